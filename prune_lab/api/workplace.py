"""Where a model is worked on: its settings, and the run folder in which results lie."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from prune_lab.api.results import RunResults, open_run
from prune_lab.api.settings import settings_by_name
from prune_lab.blocks import Architecture
from prune_lab.config import SETTINGS, RunConfig, changed_settings, with_settings
from prune_lab.models import ModelSource, configured_model, recorded_model
from prune_lab.models.protection import Sources, check_run_folder, sources_of
from prune_lab.processes import is_main
from prune_lab.runs import Run, read_records, writing
from prune_lab.runtime import progress_shown
from prune_lab.schemas import IMPORTANCE
from prune_lab.workflow import (
    Session,
    forget,
    start_run,
)

_LOADED = {
    "source",
    "architecture",
    "device",
    "dtype",
    "pipeline",
    "model",
}  # by the settings of the model


class Workplace:
    """A model, its settings, and its run folder: a temporary one, gone with this object, unless it is named."""

    def __init__(self, settings: RunConfig, run: Path | None = None) -> None:
        self.settings = settings
        self.source: ModelSource = (
            configured_model(settings) if run is None else recorded_model(settings, run)
        )
        self._temporary = run is None
        self.folder = Path(tempfile.mkdtemp(prefix="prune-lab-")) if run is None else run
        if self._temporary:
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._session: Session | None = None

    @property
    def architecture(self) -> Architecture:
        """The inventory of the model; needs no weights."""
        return self.source.architecture

    def _read_by(self, settings: RunConfig) -> Sources:
        """What a job with ``settings`` is made from."""
        return {**sources_of(settings), "the model": self.source.places}

    @property
    def _named(self) -> str:
        """What the results are called: by their folder, or by the model where that is a temporary one."""
        return self.source.text if self._temporary else str(self.folder)

    @property
    def results(self) -> RunResults:
        """Everything that was found so far. Raises RunError before the first step."""
        return open_run(self.folder)

    def _scores(self) -> pd.DataFrame | None:
        run = Run(self.folder)
        return read_records(run.importance, IMPORTANCE) if run.done(run.importance) else None

    @contextlib.contextmanager
    def _opened(
        self, verb: str, given: Mapping[str, object], *, redo: str = "", force: bool = False
    ) -> Iterator[Session]:
        """The session of the run folder with the settings ``given``; ``redo`` names the step that is done anew."""
        settings = with_settings(self.settings, settings_by_name(verb, given))
        forced = force or bool(redo) or self._temporary
        with contextlib.ExitStack() as stack:
            if is_main():
                stack.enter_context(progress_shown())
            if not self._temporary:
                check_run_folder(self.folder, settings, **{"the model": self.source.places})
            stack.enter_context(writing(Run(self.folder)))
            with PartialState().main_process_first():
                run = start_run(settings, self.folder, force=forced)
                if redo:
                    forget(run, redo)
            self.settings = settings
            session = Session(run)
            old, self._session = self._session, session
            if old is not None:
                changed = changed_settings(old.config, session.config)
                if not any(SETTINGS[name].read_by == "blocks" for name in changed):
                    # What is loaded stays loaded: a cached property that is in the instance is not computed.
                    vars(session).update(
                        {name: value for name, value in vars(old).items() if name in _LOADED}
                    )
            yield session
