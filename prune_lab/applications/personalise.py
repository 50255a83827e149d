"""The whole of it: pictures read, the class drawn, the subject learnt, and what was learnt written and proved."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune_lab.applications.before_and_after import (
    SHEET,
    BeforeAndAfter,
    draw_before_and_after,
    shown_in,
)
from prune_lab.applications.class_drawing import ClassPictures, class_pictures, kept_classes
from prune_lab.applications.personal import Learnt, PersonalSettings, check_takes_lora, learn_subject
from prune_lab.applications.pictures import read_own_pictures
from prune_lab.applications.saving import about, lora_name_of, save_lora, save_whole, told_in
from prune_lab.distill.data import LatentData
from prune_lab.distill.encoding import encode_data
from prune_lab.errors import ConfigError, DataError, RunError, StorageError, UnsupportedModelError
from prune_lab.evaluation import drawing_of
from prune_lab.families import embedding_width, model_of
from prune_lab.models import (
    ModelSource,
    drawing_asked,
    load_model,
    load_pipeline,
    note_trained_for_many,
    pipeline_digest,
    resolve_model,
)
from prune_lab.models.protection import check_folder, expanded
from prune_lab.models.silence import quiet
from prune_lab.probes import encode_captions, note_cut, picture_side
from prune_lab.runtime import note, tensors_digest

_BATCH = 8  # pictures of the class that are drawn at once


@dataclasses.dataclass(frozen=True, slots=True)
class Personalised:
    """What was learnt and where it lies."""

    out: Path
    settings: PersonalSettings
    learnt: Learnt
    pictures: int  # of the subject
    class_pictures: int
    class_folder: Path | None  # where they lie; None without any
    shown: BeforeAndAfter | None = None  # what it draws; None where nothing was drawn


def check_personal(source: ModelSource) -> None:
    """Raise RunError or UnsupportedModelError for a model that cannot learn a subject by a prompt."""
    if not source.is_pipeline or source.folder is None:
        raise RunError(
            f"asked to personalise {source.text}, a {source.called} alone (kind: {source.kind}); pictures and prompts "
            "are encoded with a VAE and a text encoder: give a pipeline folder or a hub id"
        )
    if not embedding_width(source.config):
        raise UnsupportedModelError(
            f"asked to personalise {source.text}, whose {source.called} reads no text; a subject is asked for by a "
            "prompt: give a text-to-image model"
        )


def _encoded(pipeline: Any, pictures: Tensor, prompt: str) -> LatentData:
    return encode_data(pipeline, pictures, [prompt] * len(pictures))


def _digest_of(pictures: Tensor) -> str:
    return tensors_digest({"pictures": pictures})[:16]


def _put_aside(pipeline: Any, model: Any) -> None:
    """Encoders are done with: only the model stays on the device."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part is not model:
            part.to("cpu")


def _class_drawn(
    pipeline: Any, model: str, settings: PersonalSettings, out: Path, drawing: tuple[int, float]
) -> ClassPictures:
    """Pictures of the class, drawn or kept; a line says how many of either, and where they lie."""
    steps, guidance = drawing
    try:
        found = class_pictures(
            pipeline,
            model,
            settings.class_prompt,
            settings.class_count,
            kept_classes(out),
            seed=settings.seed,
            steps=steps,
            guidance=guidance,
            batch=_BATCH,
        )
    except StorageError as error:
        raise StorageError(f"{error}; another place for the cache is named by XDG_CACHE_HOME") from None
    count = len(found.pictures)
    kept = f", {count - found.drawn} of them kept already" if found.drawn < count else ""
    note(f"{count} pictures of the class, drawn by the model{kept}: {found.folder}")
    return found


def _texts(pipeline: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    own, other = encode_captions(pipeline, prompts)[0]
    return own, other


def _drawer(
    source: ModelSource,
    pipeline: Any,
    model: Any,
    pictures: Tensor,
    settings: PersonalSettings,
    drawing: tuple[int, float],
    device: torch.device | str,
) -> Callable[[], BeforeAndAfter]:
    """What draws before and after with these, by (steps, guidance) ``drawing``."""
    steps, guidance = drawing
    return partial(
        draw_before_and_after,
        *(source, pipeline, model, pictures, settings),
        steps=steps,
        guidance=guidance,
        device=device,
    )


def _drawn_late(
    source: ModelSource,
    images: Path,
    out: Path,
    settings: PersonalSettings,
    drawing: tuple[int, float],
    device: torch.device | str,
    show: Callable[[Path, BeforeAndAfter], object],
) -> Personalised | None:
    """What the same call has learnt, after what it draws was shown: it was stopped while that was drawn, or not asked
    for it. None where ``out`` is not there, shows it already, or holds something else.
    """
    told = told_in(source, out, settings)
    if not settings.pictures or (out / SHEET).exists() or told is None:
        return None
    if told["model_digest"] != pipeline_digest(source):
        return None
    pipeline = load_pipeline(source, device=device)
    pictures, _ = read_own_pictures(images, picture_side(pipeline), "the subject")
    if told["pictures"]["digest"] != _digest_of(pictures):
        return None
    note(f"{out} holds what was learnt, whole; what it draws is drawn now")
    if settings.lora:
        with quiet():
            pipeline.load_lora_weights(out)
        model = model_of(pipeline)
    else:
        model = load_model(resolve_model(str(out.resolve())))

    draw = _drawer(source, pipeline, model, pictures, settings, drawing, device)
    count = (told["class_pictures"] or {"count": 0})["count"]
    return Personalised(
        out, settings, told["training"], len(pictures), count, None, shown_in(out, show, draw)
    )


def personalise(
    source: ModelSource,
    images: Path,
    out: Path,
    settings: PersonalSettings,
    *,
    class_images: Path | None = None,
    device: torch.device | str = "cpu",
    frozen: Sequence[str] = (),
    force: bool = False,
    finish: Callable[[Path, PersonalSettings], object] | None = None,
    show: Callable[[Path, BeforeAndAfter], object] | None = None,
) -> Personalised:
    """``source``, taught to draw the subject of the pictures in ``images`` for its token, in the folder ``out``: a
    pipeline, or with ``settings.lora`` a LoRA for it.

    Pictures of its class come from ``class_images``, or ``source`` draws them; those are kept in the user's cache, so
    that no other call has to draw them again; nor has it to train again, from the state beside ``out``, which is
    removed in the end. ``frozen`` are paths of modules that are not trained, ``finish`` adds to the folder before it
    gets its name. ``show`` adds to it afterwards what is drawn before and after: what was learnt is safe by then,
    whatever becomes of the drawing, which takes as much memory as anything here. Raises DataError for pictures that
    cannot be read, UnsupportedModelError or RunError for a model that cannot learn, StorageError where ``out`` may not
    be written, ProofError where what was written differs.

    Where ``out`` holds what the same call has learnt, and no pictures of it, these alone are drawn.
    """
    check_personal(source)
    if class_images is not None and not settings.prior_weight:
        raise ConfigError(
            f"asked for the pictures of the class in {class_images} with prior_weight = 0, by which they count "
            "nothing; leave one of the two away"
        )
    read = {
        "the model": source.places,
        "the pictures": (images,),
        "the pictures of the class": (class_images or "",),
    }
    drawing = drawing_asked(source, settings.class_steps, settings.guidance)
    if (
        show is not None
        and not force
        and (late := _drawn_late(source, images, expanded(out), settings, drawing, device, show))
    ):
        return late
    out = check_folder(out, read, force=force)
    note_trained_for_many(source)
    digest, pipeline = pipeline_digest(source), load_pipeline(source, device=device)
    drawing_of(pipeline)  # says what is in the way
    model, side = model_of(pipeline), picture_side(pipeline)
    if settings.lora:
        lora_name_of(pipeline, source.component)
        check_takes_lora(model)
    pictures, names = read_own_pictures(images, side, "the subject")
    prompts = [settings.prompt, settings.class_prompt]
    note_cut(pipeline, prompts, "prompts")
    if torch.equal(*_texts(pipeline, prompts)):
        raise DataError(
            f"asked to tell {settings.prompt!r:.80} from {settings.class_prompt!r:.80}, found that the text encoder "
            "reads both as the same; give another token, or a shorter prompt"
        )
    others, folder = None, class_images
    if settings.prior_weight and class_images is not None:
        others, _ = read_own_pictures(class_images, side, "the class")
    elif settings.prior_weight:
        found = _class_drawn(pipeline, digest, settings, out, drawing)
        others, folder = found.pictures, found.folder
    subject = _encoded(pipeline, pictures, settings.prompt)
    prior = None if others is None else _encoded(pipeline, others, settings.class_prompt)
    _put_aside(pipeline, model)
    state = out.with_name(f"{out.name}.state.safetensors")
    if force:
        state.unlink(missing_ok=True)
    learnt = learn_subject(
        model, pipeline.scheduler, subject, prior, settings, frozen=frozen, state_file=state
    )
    made = about(
        settings,
        learnt,
        {
            "model_digest": digest,
            "pictures": {"names": list(names), "digest": _digest_of(pictures)},
            "class_pictures": None
            if others is None
            else {
                "count": len(others),
                "drawn by the model": class_images is None,
                "digest": _digest_of(others),
            },
        },
    )
    end = None if finish is None else lambda written: finish(written, settings)
    if settings.lora:
        save_lora(source, pipeline, model, out, made, force=force, finish=end)
    else:
        save_whole(source, model, out, made, force=force, finish=end)
    state.unlink(missing_ok=True)
    count = 0 if others is None else len(others)
    shown = None
    if show is not None and settings.pictures:
        shown = shown_in(out, show, _drawer(source, pipeline, model, pictures, settings, drawing, device))
    return Personalised(out, settings, learnt, len(pictures), count, folder if count else None, shown)
