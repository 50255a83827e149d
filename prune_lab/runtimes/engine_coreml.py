"""Runs one part of an exported pipeline with Core ML; needs coremltools on macOS, and is copied along as ``engine.py``.

Where torch is installed coremltools imports it; an app reads the same files without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ENDING = ".mlpackage"


def load(path: Path, threads: int = 0, precision: str = "f32") -> Callable[[Mapping[str, Any]], list[Any]]:
    """What answers named arrays with the list of its outputs; Core ML decides where and with how many threads.

    Inputs that the part does not take are left aside. The numbers are those in the file: ``precision`` decides nothing.
    Raises RuntimeError anywhere but on macOS.
    """
    here = str(sys.platform)  # as a word: types of what follows are to be checked on other platforms too
    if here != "darwin":
        raise RuntimeError(f"Core ML runs on macOS alone, this is {here}: copy the folder there")
    import coremltools
    import numpy as np

    model = coremltools.models.MLModel(str(path))
    described = model.get_spec().description
    taken = [one.name for one in described.input]
    answered = [one.name for one in described.output]

    def answer(given: Mapping[str, Any]) -> list[Any]:
        # it knows no whole numbers of 64 bits
        inputs = {
            name: given[name].astype(np.int32 if given[name].dtype.kind == "i" else np.float32)
            for name in taken
        }
        found = model.predict(inputs)
        return [np.asarray(found[name], np.float32) for name in answered]

    return answer
