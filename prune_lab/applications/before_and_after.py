"""What a model draws before and after it learnt a subject: the same prompts from the same noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.applications.personal import PersonalSettings
from prune_lab.evaluation import generate
from prune_lab.models import ModelSource, load_model
from prune_lab.models.silence import quiet
from prune_lab.runtime import note, return_freed

SHEET = "pictures.png"  # in a folder of what was learnt: shows what is drawn


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BeforeAndAfter:
    """Pictures (P, N, 3, H, W) uint8 of P prompts and N seeds, drawn before and after the subject was learnt from the
    pictures ``given`` (G, 3, H, W) uint8.
    """

    given: Tensor
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    before: Tensor
    after: Tensor
    steps: int
    guidance: float


def _drawn(
    pipeline: Any, prompts: tuple[str, ...], seeds: tuple[int, ...], model: Any, how: dict[str, Any]
) -> Tensor:
    # one at a time: pictures do not depend on it, and what the memory was large enough for before, it is again
    found = generate(pipeline, prompts, seeds, model=model, batch=1, **how)
    return found.reshape(len(prompts), len(seeds), *found.shape[1:])


def draw_before_and_after(
    source: ModelSource,
    pipeline: Any,
    model: Any,
    given: Tensor,
    settings: PersonalSettings,
    *,
    steps: int,
    guidance: float,
    device: torch.device | str,
) -> BeforeAndAfter:
    """What ``pipeline`` draws with ``model``, which has learnt the subject of the pictures ``given``, and with that of
    ``source``, which is loaded again; ``settings.pictures`` of each of ``settings.shown_prompts``.

    ``model`` is left on the CPU in float32, the other parts on ``device``. Raises what loading and drawing raise.
    """
    return_freed()  # of the training
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part is not model:
            part.to(device)
    with quiet():  # diffusers warns of any change of the format
        model.to(device, torch.float32)
    prompts, how = settings.shown_prompts, {"steps": steps, "guidance": guidance}
    first = settings.seed + settings.class_count  # none of the pictures of the class that it learnt from
    seeds = tuple(range(first, first + settings.pictures))
    after = _drawn(pipeline, prompts, seeds, model, how)
    model.to("cpu")  # two of them may be one too many
    return_freed()
    before = _drawn(pipeline, prompts, seeds, load_model(source, device=device), how)
    return BeforeAndAfter(given, prompts, seeds, before, after, steps, guidance)


def shown_in(
    out: Path, show: Callable[[Path, BeforeAndAfter], object], draw: Callable[[], BeforeAndAfter]
) -> BeforeAndAfter | None:
    """What ``draw`` draws, after it was shown in the folder ``out``; None, and a line, where that does not come off."""
    try:
        found = draw()
        show(out, found)
        return found
    except (
        Exception
    ) as error:  # whatever it is, and out of memory is likely: what was learnt is written and proved
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        note(
            f"no pictures of what was learnt: {why}; {out} is whole, and the same command again draws them alone"
        )
        return None
    except BaseException:  # stopped, as a drawing that takes too long may be
        note(
            f"stopped while drawing what was learnt: {out} is whole, and the same command again draws it alone"
        )
        raise
