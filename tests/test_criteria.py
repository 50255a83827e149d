"""One conformance suite for every criterion, and each formula against something independent."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionPipeline
from scipy.stats import spearmanr
from torch import nn
from torch_pruning.pruner.importance import GroupMagnitudeImportance

from prune_lab.blocks import BlockGroup, architecture_of, block_groups
from prune_lab.errors import DataError, UnknownBlockError, UnknownCriterionError
from prune_lab.evaluation import clip_scores, generate
from prune_lab.importance import (
    CRITERIA,
    NEEDS_PIPELINE,
    GenerationSettings,
    ScoreCache,
    ScoringContext,
    score,
    untrained_like,
    with_psnr,
)
from prune_lab.importance.activations import block_influence
from prune_lab.importance.gates import gate_derivatives, gated
from prune_lab.importance.outputs import OUTPUT_METRICS
from prune_lab.importance.trajectories import latent_change, pixel_mse, psnr
from prune_lab.importance.weights import neuron_mean
from prune_lab.models import load_scorer
from prune_lab.probes import Probe, decode_latents, predict, random_probe
from prune_lab.surgery import bypassed

READS_WEIGHTS = [name for name in CRITERIA if name not in ("architecture-prior", "random")]
SEEN = [name for name in CRITERIA if name not in ("magnitude", "random")]  # those that look at samples


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    loaded = StableDiffusionPipeline.from_pretrained(tiny_pipeline_folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def scorer(tiny_scorer_folder: Path) -> Any:
    return load_scorer(str(tiny_scorer_folder))


@pytest.fixture
def probe(tiny_config: dict[str, Any]) -> Probe:
    return random_probe(tiny_config, samples=4, seed=0, timesteps=4)


@pytest.fixture
def generation(pipeline: Any, scorer: Any) -> GenerationSettings:
    prompts = ("a red apple", "two cats", "rain")
    kinds = ("food", "animals", "places")
    return GenerationSettings(
        pipeline, prompts, kinds, seeds=(0,), steps=2, guidance=1.0, scorer=scorer, scorer_name="tiny"
    )


@pytest.fixture
def context(tiny_unet: Any, probe: Probe, generation: GenerationSettings) -> ScoringContext:
    return ScoringContext(tiny_unet, probe, generation=generation)


def single(*names: str) -> tuple[BlockGroup, ...]:
    return tuple(BlockGroup(name, "block", (name,)) for name in names)


def silence(unet: Any, *names: str) -> None:
    """Set every weight of these blocks to zero: with their residual connections they hand on their input."""
    with torch.no_grad():
        for name in names:
            for parameter in unet.get_submodule(architecture_of(unet).block(name).path).parameters():
                parameter.zero_()


def shuffled(probe: Probe, order: list[int]) -> Probe:
    return Probe(
        **{name: tensor[order] for name, tensor in probe.tensors().items()},
        captions=tuple(probe.captions[row] for row in order),
        groups=tuple(probe.groups[row] for row in order),
    )


# What holds for all of them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", READS_WEIGHTS)
def test_a_block_that_hands_on_its_input_is_worth_nothing(context: ScoringContext, criterion: str) -> None:
    silence(context.model, "Dn1.A2", "Md.R1")
    groups = (*single("Dn1.A2", "Md.R1", "Dn1.A1"), BlockGroup("idle", "plan", ("Dn1.A2", "Md.R1")))
    table = score(context, groups, criterion, bootstrap=50)
    idle, also_idle, busy, both = (entry.impact for entry in table.entries)
    assert (idle, also_idle, both) == pytest.approx((0, 0, 0), abs=1e-12)
    assert abs(busy) > 1e-9


@pytest.mark.parametrize("criterion", SEEN)
def test_the_order_of_samples_does_not_matter(context: ScoringContext, criterion: str) -> None:
    groups = single("Dn1.A1", "Md.R1")
    generation = context.generation_for(criterion)
    turned = GenerationSettings(
        generation.pipeline,
        generation.prompts[::-1],
        generation.kinds[::-1],
        steps=generation.steps,
        guidance=generation.guidance,
        scorer=generation.scorer,
    )
    other = ScoringContext(context.model, shuffled(context.probe, [2, 0, 3, 1]), generation=turned)
    plain, again = (score(one, groups, criterion, bootstrap=0) for one in (context, other))
    tolerance = 1.0 if criterion == "gate-fisher" else 1e-3  # its random projection goes by place
    for one, two in zip(plain.entries, again.entries, strict=True):
        assert one.impact == pytest.approx(two.impact, rel=tolerance, abs=1e-8)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_seed_gives_one_table_in_the_order_asked(context: ScoringContext, criterion: str) -> None:
    groups = single("Up4.A3", "Dn1.A1", "Md.R1")
    other = ScoringContext(context.model, context.probe, generation=context.generation)
    first, again = (score(one, groups, criterion, bootstrap=20).frame() for one in (context, other))
    assert first["group"].tolist() == ["Up4.A3", "Dn1.A1", "Md.R1"]
    assert first.equals(again)


@pytest.mark.parametrize("criterion", READS_WEIGHTS)
def test_not_a_number_is_an_error_and_not_a_score(context: ScoringContext, criterion: str) -> None:
    with torch.no_grad():
        context.model.get_submodule("down_blocks.0.attentions.1.proj_out").weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        score(context, single("Dn1.A1", "Dn1.A2"), criterion)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_model_stays_as_it_was_and_says_what_it_cost(context: ScoringContext, criterion: str) -> None:
    unet = context.model.train()
    before, state = predict(unet, context.probe), copy.deepcopy(unet.state_dict())
    grad = [parameter.requires_grad for parameter in unet.parameters()]
    table = score(context, single("Dn1.A1", "Dn2.R1"), criterion, bootstrap=0)
    assert unet.training
    assert grad == [parameter.requires_grad for parameter in unet.parameters()]
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert torch.equal(predict(unet, context.probe), before)
    assert table.compute is not None
    free = criterion in ("magnitude", "random")
    assert (table.compute.forwards == 0) is free
    bound = {"similarity": 4, "taylor": 12, "gate-gradient": 8, "gate-fisher": 8, "gate-path": 24}
    if criterion in bound:
        assert table.compute.forwards == bound[criterion]  # 4 rows
    if criterion in NEEDS_PIPELINE:
        assert table.compute.forwards == 3 * 3 * 2  # the teacher and two groups, three prompts, two steps


def test_the_prior_is_that_of_untrained_models(context: ScoringContext) -> None:
    """By hand: three models of the same config, the mean of their relative changes; the trained weights say nothing."""
    groups = single("Dn1.A1", "Md.R1")
    found = score(context, groups, "architecture-prior", bootstrap=0)
    wanted = []
    for seed in range(3):
        model = untrained_like(context.model, seed)
        assert not torch.equal(next(model.parameters()), next(context.model.parameters()))
        whole = predict(model, context.probe).double()
        with bypassed(model, ["Md.R1"]) as pruned:
            change = predict(pruned, context.probe).double() - whole
        wanted.append(float(change.square().sum() / whole.square().sum()))
    assert found.entries[1].impact == pytest.approx(sum(wanted) / 3, rel=1e-4)
    silence(context.model, "Md.R1")
    other = dataclasses.replace(context, cache=ScoreCache())
    assert score(other, groups, "architecture-prior", bootstrap=0).frame().equals(found.frame())
    drawn = torch.rand(1)
    untrained_like(context.model, 0)
    assert not torch.equal(torch.rand(1), drawn)  # torch's own generator went on from where it was


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_explains_itself(criterion: str) -> None:
    for heading in ("Measures:", "Reads as:", "Misleads when:", "Cost:", "Reference:"):
        assert heading in (CRITERIA[criterion].__doc__ or ""), f"{criterion} lacks {heading}"


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_unknown_block_is_an_error(context: ScoringContext, criterion: str) -> None:
    with pytest.raises(UnknownBlockError, match=r"Dn9\.R1"):
        score(context, single("Dn9.R1"), criterion)


@pytest.mark.parametrize("criterion", SEEN)
def test_values_are_kept_by_timestep_or_by_prompt(context: ScoringContext, criterion: str) -> None:
    table = score(context, single("Dn1.A1", "Up4.R3"), criterion, bootstrap=0)
    parts = table.parts()
    assert parts["criterion"].eq(criterion).all()
    wanted = (
        {"prompts"}
        if criterion in NEEDS_PIPELINE
        else {"timesteps"}
        if criterion == "taylor"
        else {"timesteps", "prompts"}
    )
    assert set(parts["part"]) == wanted
    assert table.scales is not None
    for part, rows in parts.groupby("part"):
        for entry in table.entries:
            own = rows[rows["group"] == entry.group.name]
            if part == "timesteps":
                assert own["of"].tolist() == ["100-199", "300-399", "600-699", "800-899"]
            if (
                criterion != "output-mse" and criterion != "gate-fisher"
            ):  # their scales differ between samples
                assert np.average(own["impact"], weights=own["samples"]) == pytest.approx(entry.impact)


@pytest.mark.parametrize("criterion", sorted(NEEDS_PIPELINE))
def test_a_model_that_cannot_draw_is_told_so(tiny_unet: Any, probe: Probe, criterion: str) -> None:
    with pytest.raises(DataError, match=f"{criterion} generates images"):
        score(ScoringContext(tiny_unet, probe), single("Md.R1"), criterion)


def test_an_unknown_criterion_names_the_known(tiny_unet: Any, probe: Probe) -> None:
    with pytest.raises(UnknownCriterionError, match=r"'mse'.*output-mse, output-cosine, denoising-loss"):
        score(ScoringContext(tiny_unet, probe), single("Md.R1"), "mse")


# Formulas ----------------------------------------------------------------------------------------------------------


def test_changes_of_simple_predictions() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]])[:, :, None, None]
    target = torch.tensor([[3.0, 0.0], [0.0, 0.0]])[:, :, None, None]
    assert OUTPUT_METRICS["output-mse"](teacher, 2 * teacher, target).tolist() == [12.5, 2.0]
    assert OUTPUT_METRICS["output-cosine"](teacher, 2 * teacher, target).tolist() == pytest.approx(
        [0, 0], abs=1e-12
    )
    assert OUTPUT_METRICS["output-cosine"](teacher, -teacher, target).tolist() == pytest.approx([2, 2])
    assert OUTPUT_METRICS["denoising-loss"](teacher, target, target).tolist() == [-8.0, -2.0]


def test_magnitude_is_torch_prunings_averaged_over_neurons() -> None:
    """For a single layer the library's L1 importance of its output channels is the paper's inner sum."""
    import torch_pruning

    layer = nn.Conv2d(3, 5, 3, bias=False)
    graph = torch_pruning.DependencyGraph().build_dependency(layer, torch.randn(1, 3, 8, 8))
    group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=list(range(5)))
    theirs = GroupMagnitudeImportance(p=1, group_reduction="mean", normalizer=None)(group)
    assert neuron_mean([layer.weight.detach()]) == pytest.approx(float(theirs.mean()), rel=1e-6)
    # Layers count equally, whatever their width.
    other = torch.tensor([[1.0, -2.0], [0.0, 0.5]])
    assert neuron_mean([layer.weight.detach(), other]) == pytest.approx(
        (float(theirs.mean()) + 1.75) / 2, rel=1e-6
    )


def test_taylor_by_hand(tiny_unet: Any, probe: Probe) -> None:
    """At one timestep, with the gradients that an ordinary backward pass leaves behind."""
    one = probe.rows([1])
    found = score(ScoringContext(tiny_unet, one), single("Md.A1"), "taylor", bootstrap=0).entries[0].impact
    loss = (tiny_unet(one.noisy, one.timesteps, one.embeddings).sample - one.target).square().mean()
    loss.backward()
    layers = [p for p in tiny_unet.mid_block.attentions[0].parameters() if p.ndim >= 2]
    by_layer = [float((p.detach() * p.grad).abs().flatten(1).sum(1).mean()) for p in layers]
    assert found == pytest.approx(np.mean(by_layer), rel=1e-4)


@pytest.mark.parametrize("name", ["Dn1.A1", "Md.R1", "Up2.R2", "Dn2.R1"])  # the last is starred
def test_a_gate_at_zero_is_the_bypass_and_at_one_the_block(tiny_unet: Any, probe: Probe, name: str) -> None:
    architecture = architecture_of(tiny_unet)
    with torch.no_grad():
        for at in (0.0, 1.0):
            with gated(tiny_unet, architecture, {name: torch.full((4,), at)}):
                found = predict(tiny_unet, probe)
            with bypassed(tiny_unet, [name] if at == 0 else [], stand_in=True):
                torch.testing.assert_close(found, predict(tiny_unet, probe), rtol=1e-4, atol=1e-5)


def test_gate_derivatives_against_differences(tiny_unet: Any, probe: Probe) -> None:
    unet = tiny_unet.double()
    context = ScoringContext(unet, probe)
    names, architecture, step = ["Dn1.A1", "Md.R1", "Up4.R2"], architecture_of(unet), 1e-5

    def loss(prediction: torch.Tensor, rows: slice) -> torch.Tensor:
        return (prediction.double() - probe.target[rows].double()).square().mean((1, 2, 3)).sum()

    found, compute = gate_derivatives(context, single(*names), loss)
    assert compute.forwards == 8
    for number, name in enumerate(names):
        for row in range(4):
            ends = []
            for at in (1 + step, 1 - step):
                gate = torch.ones(4, dtype=torch.float64)
                gate[row] = at
                with torch.no_grad(), gated(unet, architecture, {name: gate}):
                    inputs = (probe.noisy.double(), probe.timesteps, probe.embeddings.double())
                    ends.append(float(loss(unet(*inputs).sample, slice(0, 4))))
            assert found[number, row] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=2e-3, abs=1e-7)


def test_a_groups_gates_move_together(context: ScoringContext) -> None:
    blocks = ("Dn1.R2", "Dn1.A2")
    both = (*single(*blocks), BlockGroup("both", "pair", blocks))
    found, _ = gate_derivatives(context, single(*blocks), lambda prediction, rows: prediction.sum())
    assert found.shape == (2, 4)
    table = score(context, both, "gate-gradient", bootstrap=0)
    assert table.values is not None
    assert (table.values[2] <= table.values[:2].sum(0) + 1e-12).all()  # opposite slopes cancel, none adds


def test_gate_fisher_estimates_the_change_of_a_model_that_is_linear_in_its_gates(
    tiny_unet: Any, tiny_config: dict[str, Any]
) -> None:
    """The last block's residual branch enters the head almost linearly once it is made small."""
    with torch.no_grad():
        tiny_unet.up_blocks[3].attentions[2].proj_out.weight.mul_(1e-2)
        tiny_unet.up_blocks[3].attentions[2].proj_out.bias.mul_(1e-2)
    probe = random_probe(tiny_config, samples=256, seed=0)
    wanted, found = (
        score(ScoringContext(tiny_unet, probe), single("Up4.A3"), name, bootstrap=0).entries[0].impact
        for name in ("output-mse", "gate-fisher")
    )
    assert found == pytest.approx(
        wanted, rel=0.35
    )  # 256 squares of normal draws: 9 % spread, and not all is linear


def test_influence_by_hand() -> None:
    main = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # positions (1, 0) and (0, 1)
    turned = torch.tensor([[2.0, 1.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)  # (2, 0) and (1, 1)
    assert block_influence(main, turned).tolist() == pytest.approx([(0 + 1 - 2**-0.5) / 2])


def test_changes_of_latents_and_pictures_by_hand() -> None:
    teacher, pruned = torch.zeros(1, 2, 1, 2), torch.tensor([[[[3.0, 3.0]], [[4.0, 4.0]]]])
    assert latent_change(teacher, pruned).tolist() == [5.0]  # means move by (3, 4), spreads do not
    spread = torch.tensor([[[[-1.0, 1.0]], [[0.0, 0.0]]]])
    assert latent_change(teacher, spread).tolist() == pytest.approx([2**0.5])
    black, white = (
        torch.zeros(1, 3, 2, 2, dtype=torch.uint8),
        torch.full((1, 3, 2, 2), 255, dtype=torch.uint8),
    )
    assert pixel_mse(black, white).tolist() == [1.0]
    assert (psnr(1.0), psnr(0.01)) == (0, pytest.approx(20))
    assert psnr(0.0) == float("inf")


def test_the_peak_signal_to_noise_ratio_stands_beside_changes_of_pictures_alone() -> None:
    scores = pd.DataFrame({"criterion": ["image-change", "output-mse"], "impact": [0.01, 0.01]})
    found = with_psnr(scores)["psnr"]
    assert found[0] == pytest.approx(20)
    assert np.isnan(found[1])
    assert "psnr" not in with_psnr(scores.iloc[1:])


def test_trajectories_are_the_pictures_that_the_pipeline_draws(context: ScoringContext, scorer: Any) -> None:
    generation = context.generation_for("clip-score")
    how = {"steps": generation.steps, "guidance": generation.guidance}
    latents = generate(generation.pipeline, generation.prompts, (0,), latents=True, **how)
    pictures = generate(generation.pipeline, generation.prompts, (0,), **how)
    assert torch.equal(decode_latents(generation.pipeline, latents), pictures)
    with bypassed(context.model, ["Up4.R3"]) as unet:
        without = generate(generation.pipeline, generation.prompts, (0,), model=unet, **how)
    drop = clip_scores(scorer, pictures, generation.prompts) - clip_scores(
        scorer, without, generation.prompts
    )
    changed = pixel_mse(pictures, without)
    for name, wanted in (("clip-score", drop), ("image-change", changed)):
        found = score(context, single("Up4.R3"), name, bootstrap=0).values
        assert found is not None
        assert found[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_one_walk_and_one_trajectory_serve_all_their_criteria(context: ScoringContext) -> None:
    groups = single("Dn1.A1", "Md.R1")
    for family in (("output-mse", "output-cosine", "denoising-loss"), tuple(sorted(NEEDS_PIPELINE))):
        spent = [score(context, groups, name, bootstrap=0).compute for name in family]
        assert [compute is not None and compute.macs > 0 for compute in spent] == [True, False, False]


def test_a_random_order_agrees_with_nothing(tiny_unet: Any, probe: Probe) -> None:
    groups = block_groups(architecture_of(tiny_unet), "block")
    orders = [
        [one.impact for one in score(ScoringContext(tiny_unet, probe, seed=seed), groups, "random").entries]
        for seed in range(20)
    ]
    agreement = [spearmanr(orders[0], other).statistic for other in orders[1:]]
    assert abs(np.mean(agreement)) < 0.15
    assert all(0 <= value < 1 for order in orders for value in order)


def test_guided_scores_are_of_the_mixed_predictions(
    tiny_unet: Any, probe: Probe, tiny_config: dict[str, Any]
) -> None:
    # Loud, so that guiding away from it changes the score by more than the last digits.
    noise = torch.randn(1, *probe.embeddings.shape[1:], generator=torch.Generator().manual_seed(0))
    unconditional = probe.with_prompt(10 * noise, {})
    context = ScoringContext(tiny_unet, probe, guidance=3.0, unconditional=unconditional, batch=3)

    def mixed() -> torch.Tensor:
        with_prompt, without = predict(tiny_unet, probe), predict(tiny_unet, unconditional)
        return without + 3 * (with_prompt - without)

    teacher = mixed()
    with bypassed(tiny_unet, ["Dn1.A1"]):
        changed = mixed()
    wanted = float((changed - teacher).square().sum() / teacher.square().sum())
    table = score(context, single("Dn1.A1", "Md.R1"), bootstrap=0)
    assert table.entries[0].impact == pytest.approx(wanted, rel=1e-4)
    plain = score(ScoringContext(tiny_unet, probe), single("Dn1.A1", "Md.R1"), bootstrap=0)
    assert plain.entries[0].impact != pytest.approx(wanted, rel=1e-2)
    assert table.compute is not None
    assert plain.compute is not None
    assert table.compute.macs == 2 * plain.compute.macs
    with pytest.raises(DataError, match="guidance 3"):
        ScoringContext(tiny_unet, probe, guidance=3.0)


# The cache ---------------------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_not_measured_again(tiny_unet: Any, probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    first = score(ScoringContext(tiny_unet, probe, cache=ScoreCache(path)), single("Dn1.A1", "Md.R1"))
    more = score(ScoringContext(tiny_unet, probe, cache=ScoreCache(path)), single("Md.R1", "Up4.A3"))
    fresh = score(ScoringContext(tiny_unet, probe), single("Up4.A3"))
    assert first.compute is not None
    assert more.compute is not None
    assert fresh.compute is not None
    assert more.compute.macs == fresh.compute.macs  # of the new group alone
    assert more.entries[0].impact == first.entries[1].impact
    again = score(ScoringContext(tiny_unet, probe, cache=ScoreCache(path)), single("Md.R1", "Up4.A3"))
    assert again.compute is not None
    assert again.compute.macs == 0
    assert again.frame().equals(more.frame())


def test_an_interrupted_run_goes_on(
    tiny_unet: Any, probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = single("Dn1.A1", "Md.R1")
    whole = score(ScoringContext(tiny_unet, probe, batch=2), groups)
    from prune_lab.importance import outputs

    plain, calls = outputs.predict_without, []

    def stops(*given: Any, **named: Any) -> Any:
        for answer in plain(*given, **named):
            if calls:
                raise KeyboardInterrupt
            calls.append(1)
            yield answer

    monkeypatch.setattr(outputs, "predict_without", stops)
    path = tmp_path / "scores.safetensors"
    with pytest.raises(KeyboardInterrupt):
        score(ScoringContext(tiny_unet, probe, batch=2, cache=ScoreCache(path)), groups)
    monkeypatch.setattr(outputs, "predict_without", plain)
    resumed = score(ScoringContext(tiny_unet, probe, batch=2, cache=ScoreCache(path)), groups)
    assert whole.compute is not None
    assert resumed.compute is not None
    assert resumed.compute.macs == whole.compute.macs / 2
    assert [one.impact for one in resumed.entries] == pytest.approx(
        [one.impact for one in whole.entries], rel=1e-6
    )


def test_a_damaged_cache_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(DataError, match="delete it"):
        ScoreCache(path)


def test_other_models_inputs_and_formats_have_other_files(tmp_path: Path) -> None:
    names = {
        ScoreCache.open(tmp_path, model=model, inputs=inputs, precision=precision).path
        for model in "ab"
        for inputs in "cd"
        for precision in ("float32", "bfloat16")
    }
    assert len(names) == 8
