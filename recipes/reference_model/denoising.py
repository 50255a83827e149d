"""How the reference U-Net is trained: to predict the velocity in noisy latents, with the inner stages kept in use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from recipes.reference_model.captions import CaptionedLatents
from recipes.reference_model.denoiser import Float32Attention, build_denoiser, open_main_path
from recipes.reference_model.noising import draw_noisy
from recipes.reference_model.settings import DenoiserShape, Objective, Recipe
from recipes.reference_model.steps import step_generator, train, training_precision


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What one training step sees: N rows, on one device."""

    noisy: torch.Tensor  # (N, C, h, w)
    times: torch.Tensor  # (N,)
    text: torch.Tensor  # (N, L, D)
    velocity: torch.Tensor  # (N, C, h, w) the answer, arXiv:2202.00512
    cut: torch.Tensor  # (N,) how many up stages, from the outermost on, get no skips
    deaf: torch.Tensor  # (N,) whether the mid stage alone hears the caption
    silence: torch.Tensor  # (L, D) the empty caption

    def to(self, device: str) -> TrainingBatch:
        """The same rows on another device."""
        return TrainingBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def draw_batch(
    data: CaptionedLatents, text: torch.Tensor, size: int, objective: Objective, seed: int, step: int
) -> TrainingBatch:
    """The rows of a step, a function of seed and step alone; every batch spreads evenly over the noise levels.

    `text` (M, L, D) holds the states of the captions of `data`.
    """
    generator = step_generator(seed, step)
    rows = draw_noisy(data, size, objective.noisier, generator)
    # The two outermost up stages at least: one alone hardly changes the way the answer takes.
    depth = torch.randint(2, 5, (size,), generator=generator)
    chosen = torch.rand(size, generator=generator) < objective.severed
    return TrainingBatch(
        noisy=rows.noisy,
        times=rows.times,
        text=text[rows.caption],
        velocity=rows.velocity,
        cut=depth * (chosen & (rows.times >= objective.severed_above)),
        deaf=torch.rand(size, generator=generator) < objective.deaf,
        silence=text[0],
    )


@contextlib.contextmanager
def hooked(modules: Sequence[nn.Module], tell: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Inside, `tell(place, output)` hears what each module gives."""

    def listener(place: int) -> Callable[..., None]:
        return lambda _module, _args, output: tell(place, output)

    handles = [module.register_forward_hook(listener(place)) for place, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _with_arguments(
    stages: Sequence[nn.Module], changed: Callable[[int, dict[str, Any]], dict[str, Any]]
) -> Iterator[None]:
    """Inside, the keyword arguments of each stage are updated with `changed(place, arguments)`."""

    def changer(place: int) -> Callable[..., tuple[Any, dict[str, Any]]]:
        return lambda _module, args, kwargs: (args, {**kwargs, **changed(place, kwargs)})

    handles = [
        stage.register_forward_pre_hook(changer(place), with_kwargs=True)
        for place, stage in enumerate(stages)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def severed(unet: UNet2DConditionModel, cut: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Inside, the `cut` (N,) outermost up stages of each row get zeros for skips; 0 leaves a row as it is."""

    def without_skips(depth: int, arguments: dict[str, Any]) -> dict[str, Any]:
        kept = (cut <= depth)[:, None, None, None]
        return {
            "res_hidden_states_tuple": tuple(skip * kept for skip in arguments["res_hidden_states_tuple"])
        }

    return _with_arguments(list(reversed(unet.up_blocks)), without_skips)


def deafened(
    unet: UNet2DConditionModel, rows: torch.Tensor, silence: torch.Tensor
) -> contextlib.AbstractContextManager[None]:
    """Inside, all stages but the mid get `silence` (L, D) for text where `rows` (N,) is True."""

    def without_text(_place: int, arguments: dict[str, Any]) -> dict[str, Any]:
        text = arguments["encoder_hidden_states"]
        return {"encoder_hidden_states": torch.where(rows[:, None, None], silence.to(text), text)}

    stages = [stage for stage in [*unet.down_blocks, *unet.up_blocks] if hasattr(stage, "attentions")]
    return _with_arguments(stages, without_text)


class SupervisedDenoiser(nn.Module):
    """A U-Net with linear readers at the mid and the three inner up stages, for training alone.

    Each reader predicts the velocity from its stage's output, at the latent's resolution or at half of it (deep
    supervision, arXiv:1409.5185). So the main path carries a coarse answer from the mid stage outwards, which the outer
    stages refine, and what the inner stages know reaches the output. The readers are thrown away after training.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.model = unet
        inner, middle, outer = unet.config.block_out_channels[:0:-1]
        channels = unet.config.out_channels
        # Up1 and Up2 end with an upsampler, Up3 too: their outputs are 2, 4 and 8 times the mid stage's resolution.
        self.reach = (4, 2, 2, 1)  # target pixels per pixel of the stage, along one side
        self.readers = nn.ModuleList(
            nn.Conv2d(width, channels * reach**2, 1)
            for width, reach in zip((inner, inner, middle, outer), self.reach, strict=True)
        )

    def forward(self, batch: TrainingBatch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The prediction (N, C, h, w), and the readers' (N, C, h/2, w/2) twice and (N, C, h, w) twice."""
        stages = [self.model.mid_block, *self.model.up_blocks[:3]]
        outputs: dict[int, torch.Tensor] = {}
        with (
            hooked(stages, outputs.__setitem__),
            severed(self.model, batch.cut),
            deafened(self.model, batch.deaf, batch.silence),
        ):
            found = self.model(batch.noisy, batch.times, batch.text).sample
        read = [
            F.pixel_shuffle(reader(outputs[place]), reach)
            for place, (reader, reach) in enumerate(zip(self.readers, self.reach, strict=True))
        ]
        return found, read


def train_denoiser(
    data: CaptionedLatents,
    text: torch.Tensor,
    shape: DenoiserShape,
    recipe: Recipe,
    folder: Path,
    *,
    objective: Objective | None = None,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
    until: int | None = None,
) -> UNet2DConditionModel:
    """The U-Net trained to predict the velocity in the latents, given `text` (M, L, D) of their captions; averaged."""
    objective = Objective() if objective is None else objective
    torch.manual_seed(recipe.seed)
    unet = build_denoiser(shape)
    open_main_path(unet)
    model = SupervisedDenoiser(unet).to(device)
    if torch.device(device).type == "cpu":
        unet.set_attn_processor(Float32Attention())

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        now = objective.at(step, recipe.steps)
        batch = draw_batch(data, text, recipe.batch, now, recipe.seed, step).to(device)
        with training_precision(device):
            found, read = model(batch)
        error = (found.float() - batch.velocity).square().mean((1, 2, 3))
        coarse = [
            F.mse_loss(one.float(), F.adaptive_avg_pool2d(batch.velocity, one.shape[-2:])) for one in read
        ]
        supervised = torch.stack(coarse).sum()
        return {
            "loss": error.mean() + now.supervision * supervised,
            "mse": error[(batch.cut == 0) & ~batch.deaf].mean(),
            "supervised": supervised,
        }

    average = train(model, loss_at, recipe, folder, "denoiser", say=say, until=until)
    model.load_state_dict(average, strict=False)
    unet.set_attn_processor(AttnProcessor2_0())
    return unet.eval()
