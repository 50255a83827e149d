"""Settings of a scheduler or VAE that cannot draw are named before anything is drawn; the usual ones pass."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.errors import ConfigError, ModelFormatError
from prune_lab.evaluation import check_steps, generate
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.models.components import complaint_of_scaling
from prune_lab.models.schedulers import scheduler_complaint, steps_complaint

USUAL = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
}
CLASSES = (
    *("PNDMScheduler", "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("UniPCMultistepScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler", "LCMScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "TCDScheduler"),
)
VARIANTS: tuple[dict[str, Any], ...] = (
    {"steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False},
    {"steps_offset": 1, "prediction_type": "v_prediction", "clip_sample": False},
    {"steps_offset": 1, "timestep_spacing": "leading", "sample_max_value": 1.0, "use_karras_sigmas": False},
    {"timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 + 1e-5 * step for step in range(1000)]},
)


def complaint(name: str, **more: Any) -> str:
    return scheduler_complaint(getattr(diffusers, name), USUAL | more)


@pytest.mark.parametrize("name", CLASSES)
def test_usual_schedulers_pass_and_the_random_numbers_stay(name: str) -> None:
    before = torch.random.get_rng_state()
    for more in VARIANTS:
        assert complaint(name, **more) == "", more
    assert torch.equal(before, torch.random.get_rng_state())


NUMBERS = st.one_of(
    st.floats(max_value=0),
    st.floats(min_value=1),
    st.sampled_from([float("nan"), "0.1", True, [0.1], 10**400]),
)
WRONG = st.one_of(
    st.tuples(
        st.sampled_from(("prediction_type", "timestep_spacing", "beta_schedule")),
        st.one_of(st.text(max_size=5), st.none(), st.integers(), st.lists(st.integers(), max_size=2)),
    ),
    st.tuples(st.just("trained_betas"), st.lists(st.floats(0.001, 0.02), max_size=5)),
    st.tuples(st.just("trained_betas"), NUMBERS.map(lambda value: [0.01] * 999 + [value])),
    st.tuples(st.sampled_from(("beta_start", "beta_end")), NUMBERS),
    st.tuples(
        st.just("steps_offset"), st.one_of(st.integers(max_value=-1), st.integers(min_value=1000), NUMBERS)
    ),
    st.tuples(st.just("steps_offset"), st.integers(41, 999)),  # 25 steps end at 960
)


@settings(max_examples=40)
@given(name=st.sampled_from(("PNDMScheduler", "DDIMScheduler")), wrong=WRONG)
def test_settings_that_cannot_draw_are_named(name: str, wrong: tuple[str, Any]) -> None:
    setting, value = wrong
    found = complaint(name, **({"timestep_spacing": "leading"} | {setting: value}))
    assert setting in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "name",
    ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "KarrasVeScheduler", "VQDiffusionScheduler"],
)
def test_a_scheduler_of_another_kind_is_refused(name: str) -> None:
    assert scheduler_complaint(getattr(diffusers, name), USUAL)


@pytest.mark.parametrize("inverted", [False, True])
def test_flows_pass_in_either_direction(inverted: bool) -> None:
    """Mochi's sampler tells the model what is left of the picture, and rises."""
    found = scheduler_complaint(
        diffusers.FlowMatchEulerDiscreteScheduler, {"invert_sigmas": inverted, "shift": 3.0}, by_flow=True
    )
    assert found == ""


SCALES = st.one_of(
    st.sampled_from(["0.18215", None, True, 0, -0.5, float("nan"), float("inf"), 10**400, [1.0], 1e-30]),
    st.floats(max_value=0),
)
SHIFTS = st.sampled_from(["0.1", True, float("nan"), float("-inf"), -(10**400), [0.1]])
WRONG_SCALING = st.one_of(
    st.tuples(st.just("scaling_factor"), SCALES),
    st.tuples(st.just("shift_factor"), SHIFTS),
    st.tuples(st.just("latents_mean"), SHIFTS.map(lambda value: [0.0, 0.0, 0.0, value])),
    st.tuples(st.just("latents_std"), SCALES.map(lambda value: [value, 1.0, 1.0, 1.0])),
    st.tuples(
        st.sampled_from(("latents_mean", "latents_std")), st.sampled_from([[], [1.0], "1,1,1,1", 1.0, {}])
    ),
)


@given(wrong=WRONG_SCALING)
def test_scaling_of_latents_that_is_none_is_named(wrong: tuple[str, Any]) -> None:
    good = {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None}
    good |= {"latents_mean": [-1.6, 2.3, 2.6, -0.2], "latents_std": [8.4, 5.3, 6.5, 5.5]}
    assert complaint_of_scaling(good) == complaint_of_scaling({}) == ""
    assert wrong[0] in complaint_of_scaling(good | dict([wrong]))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "bogus"}),
        ("scheduler/scheduler_config.json", {"beta_end": 5.0}),
        ("vae/config.json", {"scaling_factor": "0.18215"}),
        ("vae/config.json", {"shift_factor": float("nan")}),
    ],
)
def test_loading_names_file_and_setting(
    file: str, change: dict[str, Any], tiny_pipeline_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelFormatError) as caught:
        load_pipeline(resolve_model(str(folder)))
    assert file in str(caught.value)
    assert next(iter(change)) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=30)
@given(
    name=st.sampled_from(("PNDMScheduler", "DDIMScheduler", "DDPMScheduler")),
    spacing=st.sampled_from(("leading", "trailing", "linspace")),
    offset=st.integers(0, 2),
    steps=st.integers(1, 40) | st.integers(37, 40),
)
def test_steps_that_are_not_refused_stay_within_the_timesteps(
    name: str, spacing: str, offset: int, steps: int
) -> None:
    more = {"num_train_timesteps": 40, "steps_offset": offset, "timestep_spacing": spacing}
    scheduler = getattr(diffusers, name).from_config(USUAL | more | {"skip_prk_steps": True})
    pipeline = SimpleNamespace(scheduler=scheduler)
    # the other spacings never add the offset
    if spacing == "leading" and (steps - 1) * (40 // steps) + offset >= 40:
        with pytest.raises(ConfigError, match=f"steps = {steps}, found a {name}"):
            check_steps(pipeline, steps)
        return
    check_steps(pipeline, steps)
    scheduler.set_timesteps(steps)
    sample = torch.ones(1, 4, 2, 2)
    for step in scheduler.timesteps:
        assert 0 <= step < 40
        sample = scheduler.step(sample, step, sample, return_dict=False)[0]


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_solvers_of_several_steps_break_in_no_pass_that_is_not_refused(name: str, spacing: str) -> None:
    for offset, steps in itertools.product((0, 1), (*range(20, 40, 7), 38, 39, 40)):
        more = {"num_train_timesteps": 40, "steps_offset": offset, "timestep_spacing": spacing}
        scheduler = getattr(diffusers, name).from_config(USUAL | more)
        before = torch.random.get_rng_state()
        refused = steps_complaint(scheduler, steps)
        assert torch.equal(before, torch.random.get_rng_state())
        assert "\n" not in refused
        if refused:
            continue
        scheduler.set_timesteps(steps)
        sample = torch.ones(1, 4, 2, 2)
        for step in scheduler.timesteps:
            assert 0 <= step < 40
            sample = scheduler.step(torch.ones(1, 4, 2, 2), step, sample, return_dict=False)[0]
        assert sample.isfinite().all()


def test_a_thousand_steps_are_refused_where_the_offset_leads_out(tiny_pipeline: Any) -> None:
    assert tiny_pipeline.scheduler.config.steps_offset == 1
    with pytest.raises(
        ConfigError, match=r"asked for steps = 1,000, found a .* timestep 1000, outside of 0 to 999"
    ):
        generate(tiny_pipeline, ["a cat"], [0], steps=1000, guidance=1)
