"""The cache of encoded images: its numbers, and builds that are stopped, shared among processes, damaged, mended."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_images import CACHED, CAPTIONS, MANY, captions_of, open_source, png_image

from prune_lab.config import DataConfig
from prune_lab.distill import LatentCache, LiveData, build_cache
from prune_lab.distill.decoding import decode_image
from prune_lab.distill.encoding import crop_variants, provenance_of
from prune_lab.distill.shard_locks import begin
from prune_lab.errors import DataError
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.probes import encode_captions, encode_distributions

pytestmark = pytest.mark.usefixtures("one_thread")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def everything(data: Any) -> list[torch.Tensor]:
    """Every variant of every row of training data, in order."""
    count = len(data)
    parts = [
        data.rows(torch.arange(count), torch.full((count,), variant)) for variant in range(data.variants)
    ]
    return [tensor for part in parts for tensor in (part.mean, part.log_variance, part.embeddings)]


def test_the_cache_holds_what_the_encoders_say(
    tiny_pipeline: Any, image_folder: Path, tmp_path: Path
) -> None:
    settings = dataclasses.replace(CACHED, flip=True)
    cache = build_cache(tiny_pipeline, open_source(str(image_folder)), settings, tmp_path / "cache").cache
    assert (len(cache), cache.variants, cache.channels, cache.empty_embedding.shape[-1]) == (7, 2, 4, 16)
    assert [shard.rows for shard in cache.shards] == [3, 3, 1]
    assert captions_of(cache) == CAPTIONS
    pixels = torch.cat(
        [crop_variants(decode_image(png_image(row)), 32, CACHED, row, (0,)) for row in range(7)]
    )
    scale = tiny_pipeline.vae.config.scaling_factor
    chosen = torch.tensor([6, 0, 3, 3])
    for variant, images in enumerate((pixels, pixels.flip(-1))):
        rows = cache.rows(chosen, torch.full((4,), variant))
        with torch.no_grad():
            found = tiny_pipeline.vae.encode(images[chosen].float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(rows.mean, found.mean * scale)
        noise = torch.randn_like(found.mean)
        drawn = (found.mean + found.std * noise) * scale
        torch.testing.assert_close(rows.mean + (rows.log_variance / 2).exp() * noise, drawn)
        torch.testing.assert_close(rows.embeddings, encode_captions(tiny_pipeline, CAPTIONS)[0][chosen])
    torch.testing.assert_close(cache.empty_embedding, encode_captions(tiny_pipeline, [""])[0][0])


def test_a_cache_is_built_once(tiny_pipeline: Any, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    first = build_cache(tiny_pipeline, open_source(str(image_folder)), MANY, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = build_cache(tiny_pipeline, open_source(str(image_folder)), MANY, out)
    assert (first.encoded, again.encoded) == (7, 0)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert again.cache.digest == first.cache.digest


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import prune_lab.distill.sharding as sharding
from prune_lab.config import DataConfig
from prune_lab.distill import build_cache, source_of
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.runtime.holders import temporary_beside
whole = sharding._write_shard
def dying(path, *more):
    if path.name == "shard-00001.safetensors":
        temporary_beside(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, *more)
sharding._write_shard = dying
model, images, out = sys.argv[1:]
pipeline = load_pipeline(resolve_model(model))
build_cache(pipeline, source_of(DataConfig(source=images)), DataConfig(shard=3, batch=2), Path(out))
"""


@pytest.mark.long
def test_a_build_that_was_killed_goes_on_to_the_same_cache(
    tiny_pipeline: Any, tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "cache", open_source(str(image_folder))
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_pipeline_folder), str(image_folder), str(out)],
        timeout=120,
        check=False,
    )
    assert found.returncode == -signal.SIGKILL
    listed, half, lock, shard = sorted(files(out))
    assert (listed, lock) == (".prune_lab_files.json", ".shard-00001.safetensors.lock")
    assert (half[:25], half[-4:], shard) == (".shard-00001.safetensors.", ".tmp", "shard-00000.safetensors")
    with pytest.raises(DataError, match="unfinished"):
        LatentCache.load(out)
    resumed = build_cache(tiny_pipeline, source, CACHED, out)
    assert resumed.encoded == 4
    build_cache(tiny_pipeline, source, CACHED, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.long
def test_two_processes_build_the_cache_of_one(
    tiny_pipeline: Any, tiny_pipeline_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "together"
    verb = [
        *("data", str(tiny_pipeline_folder), "--data", str(image_folder), "--out", str(out)),
        *("--set", "data.shard=2", "--set", "data.batch=2", "--flip", "--device", "cpu", "--json"),
    ]
    code = f"import sys; sys.argv = {['prune-lab', *verb]!r}; from prune_lab.cli import main; main()"
    (tmp_path / "verb.py").write_text(code, encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    found = subprocess.run(
        [*launch, "--main_process_port", "0", str(tmp_path / "verb.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    (row,) = json.loads(found.stdout)
    assert (row["rows"], row["encoded"], row["shards"], row["variants"]) == (7, 7, 4, 2)
    settings = DataConfig(shard=2, batch=2, flip=True)
    build_cache(tiny_pipeline, open_source(str(image_folder)), settings, tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")


def test_each_process_builds_its_share(
    tiny_pipeline: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_lab.distill import sharding

    built: list[str] = []
    whole = sharding._write_shard

    def watched(path: Path, *more: Any) -> None:
        built.append(path.name)
        whole(path, *more)

    class Second:
        process_index, num_processes, is_main_process = 1, 2, False

        def wait_for_everyone(self) -> None: ...

    monkeypatch.setattr(sharding, "_write_shard", watched)
    monkeypatch.setattr(sharding, "PartialState", Second)
    source, names = open_source(str(image_folder)), [f"shard-{row:05d}.safetensors" for row in range(3)]
    begin(tmp_path / "cache", names, provenance_of(tiny_pipeline, source, CACHED))  # as the main process does
    with pytest.raises(DataError, match="unfinished"):  # the main process, which ends the build, is not there
        build_cache(tiny_pipeline, source, CACHED, tmp_path / "cache")
    assert built == ["shard-00001.safetensors"]


def test_another_recipe_is_refused_by_name(
    tiny_pipeline: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "cache", open_source(str(image_folder))
    build_cache(tiny_pipeline, source, CACHED, out)
    (out / "mine.txt").write_text("stays")
    other = dataclasses.replace(CACHED, flip=True, shard=2)
    with pytest.raises(DataError, match=r"flip False there, True here; .*shard 3 there, 2 here\); .*--force"):
        build_cache(tiny_pipeline, source, other, out)
    (out / "cache.json").unlink()  # an unfinished cache says so as well
    with pytest.raises(DataError, match="flip False there, True here"):
        build_cache(tiny_pipeline, source, other, out)
    with pytest.raises(DataError, match=r"data \w{16} there"):
        build_cache(tiny_pipeline, open_source(str(image_folder), limit=4), CACHED, out)
    changed = load_pipeline(resolve_model(str(tiny_pipeline.config._name_or_path)))
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight[0] += 1
    with pytest.raises(DataError, match=r"encoders \w{16} there"):
        build_cache(changed, source, CACHED, out)
    found = build_cache(tiny_pipeline, source, other, out, force=True).cache
    assert (found.variants, len(found.shards)) == (2, 4)
    assert (out / "mine.txt").read_text() == "stays"


def test_damage_is_named_and_mended(tiny_pipeline: Any, image_folder: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "cache", open_source(str(image_folder))
    digest = build_cache(tiny_pipeline, source, CACHED, out).cache.digest
    shard = out / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"bytes of shard-00001.*again"):
        LatentCache.load(out)
    assert build_cache(tiny_pipeline, source, CACHED, out).encoded == 3
    assert shard.read_bytes() == whole
    index = (out / "cache.json").read_text(encoding="utf-8")
    of_shard = LatentCache.load(out).shards[1].digest
    (out / "cache.json").write_text(index.replace(of_shard, "0" * 16), encoding="utf-8")
    with pytest.raises(DataError, match="replaced"):
        LatentCache.load(out).rows(torch.tensor([4]), torch.tensor([0]))
    shard.unlink()
    assert build_cache(tiny_pipeline, source, CACHED, out).cache.digest == digest
    (out / "cache.json").write_text("{}")
    with pytest.raises(DataError, match=r"cache\.json, found no 'channels'; delete it and make it again"):
        LatentCache.load(out)


def test_a_cache_that_lost_a_shard_is_unfinished_until_it_is_mended(
    tiny_pipeline: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    out, source = tmp_path / "cache", open_source(str(image_folder))
    build_cache(tiny_pipeline, source, CACHED, out)
    (out / "shard-00001.safetensors").unlink()
    monkeypatch.setattr("prune_lab.distill.sharding._write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tiny_pipeline, source, CACHED, out)
    with pytest.raises(DataError, match="unfinished"):
        LatentCache.load(out)


def test_broken_pictures_are_left_out_and_counted(
    tiny_pipeline: Any, image_folder: Path, tmp_path: Path
) -> None:
    (image_folder / "0.png").write_bytes(png_image(0)[:700])
    (image_folder / "more" / "5.png").write_bytes(b"no image")
    source = open_source(str(image_folder))
    cache = build_cache(tiny_pipeline, source, CACHED, tmp_path / "cache").cache
    assert [shard.rows for shard in cache.shards] == [2, 2, 1]
    assert captions_of(cache) == (*CAPTIONS[1:5], CAPTIONS[6])
    assert [text.split(":")[0] for text in cache.left_out] == [
        str(image_folder / "0.png"),
        str(image_folder / "more/5.png"),
    ]
    mean, _ = encode_distributions(
        tiny_pipeline, crop_variants(decode_image(png_image(6)), 32, CACHED, 6, (0,))
    )
    torch.testing.assert_close(cache.rows(torch.tensor([4]), torch.tensor([0])).mean, mean)
    live = LiveData.of(tiny_pipeline, source, CACHED)
    with pytest.raises(DataError, match=r"5\.png.*data\.cached = true"):
        live.rows(torch.tensor([4, 5]), torch.tensor([0, 0]))
    for path in image_folder.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of them can be read"):
        build_cache(tiny_pipeline, open_source(str(image_folder)), CACHED, tmp_path / "other")


def test_float16_is_half_the_size_and_nearly_the_same(
    tiny_pipeline: Any, image_folder: Path, tmp_path: Path
) -> None:
    source = open_source(str(image_folder))
    whole = build_cache(tiny_pipeline, source, MANY, tmp_path / "whole").cache
    half = build_cache(
        tiny_pipeline, source, dataclasses.replace(MANY, format="float16"), tmp_path / "half"
    ).cache
    assert 0.45 < half.bytes / whole.bytes < 0.6
    for found, wanted in zip(everything(half), everything(whole), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert half.digest != whole.digest


def test_only_the_pages_of_the_chosen_rows_are_read(
    tiny_pipeline: Any, tmp_path: Path, image_folder: Path
) -> None:
    cache = build_cache(tiny_pipeline, open_source(str(image_folder)), MANY, tmp_path / "cache").cache
    cache.rows(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert list(cache._mapped) == [0]
    mapped = cache._mapped[0]["mean"]
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in lines if "shard-00000" in line]
    assert any(int(start, 16) <= mapped.data_ptr() < int(end, 16) for start, end in spans)
