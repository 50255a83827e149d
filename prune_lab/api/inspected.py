"""What a model is and costs: the verbs that need no run."""

from __future__ import annotations

from pathlib import Path

from prune_lab.api.making import place_of, plans_of, profile_table, read_backends
from prune_lab.api.plans import Plan
from prune_lab.api.workplace import Workplace
from prune_lab.blocks import UNKNOWN_LATENT, blocks_frame, cost_notes
from prune_lab.config import check_numbers
from prune_lab.errors import PlanError
from prune_lab.families import knows_its_size
from prune_lab.plans import read_one_plan
from prune_lab.profiling import check_frames, cost_table, latent_of_pixels, size_text
from prune_lab.report import block_map_frame, draw_block_map
from prune_lab.runtime import progress_shown
from prune_lab.tables import Table
from prune_lab.width import widths_text
from prune_lab.workflow import levels_frame, stage_channels


class Inspected(Workplace):
    """A model with its blocks, plans and costs, each a table that shows itself."""

    def __repr__(self) -> str:
        blocks = self.architecture.blocks
        removable = sum(block.removable for block in blocks)
        return (
            f"{self.source.text}: {self.architecture.total_params:,} parameters, {len(blocks)} blocks, "
            f"{removable} of them can be removed"
        )

    def blocks(
        self, *, resolution: int | None = None, tokens: int | None = None, frames: int | None = None
    ) -> Table:
        """The blocks of the model: kind, channels, parameters, multiply-adds, and whether each can be removed.

        The multiply-adds are those of one picture of ``resolution`` pixels, ``tokens`` words of text, ``frames`` of the
        latent of a film (None: the model's own). ``widths`` says which parts of its inside a plan can take, and how
        many there are: ``hidden=16`` of Dn1.R1 is cut by ``~Dn1.R1.hidden=12/16``.
        """
        source = self.source
        check_numbers(resolution=resolution, tokens=tokens, frames=frames)
        check_frames(source, frames)
        frame = blocks_frame(self.architecture)
        frame["widths"] = [widths_text(self.architecture.sites, name) for name in frame["name"]]
        latent = None if resolution is None else latent_of_pixels(resolution, source)
        if resolution or tokens or frames:
            asked = latent or (None if knows_its_size(source.config) else UNKNOWN_LATENT)
            costs = cost_table(self.architecture, latent=asked, tokens=tokens or source.tokens, frames=frames)
            parts = [costs.part(name) for name in frame["name"]]
            frame["macs"] = [part.macs for part in parts]
            frame["attention_macs"] = [part.attention_macs for part in parts]
            frame["tokens"] = costs.tokens
        if latent is None and not knows_its_size(source.config):
            side = UNKNOWN_LATENT
            size = f"a {side} x {side} latent, as its config has no sample_size"
        else:
            size = size_text(source, latent, tokens, frames)
        title = f"Blocks of {source.text} (multiply-adds at {size})"
        mapped = block_map_frame(frame, self._scores())
        notes = cost_notes(self.architecture)
        return Table("blocks", frame, title, lambda theme: draw_block_map(mapped, theme), notes=notes)

    def levels(self) -> Table:
        """What ``narrow`` can make of the stages of a U-Net: their channels now, and what these can become.

        Raises UnsupportedModelError for a model that is no U-Net.
        """
        frame, now = levels_frame(self.source), stage_channels(self.source)
        note = (
            f"--channels takes a number for each stage, now {now}; stages of one row stay equal, those of "
            "neighbouring rows different"
        )
        return Table("levels", frame, f"Stages of {self.source.text}", notes=(note,))

    def plan(self, text: str | Path) -> Plan:
        """The plan that ``text`` describes: ``bk-small``, ``bk-base -Md``, ``-Dn1.R2 -Dn1.A2``, or a file of one;
        ``plans.json#2`` and ``plans.json#NAME`` are one of several in a file.

        Raises PlanError, UnknownBlockError or UnremovableBlockError.
        """
        return Plan(read_one_plan(str(text), self.architecture), self.architecture, self._scores())

    def profile(
        self,
        *plans: str | Plan,
        blocks: bool = False,
        pipeline: bool = False,
        latency: bool | None = None,
        steps: int = 25,
        batch: int = 1,
        resolution: int | None = None,
        tokens: int | None = None,
        frames: int | None = None,
        rounds: int = 20,
        backend: str = "",
    ) -> Table:
        """Parameters and multiply-adds of the model and of what each of ``plans`` leaves, the model first.

        With ``blocks`` a row per block, with ``pipeline`` one per part of the pipeline in a picture of ``steps`` steps.
        ``latency`` times a forward pass of ``batch`` samples in milliseconds, the plans in turns with the model in each
        of ``rounds`` (None: where there are weights). ``resolution`` is in pixels of the picture's sides, ``tokens`` in
        words of text, ``frames`` are those of the latent of a film (None: the model's own). Plans are taken in the form
        that ``prune`` gives them. ``backend``, such as ``eager,openvino``, gives a table of times alone, each model in
        a process of its own: eager, compile, onnx, openvino, executorch. Raises PlanError for a plan that cannot be
        read, or when two of the tables are asked for, ConfigError for a number out of range.
        """
        if (blocks or pipeline) and (plans or backend or blocks == pipeline):
            raise PlanError("blocks, pipeline and plans each give a table of their own; ask for one of them")
        backends = read_backends(backend)
        check_numbers(
            steps=steps, batch=batch, resolution=resolution, tokens=tokens, frames=frames, rounds=rounds
        )
        with progress_shown():
            return profile_table(
                self.source,
                plans_of(self.architecture, plans),
                place_of(self.settings),
                self._scores(),
                kind="pipeline"
                if pipeline
                else "block costs"
                if blocks
                else "runtimes"
                if backends
                else "reductions",
                backends=backends,
                latency=True if latency is None and self.settings.random_weights else latency,
                steps=steps,
                batch=batch,
                resolution=resolution,
                tokens=tokens,
                frames=frames,
                rounds=rounds,
            )
