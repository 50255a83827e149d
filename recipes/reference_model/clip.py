"""The reference scorer: a small `CLIPModel`, from whose text tower the pipeline's text encoder starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.reference_model.autoencoder import shifted, to_unit
from recipes.reference_model.captions import tokens, without_style
from recipes.reference_model.settings import ClipShape, Recipe
from recipes.reference_model.steps import batch_indices, slices, step_generator, train, training_precision

_MEAN, _DEVIATION = 0.5, 0.5  # pictures reach the scorer in [-1, 1]
_NOISE = 0.08  # on [-1, 1]: the scorer must also read pictures a decoder made
_STYLELESS = 0.1  # share of captions shown without their style word, so that plain prompts are understood too


def build_clip(shape: ClipShape, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A freshly initialised pair whose text tower reads the tokenizer's tokens."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": shape.shared,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    picture = {
        "hidden_size": shape.picture_width,
        "intermediate_size": 3 * shape.picture_width,
        "num_hidden_layers": shape.picture_layers,
        "num_attention_heads": shape.heads,
        "image_size": shape.picture,
        "patch_size": shape.patch,
        "projection_dim": shape.shared,
    }
    # Eager attention: the fused kernel's bfloat16 backward pass is several times slower on CPUs.
    config = CLIPConfig(
        text_config=text, vision_config=picture, projection_dim=shape.shared, attn_implementation="eager"
    )
    return CLIPModel(config)


def processor_settings(shape: ClipShape) -> dict[str, object]:
    """Contents of preprocessor_config.json: resize to the pair's size, scale to [-1, 1], no cropping."""
    side = {"height": shape.picture, "width": shape.picture}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "size": side,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [_MEAN] * 3,
        "image_std": [_DEVIATION] * 3,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def pair_loss(similarity: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over a batch (N, N) in which every pair of equal captions is a match."""
    wanted = same.float() / same.sum(1, keepdim=True)
    rows = -(wanted * F.log_softmax(similarity, dim=1)).sum(1).mean()
    columns = -(wanted * F.log_softmax(similarity.t(), dim=1)).sum(1).mean()
    return (rows + columns) / 2


def features(model: CLIPModel, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (N, D) of pictures in [-1, 1] and of token ids, float32."""
    picture = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    text = model.text_projection(model.text_model(input_ids=ids).pooler_output)
    return F.normalize(picture.float(), dim=-1), F.normalize(text.float(), dim=-1)


def train_clip(
    pictures: torch.Tensor,
    captions: Sequence[str],
    styles: Sequence[str],
    tokenizer: CLIPTokenizer,
    shape: ClipShape,
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
    until: int | None = None,
) -> CLIPModel:
    """The pair trained contrastively on uint8 pictures (N, 3, H, W) and their captions."""
    torch.manual_seed(recipe.seed)
    model = build_clip(shape, tokenizer).to(device)
    full, plain = tokens(tokenizer, captions), tokens(tokenizer, without_style(captions, styles))

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        generator = step_generator(recipe.seed, step)
        rows = batch_indices(len(pictures), recipe.batch, recipe.seed, step)
        bare = torch.rand(len(rows), generator=generator) < _STYLELESS
        ids = torch.where(bare[:, None], plain[rows], full[rows]).to(device)
        # Pictures move in eight groups: one shift for all would be learnt as a property of the batch.
        moved = [shifted(part, generator, reach=4, flip=False) for part in to_unit(pictures[rows]).chunk(8)]
        pixels = torch.cat(moved)
        grain = torch.randn(pixels.shape, generator=generator) * torch.rand((), generator=generator)
        pixels = (pixels + _NOISE * grain).to(device)
        with training_precision(device):
            picture, text = features(model, pixels, ids)
        scale = model.logit_scale.clamp(max=4.6052).exp()  # at most 100, as in CLIP
        loss = pair_loss(scale * picture @ text.t(), (ids[:, None] == ids[None]).all(-1))
        return {"loss": loss, "scale": scale}

    average = train(model, loss_at, recipe, folder, "clip", say=say, until=until)
    model.load_state_dict(average, strict=False)
    return model.eval()


def text_tower(model: CLIPModel) -> CLIPTextModel:
    """A copy of the pair's text tower, as the plain `CLIPTextModel` a pipeline holds."""
    tower = CLIPTextModel(CLIPTextConfig(**model.config.text_config.to_dict()))
    tower.load_state_dict(model.text_model.state_dict())
    return tower.eval()


@torch.no_grad()
def embed_pairs(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    pictures: torch.Tensor,
    captions: Sequence[str],
    batch: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (N, D) of uint8 pictures and of their captions, float32 on the CPU."""
    ids = tokens(tokenizer, captions)
    found = [
        features(model, to_unit(pictures[part]).to(model.device, model.dtype), ids[part].to(model.device))
        for part in slices(len(pictures), batch)
    ]
    return torch.cat([one[0] for one in found]).cpu(), torch.cat([one[1] for one in found]).cpu()


def retrieval(pictures: torch.Tensor, texts: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """R@1 and R@5 in both directions over unit vectors (N, D); any row with the same caption counts as right."""
    names = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([names[caption] for caption in captions])
    first = torch.tensor([list(captions).index(caption) for caption in names])
    by_text = (pictures @ texts[first].t()).topk(min(5, len(first)), dim=1).indices
    right = by_text == label[:, None]
    by_picture = label[(texts[first] @ pictures.t()).topk(min(5, len(label)), dim=1).indices]
    found = by_picture == torch.arange(len(first))[:, None]
    return {
        "picture_to_text_r1": float(right[:, :1].any(1).float().mean()),
        "picture_to_text_r5": float(right.any(1).float().mean()),
        "text_to_picture_r1": float(found[:, :1].any(1).float().mean()),
        "text_to_picture_r5": float(found.any(1).float().mean()),
        "pictures": float(len(label)),
        "texts": float(len(first)),
    }
