"""Loss curves during training, besides the CSV: TensorBoard, Weights & Biases and the other trackers of accelerate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from prune_lab.errors import ConfigError

Log = Callable[[Mapping[str, float], int], None]  # values by name, step


@contextmanager
def log_to_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[Log]:
    """A function that logs the values of a step to the trackers called ``names``; they are closed on exit.

    Trackers that write files write them into ``folder``. Only the main process logs. Raises ConfigError for a tracker
    that accelerate does not know or whose package is not installed.
    """
    if not names:
        yield lambda _values, _step: None
        return
    there = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(LOGGER_TYPE_TO_CLASS)
            raise ConfigError(f"distill.trackers asks for {name!r}; accelerate knows {known}")
        if name not in there:
            raise ConfigError(
                f"distill.trackers asks for {name!r}, whose package is not installed; install it, or leave it out"
            )
    accelerator = Accelerator(log_with=list(names), project_dir=str(folder))
    plain = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str))}
    accelerator.init_trackers("distillation", config=plain)
    try:
        yield lambda values, step: accelerator.log(dict(values), step=step)
    finally:
        # not end_training, which also ends the process group that the next rung needs
        for tracker in accelerator.trackers:
            tracker.finish()
