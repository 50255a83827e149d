"""A family is all that is known about a class of models: a toy of one row passes everywhere, and no other module knows
the classes, module paths and block names of a real one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_UNET
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

import prune_lab
from prune_lab import families
from prune_lab.blocks import architecture_of, block_groups, blocks_frame
from prune_lab.distill.features import feature_pairs
from prune_lab.errors import NonNativePlanError, UnsupportedModelError
from prune_lab.families import Family, Layout, Outline, Stage, Unit, family_of, plain_config
from prune_lab.models import load_model, resolve_model
from prune_lab.plans import gone_with, is_native, native_choices, native_layout, parse_plan
from prune_lab.prefix_sharing import ComputeCost, predict_without
from prune_lab.probes import predict, random_probe
from prune_lab.repair.cuts import find_cuts
from prune_lab.report.maps import map_cells
from prune_lab.report.tables import block_map_frame
from prune_lab.surgery import bypassed, materialise, materialise_from_folder, save_model

PACKAGE = Path(prune_lab.__file__).resolve().parent

# A chain as a new family would describe it ---------------------------------------------------------------------------


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, time: Tensor, hidden_states: Tensor) -> tuple[Tensor]:
        return (hidden_states + torch.tanh(self.layer(hidden_states + time)),)


class ToyChain(ModelMixin, ConfigMixin):  # type: ignore[misc]
    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, depth: int = 4, width: int = 6, channels: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        self.chain = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.final = nn.Linear(width, channels)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        hidden = self.embed(sample) + encoder_hidden_states.mean(dim=1, keepdim=True)
        for block in self.chain:
            (hidden,) = block(timestep[:, None, None] / 1000, hidden_states=hidden)
        return (self.final(hidden),)


def toy_inputs(
    config: Mapping[str, Any], *, batch: int, latent: Any, tokens: Any, device: Any, dtype: torch.dtype
) -> dict[str, Any]:
    made = {"device": device, "dtype": dtype}
    return {
        "sample": torch.zeros(batch, latent or 5, config["channels"], **made),
        "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        "encoder_hidden_states": torch.zeros(batch, tokens or 2, config["width"], **made),
    }


def toy_outline(model: Any) -> Outline:
    """B1, B2, ...; a plan may not remove the last one."""
    width, last = model.config.width, len(model.chain) - 1
    units = tuple(
        Unit(
            name=f"B{i + 1}",
            path=f"chain.{i}",
            stage="B",
            kind="transformer",
            in_channels=width,
            out_channels=width,
            in_tuple=True,
            reason="is the last one" if i == last else "",
        )
        for i in range(last + 1)
    )
    return Outline(plain_config(model), (Stage("B", "chain"),), units)


def toy_layout(outline: Outline, removed: frozenset[str]) -> Layout:
    """The survivors, renumbered; a chain of one block counts as no plain model here."""
    kept = [unit.path for unit in outline.units if unit.name not in removed]
    if len(kept) < 2:
        raise NonNativePlanError("one block is no chain")
    names: dict[str, str | None] = {unit.path: None for unit in outline.units}
    names |= {path: f"chain.{i}" for i, path in enumerate(kept)}
    return Layout({**outline.config, "depth": len(kept)}, names)


def toy_features(outline: Outline, removed: frozenset[str]) -> list[tuple[str, str]]:
    """The middle of the chain: in the smaller model what stands there is what the last survivor up to it wrote."""
    middle = outline.units[: len(outline.units) // 2]
    left = [unit for unit in middle if unit.name not in removed]
    return [(middle[-1].path, left[-1].path)] if left else []


def toy_arrange(
    config: Any, conditions: Any, sample: Tensor, timestep: Tensor, text: Tensor, given: Any
) -> dict[str, Any]:
    """Each latent pixel is a row."""
    return {"sample": sample.flatten(2).mT, "timestep": timestep, "encoder_hidden_states": text}


TOY = Family(
    model_class=lambda: ToyChain,
    channels=lambda config: int(config["channels"]),
    text=lambda config: int(config["width"]),
    size=lambda config: (1, 5),
    tokens=lambda config: 2,
    arrange=toy_arrange,
    prediction=lambda config, output, sample: output.mT.reshape(sample.shape),
    example_inputs=toy_inputs,
    outline=toy_outline,
    layout=toy_layout,
    levels=lambda outline: [[unit.name] for unit in outline.units if unit.removable],
    plans={"odd": lambda outline: frozenset(unit.name for unit in outline.units[:-1:2])},
    stage_features=toy_features,
    stem=lambda config: "embed",
    head=lambda config: "final",
    compiled=("ToyBlock",),
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(families.FAMILIES, "ToyChain", TOY)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return ToyChain().eval()


def test_the_inventory_of_a_toy(toy: Any) -> None:
    architecture = architecture_of(toy)
    assert architecture.family is TOY
    assert [block.name for block in architecture.blocks] == ["B1", "B2", "B3", "B4"]
    assert {block.params for block in architecture.blocks} == {6 * 6 + 6}
    assert {block.macs for block in architecture.blocks} == {5 * 6 * 6}
    assert architecture.total_macs == 5 * (3 * 6 + 4 * 6 * 6 + 6 * 3)
    assert (architecture.stages, architecture.samplers) == (("B",), ())
    assert [group.blocks for group in block_groups(architecture, "stage")] == [("B1", "B2", "B3")]
    assert block_groups(architecture, "pair") == ()
    cells, _ = map_cells(block_map_frame(blocks_frame(architecture), None))
    assert [cell.x for cell in cells] == sorted(cell.x for cell in cells)


def test_plans_of_a_toy(toy: Any) -> None:
    architecture = architecture_of(toy)
    assert parse_plan("-B1", architecture).removed == ("B1",)
    assert parse_plan("odd", architecture) == parse_plan("-B3 -B1", architecture)
    assert not is_native(architecture, parse_plan("-B1 -B2 -B3", architecture))
    assert native_choices(architecture) == tuple((frozenset(), frozenset({f"B{i}"})) for i in (1, 2, 3))


@pytest.mark.parametrize("text", ["-B1", "-B2", "odd"])
def test_a_toy_without_blocks_three_times(toy: Any, text: str, tmp_path: Path) -> None:
    """Bypassed, materialised, and read back from a folder it is one function."""
    architecture, probe = architecture_of(toy), random_probe(toy_config(toy), samples=3, seed=0, timesteps=3)
    plan = parse_plan(text, architecture)
    whole = predict(toy, probe)
    with bypassed(toy, plan):
        wanted = predict(toy, probe)
    assert not torch.equal(wanted, whole)
    student = materialise(toy, plan)
    assert torch.equal(predict(student, probe), wanted)
    toy.save_pretrained(tmp_path / "teacher")
    again = materialise_from_folder(tmp_path / "teacher", plan)
    save_model(again, tmp_path / "student", plan, {})
    loaded = load_model(resolve_model(str(tmp_path / "student")))
    assert len(loaded.chain) == 4 - len(plan.removed)
    assert torch.equal(predict(loaded, probe), wanted)


def toy_config(toy: Any) -> dict[str, Any]:
    return plain_config(toy)


def test_a_toy_shares_what_its_sets_begin_with(toy: Any) -> None:
    architecture, compute = architecture_of(toy), ComputeCost()
    probe = random_probe(toy_config(toy), samples=3, seed=0, timesteps=3)
    sets = [gone_with(architecture, names) for names in ((), ("B1",), ("B1", "B3"), ("B1",))]
    parts = list(predict_without(toy, probe, sets, compute=compute, width=1))
    found = [torch.cat(answers) for answers in zip(*(answers for _, answers in parts), strict=True)]
    for gone, answer in zip(sets, found, strict=True):
        with bypassed(toy, gone):
            assert torch.equal(predict(toy, probe), answer)
    # all four blocks; then B2, B3 and B4 without B1; then B4, after what both have in common
    block = architecture.blocks[0].macs
    around = architecture.total_macs - 4 * block
    assert compute.macs == 3 * (3 * around + (4 + 3 + 1) * block)


def test_features_of_a_toy_follow_the_weights(toy: Any) -> None:
    architecture = architecture_of(toy)
    plan = parse_plan("-B2", architecture)
    student = materialise(toy, plan)
    pairs = feature_pairs(architecture, plan, "blocks")
    assert [(pair.teacher_path, pair.student_path) for pair in pairs] == [
        ("chain.0", "chain.0"),
        ("chain.2", "chain.1"),
        ("chain.3", "chain.2"),
    ]
    for pair in pairs:
        theirs, ours = (
            model.get_submodule(path).layer.weight
            for model, path in ((toy, pair.teacher_path), (student, pair.student_path))
        )
        assert torch.equal(theirs, ours)
    ((middle, written),) = [
        (pair.teacher_path, pair.student_path) for pair in feature_pairs(architecture, plan)
    ]
    assert (middle, written) == ("chain.1", "chain.0")
    (cut,) = find_cuts(architecture, parse_plan("-B1", architecture))
    assert cut.label == "embed [B1] B2"


# The table -----------------------------------------------------------------------------------------------------------


def test_a_class_without_a_family_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"class Linear; supported is UNet2DConditionModel"):
        family_of(nn.Linear(1, 1))
    with pytest.raises(UnsupportedModelError, match=r"without _class_name"):
        architecture_of({name: value for name, value in TINY_UNET.items() if name[0] != "_"})


def test_names_are_followed_by_their_longest_beginning() -> None:
    layout = Layout({}, {"a": "b", "a.1": None, "a.2": "b.1", "a.2.x": "c"})
    assert [layout.renamed(path) for path in ("a", "a.0.w", "a.1.w", "a.2.w", "a.2.x.w", "other.a")] == [
        *("b", "b.0.w", None, "b.1.w", "c.w", "other.a")
    ]
    assert layout.sources(["b.0.w", "b.1.w", "c.w"]) == {"b.0.w": "a.0.w", "b.1.w": "a.2.w", "c.w": "a.2.x.w"}
    assert layout.sources(["other.a"]) == {"other.a": "other.a"}


@pytest.mark.parametrize("text", ["bk-base", "bk-small", "bk-tiny"])
def test_the_layout_of_a_unet_names_each_tensor_once(text: str) -> None:
    architecture = architecture_of(TINY_UNET)
    layout = native_layout(architecture, parse_plan(text, architecture))
    ours = set(families.meta_model(layout.config).state_dict())
    renamed = [layout.renamed(key) for key in families.meta_model(architecture.config).state_dict()]
    assert sorted(name for name in renamed if name is not None) == sorted(ours)
    assert {layout.renamed(theirs) for theirs in layout.sources(ours).values()} == ours


# Nobody else knows ---------------------------------------------------------------------------------------------------

KNOWN_TO_FAMILIES = re.compile(
    r"UNet\w+Model|\w+Block2D|Transformer2DModel|BasicTransformerBlock|(Down|Up)sample2D"  # classes
    r"|(down|up|mid)_blocks?\b|(down|up|mid)_block_types?|layers_per_block|block_out_channels|(up|down)samplers"
    r"|conv_in\b|conv_out\b|conv_norm_out\b"  # modules and settings
    r"|\b(Dn|Up)\d*\b|\bMd\b"  # names of stages
)
# Help texts show a plan or a quota as a user writes it.
EXAMPLES = ("-Dn1.R2 -Dn1.A2", "Dn1<=2")
WITH_EXAMPLES = ("cli/", "config/")


def code_in(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and every string of ``source`` that is no docstring."""
    tree = ast.parse(source)
    docstrings = {
        id(statement.value)
        for node in ast.walk(tree)
        for statement in (node.body if isinstance(getattr(node, "body", None), list) else [])
        if isinstance(statement, ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value
        for name in ("id", "attr", "arg", "name"):
            if isinstance(text := getattr(node, name, None), str):
                yield getattr(node, "lineno", 0), text


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_only_families_know_the_parts_of_a_model(path: Path) -> None:
    module = path.relative_to(PACKAGE).as_posix()
    if module.startswith("families/"):
        return
    allowed = EXAMPLES if module.startswith(WITH_EXAMPLES) else ()
    found = [
        f"line {line}: {text}"
        for line, text in code_in(path.read_text(encoding="utf-8"))
        if KNOWN_TO_FAMILIES.search(text) and not any(example in text for example in allowed)
    ]
    assert not found, f"{module} knows what only families should: {found}"


@pytest.mark.parametrize(
    "source",
    [
        'stage.startswith("Dn")',
        "unet.down_blocks[0]",
        'layers = config["layers_per_block"]',
        "from diffusers import UNet2DConditionModel",
        'raise E(f"{x} of Md.R1")',
        "def f(mid_block): pass",
    ],
)
def test_the_check_sees_what_it_should(source: str) -> None:
    assert any(KNOWN_TO_FAMILIES.search(text) for _, text in code_in(source))


def test_the_check_lets_docstrings_and_other_words_be() -> None:
    source = '"""``Dn1.R2`` of ``down_blocks``."""\ndown = "Update the Module"\nblocks = model_blocks'
    assert not [text for _, text in code_in(source) if KNOWN_TO_FAMILIES.search(text)]
