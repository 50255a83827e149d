"""Training pictures: where they come from, their variants, the sharded cache, and batches drawn from it."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from distilling import SCHEDULER, made_up_data
from PIL import Image
from typer.testing import CliRunner

from prune_lab.cli import app
from prune_lab.config import DataConfig, DistillConfig, RunConfig
from prune_lab.distill import (
    ImageSource,
    LatentCache,
    LatentData,
    LiveData,
    build_cache,
    draw_batch,
    open_source,
    source_of,
    training_data,
)
from prune_lab.distill.batches import batch_rows, generator_for
from prune_lab.distill.encoding import crop_variants, decode_image, encode_distributions
from prune_lab.errors import ConfigError, DataError
from prune_lab.models import load_pipeline, resolve_model
from prune_lab.probes import encode_captions
from prune_lab.runs import Run
from prune_lab.workflow import STEPS, Session, ensure_data, forget, start_run
from prune_lab.workflow.steps import Step

CAPTIONS = ("a cat", "a dog, smiling", "two cats", "", "an owl", "a fox", "rain")
CACHED = DataConfig(shard=3, batch=2)
MANY = dataclasses.replace(CACHED, crop="random", flip=True, variants=3, seed=5)
TRAINING = DistillConfig(batch=4, caption_dropout=0.3, seed=2)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as the subprocesses here have; `datasets` writes its copies into the folder of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline_folder: Path) -> Any:
    return load_pipeline(resolve_model(str(tiny_pipeline_folder)))


def png(row: int) -> bytes:
    """A picture of noise that is wide, high or square, and of more pixels than the pipeline draws."""
    height, width = ((40, 56), (64, 48), (32, 32))[row % 3]
    pixels = np.random.default_rng(row).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    """A folder as `datasets` reads it: pictures and metadata.csv."""
    (folder / "more").mkdir(parents=True)
    names = [("more/" if row % 2 else "") + f"{row}.png" for row in range(len(captions))]
    for row, name in enumerate(names):
        (folder / name).write_bytes(png(row))
    pd.DataFrame({"file_name": names, "text": captions}).to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures")


def contents(source: ImageSource) -> list[tuple[str, bytes]]:
    return [(source.captions[row], source.content(row)) for row in range(len(source))]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def everything(data: Any) -> list[torch.Tensor]:
    """Every variant of every row of training data, in order."""
    count = len(data)
    parts = [
        data.rows(torch.arange(count), torch.full((count,), variant)) for variant in range(data.variants)
    ]
    return [tensor for part in parts for tensor in (part.mean, part.log_variance, part.embeddings)]


# Sources ---------------------------------------------------------------------------------------------------------


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def as_jsonl(folder: Path) -> str:
    folder.mkdir()
    lines = []
    for row, caption in enumerate(CAPTIONS):
        (folder / f"{row}.png").write_bytes(png(row))
        lines.append(json.dumps({"file_name": f"{row}.png", "caption": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


def as_pairs(folder: Path) -> str:
    folder.mkdir()
    for row, caption in enumerate(CAPTIONS):
        (folder / f"{row}.png").write_bytes(png(row))
        (folder / f"{row}.txt").write_text(caption, encoding="utf-8")
    return str(folder)


def as_parquet(folder: Path) -> str:
    from datasets import Dataset, Features, Image, Value

    folder.mkdir()
    rows = [
        {"picture": {"bytes": png(row), "path": None}, "prompt": caption}
        for row, caption in enumerate(CAPTIONS)
    ]
    table = Dataset.from_list(rows, Features({"picture": Image(), "prompt": Value("string")}))
    table.select(range(4)).to_parquet(folder / "part-0.parquet")
    table.select(range(4, 7)).to_parquet(folder / "part-1.parquet")
    return str(folder)


def as_plain_parquet(folder: Path) -> str:
    folder.mkdir()
    frame = pd.DataFrame({"jpg": [png(row) for row in range(len(CAPTIONS))], "caption": CAPTIONS})
    frame.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def as_tars(folder: Path) -> str:
    folder.mkdir()
    for number, rows in enumerate((range(4), range(4, 7))):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for row in rows:
                add(archive, f"{row:04d}.png", png(row))
                add(archive, f"{row:04d}.mask.png", b"of the same sample, under another name")
                if row % 2:
                    add(archive, f"{row:04d}.txt", CAPTIONS[row].encode())
                else:
                    add(archive, f"{row:04d}.json", json.dumps({"caption": CAPTIONS[row]}).encode())
        frame = pd.DataFrame({"key": [f"{row:04d}" for row in rows], "caption": "of the log"})
        frame.to_parquet(folder / f"{number:05d}.parquet")  # as img2dataset lays them beside
    return str(folder)


def as_glob_of_tars(folder: Path) -> str:
    return f"{as_tars(folder)}/*.tar"


KINDS = [as_jsonl, as_pairs, as_parquet, as_plain_parquet, as_tars, as_glob_of_tars]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_of_source_has_the_same_pictures_and_captions(
    make: Any, tmp_path: Path, folder: Path
) -> None:
    source = open_source(make(tmp_path / "found"))
    assert contents(source) == [(caption, png(row)) for row, caption in enumerate(CAPTIONS)]
    assert contents(source) == contents(open_source(str(folder)))
    assert source.left_out == ()


def test_a_hub_id_is_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.load_dataset("parquet", data_files=as_plain_parquet(tmp_path / "rows"), split="train")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **more: asked.append((names, more)) or table)
    source = open_source("someone/pictures")
    assert asked == [(("someone/pictures",), {"split": "train"})]
    assert contents(source) == [(caption, png(row)) for row, caption in enumerate(CAPTIONS)]


def test_folders_and_tars_are_read_as_datasets_reads_them(tmp_path: Path, folder: Path) -> None:
    from datasets import Image, load_dataset

    def pairs(table: Any, image: str, text: str) -> list[tuple[str, bytes]]:
        rows = table.cast_column(image, Image(decode=False))
        return sorted(
            (row[text] or "", row[image]["bytes"] or Path(row[image]["path"]).read_bytes()) for row in rows
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # `datasets` leaves metadata.csv open
        images = load_dataset("imagefolder", data_dir=str(folder), split="train")
        gc.collect()
    assert sorted(contents(open_source(str(folder)))) == pairs(images, "image", "text")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
        for row, caption in enumerate(CAPTIONS):
            add(archive, f"x/{row}.png", png(row))
            add(archive, f"x/{row}.txt", caption.encode())
    tars = load_dataset("webdataset", data_files=str(tmp_path / "tars" / "a.tar"), split="train")
    assert sorted(contents(open_source(str(tmp_path / "tars")))) == pairs(tars, "png", "txt")


def test_the_shipped_pictures_in_the_order_of_a_run(pipeline: Any) -> None:
    from prune_lab.assets import decode_pictures
    from prune_lab.workflow.session import _chosen

    source, frame = open_source("reference", limit=5, seed=3), _chosen("train", 5, 3)
    assert source.captions == tuple(frame["caption"])
    for row, pixels in enumerate(decode_pictures(frame)):
        assert torch.equal(crop_variants(decode_image(source.content(row)), 64, CACHED, row, (0,))[0], pixels)


def test_what_has_no_partner_is_named_and_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "alone.png").write_bytes(png(9))
    with (folder / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("gone.png,a ghost\n0.png,a second caption\n")
    source = open_source(str(folder))
    assert source.captions == (*CAPTIONS, "a second caption")
    assert [text.removeprefix(f"{folder}/") for text in source.left_out] == [
        "gone.png: no such image",
        "alone.png: no caption",
    ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in {"0.png": png(0), "0.txt": b"x", "1.png": png(1), "2.txt": b"y"}.items():
            add(archive, name, content)
    source = open_source(str(tmp_path / "a.tar"))
    assert (source.captions, source.left_out) == (("x",), ("a.tar/1: no caption", "a.tar/2: no image"))


def _nothing(path: Path) -> str:
    path.mkdir()
    return str(path)


def _no_captions(path: Path) -> str:
    path.mkdir()
    (path / "0.png").write_bytes(png(0))
    return str(path)


def _no_pictures(path: Path) -> str:
    path.mkdir()
    (path / "notes.md").write_text("x")
    return str(path)


def _cut_tar(path: Path) -> str:
    whole = Path(as_tars(path)) / "00000.tar"
    whole.write_bytes(whole.read_bytes()[:9000])
    return str(path)


def _damaged_tar(path: Path) -> str:
    path.mkdir()
    with tarfile.open(path / "a.tar", "w") as archive:
        for name in ("0.png", "0.txt", "1.png", "1.txt"):
            add(archive, name, b"x")
    content = bytearray((path / "a.tar").read_bytes())
    content[2048:2560] = b"?" * 512  # the header of 1.png
    (path / "a.tar").write_bytes(content)
    return str(path)


def _tar_cut_between_files(path: Path) -> str:
    whole = Path(_damaged_tar(path)) / "a.tar"
    whole.write_bytes(whole.read_bytes()[:2048])
    return str(path)


def _packed_tar(path: Path) -> str:
    path.mkdir()
    with tarfile.open(path / "a.tar", "w:gz") as archive:
        add(archive, "0.png", png(0))
    return str(path)


def _other_columns(path: Path) -> str:
    path.mkdir()
    pd.DataFrame({"jpg": [png(0)], "says": ["x"]}).to_parquet(path / "a.parquet")
    return str(path)


def _broken_parquet(path: Path) -> str:
    path.mkdir()
    (path / "a.parquet").write_bytes(b"PAR1 and no more")
    return str(path)


def _lists_of_captions(path: Path) -> str:
    path.mkdir()
    pd.DataFrame({"jpg": [png(0)], "text": [["x", "y"]]}).to_parquet(path / "a.parquet")
    return str(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (str, "no such file or folder"),
        (_nothing, "found nothing there"),
        (_no_captions, "1 images and no caption.*metadata.csv"),
        (_no_pictures, r"found \.md there"),
        (_cut_tar, r"00000\.tar.*fetch it again"),
        (_damaged_tar, r"a\.tar.*breaks off after 2,048 bytes"),
        (_tar_cut_between_files, r"a\.tar.*breaks off after 2,048 bytes"),
        (_packed_tar, r"a\.tar.*not compressed"),
        (_other_columns, r"caption_column any of .* found jpg, says; say which with data\.caption_column"),
        (_broken_parquet, "cannot load them"),
        (_lists_of_captions, r"found list there.*data\.caption_column"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_in_one_line(make: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        open_source(make(tmp_path / "found"))


def test_columns_can_be_named(tmp_path: Path) -> None:
    frame = pd.DataFrame({"scan": [png(1)], "says": ["x"], "text": ["y"], "jpg": [png(2)]})
    frame.to_parquet(tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), image_column="scan", caption_column="says")
    assert contents(source) == [("x", png(1))]


def test_the_digest_follows_the_data_and_not_their_place(tmp_path: Path, folder: Path) -> None:
    digest = open_source(str(folder)).digest
    assert open_source(str(folder)).digest == digest
    shutil.copytree(folder, tmp_path / "elsewhere")  # with the times of change
    assert open_source(str(tmp_path / "elsewhere")).digest == digest
    assert open_source(str(folder), limit=3).digest != digest
    assert open_source(str(folder), limit=3).digest != open_source(str(folder), limit=3, seed=1).digest
    (folder / "0.png").write_bytes(png(3))  # as many bytes, maybe, but another time
    changed = open_source(str(folder)).digest
    assert changed != digest
    text = (folder / "metadata.csv").read_text(encoding="utf-8")
    (folder / "metadata.csv").write_text(text.replace("an owl", "an elk"), encoding="utf-8")
    assert open_source(str(folder)).digest not in (changed, digest)


# Pictures --------------------------------------------------------------------------------------------------------


def test_a_picture_is_scaled_to_its_short_side_and_cut_in_the_middle() -> None:
    picture = Image.open(io.BytesIO(png(0)))  # 40 x 56
    resized = picture.resize((44, 32), Image.Resampling.BILINEAR).crop((6, 0, 38, 32))
    found = crop_variants(picture, 32, CACHED, 0, (0,))
    assert torch.equal(found[0], torch.from_numpy(np.array(resized)).permute(2, 0, 1))


def test_variants_are_drawn_from_seed_row_and_number() -> None:
    picture = decode_image(png(0))
    first = crop_variants(picture, 32, MANY, 0, range(3))
    assert torch.equal(first, crop_variants(picture, 32, MANY, 0, range(3)))
    assert torch.equal(first[2:], crop_variants(picture, 32, MANY, 0, (2,)))
    assert torch.equal(first[:1], crop_variants(picture, 32, CACHED, 0, (0,)))
    assert not torch.equal(first[2], crop_variants(picture, 32, MANY, 1, (2,))[0])
    assert not torch.equal(
        first[2], crop_variants(picture, 32, dataclasses.replace(MANY, seed=6), 0, (2,))[0]
    )
    unflipped = crop_variants(picture, 32, dataclasses.replace(MANY, flip=False), 0, range(3))
    assert torch.equal(first[1], unflipped[1].flip(-1))
    assert torch.equal(first[2], unflipped[2])
    settings = dataclasses.replace(MANY, variants=200)
    cuts = {
        tuple(cut[:, :, 0].flatten().tolist())
        for cut in crop_variants(picture, 32, settings, 0, range(0, 200, 2))
    }
    assert len(cuts) == 13  # 44 - 32 places and the one at the end: all are reached


def test_pictures_of_other_modes_become_rgb_on_white_and_upright() -> None:
    def saved(picture: Image.Image, kind: str = "PNG", **more: Any) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **more)
        return decode_image(buffer.getvalue())

    assert saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert saved(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert saved(Image.new("RGB", (4, 6)), "JPEG", exif=exif).size == (6, 4)


# The cache -------------------------------------------------------------------------------------------------------


def test_the_cache_holds_what_the_encoders_say(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(CACHED, flip=True)
    cache = build_cache(pipeline, open_source(str(folder)), settings, tmp_path / "cache").cache
    assert (len(cache), cache.variants, cache.channels, cache.width) == (7, 2, 4, 16)
    assert [shard.rows for shard in cache.shards] == [3, 3, 1]
    assert cache.captions() == CAPTIONS
    pixels = torch.cat([crop_variants(decode_image(png(row)), 32, CACHED, row, (0,)) for row in range(7)])
    scale = pipeline.vae.config.scaling_factor
    chosen = torch.tensor([6, 0, 3, 3])
    for variant, pictures in enumerate((pixels, pixels.flip(-1))):
        rows = cache.rows(chosen, torch.full((4,), variant))
        with torch.no_grad():
            found = pipeline.vae.encode(pictures[chosen].float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(rows.mean, found.mean * scale)
        noise = torch.randn_like(found.mean)
        drawn = (found.mean + found.std * noise) * scale
        torch.testing.assert_close(rows.mean + (rows.log_variance / 2).exp() * noise, drawn)
        torch.testing.assert_close(rows.embeddings, encode_captions(pipeline, CAPTIONS)[0][chosen])
    torch.testing.assert_close(cache.empty_embedding, encode_captions(pipeline, [""])[0][0])


def test_a_cache_is_built_once(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    first = build_cache(pipeline, open_source(str(folder)), MANY, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = build_cache(pipeline, open_source(str(folder)), MANY, out)
    assert (first.encoded, again.encoded) == (7, 0)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert again.cache.digest == first.cache.digest


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import prune_lab.distill.building as building
from prune_lab.config import DataConfig
from prune_lab.distill import build_cache, open_source
from prune_lab.models import load_pipeline, resolve_model
whole = building._build_shard
def dying(path, *more):
    if path.name == "shard-00001.safetensors":
        (path.parent / ".shard-00001.safetensors.x.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, *more)
building._build_shard = dying
model, pictures, out = sys.argv[1:]
pipeline = load_pipeline(resolve_model(model))
build_cache(pipeline, open_source(pictures), DataConfig(shard=3, batch=2), Path(out))
"""


def test_a_build_that_was_killed_goes_on_to_the_same_cache(
    pipeline: Any, tiny_pipeline_folder: Path, folder: Path, tmp_path: Path
) -> None:
    out, source = tmp_path / "cache", open_source(str(folder))
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_pipeline_folder), str(folder), str(out)],
        timeout=120,
        check=False,
    )
    assert found.returncode == -signal.SIGKILL
    assert sorted(files(out)) == [".shard-00001.safetensors.x.tmp", "shard-00000.safetensors"]
    with pytest.raises(DataError, match="unfinished"):
        LatentCache.load(out)
    resumed = build_cache(pipeline, source, CACHED, out)
    assert resumed.encoded == 4
    build_cache(pipeline, source, CACHED, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_two_processes_build_the_cache_of_one(
    pipeline: Any, tiny_pipeline_folder: Path, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "together"
    verb = [
        *("cache", str(tiny_pipeline_folder), "--data", str(folder), "--out", str(out), "--shard", "2"),
        *("--batch", "2", "--flip", "--device", "cpu", "--json"),
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
    build_cache(pipeline, open_source(str(folder)), settings, tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")


def test_each_process_builds_its_share(
    pipeline: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_lab.distill import building

    built: list[str] = []
    whole = building._build_shard

    def watched(path: Path, *more: Any) -> None:
        built.append(path.name)
        whole(path, *more)

    class Second:
        process_index, num_processes, is_main_process = 1, 2, False

        def wait_for_everyone(self) -> None: ...

    monkeypatch.setattr(building, "_build_shard", watched)
    monkeypatch.setattr(building, "PartialState", Second)
    with pytest.raises(DataError, match="unfinished"):  # the main process, which ends the build, is not there
        build_cache(pipeline, open_source(str(folder)), CACHED, tmp_path / "cache")
    assert built == ["shard-00001.safetensors"]


def test_another_recipe_is_refused_by_name(
    pipeline: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "cache", open_source(str(folder))
    build_cache(pipeline, source, CACHED, out)
    (out / "mine.txt").write_text("stays")
    other = dataclasses.replace(CACHED, flip=True, shard=2)
    with pytest.raises(DataError, match=r"flip False there, True here; .*shard 3 there, 2 here\); .*--force"):
        build_cache(pipeline, source, other, out)
    (out / "cache.json").unlink()  # an unfinished cache says so as well
    with pytest.raises(DataError, match="flip False there, True here"):
        build_cache(pipeline, source, other, out)
    with pytest.raises(DataError, match=r"data \w{16} there"):
        build_cache(pipeline, open_source(str(folder), limit=4), CACHED, out)
    changed = load_pipeline(resolve_model(str(pipeline.config._name_or_path)))
    with torch.no_grad():
        changed.text_encoder.get_input_embeddings().weight[0] += 1
    with pytest.raises(DataError, match=r"encoders \w{16} there"):
        build_cache(changed, source, CACHED, out)
    found = build_cache(pipeline, source, other, out, force=True).cache
    assert (found.variants, len(found.shards)) == (2, 4)
    assert (out / "mine.txt").read_text() == "stays"


def test_damage_is_named_and_mended(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "cache", open_source(str(folder))
    digest = build_cache(pipeline, source, CACHED, out).cache.digest
    shard = out / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(DataError, match=r"bytes of shard-00001.*again"):
        LatentCache.load(out)
    assert build_cache(pipeline, source, CACHED, out).encoded == 3
    assert shard.read_bytes() == whole
    index = (out / "cache.json").read_text(encoding="utf-8")
    of_shard = LatentCache.load(out).shards[1].digest
    (out / "cache.json").write_text(index.replace(of_shard, "0" * 16), encoding="utf-8")
    with pytest.raises(DataError, match="replaced"):
        LatentCache.load(out).rows(torch.tensor([4]), torch.tensor([0]))
    shard.unlink()
    assert build_cache(pipeline, source, CACHED, out).cache.digest == digest
    (out / "cache.json").write_text("{}")
    with pytest.raises(DataError, match=r"another cache\.json"):
        LatentCache.load(out)


def test_a_cache_that_lost_a_shard_is_unfinished_until_it_is_mended(
    pipeline: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    out, source = tmp_path / "cache", open_source(str(folder))
    build_cache(pipeline, source, CACHED, out)
    (out / "shard-00001.safetensors").unlink()
    monkeypatch.setattr("prune_lab.distill.building._build_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_cache(pipeline, source, CACHED, out)
    with pytest.raises(DataError, match="unfinished"):
        LatentCache.load(out)


def test_broken_pictures_are_left_out_and_counted(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    (folder / "0.png").write_bytes(png(0)[:700])
    (folder / "more" / "5.png").write_bytes(b"no picture")
    source = open_source(str(folder))
    cache = build_cache(pipeline, source, CACHED, tmp_path / "cache").cache
    assert [shard.rows for shard in cache.shards] == [2, 2, 1]
    assert cache.captions() == (*CAPTIONS[1:5], CAPTIONS[6])
    assert [text.split(":")[0] for text in cache.left_out] == [
        str(folder / "0.png"),
        str(folder / "more/5.png"),
    ]
    mean, _ = encode_distributions(pipeline, crop_variants(decode_image(png(6)), 32, CACHED, 6, (0,)))
    torch.testing.assert_close(cache.rows(torch.tensor([4]), torch.tensor([0])).mean, mean)
    live = LiveData.of(pipeline, source, CACHED)
    with pytest.raises(DataError, match=r"5\.png.*data\.cached = true"):
        live.rows(torch.tensor([4, 5]), torch.tensor([0, 0]))
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of them can be read"):
        build_cache(pipeline, open_source(str(folder)), CACHED, tmp_path / "other")


def test_float16_is_half_the_size_and_nearly_the_same(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    whole = build_cache(pipeline, source, MANY, tmp_path / "whole").cache
    half = build_cache(pipeline, source, dataclasses.replace(MANY, format="float16"), tmp_path / "half").cache
    assert 0.45 < half.bytes / whole.bytes < 0.6
    for found, wanted in zip(everything(half), everything(whole), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert half.digest != whole.digest


# Batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_latents_in_memory_is_what_it_always_was() -> None:
    data, step = made_up_data(), 3
    batch = draw_batch(data, SCHEDULER, TRAINING, step)
    rows = torch.tensor(batch_rows(5, 4, TRAINING.seed, step))
    generator = generator_for(TRAINING.seed, "step", step)
    noise = torch.randn((4, 4, 16, 16), generator=generator)
    timesteps = torch.randint(0, 1000, (4,), generator=generator)
    dropped = torch.rand(4, generator=generator) < TRAINING.caption_dropout
    assert torch.equal(batch.target, noise)
    assert torch.equal(batch.timesteps, timesteps)
    assert torch.equal(batch.noisy, SCHEDULER.add_noise(data.latents[rows], noise, timesteps))
    wanted = torch.where(dropped[:, None, None], data.empty_embedding, data.embeddings[rows])
    assert torch.equal(batch.embeddings, wanted)


@pytest.fixture
def cache(pipeline: Any, folder: Path, tmp_path: Path) -> LatentCache:
    return build_cache(pipeline, open_source(str(folder)), MANY, tmp_path / "cache").cache


def test_latents_are_drawn_from_the_distribution_of_the_vae(cache: LatentCache) -> None:
    batch = draw_batch(cache, SCHEDULER, TRAINING, 2)
    chosen = torch.tensor(batch_rows(7, 4, TRAINING.seed, 2))
    variants = torch.randint(0, 3, (4,), generator=generator_for(TRAINING.seed, "variant", 2))
    rows = cache.rows(chosen, variants)
    noise = torch.randn(rows.mean.shape, generator=generator_for(TRAINING.seed, "vae", 2))
    latents = rows.mean + (rows.log_variance / 2).exp() * noise
    assert torch.equal(batch.noisy, SCHEDULER.add_noise(latents, batch.target, batch.timesteps))
    modes = LatentData(rows.mean, rows.embeddings, cache.empty_embedding, ("",) * 4)
    assert modes.rows(torch.arange(4), torch.zeros(4, dtype=torch.int64)).log_variance is None


def test_a_batch_of_the_cache_follows_from_seed_and_step_alone(cache: LatentCache) -> None:
    first = draw_batch(cache, SCHEDULER, TRAINING, 4)
    draw_batch(cache, SCHEDULER, TRAINING, 5)
    again = draw_batch(LatentCache.load(cache.folder), SCHEDULER, TRAINING, 4)
    for name in ("noisy", "target", "timesteps", "embeddings", "weights"):
        assert torch.equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_part_of_a_batch_equals_that_part_of_the_whole(cache: LatentCache, offset: float) -> None:
    settings = dataclasses.replace(TRAINING, noise_offset=offset, min_snr=5.0)
    whole = draw_batch(cache, SCHEDULER, settings, 2)
    for part in (slice(0, 1), slice(1, 4)):
        found = draw_batch(cache, SCHEDULER, settings, 2, part=part)
        for name in ("noisy", "target", "timesteps", "embeddings", "weights"):
            assert torch.equal(getattr(found, name), getattr(whole, name)[part])


def test_live_data_give_the_batches_of_the_cache(pipeline: Any, folder: Path, cache: LatentCache) -> None:
    live = LiveData.of(pipeline, open_source(str(folder)), MANY)
    assert (len(live), live.variants, live.channels, live.width) == (7, 3, 4, 16)
    for step in (1, 2):
        found, wanted = (draw_batch(data, SCHEDULER, TRAINING, step) for data in (live, cache))
        for name in ("noisy", "target", "timesteps", "embeddings"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    other = dataclasses.replace(MANY, seed=6)
    assert live.digest != LiveData.of(pipeline, open_source(str(folder)), other).digest


def test_every_epoch_of_the_cache_uses_every_picture_once(cache: LatentCache) -> None:
    settings = dataclasses.replace(TRAINING, caption_dropout=0.0, batch=7)
    batch = draw_batch(cache, SCHEDULER, settings, 3)
    told = cache.rows(torch.arange(7), torch.zeros(7, dtype=torch.int64)).embeddings
    places = [(batch.embeddings[row] == told).flatten(1).all(dim=1).nonzero().item() for row in range(7)]
    assert sorted(places) == list(range(7))


def test_only_the_pages_of_the_chosen_rows_are_read(pipeline: Any, tmp_path: Path, folder: Path) -> None:
    cache = build_cache(pipeline, open_source(str(folder)), MANY, tmp_path / "cache").cache
    cache.rows(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert list(cache._mapped) == [0]
    mapped = cache._mapped[0]["mean"]
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in lines if "shard-00000" in line]
    assert any(int(start, 16) <= mapped.data_ptr() < int(end, 16) for start, end in spans)


def test_sdxl_is_told_the_size(
    pipeline: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encode_captions

    def pooled(*arguments: Any, **more: Any) -> Any:
        embeddings, _ = whole(*arguments, **more)
        return embeddings, {"text_embeds": embeddings.mean(dim=1)}

    monkeypatch.setattr("prune_lab.distill.encoding.encode_captions", pooled)
    cache = build_cache(pipeline, open_source(str(folder)), CACHED, tmp_path / "cache").cache
    rows = cache.rows(torch.tensor([5, 1]), torch.tensor([0, 0]))
    assert rows.added["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2
    torch.testing.assert_close(rows.added["text_embeds"], rows.embeddings.mean(dim=1))
    batch = draw_batch(cache, SCHEDULER, dataclasses.replace(TRAINING, caption_dropout=0.99), 1)
    assert torch.equal(batch.added["text_embeds"], cache.empty_added["text_embeds"].expand(4, -1))


# Runs and the command line ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"crop": "left"}, "center, random"),
        ({"format": "int8"}, "float32, float16"),
        ({"variants": 2}, "at most 1 without random crops or flips"),
        ({"variants": 3, "flip": True}, "at most 2 without random crops"),
        ({"variants": 1, "flip": True}, "at least 2 for flips"),
        ({"shard": 0}, "at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DataConfig(**settings)


def test_variants_follow_from_crop_and_flip() -> None:
    found = [
        DataConfig(crop=crop, flip=flip).num_variants
        for crop in ("center", "random")
        for flip in (False, True)
    ]
    assert found == [1, 2, 4, 4]
    assert math.isclose(DataConfig(crop="random", variants=9).num_variants, 9)


def data_step() -> Step:
    return next(step for step in STEPS if step.name == "data")


def test_a_run_trains_on_the_pictures_it_names(
    pipeline: Any, tiny_pipeline_folder: Path, folder: Path, tmp_path: Path
) -> None:
    config = RunConfig(
        model=str(tiny_pipeline_folder), device="cpu", data=dataclasses.replace(CACHED, source=str(folder))
    )
    run = start_run(config, tmp_path / "run")
    data = ensure_data(Session(run))
    assert isinstance(data, LatentCache)
    assert data.folder == run.data_dir
    assert not run.data.exists()
    assert data_step().marks(run) == (run.data_dir / "cache.json",)
    shutil.rmtree(folder)
    assert ensure_data(Session(run)).digest == data.digest  # from the run alone

    ready = dataclasses.replace(config, data=DataConfig(source=str(run.data_dir)))
    found = ensure_data(Session(start_run(ready, tmp_path / "ready")))
    assert found.digest == data.digest
    assert not (tmp_path / "ready" / "data").exists()
    assert data_step().marks(Run(tmp_path / "ready")) == ()
    with pytest.raises(DataError, match=r"data\.limit = 2"):
        training_data(pipeline, dataclasses.replace(ready.data, limit=2), tmp_path)
    changed = load_pipeline(resolve_model(str(tiny_pipeline_folder)))
    with torch.no_grad():
        changed.vae.encoder.conv_in.weight *= 1.1
    with pytest.raises(DataError, match="other encoders"):
        training_data(changed, ready.data, tmp_path)
    assert isinstance(training_data(pipeline.to(torch.bfloat16), ready.data, tmp_path), LatentCache)
    pipeline.to(torch.float32)
    forget(run, "data")
    assert not run.data_dir.exists()


def test_without_the_cache_a_run_encodes_in_the_loop(
    tiny_pipeline_folder: Path, folder: Path, tmp_path: Path
) -> None:
    data = dataclasses.replace(CACHED, source=str(folder), cached=False)
    run = start_run(RunConfig(model=str(tiny_pipeline_folder), device="cpu", data=data), tmp_path / "run")
    assert isinstance(ensure_data(Session(run)), LiveData)
    assert not run.data_dir.exists()
    assert data_step().marks(run) == ()


def test_the_verb_builds_finishes_and_refuses(
    tiny_pipeline_folder: Path, folder: Path, tmp_path: Path
) -> None:
    def ask(*more: str) -> Any:
        verb = ["cache", str(tiny_pipeline_folder), "--out", str(tmp_path / "cache"), "--device", "cpu"]
        return CliRunner().invoke(app, [*verb, *more])

    found = ask("--data", str(folder), "--shard", "4", "--format", "float16", "--json")
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)
    assert (row["rows"], row["left_out"], row["variants"], row["shards"], row["encoded"]) == (7, 0, 1, 2, 7)
    assert row["bytes"] == LatentCache.load(tmp_path / "cache").bytes
    refused = ask("--data", str(folder), "--shard", "4")
    assert refused.exit_code == 2
    assert "format float16 there, float32 here" in refused.stderr
    assert ask("--data", str(folder), "--shard", "4", "--force").exit_code == 0
    assert "finished cache" in ask("--data", str(tmp_path / "cache")).stderr
    assert "give --data" in ask().stderr


def test_help_answers_without_the_heavy_libraries() -> None:
    code = (
        "import sys; sys.argv = ['prune-lab', 'cache', '--help']\n"
        "from prune_lab.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'datasets', 'accelerate', 'pandas'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "--data" in found.stdout


def test_the_settings_open_their_source(folder: Path) -> None:
    settings = DataConfig(source=str(folder), limit=2, seed=4)
    assert source_of(settings).captions == open_source(str(folder), limit=2, seed=4).captions
