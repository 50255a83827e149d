"""What is drawn, and how: the rows of prompts and seeds, and the protocols under which pictures are compared."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prune_lab.assets import load_pictures
from prune_lab.config import SHIPPED, DataConfig
from prune_lab.distill.sources import source_of
from prune_lab.errors import ConfigError, DataError
from prune_lab.models import ModelSource, drawing_asked, usual_drawing
from prune_lab.prompts import Prompts, read_prompts
from prune_lab.runtime import note, path_text, seeded

NOT_COMPARABLE = "not comparable with published figures: seeding"


@dataclass(frozen=True, slots=True)
class Protocol:
    """How pictures are drawn and kept; two sets of one protocol and one model are the same pictures."""

    steps: int = 25
    guidance: float = 7.5
    resolution: int | None = None  # pixels of a side that is drawn; None: the model's own
    dtype: str = "float32"
    kept: int | None = None  # pixels of a side that is kept and judged; None: as it is drawn
    jpeg: bool = False  # kept as JPEG, and made one before it is resized; else as PNG
    preset: str = ""
    note: str = ""  # what every table says

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the pixels, ready for JSON."""
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "resolution": self.resolution,
            "dtype": self.dtype,
            "kept": self.kept,
            "format": self.suffix,
        }

    @property
    def suffix(self) -> str:
        """The ending of the files."""
        return "jpg" if self.jpeg else "png"


# BK-SDM's protocol for 30 K captions of MS-COCO, but for its one generator that all prompts draw from in turn: with it
# a picture depends on the order of the prompts, on the batch, and on where a stopped job went on.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "coco30k": {"steps": 25, "guidance": 7.5, "kept": 256, "jpeg": True, "note": NOT_COMPARABLE},
}


def protocol_of(
    preset: str, *, steps: int, guidance: float, resolution: int | None, dtype: str, on_gpu: bool
) -> Protocol:
    """The protocol called ``preset``, or without one that of the settings.

    A preset says steps and guidance, and float16 on a GPU. Raises ConfigError for an unknown one.
    """
    if not preset:
        return Protocol(steps, guidance, resolution, dtype)
    if preset not in PRESETS:
        raise ConfigError(f"asked for the preset {preset!r:.60}; give {' or '.join(PRESETS)}, or none")
    return Protocol(
        resolution=resolution, dtype="float16" if on_gpu else dtype, preset=preset, **PRESETS[preset]
    )


def drawn_by(
    protocol: Protocol, source: ModelSource, steps: int | None = None, guidance: float | None = None
) -> Protocol:
    """How the pipeline ``source`` draws by ``protocol``: one that was distilled for few steps draws in these, where
    nobody asked for ``steps`` or ``guidance``; a line says so.
    """
    if not usual_drawing(source).few:
        return protocol
    taken, scale = drawing_asked(source, steps, guidance)
    if steps is None or guidance is None:
        note(
            f"{source.name} draws in {taken} steps with a guidance of {scale:g}, as it was distilled to; others in "
            f"{protocol.steps} with {protocol.guidance:g}"
        )
    return replace(protocol, steps=taken, guidance=scale)


# Rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One picture to be drawn: its file, its prompt and kind, and the seed of its noise."""

    file: str
    prompt: str
    kind: str
    number: int  # of the seeds of a prompt, from 0
    seed: int


def picture_seed(seed: int, prompt: str, occurrence: int, number: int) -> int:
    """The seed of the noise of a picture, from the seed of the job, the text, and how often that stood before.

    So it does not depend on other prompts, on their order, or on who draws it.
    """
    digest = hashlib.sha256(f"{seed}/{occurrence}/{number}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def shipped_prompts() -> Prompts:
    """The captions of the shipped held-out pictures, and their groups as kinds."""
    frame = load_pictures("heldout")
    return Prompts(tuple(frame["caption"]), tuple(frame["group"]))


def prompts_in(file: str) -> Prompts:
    """The prompts of ``file``, as ``read_prompts``; of a folder, .tar or .zip of pictures their captions; ``shipped``
    are those of the held-out pictures of the shipped models.

    Raises DataError where there are none.
    """
    if file == SHIPPED:
        return shipped_prompts()
    path = Path(file).expanduser()
    if not path.is_dir() and path.suffix.lower() not in (".tar", ".zip"):
        return read_prompts(file)
    captions = tuple(filter(str.strip, source_of(DataConfig(source=file)).captions))
    if not captions:
        raise DataError(
            f"asked for the captions of the pictures in {path_text(path)}, found none; give a file of prompts"
        )
    return Prompts(captions, ())


def rows_of(prompts: Prompts, images: int | None, *, seeds: int, seed: int, suffix: str) -> tuple[Row, ...]:
    """``seeds`` pictures of each of ``images`` of the prompts (None: all), prompt by prompt, in the order of the file.

    Fewer than all are drawn at random with ``seed``, so that a file that is sorted by kind gives some of each; what
    is asked for with a larger number holds them all. Names of files tell prompt and seed apart, so a picture is never
    taken for that of another prompt. Raises ConfigError for more than there are.
    """
    count = len(prompts.texts)
    if images is not None and not 1 <= images <= count:
        raise ConfigError(
            f"asked for images = {images}, found {count:,} prompts; give 1 to {count:,}, --seeds for several of each"
        )
    chosen = sorted(torch.randperm(count, generator=seeded(seed))[: images or count].tolist())
    before, found = Counter[str](), list[Row]()
    occurrences = []
    for text in prompts.texts:
        occurrences.append(before[text])
        before[text] += 1
    for row in chosen:
        text = prompts.texts[row]
        for number in range(seeds):
            own = picture_seed(seed, text, occurrences[row], number)
            file = f"{row:06d}-{own:016x}-{number}.{suffix}"
            found.append(Row(file, text, prompts.kinds[row] if prompts.kinds else "", number, own))
    return tuple(found)
