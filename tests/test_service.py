"""The service of a budget on latency: its parts in any order, what is refused, pixels by the VAE."""

from __future__ import annotations

import inspect
import itertools
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_config

from prune_lab.errors import BudgetError, ConfigError, DeviceError, PruneLabError
from prune_lab.models import ModelSource, resolve_model
from prune_lab.profiling import Service, picture_size, pixels_per_latent, read_service, split_service
from prune_lab.profiling.latency import random_inputs
from prune_lab.search import service_named

OWN = Service(device="cpu", dtype="float32", batch=4, tokens=16)


@pytest.mark.parametrize("parts", list(itertools.permutations(("float16", "512", "batch=1"))))
def test_parts_stand_in_any_order(parts: tuple[str, ...]) -> None:
    budget, service = split_service(f"0.7x@{','.join(parts)}")
    assert budget == "0.7x"
    found = read_service(service, OWN, resolve_model("sd-v1.4"))
    assert found == Service("cpu", "float16", 1, 64, 16)
    assert found.text(resolve_model("sd-v1.4").config) == "cpu float16, 512 x 512, batch 1, 16 tokens"


def alone(config: dict[str, Any], folder: Path) -> ModelSource:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return resolve_model(str(folder / "config.json"))


def test_pixels_of_a_model_alone_are_what_its_family_knows(tmp_path: Path) -> None:
    """Those of pipelines of its class without a VAE, which diffusers writes down in each; words where nobody knows."""
    pipelines = {
        "PixArtTransformer2DModel": diffusers.PixArtSigmaPipeline,
        "SanaTransformer2DModel": diffusers.SanaPipeline,
        "SD3Transformer2DModel": diffusers.StableDiffusion3Pipeline,
        "FluxTransformer2DModel": diffusers.FluxPipeline,
        "WanTransformer3DModel": diffusers.WanPipeline,
        "LTXVideoTransformer3DModel": diffusers.LTXPipeline,
    }
    for name, pipeline in pipelines.items():
        config = tiny_config(name, **({"in_channels": 16, "out_channels": 16} if "Wan" in name else {}))
        words = inspect.getsource(pipeline.__init__)
        expected = 32 if re.search(r"else 32\b", words) else 8
        assert expected == 32 or re.search(r"else 8\b", words)
        source = alone(config, tmp_path / name)
        assert pixels_per_latent(source) == expected, name
        found = read_service(str(4 * expected), OWN, source)
        assert found.latent == 4
        assert f"{4 * expected} x {4 * expected}" in found.text(source.config)
        with pytest.raises(ConfigError, match=f"multiple of {expected}"):
            read_service(str(4 * expected + 1), OWN, source)
    pixels = {"sample_size": 16, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1}
    plain = {f"{way}_block_types": [f"{way.title()}Block2D"] * 2 for way in ("down", "up")}
    source = alone({"_class_name": "UNet2DModel", **pixels, **plain}, tmp_path / "unknown")
    assert pixels_per_latent(source) is None  # of a DDPM and of a latent diffusion model alike
    assert "latents of 16 x 16" in OWN.text(source.config)
    assert picture_size(source) == (None, "latents of 16 x 16")
    for ask in (lambda: picture_size(source, 32), lambda: read_service("32", OWN, source)):
        with pytest.raises(ConfigError, match="several: give the folder of its pipeline"):
            ask()


def test_what_is_not_said_is_the_runs_own(tiny_pipeline_folder: Path) -> None:
    tiny, preset = resolve_model(str(tiny_pipeline_folder)), resolve_model("sd-v1.4")
    assert (pixels_per_latent(tiny), pixels_per_latent(preset)) == (2, 8)  # the tiny VAE halves once
    assert read_service("48", OWN, tiny) == Service("cpu", "float32", 4, 24, 16)
    assert read_service(" cpu , fp16 , tokens = 7, compiled", OWN, preset) == Service(
        "cpu", "float16", 4, None, 7, "compiled"
    )


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("float61", BudgetError, "cannot read 'float61'.*batch=N"),
        ("batch=0", BudgetError, "cannot read 'batch=0'"),
        ("batch=1,batch=2", BudgetError, "says batch twice"),
        ("float16,bf16", BudgetError, "says dtype twice"),
        (" , ", BudgetError, "names nothing"),
        ("500", ConfigError, "multiple of 8, such as 496"),
        ("3", ConfigError, "such as 8"),
        ("cuda:99", DeviceError, "cuda:99"),
    ],
)
def test_a_service_that_cannot_be_read_is_refused(text: str, error: type[PruneLabError], words: str) -> None:
    with pytest.raises(error, match=words):
        read_service(text, OWN, resolve_model("sd-v1.4"))


def refused(text: str) -> str:
    with pytest.raises(PruneLabError) as caught:
        read_service(text, OWN, resolve_model("sd-v1.4"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(
    name=st.sampled_from(("batch", "tokens")),
    value=st.one_of(
        st.integers(100_001).map(str),
        st.integers(max_value=0).map(str),
        st.sampled_from(("\uff11", "\u0661", "1e3", "1_0", "0x1", "1.0", "nan", "\xb2", "9" * 5000)),
    ),
)
def test_numbers_of_a_service_have_bounds(name: str, value: str) -> None:
    assert name in refused(f"cpu,{name}={value}")


@given(st.integers(65_537, 99_999))
def test_pictures_of_a_service_have_bounds(pixels: int) -> None:
    assert "resolution" in refused(str(pixels))


def test_a_device_number_of_any_length_is_refused() -> None:
    for number in ("99999999999999999999", "9" * 5000):
        assert len(refused(f"cuda:{number}")) < 400


def test_a_service_that_does_not_fit_memory_is_told_with_its_cure() -> None:
    # 20 TB: more than any machine has
    sizes = {"batch": 65_536, "latent": 8_192, "tokens": 77}
    with pytest.raises(ConfigError, match=r"do not fit the memory.*smaller batch") as caught:
        random_inputs(resolve_model("sd-v1.4").config, **sizes)
    assert "\n" not in str(caught.value)


def test_a_run_has_one_service() -> None:
    assert service_named(()) == service_named(("macs<=65%", "latency<=35ms, params<=80%")) == ""
    one = "macs<=65%, latency<=0.7x@float16,512,batch=1"
    assert service_named(("params<=80%", one)) == "float16,512,batch=1"
    assert service_named((one, "latency<=0.9x@512, batch=1, float16")) in (
        "float16,512,batch=1",
        "512, batch=1, float16",
    )
    for other in ("latency<=0.5x", "latency<=0.5x@512"):
        with pytest.raises(BudgetError, match="different services"):
            service_named((one, other))
