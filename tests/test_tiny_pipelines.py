"""The tiny pipelines of the tests are real ones: plain diffusers loads them and draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import KINDS, drawn


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_loads_the_folder_and_draws_a_picture(
    kind: str, pipeline_folder: Callable[[str], Path]
) -> None:
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder(kind))

    one, other = drawn(pipeline, kind, seed=0), drawn(pipeline, kind, seed=1)

    assert one.shape[-1] == 3
    assert one.isfinite().all()
    assert 0 <= one.min() < one.max() <= 1
    assert not torch.equal(one, other)
