"""What a model is used for: pictures, few steps, a subject that it learns, other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_lab.api.applying import personal_settings, personal_table
from prune_lab.api.inspected import Inspected
from prune_lab.api.making import drawn_table, exported_table, place_of
from prune_lab.api.steps import steps_table
from prune_lab.config import check_numbers
from prune_lab.models import resolve_model
from prune_lab.runtime import progress_shown
from prune_lab.tables import Pictures, Table


class Used(Inspected):
    """A model that draws, learns a subject, and is written for other programs."""

    # Pictures

    def generate(
        self,
        *prompts: str,
        seed: int = 0,
        count: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
    ) -> Pictures:
        """``count`` pictures of each of ``prompts``, as a grid: a row per prompt, a column per seed from ``seed`` on.

        ``guidance`` is the scale of classifier-free guidance, 1 for none (None: 25 steps and 7.5, or 4 and 1 of a model
        that was distilled for few steps), ``resolution`` in pixels of a side (None: the model's own). Raises
        UnsupportedModelError for a model alone, DataError without a prompt, ConfigError for a number out of range.
        """
        check_numbers(seed=seed, count=count, steps=steps, guidance=guidance, resolution=resolution)
        with progress_shown():
            return drawn_table(
                self.source,
                prompts,
                tuple(range(seed, seed + count)),
                place_of(self.settings),
                steps=steps,
                guidance=guidance,
                resolution=resolution,
            )

    def few_steps(
        self,
        *others: str | Path | Used,
        out: str | Path,
        latency: str = "",
        dry_run: bool = False,
        **asked: Any,
    ) -> Table:
        """Time and quality of one picture of this model and of ``others`` in few steps; ``best`` rows are not beaten.

        ``out`` gets steps.csv, a figure, a page and pictures; the same call again goes on. With ``dry_run`` it says
        what would be drawn and timed and about how long that takes, and writes nothing. ``latency``, such as 200ms or
        0.5x, says in notes which lever meets it best. ``asked`` are steps=(4, 8), schedulers=("own", "unipc"),
        reuse=(2, 3) (one whole pass in so many), many=50, prompts=FILE, images, guidance, rounds, scorer and seed.
        Raises RunError for a model without its pipeline, ConfigError for a number or a name that cannot be used.
        """
        sources = [one.source if isinstance(one, Used) else resolve_model(str(one)) for one in others]
        with progress_shown():
            place = place_of(self.settings)
            return steps_table([self.source, *sources], Path(out), latency, place, asked, dry_run=dry_run)

    # What it is used for

    def personalise(
        self,
        images: str | Path,
        out: str | Path,
        *,
        token: str,
        subject_class: str,
        class_images: str | Path | None = None,
        force: bool = False,
        **settings: Any,
    ) -> Table:
        """Teach the model to draw the subject of the pictures in ``images`` for ``token``, and write that to ``out``.

        ``subject_class`` is what it is one of, such as ``dog``; pictures of others of its class come from
        ``class_images``, or the model draws them. With ``lora=RANK`` a LoRA is trained and written, else the whole
        model, as a pipeline folder. Settings are those of ``applications.PersonalSettings``: ``template``, ``steps``,
        ``batch``, ``learning_rate``, ``prior_weight``, ``class_count``, ``seed``, ``pictures`` (of each prompt, drawn
        before and after for the sheet, which ``plot()`` shows, too; 0: none), ... Raises ConfigError for a bad one,
        DataError for a picture that cannot be read, UnsupportedModelError for a model without text.
        """
        asked = personal_settings(token=token, subject_class=subject_class, **settings)
        with progress_shown():
            device = place_of(self.settings)["device"]
            return personal_table(
                self.source, Path(images), Path(out), asked, class_images, device, force=force
            )

    # Other programs

    def export(
        self,
        out: str | Path,
        to: str = "single-file",
        *,
        form: str = "native",
        dtype: str | None = None,
        weights: str = "",
        force: bool = False,
    ) -> Table:
        """Write the model to ``out`` in a format that other programs read; ``single-file`` is ComfyUI's and A1111's,
        ``onnx`` and ``openvino`` are folders that draw without torch, with ``weights="int8"`` smaller ones;
        ``executorch`` and ``coreml`` are folders for devices, of one picture of one size at a time.

        With ``form="neutral"`` a mid stage that is gone is there as the identity, for programs that need one.

        Raises UnsupportedModelError for another format and for a model that it cannot hold, StorageError where
        ``out`` is there already and ``force`` is not given.
        """
        with progress_shown():
            return exported_table(
                self.source, Path(out), to, form=form, dtype=dtype, force=force, weights=weights
            )
