"""Keeping the libraries underneath from talking over our own output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import diffusers
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, diffusers, transformers and the hub client draw no bars and log errors only."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    hub_disabled = are_progress_bars_disabled()
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        disable_progress_bars()
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
        (disable_progress_bars if hub_disabled else enable_progress_bars)()
