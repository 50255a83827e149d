"""A sweep over the strength with which several models change one picture: pictures as files, and a table of scores."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from prune_lab.applications.image_to_image import (
    change_picture,
    changing_pipeline,
    check_share,
    check_strength,
)
from prune_lab.applications.likeness import likeness
from prune_lab.applications.pictures import check_own_picture, read_own_mask, read_own_picture, save_picture
from prune_lab.applications.sweep_means import sweep_means
from prune_lab.config import check_numbers
from prune_lab.errors import ConfigError, RunError, UnsupportedModelError
from prune_lab.evaluation import check_steps, clip_scores
from prune_lab.families import embedding_width, model_of
from prune_lab.models import ModelSource, choose_scorer, drawing_asked, load_pipeline, load_scorer
from prune_lab.models.protection import check_folder
from prune_lab.probes import picture_side
from prune_lab.runtime import note, output_folder, track, write_frame
from prune_lab.schemas import SWEEP_COLUMNS

_NAN = float("nan")
_AT_ONCE = 8  # pictures that are changed at once, as many as are drawn at once elsewhere


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SweepSettings:
    """What is asked of every model."""

    prompt: str
    strengths: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None  # None: as each model is meant to draw
    guidance: float | None = None
    scorer: str = ""  # a CLIP folder or hub id; empty: that of the models, where there is one

    def __post_init__(self) -> None:
        check_numbers(steps=self.steps, guidance=self.guidance, count=len(self.seeds))
        for seed in self.seeds:
            check_numbers(seed=seed)
        if not self.prompt.strip():
            raise ConfigError("asked to change a picture without saying towards what; give --prompt")
        if not self.strengths:
            raise ConfigError(
                "asked to change a picture with no strength; give one or more, such as 0.3,0.5,0.7"
            )
        for strength in self.strengths:
            check_share(strength)
        for what, values in (("strength", self.strengths), ("seed", self.seeds)):
            written = [f"{value:g}" if what == "strength" else str(value) for value in values]
            if twice := next((one for one in written if written.count(one) > 1), ""):
                raise ConfigError(
                    f"asked for the {what} {twice} twice, which would be drawn into one file; give each once, "
                    "strengths apart by more than a millionth"
                )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sweep:
    """What came of it: ``frame`` has a row for each model, strength and seed, SWEEP_COLUMNS, in the order of the
    pictures (M, S, N, 3, H, W) uint8 of M models, S strengths, N seeds.
    """

    frame: pd.DataFrame
    pictures: tuple[Tensor, ...]  # of each model (S, N, 3, H, W) uint8; models may draw at several sizes
    picture: Tensor  # (3, H, W) uint8 that they began with, at the size of the first model
    mask: Tensor | None  # (H, W)
    names: tuple[str, ...]  # of the models
    scorer: str  # what judged, and why


def file_names(models: Sequence[str]) -> tuple[str, ...]:
    """A name for files of each of ``models``, by its last part; numbered where two are the same, in any case."""
    plain = [re.sub(r"[^\w.+-]+", "-", Path(name).name).strip("-.") or "model" for name in models]
    lower = [name.lower() for name in plain]
    found: list[str] = []
    for name in plain:
        number, one = 1, name
        if lower.count(name.lower()) > 1:
            while one.lower() in (*lower, *map(str.lower, found)):
                one, number = f"{name}-{number}", number + 1
        found.append(one)
    return tuple(found)


@contextlib.contextmanager
def _counted_passes(model: Any) -> Iterator[list[None]]:
    """Inside, each forward pass of ``model`` adds to the list."""
    calls: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def _as_large(pictures: Tensor, side: int) -> Tensor:
    """``pictures`` (N, 3, H, W) uint8, ``side`` pixels high and wide, from 0 to 1."""
    found = pictures.float().div(255)
    return found if found.shape[-1] == side else interpolate(found, side, mode="bilinear", antialias=True)


def _errors(pictures: Tensor, others: Tensor, where: Tensor | None = None) -> list[float]:
    """Mean squared difference of each of ``pictures`` (N, 3, H, W) from that of ``others``, pixels from 0 to 1; only
    ``where`` (H, W) is true.
    """
    side = others.shape[-1]
    squares = (_as_large(pictures, side) - _as_large(others, side)).square().mean(dim=1)
    if where is None:
        return [float(value) for value in squares.flatten(1).mean(dim=1)]
    return [float(value) for value in squares[:, where].mean(dim=1)]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Drawn:
    """What one model made of the picture at S strengths."""

    pictures: Tensor  # (S, N, 3, H, W) uint8
    passes: tuple[int, ...]  # of the model, by strength
    seconds: tuple[float, ...]  # of one picture, by strength


def _changed(
    pipeline: Any,
    name: str,
    picture: Tensor,
    mask: Tensor | None,
    settings: SweepSettings,
    drawing: tuple[int, float],
) -> _Drawn:
    """``picture`` (3, H, W), as the model ``name`` changes it at each strength; ``drawing`` is (steps, guidance)."""
    steps, guidance = drawing
    seeds = settings.seeds
    groups = [seeds[start : start + _AT_ONCE] for start in range(0, len(seeds), _AT_ONCE)]
    found, passes, seconds = [], [], []
    for strength in track(settings.strengths, f"changing the picture with {name}"):
        start = time.perf_counter()
        with _counted_passes(model_of(pipeline)) as calls:
            drawn = [
                change_picture(
                    pipeline,
                    picture,
                    settings.prompt,
                    group,
                    strength=strength,
                    steps=steps,
                    guidance=guidance,
                    mask=mask,
                )
                for group in groups
            ]
        found.append(torch.cat(drawn))
        seconds.append((time.perf_counter() - start) / len(seeds))
        passes.append(len(calls) // len(groups))
    return _Drawn(torch.stack(found), tuple(passes), tuple(seconds))


def _models_rows(
    name: str,
    file: str,
    drawn: _Drawn,
    picture: Tensor,
    mask: Tensor | None,
    first: Tensor,
    settings: SweepSettings,
    scorer: Any,
) -> list[tuple[object, ...]]:
    """The rows of one model, in the order of its pictures; ``first`` are those of the first model."""
    rows: list[tuple[object, ...]] = []
    given = picture[None]
    for place, strength in enumerate(settings.strengths):
        found = drawn.pictures[place]
        count = len(found)
        clip, alike = [_NAN] * count, [_NAN] * count
        if scorer is not None:
            clip = clip_scores(scorer, found, [settings.prompt] * count).tolist()
            alike = likeness(scorer, found, given).tolist()
        pixels = _errors(found, given)
        kept = [_NAN] * count if mask is None or mask.all() else _errors(found, given, ~mask)
        apart = _errors(found, first[place])
        rows += [
            (
                name,
                strength,
                seed,
                settings.prompt,
                drawn.passes[place],
                f"{file}/strength-{strength:g}-seed-{seed}.png",
                *cells,
            )
            for seed, *cells in zip(
                settings.seeds, clip, alike, pixels, kept, apart, [drawn.seconds[place]] * count, strict=True
            )
        ]
    return rows


def _drawings(sources: Sequence[ModelSource], settings: SweepSettings) -> dict[str, tuple[int, float]]:
    """(steps, guidance) of each model by its name. Raises ConfigError where a strength takes none of the steps."""
    found = {}
    for source in sources:
        found[source.text] = drawing_asked(source, settings.steps, settings.guidance, changing=True)
        for strength in settings.strengths:
            check_strength(strength, found[source.text][0])
    return found


def sweep(
    sources: Sequence[ModelSource],
    picture: Path,
    settings: SweepSettings,
    out: Path,
    *,
    mask: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    finish: Callable[[Path, Sweep], object] | None = None,
) -> Sweep:
    """What each model of ``sources`` makes of ``picture`` at each strength, with the same noise: written to ``out`` as
    pictures and sweep.csv, of several seeds means.csv, too. With ``mask`` what is white in it is drawn anew, and
    nothing else.

    Scores are CLIP's with the prompt, the likeness to the picture that was given (both by the scorer of the first
    model, else not measured), mean squared differences of pixels from that picture, of those outside of the mask, and
    from what the first model made of it. ``finish`` adds to the folder. Raises UnsupportedModelError for a model that
    cannot; nothing is left then.
    """
    if not sources:
        raise RunError("asked to change a picture by no model; give one or more")
    texts = [source.text for source in sources]
    if twice := next((text for text in texts if texts.count(text) > 1), ""):
        raise ConfigError(
            f"asked to change a picture by {twice} twice, whose pictures would be the same; give it once"
        )
    for source in sources:
        if not source.is_pipeline:
            raise RunError(
                f"asked to change a picture with {source.text}, a {source.called} alone (kind: {source.kind}); give "
                "a pipeline folder or a hub id"
            )
        if not embedding_width(source.config):
            raise UnsupportedModelError(
                f"asked to change a picture towards a prompt with {source.text}, which reads no text; give a "
                "text-to-image model"
            )
    read: dict[str, tuple[Path, ...]] = {
        f"the model {source.text}": tuple(source.places) for source in sources
    }
    read |= {"the picture": (picture,), "the mask": (mask,) if mask else ()}
    out = check_folder(out, read, force=force)
    check_own_picture(picture)
    if mask is not None:
        check_own_picture(mask, mask=True)
    drawings = _drawings(sources, settings)
    choice = choose_scorer(settings.scorer, sources[0])
    scorer = load_scorer(choice.text, device=device) if choice.text else None
    note(f"scorer: {choice.name} ({choice.reason})")
    names = tuple(source.text for source in sources)
    files = file_names(names)
    rows: list[tuple[object, ...]] = []
    made: list[Tensor] = []
    given: Tensor | None = None
    given_mask: Tensor | None = None
    with output_folder(out, force=force) as temporary:
        for source, name, file in zip(sources, names, files, strict=True):
            pipeline = load_pipeline(source, device=device, dtype=dtype)
            changing_pipeline(pipeline, mask=mask is not None)
            check_steps(pipeline, drawings[name][0])
            side = picture_side(pipeline)
            own = read_own_picture(picture, side)
            own_mask = None if mask is None else read_own_mask(mask, side)
            given, given_mask = (own, own_mask) if given is None else (given, given_mask)
            drawn = _changed(pipeline, name, own, own_mask, settings, drawings[name])
            made.append(drawn.pictures)
            more = _models_rows(name, file, drawn, own, own_mask, made[0], settings, scorer)
            for row, one in zip(more, drawn.pictures.flatten(0, 1), strict=True):
                save_picture(temporary / str(row[SWEEP_COLUMNS.index("file")]), one)
            rows += more
            del pipeline
        assert given is not None
        save_picture(temporary / "given.png", given)
        frame = pd.DataFrame(rows, columns=list(SWEEP_COLUMNS))
        write_frame(temporary / "sweep.csv", frame)
        if len(settings.seeds) > 1:
            write_frame(temporary / "means.csv", sweep_means(frame))
        found = Sweep(frame, tuple(made), given, given_mask, names, f"{choice.name} ({choice.reason})")
        if finish is not None:
            finish(temporary, found)
    return found
