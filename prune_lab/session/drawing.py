"""What the model draws itself where it has no other pictures: prompts for each use, and the probe."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from prune_lab.config import EvaluateConfig, ProbeConfig
from prune_lab.errors import DataError
from prune_lab.evaluation import generate
from prune_lab.families.drawing import class_texts
from prune_lab.probes import Probe
from prune_lab.prompts import Prompts
from prune_lab.runtime import seeded
from prune_lab.session.own import probe_of_few, told_classes


@dataclasses.dataclass(frozen=True, slots=True)
class PromptParts:
    """Prompts for each use; no prompt is in two of them."""

    probe: Prompts
    shown: Prompts  # what teacher and students draw to be compared
    data: Prompts  # of pictures to train on and to validate with


def prompt_parts(prompts: Prompts, *, probe: int, shown: int, seed: int) -> PromptParts:
    """``prompts`` in parts of these sizes, drawn with ``seed``, and all others for the data.

    Of few prompts half at least are left for the data. Raises DataError for fewer than four.
    """
    if len(prompts.texts) < 4:
        raise DataError(
            f"asked to draw pictures for the probe, to compare and to train on, found {len(prompts.texts)} prompts; "
            "give four at least with data.prompts"
        )
    probe, shown = (min(count, len(prompts.texts) // 4) for count in (probe, shown))
    order = torch.randperm(len(prompts.texts), generator=seeded(seed)).tolist()

    def chosen(rows: list[int]) -> Prompts:
        kinds = tuple(prompts.kinds[row] for row in rows) if prompts.kinds else ()
        return Prompts(tuple(prompts.texts[row] for row in rows), kinds)

    cuts = probe, probe + shown
    return PromptParts(
        chosen(order[: cuts[0]]), chosen(order[cuts[0] : cuts[1]]), chosen(sorted(order[cuts[1] :]))
    )


def untexted_parts(classes: int, *, probe: int, shown: int) -> PromptParts:
    """What a model that reads no text is asked for, for each use: its ``classes`` in turn, or pictures by name.

    Training pictures start from noise of their own, so they differ from all of these.
    """
    most = classes or probe + shown
    counts = min(shown, most), min(probe, most)
    parts = [class_texts(classes, count, first) for count, first in zip(counts, (0, counts[0]), strict=True)]
    shown_texts, probe_texts = (Prompts(texts, ("",) * len(texts)) for texts in parts)
    return PromptParts(probe_texts, shown_texts, Prompts(("",), ("",)))


def drawn_probe(
    pipeline: Any, prompts: Prompts, settings: ProbeConfig, how: EvaluateConfig, *, steps: int, seed: int
) -> Probe:
    """A probe of the final latents that ``pipeline`` draws for ``prompts`` in ``steps`` denoising steps.

    The pictures are drawn with ``probe.seed``; ``seed`` draws the noise and timesteps of the rows. Few pictures give
    several rows each (see ``probe_of_few``).
    """
    latents = generate(
        pipeline, prompts.texts, (settings.seed,), steps=steps, guidance=how.guidance, latents=True
    )
    kinds = prompts.kinds or ("",) * len(prompts.texts)
    text = told_classes(pipeline, prompts.texts)
    return probe_of_few(pipeline, latents, prompts.texts, kinds, settings, seed=seed, text=text)
