"""A replay gives what a naive loop gives that shares no code with it; a model that cannot be replayed says so."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest
import tiny_models
import torch
from conftest import SHAPES, build_unet
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from prune_lab import families
from prune_lab.blocks import Architecture, architecture_of
from prune_lab.errors import ReplayError, UnknownBlockError
from prune_lab.families import Family, Layout, Outline, Stage, Unit, example_inputs, meta_model, plain_config
from prune_lab.models import preset_config
from prune_lab.plans import gone_with
from prune_lab.prefix_sharing import ComputeCost, macs_without, predict_without, replayed
from prune_lab.probes import random_probe

WIDE = 5e-5  # how far a wide pass may be from a plain one, of the largest value

# The loop that shares nothing with what is tested --------------------------------------------------------------------


def interpolated(hidden: Tensor, main: int, out: int) -> Tensor:
    """The main path of ``hidden``, resized linearly along the channels: an (out, main) matrix written by hand."""
    weights = torch.zeros(out, main, dtype=torch.float64)
    for row in range(out):
        at = min(max((row + 0.5) * main / out - 0.5, 0.0), main - 1.0)
        low = int(at)
        weights[row, low] += 1 - (at - low)
        weights[row, min(low + 1, main - 1)] += at - low
    return torch.einsum("om,bmhw->bohw", weights.to(hidden.dtype), hidden[:, :main])


def naive(model: Any, inputs: Mapping[str, Any], gone: frozenset[str], units: Sequence[Unit]) -> Tensor:
    """The prediction without ``gone``: every block computes, and a hook puts its input in the place of its output."""

    def exchange(unit: Unit) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            names = list(inspect.signature(module.forward).parameters)
            given = dict(zip(names, args, strict=False)) | kwargs
            if unit.stand_in:
                return interpolated(given[names[0]], unit.main_channels, unit.out_channels)
            values = [None if name is None else given[name] for name in unit.hands_on]
            if unit.skip_channels:
                values = [value[:, : unit.main_channels].contiguous() for value in values]
            return tuple(values) if isinstance(output, tuple) else values[0]

        return hook

    handles = [
        model.get_submodule(unit.path).register_forward_hook(exchange(unit), with_kwargs=True)
        for unit in units
        if unit.name in gone
    ]
    try:
        with torch.no_grad():
            answer: Tensor = model(**inputs, return_dict=False)[0]
            return answer
    finally:
        for handle in handles:
            handle.remove()


def plans(architecture: Architecture, count: int, seed: int) -> list[frozenset[str]]:
    """Random sets of removable blocks with the samplers that leave with them, of every size."""
    draw = random.Random(seed)
    names = [block.name for block in architecture.blocks if block.removable]
    drawn = [draw.sample(names, draw.randint(0, len(names))) for _ in range(count)]
    return [gone_with(architecture, sorted(names)) for names in drawn]


def shared(
    model: Any, sets: Sequence[frozenset[str]], rows: int = 2, **options: Any
) -> tuple[list[Tensor], ComputeCost, dict[str, Any]]:
    """Answers, cost, and the inputs that they answer."""
    config = plain_config(model)
    probe = random_probe(config, samples=rows, seed=0, timesteps=rows)
    compute = ComputeCost()
    ((_, answers),) = predict_without(model, probe, sets, batch=rows, compute=compute, **options)
    return answers, compute, next(probe.batches(rows, model))[1]


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


# U-Nets --------------------------------------------------------------------------------------------------------------


def check_unet(name: str, every: int) -> None:
    """Of one in ``every`` blocks, and as few of the random plans."""
    unet = build_unet({**SHAPES[name], "sample_size": 8})
    architecture = architecture_of(unet)
    starred = {block.name for block in architecture.blocks if block.starred}
    sets = [frozenset({block.name}) for block in architecture.blocks[::every]]
    sets += [frozenset[str](), *plans(architecture, 12 // every, seed=len(name))]
    # everything that can leave, and the samplers that leave with it
    sets.append(gone_with(architecture, [block.name for block in architecture.blocks if block.removable]))
    assert bool(sets[-1] & {unit.name for unit in architecture.samplers}) == (name != "sdxl")
    alone, _, inputs = shared(unet, sets, width=1)
    wide, _, _ = shared(unet, sets)
    for gone, one, other in zip(sets, alone, wide, strict=True):
        wanted = naive(unet, inputs, gone, architecture.units)
        if gone & starred:
            assert apart(one, wanted) < 3e-5
        else:
            assert torch.equal(one, wanted), sorted(gone)
        assert apart(other, one) < WIDE


@pytest.mark.parametrize("name", ["sdxl"])
def test_some_blocks_and_plans_of_a_unet_bit_for_bit(name: str) -> None:
    check_unet(name, every=6)


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_each_block_and_random_plans_of_a_unet_bit_for_bit(name: str) -> None:
    check_unet(name, every=1)


PUBLISHED = {"dit-xl-2-256": 1.866, "sd3-medium": 1.848, "flux-dev": 1.932}  # SD3's last block is smaller


def macs_of_removals(config: Mapping[str, Any], *, whole: bool) -> tuple[dict[str, int], int, int]:
    """Multiply-adds of a row: of each unit, around them, and of what is run of units without each block in turn, beside
    the ``whole`` model or alone; counted by the engine itself, on ``meta``.
    """
    architecture, model = architecture_of(config), meta_model(config)
    inputs = example_inputs(config, batch=1, device="meta")
    macs = {unit.name: architecture.count().by_module[unit.path][0] for unit in architecture.units}
    ran = 0

    def computed(unit: Unit, lanes: int) -> None:
        nonlocal ran
        ran += macs[unit.name] * lanes

    sets = [frozenset({block.name}) for block in architecture.blocks] + [frozenset[str]()] * whole
    with torch.no_grad():
        answers = replayed(model, architecture, lambda _: model(**inputs)[0], sets, computed=computed)
        assert sum(1 for _ in answers) == len(sets)
    return macs, architecture.total_macs - sum(macs.values()), ran


@pytest.mark.long
def test_the_saving_for_stable_diffusion_is_the_closed_form() -> None:
    """1.71 for the 38 blocks of SD-v1.4."""
    config = preset_config("sd-v1.4")
    macs, around, ran = macs_of_removals(config, whole=True)
    blocks, order = [block.name for block in architecture_of(config).blocks], list(macs)
    after = sum(sum(macs[name] for name in order[order.index(block) + 1 :]) for block in blocks)
    assert ran == sum(macs.values()) + after
    assert 38 * (sum(macs.values()) + around) / (ran + around) == pytest.approx(1.71, abs=0.01)


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_saving_for_published_transformers_is_the_closed_form(name: str) -> None:
    """2n/(n+2) for n equal blocks, each removed in turn: n - 1 of them for each, where nothing is shared."""
    macs, _, ran = macs_of_removals(preset_config(name), whole=False)
    count, total = len(macs), sum(macs.values())
    assert (count - 1) * total / ran == pytest.approx(PUBLISHED[name], abs=1e-3)
    if len(set(macs.values())) == 1:
        assert (count - 1) * total / ran == pytest.approx(2 * count / (count + 2))


# Chains: one that does what it should, and those that do not ---------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states))


class Block(nn.Module):
    """Two streams, positions that have no rows, and two layers inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(width, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor,
        positions: Tensor,
        shift: float | Tensor | None = 0.0,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(hidden_states)) + positions + (0.0 if shift is None else shift)
        for layer in self.layers:
            hidden = layer(hidden)
        if more.get("count") is not None:
            more["count"].add_(1)
        if more.get("shared"):
            return text + self.first.bias, hidden_states + hidden
        return text + hidden.mean(dim=1, keepdim=True), hidden_states + hidden


class StrictBlock(Block):
    """Takes what it names alone."""

    def forward(self, hidden_states: Tensor, text: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(hidden_states, text, positions)


class Chain(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """As many words as rows, so that shapes tell nothing; what ``trap`` names it does wrong."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, depth: int = 4, width: int = 6, channels: int = 3, trap: str = "") -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(
            (StrictBlock if trap == "no such input" else Block)(width) for _ in range(depth)
        )
        self.final = nn.Linear(width, channels)
        self.trap = trap
        self.register_buffer("shifts", torch.linspace(0, 1, depth), persistent=False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        hidden = self.embed(sample) + timestep[:, None, None] / 1000
        text = encoder_hidden_states
        if self.trap == "rows hang on each other":
            hidden = hidden + hidden.mean(dim=0, keepdim=True)
        positions = torch.linspace(0, 1, hidden.shape[1], device=hidden.device)[:, None]
        count = torch.zeros((), device=hidden.device)  # anew in each pass, where "counts" keeps its number
        for place, block in enumerate(self.blocks):
            named: dict[str, Any] = {"count": count} if self.trap == "an input" else {}
            if self.trap == "no rows":
                named, text = {"shared": True}, text if place else positions.repeat(1, block.width)
            if self.trap == "by value":
                there = not sample.is_meta and bool(sample.any())
                named = {"shift": hidden.mean(dim=-1, keepdim=True) if there else None}
            if self.trap == "counts":
                self.count.add_(1)
            if self.trap == "unused" and place == 2:
                continue
            if self.trap == "by index":  # and an attribute of the block, which no stand-in has
                named = {"shift": float(self.shifts[place]) if self.shifts.device.type != "meta" else 0.0}
                hidden = hidden / block.width
            if self.trap == "positional":
                text, hidden = block(hidden, text, positions)
                continue
            text, hidden = block(hidden_states=hidden, text=text, positions=positions, **named)
            if self.trap == "in place":
                hidden.mul_(0.5)
            if self.trap == "twice" and place == 1:
                text, hidden = block(hidden_states=hidden, text=text, positions=positions)
        return (self.final(hidden + text.mean(dim=1, keepdim=True) + count),)


def chain_inputs(
    config: Mapping[str, Any], *, batch: int, latent: Any, tokens: Any, device: Any, dtype: torch.dtype
) -> dict[str, Any]:
    made = {"device": device, "dtype": dtype}
    return {
        "sample": torch.zeros(batch, 2, config["channels"], **made),
        "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        "encoder_hidden_states": torch.zeros(batch, 2, config["width"], **made),
    }


def chain_arrange(
    config: Any, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    """Each latent pixel is a row."""
    return {"sample": sample.flatten(2).mT, "timestep": timestep, "encoder_hidden_states": text}


def chain_outline(model: Any, hands_on: tuple[str | None, ...] = ("text", "hidden_states")) -> Outline:
    width = model.config.width
    same = {"stage": "B", "kind": "transformer", "in_channels": width, "out_channels": width}
    units: list[Unit] = []
    for i in range(len(model.blocks)):
        units.append(Unit(name=f"B{i + 1}", path=f"blocks.{i}", hands_on=hands_on, in_tuple=True, **same))
        units += [
            Unit(name=f"B{i + 1}.T{j + 1}", path=f"blocks.{i}.layers.{j}", inside=f"B{i + 1}", **same)
            for j in range(2)
        ]
    return Outline(MappingProxyType(plain_config(model)), (Stage("B", "blocks"),), tuple(units))


CHAIN = {
    "model_class": lambda: Chain,
    "example_inputs": chain_inputs,
    "channels": lambda config: int(config["channels"]),
    "text": lambda config: int(config["width"]),
    "size": lambda config: (1, 2),
    "tokens": lambda config: 2,
    "arrange": chain_arrange,
    "prediction": lambda config, output, sample: output,  # as a plain pass gives it
    "outline": chain_outline,
    "layout": lambda outline, removed: Layout({}, {}),
    "levels": lambda outline: [[unit.name] for unit in outline.units],
    "stage_features": lambda outline, removed: [],
    "stem": lambda config: "embed",
    "head": lambda config: "final",
}


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def build(trap: str = "", depth: int = 4, **row: Any) -> Any:
        monkeypatch.setitem(families.FAMILIES, "Chain", Family(**{**CHAIN, **row}))  # type: ignore[arg-type]
        torch.manual_seed(0)
        return Chain(trap=trap, depth=depth).eval()

    return build


SETS = [frozenset(names) for names in ((), ("B1",), ("B3",), ("B2", "B3"), ("B4",), ("B1", "B2", "B3", "B4"))]
INNER = [frozenset(names) for names in (("B2.T1",), ("B2.T2",), ("B2.T1", "B2.T2"), ("B3.T2", "B1"))]


@pytest.mark.parametrize("trap", ["", "by index", "positional"])
@pytest.mark.parametrize("width", [1, 2, 3, 40])
def test_a_chain_with_layers_inside(chain: Callable[..., Any], trap: str, width: int) -> None:
    """Two streams; a parent that reads an attribute of its block and a buffer by its index; blocks and inner layers."""
    model = chain(trap)
    units = architecture_of(model).outline.units
    sets = [*SETS, *INNER]
    found, _, inputs = shared(model, sets, width=width)
    for gone, answer in zip(sets, found, strict=True):
        wanted = naive(model, inputs, gone, units)
        assert torch.equal(answer, wanted) if width == 1 else apart(answer, wanted) < WIDE, sorted(gone)
    assert len({tuple(answer.flatten().tolist()) for answer in found}) == len(sets)


def test_every_set_of_inner_layers(chain: Callable[..., Any]) -> None:
    model = chain(depth=2)
    units = architecture_of(model).outline.units
    names = [unit.name for unit in units]
    sets = [
        frozenset(chosen) for size in range(len(names) + 1) for chosen in itertools.combinations(names, size)
    ]
    assert len(sets) == 64
    for width in (1, 5):
        found, _, inputs = shared(model, sets, width=width)
        for gone, answer in zip(sets, found, strict=True):
            wanted = naive(model, inputs, gone, units)
            assert torch.equal(answer, wanted) if width == 1 else apart(answer, wanted) < WIDE, sorted(gone)


def test_inner_layers_before_a_difference_are_not_computed_again(chain: Callable[..., Any]) -> None:
    model = chain(depth=2)
    architecture = architecture_of(model)
    macs = {path: count[0] for path, count in architecture.count().by_module.items()}
    layer, block = macs["blocks.1.layers.0"], macs["blocks.1"]
    around = architecture.total_macs - 2 * block
    sets = [frozenset[str](), frozenset({"B2.T2"}), frozenset({"B2.T1"})]
    for width in (1, 2, 3):
        _, compute, _ = shared(model, sets, width=width)
        # B1 once, B2 three times without its layers; T1 once and not, T2 of the whole and of what lacks T1
        assert compute.macs == 2 * (3 * around + block + 3 * (block - 2 * layer) + layer + 2 * layer)
    # alone beside a pass of the whole model: B2 anew but for T1; B2 anew with T2 alone; nothing of B2 twice
    wanted = {
        "B2.T2": block - 2 * layer,
        "B2.T1": block - layer,
        "B2": 0,
        "B1": block,
        "B1.T2": 2 * block - 2 * layer,
    }
    for name, macs_after in wanted.items():
        assert macs_without(architecture, frozenset({name})) == around + macs_after, name
    assert macs_without(architecture, frozenset()) == architecture.total_macs


@pytest.mark.parametrize("width", [1, 3, 100])
def test_equal_blocks_save_the_closed_form(chain: Callable[..., Any], width: int) -> None:
    """2n/(n+2), where the whole model is asked for first and stem and head are left out."""
    depth = 10
    model = chain(depth=depth)
    architecture = architecture_of(model)
    sets = [frozenset[str](), *(frozenset({block.name}) for block in architecture.blocks)]
    _, compute, _ = shared(model, sets, rows=1, width=width)
    block = architecture.blocks[0].macs
    around = architecture.total_macs - depth * block
    ran = (compute.macs - (depth + 1) * around) // block
    assert ran == depth + depth * (depth - 1) // 2
    assert ran < (depth + 2) * depth / 2 == pytest.approx(depth * depth / (2 * depth / (depth + 2)))


TRAPS = {
    "in place": r"hand back what B\d gave before.*changed it in place",
    "twice": r"calls B2 twice or out of the order",
    "counts": "changes a buffer",
    "an input": r"B1 changes one of its inputs in place",
    "unused": r"calls B4 where B3 should come",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_model_that_cannot_be_replayed_says_so(chain: Callable[..., Any], trap: str) -> None:
    model = chain(trap)
    with pytest.raises(ReplayError, match=TRAPS[trap]) as caught:
        shared(model, SETS, width=1)
    assert "\n" not in str(caught.value)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("trap", ["twice", "counts", "an input", "unused"])
def test_nor_several_sets_at_a_time(chain: Callable[..., Any], trap: str) -> None:
    with pytest.raises(ReplayError):
        shared(chain(trap), SETS)


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_on_a_block_is_refused(chain: Callable[..., Any], before: bool) -> None:
    """Torch calls it around the block, also where the block is bypassed: its scale would act without the block."""
    model = chain()
    block = model.blocks[1]
    scaled = {
        True: lambda module, args, kwargs: (args, {**kwargs, "text": 2 * kwargs["text"]}),
        False: lambda module, args, output: (2 * output[0], output[1]),
    }[before]
    register = block.register_forward_pre_hook if before else block.register_forward_hook
    with register(scaled, **({"with_kwargs": True} if before else {})):
        for width in (1, 4):
            with pytest.raises(ReplayError, match=r"found a hook on it \(blocks\.1\)"):
                shared(model, SETS, width=width)
    shared(model, SETS)


ALONE = {
    # whether it has rows was not seen in a run without values
    "by value": r"a tensor among its inputs where a model without weights gives it none",
    # what has no rows is one for all sets of a pass, and here each block changes it
    "no rows": r"B\d gives a tensor of shape \[\d, \d+\], which has no rows",
}


@pytest.mark.parametrize("kind", ALONE)
def test_what_cannot_share_a_pass_is_scored_set_by_set(chain: Callable[..., Any], kind: str) -> None:
    model = chain(kind)
    units = architecture_of(model).outline.units
    found, _, inputs = shared(model, SETS, width=1)
    for gone, answer in zip(SETS, found, strict=True):
        assert torch.equal(answer, naive(model, inputs, gone, units)), sorted(gone)
    with pytest.raises(ReplayError, match=ALONE[kind]):
        shared(model, SETS, width=4)


def test_a_change_in_place_does_no_harm_to_copies(chain: Callable[..., Any]) -> None:
    """In a wide pass the model gets copies of what is kept: the answers are right, or there is an error."""
    model = chain("in place")
    units = architecture_of(model).outline.units
    found, _, inputs = shared(model, SETS, width=len(SETS))
    for gone, answer in zip(SETS, found, strict=True):
        # a plain pass halves what a removed block hands on, which is what it was given itself
        assert apart(answer, naive(model, inputs, gone, units)) < WIDE, sorted(gone)


def test_rows_that_hang_on_each_other_are_noticed(chain: Callable[..., Any]) -> None:
    model = chain("rows hang on each other")
    with pytest.raises(ReplayError, match="a row gives another answer beside others than alone"):
        shared(model, SETS)


HANDS_ON = {
    "no such input": (
        ("text", "hidden"),
        r"B1.*'hidden'.*StrictBlock.forward does not take; it takes hidden_states",
    ),
    "not given": (("text", "shift"), r"without B1.*without the input 'shift'"),
    "another form": (("text",), r"without B1.*must agree"),
    "another shape": (("text", "positions"), r"without B1.*must agree"),
}


@pytest.mark.parametrize("wrong", HANDS_ON)
def test_an_input_to_hand_on_that_is_not_there(chain: Callable[..., Any], wrong: str) -> None:
    names, message = HANDS_ON[wrong]
    model = chain(wrong, outline=lambda model: chain_outline(model, names))
    with pytest.raises(ReplayError, match=message):
        shared(model, [frozenset({"B1"}), frozenset({"B4"}), frozenset()])


def test_an_unknown_unit_is_named(chain: Callable[..., Any]) -> None:
    with pytest.raises(UnknownBlockError, match="B9"):
        shared(chain(), [frozenset({"B9"})])


# What an output goes on as -------------------------------------------------------------------------------------------


def calls_of(
    model: Any, inputs: Mapping[str, Any], units: Sequence[Unit]
) -> list[tuple[Unit, dict[str, Any], Any]]:
    """Unit, its inputs by name and its output, in order of execution."""
    seen: list[tuple[Unit, dict[str, Any], Any]] = []

    def note(unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            names = list(inspect.signature(module.forward).parameters)
            seen.append((unit, dict(zip(names, args, strict=False)) | kwargs, output))

        return hook

    handles = [
        model.get_submodule(unit.path).register_forward_hook(note(unit), with_kwargs=True) for unit in units
    ]
    with torch.no_grad():
        model(**inputs, return_dict=False)
    for handle in handles:
        handle.remove()
    return seen


def goes_on_as(
    calls: Sequence[tuple[Unit, dict[str, Any], Any]],
) -> Iterator[tuple[Unit, Unit, int, str]]:
    """(unit, next, place of an output of the unit, name of the next one's input that is the same object)."""
    for (unit, _, output), (following, given, _) in itertools.pairwise(calls):
        for place, value in enumerate(output if isinstance(output, tuple) else (output,)):
            for name, other in given.items():
                if value is other and isinstance(value, Tensor):
                    yield unit, following, place, name


LAID_OUT_ANEW = ("LatteTransformer3DModel",)  # between blocks that look at places and at frames


@pytest.mark.parametrize("name", tiny_models.others_long(families.FAMILIES))
def test_a_family_hands_on_what_neighbours_show(name: str) -> None:
    """Found by object identity in a tiny model, where there is one, or the class's default model on ``meta``."""
    if name in tiny_models.TINY_TRANSFORMERS:
        model = tiny_models.tiny_model(name)
        inputs = tiny_models.random_inputs(model)
    else:
        model = meta_model({"_class_name": name})
        latent = 16 if model.config.get("sample_size") is None else None
        inputs = example_inputs(plain_config(model), latent=latent, device="meta")
    outline = families.outline_of(model)
    units = [unit for unit in outline.units if not unit.inside]
    calls = calls_of(model, inputs, units)
    assert [unit.name for unit, _, _ in calls] == [unit.name for unit in units]
    found = list(goes_on_as(calls))
    assert bool(found) == (name not in LAID_OUT_ANEW)
    for unit, following, place, input_name in found:
        # the last block of SD3 reads text and gives none
        named = (*following.hands_on, input_name) if following.hands_on[place] is None else following.hands_on
        assert input_name in named, (unit.name, following.name)
        if unit.kind == following.kind and type(model.get_submodule(unit.path)) is type(
            model.get_submodule(following.path)
        ):
            assert unit.hands_on[place] == input_name, unit.name
    for unit, given, output in calls:
        values = output if isinstance(output, tuple) else (output,)
        assert unit.in_tuple == isinstance(output, tuple), unit.name
        if unit.removable and not unit.takes_skip:
            handed = [None if one is None else given[one].shape for one in unit.hands_on]
            assert handed == [None if one is None else one.shape for one in values], unit.name


def test_the_discovery_would_notice(chain: Callable[..., Any]) -> None:
    model = chain()
    inputs = chain_inputs(model.config, batch=2, latent=None, tokens=None, device="cpu", dtype=torch.float32)
    units = [unit for unit in chain_outline(model).units if not unit.inside]
    found = {(place, name) for _, _, place, name in goes_on_as(calls_of(model, inputs, units))}
    assert found == {(0, "text"), (1, "hidden_states")}


def test_what_is_inside_of_a_removed_block_makes_no_difference(chain: Callable[..., Any]) -> None:
    model = chain()
    both, alone = frozenset({"B2", "B2.T1"}), frozenset({"B2"})
    _, compute, _ = shared(model, [both, alone], width=1)
    _, once, _ = shared(model, [alone], width=1)
    assert compute.macs == once.macs
