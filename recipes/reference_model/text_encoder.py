"""The pipeline's text encoder: a copy of the scorer's text tower that has learned where things lie in a picture.

A contrastive tower need only tell captions apart. What a caption says about the layout has to be worked out from its
states, and a U-Net works it out slowly: only the last few noise levels hide a picture enough to ask for it, and there
every answer is hidden in noise too. So the tower learns it first, from latents without noise, at about a tenth of the
cost per picture: a small reader tells the mean latent of a caption from its states, by attention, as the U-Net will
read them. The reader is thrown away; the layout lies open in the states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextModel

from recipes.reference_model.captions import CaptionedLatents
from recipes.reference_model.settings import Recipe
from recipes.reference_model.steps import step_generator, train, training_precision

_CELL = 2  # latent pixels along one side that share a query
_QUERY = 0.5  # spread of the queries at the start


class LayoutReader(nn.Module):
    """A latent told from text states: one learned query per 2 x 2 cell attends to them, once."""

    def __init__(self, width: int, heads: int, channels: int, side: int) -> None:
        super().__init__()
        self.cells = side // _CELL
        self.queries = nn.Parameter(torch.randn(self.cells**2, width) * _QUERY)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.out = nn.Linear(width, channels * _CELL**2)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The latents (N, C, side, side) that states (N, L, D) speak of."""
        asked = self.queries.expand(len(states), -1, -1)
        heard, _ = self.attention(asked, states, states, need_weights=False)
        found = asked + heard
        cells = self.out(found + self.feed(found)).transpose(1, 2).unflatten(2, (self.cells, self.cells))
        return F.pixel_shuffle(cells, _CELL)


class ReadTower(nn.Module):
    """A text tower with a reader behind it, for training alone."""

    def __init__(self, tower: CLIPTextModel, channels: int, side: int) -> None:
        super().__init__()
        self.tower = tower
        self.reader = LayoutReader(tower.config.hidden_size, tower.config.num_attention_heads, channels, side)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The mean latents (N, C, h, w) of token ids (N, L)."""
        found: torch.Tensor = self.reader(self.tower(ids).last_hidden_state)
        return found


def train_text_encoder(
    tower: CLIPTextModel,
    data: CaptionedLatents,
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    say: Callable[[str], None] | None = None,
    until: int | None = None,
) -> CLIPTextModel:
    """A copy of `tower` whose states tell the mean latent of a caption; averaged weights. `tower` stays as it was."""
    torch.manual_seed(recipe.seed)
    channels, side = data.latents.shape[1:3]
    model = ReadTower(copy.deepcopy(tower), channels, side).to(device)

    def loss_at(step: int) -> dict[str, torch.Tensor]:
        rows, caption = data.draw(recipe.batch, step_generator(recipe.seed, step))
        with training_precision(device):
            found = model(data.ids[caption].to(device))
        return {"loss": F.mse_loss(found.float(), data.latents[rows].to(device))}

    average = train(model, loss_at, recipe, folder, "text_encoder", say=say, until=until)
    model.load_state_dict(average, strict=False)
    return model.tower.eval()
