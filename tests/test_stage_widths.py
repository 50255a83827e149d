"""Stages with fewer channels: the cut against a model that was widened by copies that nothing reads, and the verb."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pandas as pd
import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.cli import app
from prune_lab.errors import BudgetError, PlanError, RunError, UnknownCriterionError, UnsupportedModelError
from prune_lab.families import example_inputs, filled_with_noise, meta_model, plain_config
from prune_lab.families.stage_widths import Level, checked_channels, levels_of, narrower_config
from prune_lab.profiling import PlanCost
from prune_lab.search import Budget
from prune_lab.search.stages import channels_within, check_reachable
from prune_lab.width.graph import magnitude_estimator
from prune_lab.width.stages import narrowed_stages

_TEXT: dict[str, Any] = {
    "sample_size": 8,
    "norm_num_groups": 2,
    "cross_attention_dim": 12,
    "layers_per_block": 1,
}
_CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": (
        "UNet2DConditionModel",
        {
            **_TEXT,
            "block_out_channels": (8, 16, 16),
            "attention_head_dim": 2,
            "down_block_types": (_CROSS[0], _CROSS[0], "DownBlock2D"),
            "up_block_types": ("UpBlock2D", _CROSS[1], _CROSS[1]),
        },
    ),
    "sd2": (
        "UNet2DConditionModel",
        {
            **_TEXT,
            "block_out_channels": (8, 16),
            "attention_head_dim": [2, 4],
            "use_linear_projection": True,
            "down_block_types": (_CROSS[0], _CROSS[0]),
            "up_block_types": (_CROSS[1], _CROSS[1]),
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            **_TEXT,
            "block_out_channels": (8, 16),
            "attention_head_dim": [2, 4],
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 30,
            "down_block_types": ("DownBlock2D", _CROSS[0]),
            "up_block_types": (_CROSS[1], "UpBlock2D"),
        },
    ),
    "attention-only": (
        "UNet2DConditionModel",
        {
            **_TEXT,
            "block_out_channels": (8, 16),
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "simple": (
        "UNet2DConditionModel",
        {
            **_TEXT,
            "block_out_channels": (8, 16),
            "attention_head_dim": 4,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
    ),
    "ddpm": (
        "UNet2DModel",
        {
            "sample_size": 8,
            "norm_num_groups": 2,
            "block_out_channels": (8, 16),
            "attention_head_dim": 4,
            "layers_per_block": 1,
            "resnet_time_scale_shift": "scale_shift",
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
}


def small(kind: str) -> Any:
    """A tiny U-Net that does not look at the features of the time, whose number sets their frequencies."""
    name, settings = KINDS[kind]
    model = getattr(diffusers, name)(**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # norms and biases too
        model.time_embedding.linear_1.weight.zero_()
    return model


def inputs_of(model: Any) -> dict[str, Any]:
    made: dict[str, Any] = filled_with_noise(
        example_inputs(plain_config(model), tokens=6), torch.Generator().manual_seed(1)
    )
    return made


_PROJECTIONS = (".to_q", ".to_k", ".to_v", ".add_k_proj", ".add_v_proj")

# The cut undoes a widening -----------------------------------------------------------------------------------------


def _copied(tensor: Tensor, side: int, run: int, *, read: bool) -> Tensor:
    """``tensor`` with each run of so many places along ``side`` a second time behind it; that is not ``read`` if so."""
    runs = tensor.unflatten(side, (-1, run))
    second = torch.zeros_like(runs) if read else runs
    return torch.stack([runs, second], side + 1).flatten(side, side + 2)


def widened(model: Any) -> Any:
    """``model`` twice as wide in all stages, which computes the same: of each channel there are two of one value, so
    that the statistics of norms stay, and of two what comes behind reads the first alone.
    """
    config = {
        **plain_config(model),
        "block_out_channels": [2 * one for one in model.config.block_out_channels],
    }
    wide: Any = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    attentions = {path: module for path, module in model.named_modules() if hasattr(module, "to_q")}
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, kind = name.rpartition(".")
        module, shape = model.get_submodule(path), wide.state_dict()[name].shape
        inner = path.rpartition(".")[0] if path.endswith(_PROJECTIONS) else path[: -len(".to_out.0")]
        of_heads = attentions.get(inner) if path.endswith((*_PROJECTIONS, ".to_out.0")) else None
        # as wide as before; else as many, twice as wide
        more_heads = of_heads is not None and wide.get_submodule(inner).heads != of_heads.heads
        run = of_heads.inner_dim // of_heads.heads if of_heads is not None and more_heads else 1
        made = tensor
        reads = path.endswith(".to_out.0")
        if tensor.ndim > 1 and shape[1] != tensor.shape[1]:
            made = _copied(made, 1, run if reads else 1, read=True)
        if shape[0] != tensor.shape[0]:
            query = path.endswith(".to_q")
            own = run if of_heads is not None and not reads else 1
            made = _copied(made, 0, own, read=query and not more_heads)
            if query and not more_heads:
                made = made * math.sqrt(2)  # the scale of attention is that of heads twice as wide
        assert made.shape == shape, name
        assert isinstance(module, nn.Module)
        assert kind in ("weight", "bias")
        state[name] = made
    wide.load_state_dict(state)
    return wide


def what_is_read(group: Any) -> Tensor:
    """(channels,) sum of the squares of the weights by which later layers read each channel of the root of ``group``:
    0 for a copy that nothing reads.
    """
    readers = (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)
    found = torch.zeros(len(group[0].idxs))
    for item in group:
        if item.dep.handler in readers and hasattr(item.dep.layer, "weight"):
            squares = item.dep.layer.weight.detach().transpose(0, 1).flatten(1).square().sum(1)
            found.index_add_(0, torch.tensor(item.root_idxs), squares[item.idxs])
    return found


@pytest.mark.parametrize("times", [1, 2])  # with 2 the order of a set is not that of its numbers
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_widened_by_copies_nothing_reads_comes_back(kind: str, times: int) -> None:
    model = small(kind)
    wide, inputs = model, inputs_of(model)
    for _ in range(times):
        wide = widened(wide)
    with torch.no_grad():
        wanted = model(**inputs).sample
        assert torch.allclose(wide(**inputs).sample, wanted, atol=1e-5)  # the widening is right
        made: Any = narrowed_stages(wide, model.config.block_out_channels, what_is_read)
        assert torch.allclose(made(**inputs).sample, wanted, atol=1e-5)
    assert type(made) is type(model)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(made.state_dict()[name], tensor, atol=1e-6), name


def test_without_the_rescaled_query_it_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prune_lab.width.stages._keep_the_scale_of_attention", lambda *_: None)
    model = small("sd1")
    with torch.no_grad():
        made: Any = narrowed_stages(widened(model), model.config.block_out_channels, what_is_read)
        inputs = inputs_of(model)
        assert not torch.allclose(made(**inputs).sample, model(**inputs).sample, atol=1e-5)


def test_the_whole_model_stays_as_it_is() -> None:
    model = small("sd1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    narrowed_stages(model, (8, 12, 12), magnitude_estimator())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert model.config.block_out_channels == (8, 16, 16)


def test_fewer_features_of_the_time_are_read_as_well_as_they_can_be() -> None:
    torch.manual_seed(0)
    model = small("sd1")
    nn.init.normal_(model.time_embedding.linear_1.weight)
    made: Any = narrowed_stages(model, (4, 16, 16), magnitude_estimator())

    def told(one: Any, timesteps: Tensor) -> Tensor:
        return one.time_proj(timesteps)

    timesteps = torch.arange(1000)
    weight = made.time_embedding.linear_1.weight.detach()
    # the rows that stay are found by their biases, which are all different
    biases = model.time_embedding.linear_1.bias.detach()
    rows = [int((biases - one).abs().argmin()) for one in made.time_embedding.linear_1.bias.detach()]
    wanted = told(model, timesteps) @ model.time_embedding.linear_1.weight.detach()[rows].T

    def error(candidate: Tensor) -> float:
        return float((told(made, timesteps) @ candidate.T - wanted).square().mean())

    least = error(weight)
    for _ in range(20):  # no neighbour is better
        assert error(weight + 1e-2 * torch.randn_like(weight)) > least


# Which channels there can be ---------------------------------------------------------------------------------------


def test_levels_say_what_a_plain_config_allows() -> None:
    first, second = levels_of(plain_config(small("sd1")))
    assert (first.stages, first.channels, first.step) == (("Dn1", "Up3"), 8, 2)
    assert (second.places, second.stages) == ((1, 2), ("Dn2", "Up2", "Dn3", "Up1", "Md"))
    assert second.choices == (16, 14, 12, 10, 8, 6, 4, 2)
    assert levels_of(plain_config(small("sd2")))[1].step == 4  # heads
    assert levels_of(plain_config(small("ddpm")))[1].step == 4  # width of a head


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_allowed_is_what_diffusers_builds_with_the_same_layers(kind: str) -> None:
    config = plain_config(small(kind))
    levels, names = levels_of(config), meta_model(config).state_dict().keys()
    numbers = [range(1, level.channels + 1) for level in levels]
    for some in itertools.islice(itertools.product(*numbers), 0, None, 7):
        channels = list(config["block_out_channels"])
        for level, number in zip(levels, some, strict=True):
            for place in level.places:
                channels[place] = number
        if channels == list(config["block_out_channels"]):
            continue
        multiples = all(number % level.step == 0 for level, number in zip(levels, some, strict=True))
        if multiples and meta_model({**config, "block_out_channels": channels}).state_dict().keys() == names:
            narrower_config(config, channels)
        else:
            with pytest.raises(PlanError):
                narrower_config(config, channels)


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ((8, 16), "the model has 3 stages of 8,16,16: give 3 numbers"),
        ((8, 16, 12), "asked for 16 and 12 channels in Dn2, Up2, Dn3, Up1, Md, which .* stay equal"),
        ((8, 13, 13), "asked for 13 channels in Dn2.* allow 16, 14, 12, 10, 8, 6, 4, 2"),
        ((8, 32, 32), "asked for 32 channels in Dn2.* which have 16"),
        ((8, 16, 16), "which the model has"),
        ((8, 8, 8), "asked for 8 channels in two stages that have 8 and 16"),
        ((0, 16, 16), "asked for 0 channels in Dn1, Up3, which have 8"),
        ((-2, 16, 16), "asked for -2 channels"),
    ],
)
def test_channels_that_no_plain_config_has_are_refused(channels: tuple[int, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        checked_channels(plain_config(small("sd1")), channels)


def test_a_transformer_has_no_stages() -> None:
    with pytest.raises(UnsupportedModelError, match="stage widths of a PixArtTransformer2DModel"):
        levels_of(plain_config(meta_model({"_class_name": "PixArtTransformer2DModel"})))


# Within a budget -----------------------------------------------------------------------------------------------------


def _cost(macs: int) -> PlanCost:
    return PlanCost(macs, macs, 0, macs, macs)


def _levels() -> list[Level]:
    return [Level((0,), ("Dn1", "Up3"), 8, 1), Level((1, 2), ("Dn2",), 16, 2)]


def _within(limit: int, impact: Callable[[tuple[int, ...]], float]) -> tuple[tuple[int, ...], float]:
    budget = Budget("macs", limit, f"macs<={limit}")
    return channels_within(
        (8, 16, 16), _levels(), [budget], lambda one: _cost(one[0] * 10 + one[1] * 5), impact
    )


def test_the_level_that_changes_least_for_its_saving_goes_first() -> None:
    # each channel of the first level counts 10, of the second 5; the first one hurts three times as much
    found, impact = _within(120, lambda one: 0.3 * (8 - one[0]) + 0.05 * (16 - one[1]))
    assert found == (8, 8, 8)
    assert impact == pytest.approx(0.4)


def test_what_is_saved_beyond_a_budget_does_not_count() -> None:
    # one step of the first level saves 10 of the 5 that are asked for, and changes more than one of the second
    found, _ = _within(155, lambda one: 0.3 * (8 - one[0]) + 0.125 * (16 - one[1]))
    assert found == (8, 14, 14)


def test_a_budget_that_cannot_be_met_says_the_least_that_there_is() -> None:
    with pytest.raises(
        BudgetError, match=r"came to channels 1,2,2 with 12.5% of the macs.* give macs<=12.5%"
    ):
        _within(3, lambda one: float(24 - sum(one)))


def test_a_budget_below_the_least_is_refused_before_anything_is_tried() -> None:
    def cost(one: tuple[int, ...]) -> PlanCost:
        return _cost(one[0] * 10 + one[1] * 5)

    with pytest.raises(BudgetError, match="smallest model of narrower stages has macs 20 of 160"):
        check_reachable(_levels(), [Budget("macs", 19, "macs<=19")], cost)
    check_reachable(_levels(), [Budget("macs", 20, "macs<=20")], cost)


def test_a_budget_that_the_whole_model_meets_is_refused() -> None:
    with pytest.raises(BudgetError, match="which the whole model meets; ask for less"):
        _within(500, lambda one: 0.0)


# The verb ------------------------------------------------------------------------------------------------------------

QUICK = ("--set", "probe.samples=4", "--data", "shipped")
SHORT = ("--set", "distill.pictures=4", "--set", "distill.warmup=1", "--batch", "2")


def run(*words: object, code: int = 0) -> str:
    found = CliRunner().invoke(app, list(map(str, words)))
    assert found.exit_code == code, found.output
    return found.stdout if code == 0 else found.stderr


_DRAWN = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert "prune_lab" not in sys.modules
picture = pipeline("a cat", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
print(pipeline.unet.config.block_out_channels, float(np.std(picture.images)))
"""


@pytest.mark.long
def test_a_narrower_pipeline_draws_in_plain_diffusers(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "narrow"
    levels = json.loads(run("narrow", tiny_pipeline_folder, "--json"))
    last = levels[-1]
    channels = list(pl.load(tiny_pipeline_folder).source.config["block_out_channels"])
    fewer = channels[-1] - last["step"]
    asked = ",".join(str(fewer if one == channels[-1] else one) for one in channels)
    (row,) = json.loads(
        run("narrow", tiny_pipeline_folder, "--channels", asked, "--out", out, "--json", *QUICK)
    )
    assert row["channels"] == asked
    assert row["params_change"] <= -0.1
    assert row["impact"] > 0
    assert (row["steps"], row["loss_after"]) == (0, None)
    drawn = subprocess.run([sys.executable, "-c", _DRAWN, out], capture_output=True, text=True, check=True)
    assert str(tuple(map(int, asked.split(",")))) in drawn.stdout.replace("[", "(").replace("]", ")")
    parameters = sum(
        one.numel() for one in diffusers.UNet2DConditionModel.from_pretrained(out / "unet").parameters()
    )
    assert row["params"] == parameters
    told = json.loads((out / "unet" / "provenance.json").read_text())
    assert (told["channels"], told["chosen_by"]) == ([int(one) for one in asked.split(",")], "taylor")
    card = (out / "README.md").read_text()
    assert f"{parameters:,}" in card
    assert "Nothing was trained after the cut" in card


@pytest.mark.long
def test_narrower_stages_are_distilled_and_go_on(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    out, channels = tmp_path / "narrow", pl.load(tiny_pipeline_folder).source.config["block_out_channels"]
    step = levels_of(pl.load(tiny_pipeline_folder).source.config)[-1].step
    fewer = [one - step if one == channels[-1] else one for one in channels]
    asked = (
        "narrow",
        tiny_pipeline_folder,
        "--channels",
        ",".join(map(str, fewer)),
        "--steps",
        2,
        "--out",
        out,
        *QUICK,
        *SHORT,
    )
    (first,) = json.loads(run(*asked, "--json"))
    assert first["steps"] == 2
    assert first["loss_before"] > 0
    assert first["loss_after"] != first["loss_before"]
    card = (out / "README.md").read_text()
    assert "| held-out loss after distillation |" in card
    cut = pd.read_csv(next((tmp_path / "narrow.run" / "narrowed").glob("*/recovery.csv")))
    assert cut["step"].tolist() == [0, 1, 2]
    (again,) = json.loads(run(*asked, "--force", "--json"))
    assert again["loss_after"] == pytest.approx(first["loss_after"], rel=1e-6)


def test_what_cannot_be_asked_for_is_said_in_one_line(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    place = ("--out", tmp_path / "out")
    both = run("narrow", tiny_pipeline_folder, "--channels", "8", "--macs", "70%", *place, code=2)
    assert "both channels and a budget" in both
    assert "neither channels nor a budget" in run("narrow", tiny_pipeline_folder, *place, code=2)
    assert "cannot read the channels 'a,b'" in run(
        "narrow", tiny_pipeline_folder, "--channels", "a,b", *place, code=2
    )
    assert "give --out DIR" in run("narrow", tiny_pipeline_folder, "--channels", "8,8", code=2)
    preset = run("narrow", "sd-v1.4", "--macs", "70%", *place, code=2)
    assert "no weights (kind: preset)" in preset
    assert "without --out its stages are listed" in preset
    assert "steps = -1" in run("narrow", tiny_pipeline_folder, "--macs", "70%", "--steps", -1, *place, code=2)
    assert not (tmp_path / "out").exists()


def test_a_criterion_and_a_teacher_that_cannot_be_used_are_refused(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnknownCriterionError, match="taylor, magnitude, random"):
        pl.load(tiny_pipeline_folder, settings={"probe.samples": 4}).narrow(
            params="70%", out=tmp_path / "out", by="size"
        )
    with pytest.raises(RunError, match="give a pipeline folder or a hub id, or --steps 0"):
        pl.load(tiny_pipeline_folder / "unet").narrow(params="70%", out=tmp_path / "out", steps=2)
    assert not (tmp_path / "out").exists()


def test_a_student_whose_zeros_or_code_stand_for_what_left_is_refused(
    tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    parent = pl.load(tiny_pipeline_folder / "unet")
    for form, plan, said in (
        ("neutral", "-Dn2.A1", "in the neutral form, whose zeros stand for"),
        ("own", "-Dn2.A1", "a model with code of its own"),
    ):
        parent.prune(plan, tmp_path / form, form=form)
        with pytest.raises((RunError, UnsupportedModelError), match=said):
            pl.load(tmp_path / form, settings={"probe.samples": 4}).narrow(params="70%", out=tmp_path / "out")
