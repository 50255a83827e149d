"""Files of models that somebody broke or made up: read as the libraries read them, or refused in one line and at once.

Cases are drawn: bytes and entries of safetensors headers, lists of shards, and every setting of a U-Net.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import SHAPES, TINY_UNET, BuiltOnce, build_unet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_bad_input import refused

from prune_lab.errors import ModelFormatError, PruneLabError, UnsupportedModelError
from prune_lab.export.single_file import export_single_file
from prune_lab.families import example_inputs
from prune_lab.models import resolve_model, weight_files
from prune_lab.models.files import MOST_HEADER, MOST_JSON, json_object, read_header, read_headers
from prune_lab.models.single_file import configs_of
from prune_lab.models.sources import preset_config


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """The body may refuse what it is given, in one line that can be read."""
    said = ""
    try:
        yield
    except PruneLabError as error:
        said = str(error)
    assert not said or (said.isprintable() and len(said) < 1000), said


# Headers ---------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
    "d": {"dtype": "F32", "shape": [0, 5], "data_offsets": [40, 40]},
}
BYTES = 40

# What stands where a whole number, a list or a text is meant; texts are put into the JSON as they are.
ODD_VALUES = [
    *("-1", "1e400", "-1e400", "NaN", "Infinity", "1.0", "1e2", "24.5", "true", "null", '"24"', "10" * 40),
    *("18446744073709551615", "18446744073709551616", "9223372036854775807", "9" * 4000, '"x"', "[]", "{}"),
    *("[[1]]", "[0]", "[0, 24, 24]", "[24, 0]", "[-24, 0]", "[0, 40]", "[0, 1e400]", '["0", "24"]'),
    *("[4294967296, 4294967296, 4294967296]", "[0, 9223372036854775807, 9223372036854775807]", '"\\ud800"'),
    *('"F32"', '"F64"', '"F8_E4M3"', '"Q4"', "[3, 2]", "[6]", "[2, 3, 1]", "[" * 300 + "]" * 300),
]


def written(path: Path, header: bytes, data: int = BYTES) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))
    return path


def as_the_library_reads(path: Path) -> dict[str, tuple[int, ...]] | None:
    """The shapes that safetensors itself finds; None where it refuses the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception:
        return None


def agrees_with_the_library(path: Path) -> None:
    """What is read here the library opens with the same shapes; what it does not open is refused in one line."""
    theirs = as_the_library_reads(path)
    ours = None
    with one_line():
        ours = {name: shape for name, (_, shape) in read_header(path).items()}
    if ours is not None or theirs is None:
        assert ours == theirs


def test_the_header_that_is_broken_below_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", json.dumps(GOOD).encode())
    assert read_header(path) == {
        name: (entry["dtype"], tuple(entry["shape"])) for name, entry in GOOD.items() if name[0] != "_"
    }
    agrees_with_the_library(path)


@settings(max_examples=120)
@given(
    name=st.sampled_from(list(GOOD)),
    key=st.sampled_from(["dtype", "shape", "data_offsets", ""]),
    value=st.sampled_from(ODD_VALUES),
)
@example(name="a", key="data_offsets", value="[0, 1e400]")
@example(name="a", key="data_offsets", value="[-24, 0]")
@example(name="a", key="", value="[[1]]")
def test_any_entry_of_a_header_is_read_as_the_library_reads_it(
    name: str, key: str, value: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = json.loads(json.dumps(GOOD))
    if key:
        header[name] = {**header[name], key: "HERE"}
    else:
        header[name] = "HERE"
    text = json.dumps(header).replace('"HERE"', value)
    agrees_with_the_library(
        written(tmp_path_factory.mktemp("header") / "x.safetensors", text.encode(errors="surrogatepass"))
    )


@settings(max_examples=150)
@given(
    place=st.integers(0, len(json.dumps(GOOD)) - 1),
    removed=st.integers(0, 30),
    added=st.binary(max_size=6) | st.sampled_from([value.encode() for value in ODD_VALUES]),
)
def test_any_bytes_of_a_header_are_read_as_the_library_reads_them(
    place: int, removed: int, added: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = json.dumps(GOOD).encode()
    broken = header[:place] + added + header[place + removed :]
    agrees_with_the_library(written(tmp_path_factory.mktemp("header") / "x.safetensors", broken))


@settings(max_examples=60)
@given(
    places=st.lists(st.tuples(st.integers(0, 6), st.integers(-1, 6)), min_size=1, max_size=4),
    size=st.integers(0, 24),
)
def test_places_that_overlap_or_leave_gaps_are_refused(
    places: list[tuple[int, int]], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    header = {
        str(number): {"dtype": "F32", "shape": [count], "data_offsets": [4 * begin, 4 * (begin + count)]}
        for number, (begin, count) in enumerate(places)
    }
    path = tmp_path_factory.mktemp("places") / "x.safetensors"
    agrees_with_the_library(written(path, json.dumps(header).encode(), size))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 200_000,
        b"[" * 200_000 + b"]" * 200_000,
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b'\xef\xbb\xbf{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.encode("utf-16"),
        b"",
    ],
)
def test_other_headers_that_no_library_opens(header: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", header, 1)
    assert as_the_library_reads(path) is None
    with pytest.raises(ModelFormatError, match="not a safetensors file"):
        read_header(path)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    one = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    path = written(tmp_path / "x.safetensors", f"{{{one},{one}}}".encode(), 1)
    with pytest.raises(ModelFormatError, match="there twice"):
        read_header(path)


def test_a_header_larger_than_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((MOST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MOST_HEADER + 100)
    with pytest.raises(ModelFormatError, match=f"at most {MOST_HEADER:,} are read"):
        read_header(path)


# Shards ----------------------------------------------------------------------------------------------------------

INDEX = "diffusion_pytorch_model.safetensors.index.json"
NAMES = st.recursive(
    st.none()
    | st.integers()
    | st.text(max_size=12)
    | st.sampled_from(
        [
            "",
            ".",
            "..",
            "../x.safetensors",
            "/etc/passwd",
            "x\0.safetensors",
            "a" * 5000,
            "a" * 5000 + ".safetensors",
            "config.json",
            "sub/x.safetensors",
            "folder.safetensors",
            "pipe.safetensors",
            "\ud800.safetensors",
            "x\ny.safetensors",
        ]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    save_file({"a": torch.zeros(1)}, folder / "good.safetensors")
    save_file({"a": torch.zeros(1)}, folder.parent / "x.safetensors")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    return folder


@settings(max_examples=80)
@given(
    weight_map=NAMES | st.dictionaries(st.text(max_size=3), NAMES | st.just("good.safetensors"), max_size=3)
)
def test_only_files_beside_its_index_are_shards(weight_map: object, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with one_line():
        assert weight_files(sharded) == (sharded / "good.safetensors",)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, paths[0])
    save_file({"c": torch.zeros(1)}, paths[1])
    assert set(read_headers(paths)) == {"a", "b", "c"}
    save_file({"b": torch.ones(1)}, paths[1])
    with pytest.raises(ModelFormatError, match=r"holds b, which another file"):
        read_headers(paths)


# Files that are none ---------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tiny_pipeline_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder of its own, free to be damaged; beside it nothing else lies in ``tmp_path``."""
    return Path(shutil.copytree(tiny_pipeline_folder, tmp_path / "pipeline"))


FILES = [
    *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "scheduler/scheduler_config.json"),
    *("tokenizer/tokenizer_config.json", "unet/notes.txt", "tokenizer/added.json"),
]


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("put", [a_pipe, a_device, a_folder])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused_and_not_waited_for(
    name: str, put: Callable[[Path], None], pipeline: Path
) -> None:
    path = pipeline / name
    path.unlink(missing_ok=True)
    put(path)
    if put is a_folder and not name.startswith(("model_index", "unet/config", "unet/diff", "vae/config")):
        return  # a folder more is nobody's business
    with pytest.raises(ModelFormatError) as caught:
        resolve_model(str(pipeline))
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_file_is_refused(tmp_path: Path) -> None:
    a_pipe(pipe := tmp_path / "model.safetensors")
    assert "a pipe" in refused_of(pipe)
    assert "a device" in refused_of(Path("/dev/zero"))


def refused_of(path: Path) -> str:
    with pytest.raises(Exception) as caught:
        resolve_model(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_config_larger_than_the_bound_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b" " * (MOST_JSON + 1))
    with pytest.raises(ModelFormatError, match=f"at most {MOST_JSON:,} are read"):
        json_object(path)


# Settings of a U-Net ---------------------------------------------------------------------------------------------

KEYS = [key for key in inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters if key != "self"]
SCALARS: list[Any] = [
    *(None, True, False, 0, 1, 2, 7, -1, 10**9, 10**30, 0.5, -0.5, math.nan, math.inf, -math.inf, 1e300),
    *("", "16", "silu", "x" * 10_000, "\ud800\n", "UNetMidBlock2D", "projection", "text_time", "layer_norm"),
]
TYPES = ["CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "AttnDownBlock2D"]
LISTS = (
    st.lists(st.sampled_from([1, 2, 8, 16]), min_size=3, max_size=5)
    | st.lists(st.sampled_from(SCALARS), max_size=5)
    | st.lists(st.sampled_from(TYPES), max_size=5)
    | st.lists(st.lists(st.integers(-1, 3), max_size=3), max_size=4)
    | st.sampled_from([[8] * 100_000, [[[1]]], [10**9] * 4])
)
HOSTILE = st.sampled_from(SCALARS) | LISTS | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)


def runs_in_plain_diffusers(config: dict[str, Any]) -> None:
    """Builds the model of ``config`` by diffusers itself and runs it: latents of its own size come out."""
    unet = build_unet(config)
    inputs = example_inputs(config, latent=None if config["sample_size"] else 8, tokens=3)
    with torch.no_grad():
        predicted = unet(**inputs).sample
    assert predicted.shape == (1, config["out_channels"], *inputs["sample"].shape[2:])


@pytest.mark.long
@settings(max_examples=60)
@given(shape=st.sampled_from(list(SHAPES)), key=st.sampled_from(KEYS), value=HOSTILE)
@example(shape="sd-v1", key="sample_size", value="16")
@example(shape="sd-v1", key="block_out_channels", value=[8, 16])
@example(shape="sdxl", key="transformer_layers_per_block", value=[1, 2, 3, 1])
@example(shape="sd-v1", key="attention_head_dim", value=3)
@example(shape="sd-v1", key="layers_per_block", value=10**9)
@example(shape="sd-v1", key="num_attention_heads", value=2)
@example(shape="sd-v2", key="class_embeddings_concat", value=True)
@example(shape="sd-v1", key="conv_in_kernel", value=2)
def test_a_unet_of_any_setting_runs_or_is_refused(
    shape: str, key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("setting") / "config.json"
    config = {**SHAPES[shape], key: value}
    path.write_text(json.dumps(config))
    with one_line():
        source = resolve_model(str(path))
        assert source.architecture.blocks
        runs_in_plain_diffusers(config)


@settings(max_examples=15)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), HOSTILE, min_size=2, max_size=4),
    left_out=st.sets(st.sampled_from(sorted(TINY_UNET)), max_size=2),
)
def test_a_unet_of_any_settings_together_runs_or_is_refused(
    changes: dict[str, Any], left_out: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("settings") / "config.json"
    config = {key: value for key, value in {**TINY_UNET, **changes}.items() if key not in left_out}
    path.write_text(json.dumps(config))
    with one_line():
        resolve_model(str(path))


# A setting, what it is wrongly, and what is said of it.
WRONG: dict[str, Any] = {
    "sample_size": "16",
    "block_out_channels": [8, 16, 32],
    "attention_head_dim": 5,
    "transformer_layers_per_block": [1, 1],
    "norm_num_groups": 3,
    "cross_attention_dim": -1,
    "layers_per_block": True,
    "mid_block_type": "NoSuchBlock2D",
    "addition_embed_type": "text_time",
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_setting_is_named_wherever_it_stands(key: str, pipeline: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: WRONG[key]}))
    for place in (path, path.parent, pipeline):
        with pytest.raises(UnsupportedModelError, match="no U-Net can be built") as caught:
            resolve_model(str(place))
        assert str(caught.value).isprintable()
        assert str(path) in str(caught.value)
        named = key.replace("addition_embed_type", "addition_time_embed_dim")
        assert named in str(caught.value) or str(WRONG[key]) in str(caught.value)


def test_a_wrong_setting_ends_a_verb_in_one_line(pipeline: Path, tmp_path: Path) -> None:
    path = pipeline / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": "16"}))
    line = refused(tmp_path, "blocks", path)
    assert "sample_size '16'; it must be a whole number from 1 to 4,096, or two of them" in line
    assert "sample_size '16'" in refused(
        tmp_path, "prune", pipeline, "--plan", "bk-base", "--out", tmp_path / "x"
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vae/config.json", {"layers_per_block": 10**9}),
        ("vae/config.json", {"latent_channels": 10**12}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}),
        ("text_encoder/config.json", {"vocab_size": 10**15}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("unet/config.json", {"notes": {"some_layers": [1, 10**6]}}),
    ],
)
def test_what_is_too_large_to_be_built_is_not_begun(
    name: str, changes: dict[str, Any], pipeline: Path
) -> None:
    path = pipeline / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UnsupportedModelError, match="where at most"):
        resolve_model(str(pipeline))


# Single files ----------------------------------------------------------------------------------------------------

SETTING = st.sampled_from(
    [None, {}, [], "x", 1, {"unet": {}}, {"model_index": {}}, {"model_index": 3}, {"../../out": {"a": 1}}]
)


@pytest.fixture(scope="module")
def exported(built_once: BuiltOnce, tiny_pipeline_folder: Path) -> Path:
    """A single file that the tiny pipeline was exported to, with its configs in the metadata."""

    def export(folder: Path) -> None:
        folder.mkdir()
        export_single_file(resolve_model(str(tiny_pipeline_folder)), folder / "one.safetensors")

    return built_once("hostile-single-file", export) / "one.safetensors"


def with_metadata(path: Path, out: Path, change: Callable[[dict[str, Any]], dict[str, str]]) -> Path:
    """A copy of the file whose ``__metadata__`` are changed."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = change(header["__metadata__"])
    text = json.dumps(header).encode()
    out.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return out


@settings(max_examples=10)
@given(
    part=st.sampled_from(["model_index", "unet", "vae", "scheduler", "text_encoder", "../../x", "/tmp/x"]),
    key=st.sampled_from(["_class_name", "sample_size", "vocab_size", "block_out_channels", "unet", "x"]),
    value=HOSTILE | SETTING,
)
def test_any_setting_in_the_metadata_of_a_single_file_is_read_or_refused(
    part: str, key: str, value: Any, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def change(metadata: dict[str, Any]) -> dict[str, str]:
        configs = json.loads(metadata["prune_lab.configs"])
        configs[part] = {**configs.get(part, {}), key: value} if key != "x" else value
        return metadata | {"prune_lab.configs": json.dumps(configs)}

    path = with_metadata(exported, tmp_path_factory.mktemp("single") / "x.safetensors", change)
    with one_line():
        configs_of(path, preset_config)


@settings(max_examples=20)
@given(
    text=st.text(max_size=20) | SETTING.map(json.dumps) | st.just("[" * 100_000),
    name=st.sampled_from(["prune_lab.configs", "prune_lab.tokenizers"]),
)
def test_any_metadata_of_a_single_file_are_read_or_refused(
    text: str, name: str, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = with_metadata(
        exported,
        tmp_path_factory.mktemp("single") / "x.safetensors",
        lambda metadata: metadata | {name: text.encode(errors="replace").decode()},
    )
    with one_line():
        configs_of(path, preset_config)
