"""Passes that reuse the inside of the pass before: what they compute, when, and which models have such an inside."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import SHAPES, build_unet
from tiny_models import TINY_TRANSFORMERS, others_long, random_inputs, tiny_model
from torch import Tensor, nn

from prune_lab.blocks import architecture_of
from prune_lab.errors import UnsupportedModelError
from prune_lab.forms import in_form
from prune_lab.plans import parse_plan
from prune_lab.reuse import Inside, inside_of, reusing
from prune_lab.surgery import materialise


def at(model: Any, number: int, timestep: float, **sizes: int) -> dict[str, Any]:
    """Inputs of a pass: other noise by ``number``."""
    inputs = random_inputs(model, number, **sizes)
    name = "t" if "t" in inputs else "timestep"
    inputs[name] = torch.full_like(torch.as_tensor(inputs[name]), timestep)
    return inputs


def answer(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = model(**inputs, return_dict=False)[0]
    return found if isinstance(found, Tensor) else torch.stack(list(found))


@contextlib.contextmanager
def hooked(module: nn.Module, hook: Any, *, before: bool = False) -> Iterator[None]:
    handle = (
        module.register_forward_pre_hook(hook, with_kwargs=True)
        if before
        else module.register_forward_hook(hook)
    )
    try:
        yield
    finally:
        handle.remove()


def seen(model: Any, inside: Inside, inputs: dict[str, Any]) -> Any:
    """What the last inner unit gives in a plain pass."""
    found: list[Any] = []
    with hooked(model.get_submodule(inside.units[-1].path), lambda _module, _args, out: found.append(out)):
        answer(model, inputs)
    return found[0]


def student(text: str) -> Any:
    whole = build_unet(SHAPES["sd-v1"])
    architecture = architecture_of(whole)
    return materialise(whole, in_form(architecture, parse_plan(text, architecture)))


MODELS = {
    **{name: lambda config=config: build_unet(config) for name, config in SHAPES.items()},
    "bk-small": lambda: student("bk-small"),
    "bk-tiny": lambda: student("bk-tiny"),
    "own code": lambda: student("-Dn1.R2 -Up3.A1 -Up4.R2 -Md.A1"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_pass_in_between_is_the_whole_model_with_the_deep_feature_replaced(name: str) -> None:
    model = MODELS[name]()
    inside = inside_of(model)
    first, second = at(model, 1, 900, latent=16), at(model, 2, 800, latent=16)
    plain = [answer(model, first), answer(model, second)]
    deep = seen(model, inside, first)
    with hooked(model.get_submodule(inside.units[-1].path), lambda *_: deep):
        wanted = answer(model, second)
    with reusing(model, 2) as reuse:
        assert torch.equal(answer(model, first), plain[0])
        assert torch.equal(answer(model, second), wanted)
    assert (reuse.whole, reuse.reused) == (1, 1)
    assert not torch.equal(wanted, plain[1])
    assert torch.equal(answer(model, second), plain[1])
    assert not model._forward_pre_hooks
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_inner_levels_are_not_computed(depth: int) -> None:
    model = build_unet(SHAPES["sd-v1"])
    ran: list[str] = []
    with contextlib.ExitStack() as stack:
        inputs = [at(model, number, 900 - number, latent=16) for number in (1, 2)]
        with reusing(model, 2, depth=depth):
            answer(model, inputs[0])
            for name, module in model.named_modules():
                if isinstance(module, nn.Conv2d):
                    stack.enter_context(hooked(module, lambda *_, name=name: ran.append(name)))
            answer(model, inputs[1])
    stages = {".".join(name.split(".")[:2]) for name in ran if "blocks" in name}
    wanted = {f"down_blocks.{i}" for i in range(depth)} | {f"up_blocks.{3 - i}" for i in range(depth)}
    assert stages == wanted
    assert not any("sampler" in name for name in ran if f"down_blocks.{depth - 1}" in name)


@pytest.mark.parametrize("name", others_long(sorted(TINY_TRANSFORMERS.keys() - {"LatteTransformer3DModel"})))
def test_of_a_transformer_what_the_inner_blocks_added_is_added_again(name: str) -> None:
    model = tiny_model(name)
    inside = inside_of(model, 1)
    first, second = (at(model, number, 900 - number) for number in (1, 2))
    plain = [answer(model, first), answer(model, second)]
    begin, end = (model.get_submodule(inside.units[place].path) for place in (0, -1))
    given: list[dict[str, Any]] = []

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.append(inspect.signature(type(module).forward).bind(None, *args, **kwargs).arguments)

    with hooked(begin, watch, before=True):
        after = seen(model, inside, first)
    names = inside.units[0].hands_on
    outs = after if isinstance(after, tuple) else (after,)
    deltas = [out - given[0][name] for out, name in zip(outs, names, strict=False)]
    given.clear()

    def replaced(_module: nn.Module, _args: Any, out: Any) -> Any:
        found = tuple(given[0][name] + delta for name, delta in zip(names, deltas, strict=True))
        return found if isinstance(out, tuple) else found[0]

    with hooked(begin, watch, before=True), hooked(end, replaced):
        wanted = answer(model, second)
    with reusing(model, 2, depth=1) as reuse:
        assert torch.equal(answer(model, first), plain[0])
        assert torch.equal(answer(model, second), wanted)
    assert (reuse.whole, reuse.reused) == (1, 1)
    assert not torch.equal(wanted, plain[1])
    assert torch.equal(answer(model, second), plain[1])


def test_with_one_nothing_is_reused() -> None:
    model = build_unet(SHAPES["sd-v1"])
    inputs = [at(model, number, 900 - number, latent=16) for number in (1, 2, 3)]
    plain = [answer(model, one) for one in inputs]
    with reusing(model, 1) as reuse:
        assert all(torch.equal(answer(model, one), wanted) for one, wanted in zip(inputs, plain, strict=True))
    assert (reuse.whole, reuse.reused, reuse.inside) == (3, 0, None)


def kinds(every: int, steps: list[tuple[int, int]]) -> str:
    """W for each whole pass and r for each that reuses, of calls with (noise, timestep)."""
    model, found = build_unet(SHAPES["sd-v1"]), ""
    with reusing(model, every) as reuse:
        for number, timestep in steps:
            before = reuse.reused
            answer(model, at(model, number, timestep, latent=8))
            found += "r" if reuse.reused > before else "W"
    return found


@pytest.mark.parametrize(
    ("every", "steps", "wanted"),
    [
        (3, [(1, 900), (2, 800), (3, 700), (4, 600), (5, 500)], "WrrWr"),
        (2, [(1, 900), (2, 800), (3, 700), (1, 900), (2, 800)], "WrWWr"),  # another picture
        (2, [(1, 900), (2, 900), (3, 900)], "WWW"),  # pictures of one step
        (2, [(1, 900), (1, 900), (2, 800), (2, 800), (3, 700), (3, 700)], "WWrrWW"),  # two calls a step
        (2, [(1, 900), (2, 800), (3, 800), (4, 700)], "WrWr"),  # PNDM asks for its second timestep twice
    ],
)
def test_which_passes_are_whole(every: int, steps: list[tuple[int, int]], wanted: str) -> None:
    assert kinds(every, steps) == wanted


def test_a_batch_of_another_size_begins_anew() -> None:
    model = build_unet(SHAPES["sd-v1"])
    with reusing(model, 2) as reuse:
        answer(model, at(model, 1, 900, latent=8))
        answer(model, at(model, 2, 800, latent=8, batch=2))
    assert (reuse.whole, reuse.reused) == (2, 0)


def test_each_call_of_a_step_goes_on_from_its_own() -> None:
    model = build_unet(SHAPES["sd-v1"])
    calls = [
        at(model, number, timestep, latent=8) for number, timestep in ((1, 900), (1, 900), (2, 800), (2, 800))
    ]
    for place in (1, 3):
        text = calls[place]["encoder_hidden_states"]
        calls[place]["encoder_hidden_states"] = text + 1
    with reusing(model, 2):
        found = [answer(model, one) for one in calls]
    for lane in (0, 1):
        with reusing(model, 2):
            alone = [answer(model, one) for one in calls[lane::2]]
        assert torch.equal(found[2 + lane], alone[1])


def test_what_cannot_be_reused_says_why() -> None:
    unet = build_unet(SHAPES["sd-v1"])
    with pytest.raises(
        UnsupportedModelError, match="found 4 levels and a depth of 4; give a depth of 1 to 3"
    ):
        inside_of(unet, 4)
    one = {**SHAPES["sd-v1"], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    with pytest.raises(UnsupportedModelError, match="one level, which nothing lies inside of"):
        inside_of(build_unet({**one, "block_out_channels": [8]}))
    with pytest.raises(UnsupportedModelError, match="found 2 blocks, of which none lies inside"):
        inside_of(tiny_model("PixArtTransformer2DModel", num_layers=2))
    with (
        pytest.raises(UnsupportedModelError, match="one whole pass in 0"),
        reusing(unet, 0),
    ):
        pass


def test_blocks_between_which_something_happens_are_refused() -> None:
    model = tiny_model("LatteTransformer3DModel")
    with (
        pytest.raises(UnsupportedModelError, match="not given what the block before it gave"),
        reusing(model, 2),
    ):
        answer(model, at(model, 1, 900))


def test_the_model_is_put_back_whatever_happens() -> None:
    model = build_unet(SHAPES["sd-v1"])
    with pytest.raises(RuntimeError, match="stopped"), reusing(model, 2):
        raise RuntimeError("stopped")
    assert not model._forward_pre_hooks
    assert not any("forward" in vars(module) for module in model.modules())
