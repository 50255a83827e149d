"""The reference autoencoder: 64 px pictures to 16 x 16 x 4 latents and back, a small diffusers `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from recipes.reference_model.settings import AutoencoderShape, Recipe
from recipes.reference_model.steps import batch_indices, slices, step_generator, train, training_precision

_KL_WEIGHT = 1e-3  # on the mean per latent element: enough to keep the latents near unit variance
_EDGE_WEIGHT = 0.5


def build_autoencoder(shape: AutoencoderShape) -> AutoencoderKL:
    """A freshly initialised autoencoder of the shape."""
    stages = len(shape.channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=shape.latent_channels,
        sample_size=shape.picture,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        norm_num_groups=shape.groups,
        scaling_factor=1.0,
    )


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures (N, 3, H, W) as float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1


def shifted(pictures: torch.Tensor, generator: torch.Generator, reach: int, flip: bool) -> torch.Tensor:
    """Unit-range pictures moved by up to `reach` pixels on white, the batch as one, mirrored half of the time."""
    down, right = (int(torch.randint(-reach, reach + 1, (), generator=generator)) for _ in range(2))
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, (reach, reach, reach, reach), value=1.0)
    moved = padded[..., reach + down : reach + down + height, reach + right : reach + right + width]
    return moved.flip(-1) if flip and bool(torch.rand((), generator=generator) < 0.5) else moved


def edge_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of horizontal and vertical gradients: charges for blur, which L1 hardly does."""
    difference = found - wanted
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def coarse_loss(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference at half and quarter size: keeps large areas in the right colour."""
    difference = found - wanted
    return F.avg_pool2d(difference, 2).abs().mean() + F.avg_pool2d(difference, 4).abs().mean()


def train_autoencoder(
    pictures: torch.Tensor,
    shape: AutoencoderShape,
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
    until: int | None = None,
) -> AutoencoderKL:
    """The autoencoder trained on uint8 pictures (N, 3, H, W): L1 + MSE + gradients + coarse L1 + a little KL."""
    torch.manual_seed(recipe.seed)
    model = build_autoencoder(shape).to(device)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        generator = step_generator(recipe.seed, step)
        rows = batch_indices(len(pictures), recipe.batch, recipe.seed, step)
        wanted = shifted(to_unit(pictures[rows]), generator, reach=4, flip=True).to(device)
        with training_precision(device):
            moments = model.encode(wanted).latent_dist
            mean, logvar = moments.mean.float(), moments.logvar.float()
            noise = torch.randn(mean.shape, generator=generator).to(device)
            found = model.decode(mean + (0.5 * logvar).exp() * noise).sample
        found = found.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        mse = F.mse_loss(found, wanted)
        loss = F.l1_loss(found, wanted) + mse + _KL_WEIGHT * kl
        loss = loss + _EDGE_WEIGHT * edge_loss(found, wanted) + 0.5 * coarse_loss(found, wanted)
        return {"loss": loss, "mse": mse, "kl": kl}

    average = train(model, loss_at, recipe, folder, "autoencoder", say=say, until=until)
    model.load_state_dict(average, strict=False)
    return model.eval()


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Latent means (N, C, h, w), float32 on the CPU, scaled as the pipeline scales them, of uint8 pictures."""
    found = []
    for part in slices(len(pictures), batch):
        units = to_unit(pictures[part]).to(model.device, model.dtype)
        found.append(model.encode(units).latent_dist.mean.float().cpu() * model.config["scaling_factor"])
    return torch.cat(found)


@torch.no_grad()
def decode(model: AutoencoderKL, latents: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """uint8 pictures (N, 3, H, W) of scaled latents."""
    found = []
    for part in slices(len(latents), batch):
        scaled = latents[part].to(model.device, model.dtype) / model.config["scaling_factor"]
        units = model.decode(scaled).sample.float().cpu()
        found.append(((units.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(found)


@torch.no_grad()
def standardise(model: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give the latents of `pictures` zero mean and unit deviation in every channel, in place and exactly.

    The shift and the scale go into the two 1 x 1 convolutions around the latents, so pictures are reconstructed as
    before, and the pipeline's single scaling factor (1.0) is right for all channels.
    """
    latents = encode(model, pictures).to(torch.float64)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    quant, post = model.quant_conv, model.post_quant_conv
    assert quant is not None and post is not None  # noqa: PT018
    assert quant.bias is not None and post.bias is not None  # noqa: PT018
    count = len(mean)
    weight, bias = quant.weight.double(), quant.bias.double()
    weight[:count] /= deviation[:, None, None, None]
    bias[:count] = (bias[:count] - mean) / deviation
    bias[count:] -= 2 * deviation.log()  # the posterior's log variance follows the scale
    post_weight = post.weight.double()
    post.bias.copy_(post.bias.double() + (post_weight[:, :, 0, 0] * mean).sum(1))
    post.weight.copy_(post_weight * deviation[None, :, None, None])
    quant.weight.copy_(weight)
    quant.bias.copy_(bias)


@torch.no_grad()
def psnr(model: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB (N,), 8 bits a channel, of every uint8 picture after encoding and decoding."""
    found = decode(model, encode(model, pictures))
    error = (found.double() - pictures.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error.clamp_min(1e-8))
