"""Models compared by many pictures: seeds, going on, intervals, gates, and what is written."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from traces import traces
from typer.testing import CliRunner

import prune_lab as pl
from prune_lab.cli import app
from prune_lab.errors import ConfigError, DataError, ModelFormatError, PruneLabError, StorageError
from prune_lab.metrics import fid, fid_without
from prune_lab.prompts import Prompts
from prune_lab.ranking.paired import paired_difference
from prune_lab.schemas import GATE_COLUMNS, KIND_COLUMNS, METRIC_COLUMNS
from prune_lab.zero_shot import METRICS, NOT_COMPARABLE, drawing, parse_gate
from prune_lab.zero_shot.estimates import Estimate, groups_of, mean_of
from prune_lab.zero_shot.features import Extractors, Features, load_inception
from prune_lab.zero_shot.gates import decide, exit_code
from prune_lab.zero_shot.measuring import Measured, Sets, _set_metric, kind_rows, metric_rows
from prune_lab.zero_shot.protocol import picture_seed, prompts_in, rows_of

TEXTS = ("a red cat", "a dog", "a fish", "a red cat", "two birds")
FEW: dict[str, object] = {"evaluate.steps": 1, "evaluate.guidance": 1.0}


@pytest.fixture(scope="module")
def other_folder(tiny_pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with another U-Net."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_pipeline_folder, folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["conv_out.weight"] *= -1
    save_file(tensors, weights, {"format": "pt"})
    return folder


@pytest.fixture
def prompts_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    kinds = ("animal", "animal", "water", "animal", "air")
    pd.DataFrame({"caption": TEXTS, "kind": kinds}).to_csv(path, index=False)
    return path


@pytest.fixture
def ask(tiny_pipeline_folder: Path, other_folder: Path, tiny_scorer_folder: Path, prompts_file: Path) -> Any:
    """``ask(out, **changes)``: the evaluation of two tiny models with a tiny scorer."""

    def found(out: Path, **changes: Any) -> pl.Evaluation:
        asked: dict[str, Any] = {
            "prompts": prompts_file,
            "clip": str(tiny_scorer_folder),
            "settings": FEW,
            "device": "cpu",
            "batch": 4,
        }
        return pl.evaluate([tiny_pipeline_folder, other_folder], out=out, **{**asked, **changes})

    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("0*"))}


# Seeds -----------------------------------------------------------------------------------------------------------


def test_a_seed_depends_on_its_prompt_alone() -> None:
    prompts = Prompts(TEXTS, ("",) * 5)
    rows = rows_of(prompts, None, seeds=2, seed=3, suffix="png")
    assert [row.prompt for row in rows[::2]] == list(TEXTS)
    assert len({row.seed for row in rows}) == len({row.file for row in rows}) == 10
    turned = rows_of(Prompts(TEXTS[::-1], ("",) * 5), None, seeds=2, seed=3, suffix="png")
    assert {(row.prompt, row.number, row.seed) for row in rows} == {
        (row.prompt, row.number, row.seed) for row in turned
    }
    assert all(0 <= row.seed < 2**63 for row in rows)
    assert picture_seed(3, "a dog", 0, 0) != picture_seed(4, "a dog", 0, 0)
    more = rows_of(prompts, None, seeds=3, seed=3, suffix="png")
    assert {row.file for row in rows} < {row.file for row in more}


def test_fewer_prompts_are_drawn_from_all_over_the_file_and_are_among_more() -> None:
    prompts = Prompts(tuple(map(str, range(100))), tuple("a" * 50 + "b" * 50))
    few = rows_of(prompts, 10, seeds=1, seed=0, suffix="png")
    more = rows_of(prompts, 40, seeds=1, seed=0, suffix="png")
    assert {row.kind for row in few} == {"a", "b"}
    assert {row.file for row in few} < {row.file for row in more}
    assert [int(row.prompt) for row in more] == sorted(int(row.prompt) for row in more)
    with pytest.raises(ConfigError, match="found 100 prompts"):
        rows_of(prompts, 101, seeds=1, seed=0, suffix="png")


def test_captions_of_a_folder_of_pictures_are_prompts(tmp_path: Path) -> None:
    for number, caption in enumerate(("a fox", "", "an owl")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    assert prompts_in(str(tmp_path)) == Prompts(("a fox", "an owl"), ())
    for path in tmp_path.glob("*.txt"):
        path.write_text("")
    with pytest.raises(DataError, match="found none; give a file of prompts"):
        prompts_in(str(tmp_path))


# Intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_the_paired_t_interval() -> None:
    one, other = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)).double().numpy()
    found, known = mean_of(one).minus(mean_of(other)), paired_difference(one, other)
    assert (found.value, *found.interval) == pytest.approx((known.mean, known.low, known.high))
    assert all(map(math.isnan, mean_of(one[:1]).interval))


def test_groups_hold_each_prompt_once() -> None:
    for count in (2, 7, 20, 45):
        sizes = groups_of(count).bincount().tolist()
        assert len(sizes) == min(20, count)
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.long
def test_the_interval_of_a_difference_of_fids_holds_the_true_one() -> None:
    """95 % of the intervals should, of 100 (a binomial bound); the true one is that of 40,000 pictures."""
    draw = torch.Generator().manual_seed(0)
    real, held = torch.randn(300, 3, generator=draw), 0

    def both(count: int) -> list[Tensor]:
        shared = torch.randn(count, 3, generator=draw)  # what a prompt makes alike
        return [shared + 0.5 * torch.randn(count, 3, generator=draw) + shift for shift in (0.4, 0.0)]

    true = [fid(rows, real) for rows in both(40_000)]
    for _ in range(100):
        found = [fid_without(rows, real, groups_of(60)) for rows in both(60)]
        one, other = (Estimate(value, np.array(without)) for value, without in found)
        low, high = one.minus(other).interval
        held += low <= true[0] - true[1] <= high
    assert 89 <= held <= 99


# Gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("clip>=0.97x teacher", ("clip", True, 0.97, True)),
        (" fid <= 110 % teacher ", ("fid", False, 1.1, True)),
        ("cmmd-to-teacher<=.5", ("cmmd-to-teacher", False, 0.5, False)),
        ("clip>=0.25", ("clip", True, 0.25, False)),
    ],
)
def test_gates_are_read(text: str, known: tuple[object, ...]) -> None:
    gate = parse_gate(text, METRICS)
    assert (gate.metric, gate.at_least, gate.bound, gate.of_teacher) == known


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clip", "cannot be read"),
        ("clip>0.3", "cannot be read"),
        ("clap>=0.3", "no metric 'clap'"),
        ("clip>=97%", "leaves open of what"),
        ("clip>=0.97 teacher", "leaves open of what"),
        ("clip>=1e3", "cannot be read"),
    ],
)
def test_a_gate_that_says_nothing_is_refused_with_what_would(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_gate(text, METRICS)


def verdict(text: str, value: float, half: float, teacher: float = 1.0) -> str:
    """The decision on a value whose interval is about ``half`` to either side, and of a teacher without noise."""
    spread = half / 12.706 * np.array([-1.0, 1.0]) / 1  # the t quantile of one degree of freedom
    found = {"clip": Estimate(value, value + spread)}
    return decide(
        parse_gate(text, METRICS), "m", found, {"clip": Estimate(teacher, np.full(2, teacher))}
    ).decision


def test_a_gate_is_undecided_where_the_interval_holds_the_bound() -> None:
    for text in ("clip>=0.9", "clip>=0.9x teacher", "clip>=90% teacher"):
        assert verdict(text, 0.95, 0.01) == "passed"
        assert verdict(text, 0.95, 0.2) == "undecided"
        assert verdict(text, 0.85, 0.01) == "failed"
    assert verdict("clip<=0.9", 0.85, 0.01) == "passed"
    assert verdict("clip<=0.9x teacher", 0.95, 0.01) == "failed"
    assert verdict("clip<=0.9x teacher", 0.95, 0.01, teacher=2.0) == "passed"
    assert verdict("clip>=0.9x teacher", 0.95, 0.01, teacher=-1.0) == "undecided"


def test_the_exit_code_is_that_of_the_worst_verdict() -> None:
    gate, one = parse_gate("clip>=0.5", METRICS), Estimate(0.9, np.array([0.9, 0.9]))
    passed = decide(gate, "m", {"clip": one}, {})
    failed = decide(gate, "m", {"clip": Estimate(0.1, np.array([0.1, 0.1]))}, {})
    missing = decide(gate, "m", {}, {}, "not measured: needs a scorer")
    assert [exit_code(found) for found in ((passed,), (passed, missing), (missing, failed), ())] == [
        0,
        3,
        1,
        0,
    ]
    assert (missing.decision, missing.reason) == ("undecided", "not measured: needs a scorer")


# Drawing ---------------------------------------------------------------------------------------------------------


def test_what_is_written_and_that_nothing_is_drawn_twice(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_pipeline_folder: Path
) -> None:
    out = tmp_path / "out"
    found = ask(out, gates=["clip>=0.5x teacher", "fid<=1.1x teacher"])
    models = [tiny_pipeline_folder.name, "other"]
    pictures = {name: files(out / name) for name in models}
    assert [len(one) for one in pictures.values()] == [10, 10]
    assert pictures[models[0]].keys() == pictures[models[1]].keys()
    table = pd.read_csv(out / models[0] / "pictures.csv")
    for row in table.itertuples():
        with Image.open(out / models[0] / str(row.file)) as picture:
            assert (picture.info["seed"], picture.info["prompt"]) == (str(row.seed), row.prompt)
    for name, columns in (("metrics", METRIC_COLUMNS), ("by_kind", KIND_COLUMNS), ("gates", GATE_COLUMNS)):
        assert tuple(pd.read_csv(out / f"{name}.csv").columns) == columns
    metrics = found.metrics.frame().set_index(["model", "metric"])
    assert found.metrics.frame()["metric"].tolist() == 2 * list(METRICS)
    assert metrics.loc[("other", "fid"), "verdict"] == "not measured"
    assert "--inception" in metrics.loc[("other", "fid"), "reason"]
    assert "--real" in metrics.loc[("other", "cmmd"), "reason"]
    assert metrics.loc[("other", "clip"), "floor"] > 0
    assert metrics.loc[("other", "diversity"), "features"] == "clip"
    assert metrics.loc[(models[0], "cmmd-to-teacher"), "value"] > 0  # of one seed to the other
    kinds = found.kinds.frame()
    assert kinds["kind"].tolist() == ["air", "air", "animal", "animal", "water", "water"]
    assert kinds["prompts"].tolist() == [1, 1, 3, 3, 1, 1]
    assert found.gates.frame()["verdict"].tolist()[1] == "undecided"
    assert found.code in (1, 3)
    assert "<img" in found._repr_html_()
    assert "not measured: needs --inception" in repr(found)
    page = (out / "README.md").read_text()
    for said in ("1 steps, guidance 1", "float32", "prompts.csv", "5 of 5 prompts", "torch", *models):
        assert said in page
    assert (out / "sheet.png").is_file()
    assert traces(out, [str(tmp_path), str(tiny_pipeline_folder.parent)]) == []

    monkeypatch.setattr(drawing, "drawn_batches", lambda *_, **__: pytest.fail("drawn again"))
    again = ask(out, gates=["clip>=0.5x teacher"])
    assert again.metrics.frame().equals(found.metrics.frame())
    assert {name: files(out / name) for name in models} == pictures

    mine, others = (out / name / row.file for name in models)
    was = mine.read_bytes()
    with Image.open(mine) as picture:
        picture.save(tmp_path / "painted.png")  # as a program for pictures keeps it
    for put in (others.read_bytes(), (tmp_path / "painted.png").read_bytes()):
        mine.write_bytes(put)
        with pytest.raises(DataError, match=r"not drawn there for this prompt, seed and model; remove it"):
            ask(out)
    mine.write_bytes(was)


def test_a_stopped_job_goes_on_and_gives_the_same_pictures(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(tmp_path / "whole")
    save, left = drawing._save, [6]

    def stopped(*given: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        save(*given)

    monkeypatch.setattr(drawing, "_save", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(tmp_path / "stopped")
    monkeypatch.setattr(drawing, "_save", save)
    name = whole.metrics.frame()["model"][0]
    assert len(files(tmp_path / "stopped" / name)) == 5
    asked: list[int] = []
    draw = drawing.drawn_batches
    monkeypatch.setattr(drawing, "drawn_batches", lambda *a, **k: (asked.append(len(a[1])), draw(*a, **k))[1])
    resumed = ask(tmp_path / "stopped")
    assert asked == [4, 2, 4, 4, 2]  # two batches of the first model, all of the second
    for model in (name, "other"):
        assert files(tmp_path / "stopped" / model) == files(tmp_path / "whole" / model)
    assert resumed.metrics.frame().equals(whole.metrics.frame())


@pytest.mark.long
def test_pictures_do_not_depend_on_batch_or_order(ask: Any, tmp_path: Path) -> None:
    turned = tmp_path / "turned.txt"
    turned.write_text("\n".join(TEXTS[::-1]))
    ask(tmp_path / "one")
    ask(tmp_path / "two", batch=3, prompts=turned)

    def pixels(out: Path) -> dict[tuple[str, int], Tensor]:
        found = {}
        table = pd.read_csv(out / "other" / "pictures.csv")
        for row in table.itertuples():
            with Image.open(out / "other" / str(row.file)) as picture:
                found[str(row.prompt), int(row.seed)] = torch.from_numpy(np.asarray(picture).astype(int))
        return found

    one, two = pixels(tmp_path / "one"), pixels(tmp_path / "two")
    assert one.keys() == two.keys()
    # kernels may round differently for another batch size
    assert max(int((one[key] - two[key]).abs().max()) for key in one) <= 1


@pytest.mark.long
def test_pictures_of_another_model_or_with_other_settings_are_no_ones_own(
    ask: Any, tmp_path: Path, other_folder: Path, tiny_pipeline_folder: Path
) -> None:
    out = tmp_path / "out"
    ask(out, seeds=1)
    before, about = files(out / "other"), (out / "evaluation.json").read_bytes()
    with pytest.raises(StorageError, match=r"steps 1 and not 2.*--force"):
        ask(out, seeds=1, settings={**FEW, "evaluate.steps": 2})
    assert (out / "evaluation.json").read_bytes() == about  # the tables beside it are those of before
    renamed = tmp_path / "other"  # another model of the same name
    shutil.copytree(tiny_pipeline_folder, renamed)
    weights = next((other_folder / "vae").glob("*.safetensors"))
    shutil.copytree(other_folder, renamed, dirs_exist_ok=True)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    (renamed / "vae" / weights.name).write_bytes(content)
    with pytest.raises(StorageError, match="another model"):
        pl.evaluate([renamed], prompts="default", images=2, out=out, settings=FEW, clip="none", device="cpu")
    assert files(out / "other") == before
    ask(out, seeds=1, settings={**FEW, "evaluate.steps": 2}, force=True)
    after = files(out / "other")
    assert after.keys() == before.keys()
    assert after != before
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "mine.txt").write_text("mine")
    with pytest.raises(StorageError, match="did not write"):
        ask(filled, force=True)


@pytest.mark.long
@pytest.mark.parametrize("how", ["processes", "ray"])
def test_shared_out_pictures_are_the_same_bit_for_bit(ask: Any, tmp_path: Path, how: str) -> None:
    alone = ask(tmp_path / "alone")
    if how == "ray":
        pytest.importorskip("ray")
        shared = ask(tmp_path / "shared", settings={**FEW, "engine.kind": "ray"})
    else:
        shared = ask(tmp_path / "shared", processes=2)
    for model in set(alone.metrics.frame()["model"]):
        assert files(tmp_path / "alone" / model) == files(tmp_path / "shared" / model)
    assert shared.metrics.frame().equals(alone.metrics.frame())


# Extractors ------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Features of floats from -1 to 1, and logits."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.shape[2] == 299
        assert x.min() >= -1
        assert x.max() <= 1
        found = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return found, found[:, :5] * 10


class ByItself(nn.Module):
    """Features of bytes when asked for them, else probabilities, as NVIDIA's file has them."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        found = nn.functional.adaptive_avg_pool2d(img.float() / 127.5 - 1, 2).flatten(1)
        return found if return_features else (found[:, :5] * 10).softmax(dim=1)


def scripted(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


def test_an_inception_is_fed_as_its_kind_wants(tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (3, 3, 299, 299), dtype=torch.uint8)
    plain, name = load_inception(scripted(Plain(), tmp_path / "plain.pt"))
    itself, _ = load_inception(scripted(ByItself(), tmp_path / "itself.pt"))
    features, logits = plain(pictures)
    others, probabilities = itself(pictures)
    assert "plain.pt (sha256 " in name
    assert torch.allclose(features, others, atol=1e-5)
    assert logits is not None
    assert probabilities is not None
    assert torch.allclose(logits.softmax(1), probabilities.exp(), atol=1e-5)


def test_too_few_real_pictures_are_told_beside_the_figure() -> None:
    def rows(count: int) -> Features:
        return Features(inception=torch.randn(count, 4, generator=torch.Generator().manual_seed(count)))

    for real, said in ((3, "3 real pictures are fewer than 4 features"), (4, "")):
        sets = Sets(8, 1, rows(real), rows(8))
        found = _set_metric("fid", rows(8), sets, Extractors())
        assert found.estimate is not None
        assert found.reason.partition(":")[0] == said


def test_a_share_that_no_group_of_prompts_changes_decides_no_gate() -> None:
    rows = Features(clip=torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    found = _set_metric("precision", rows, Sets(9, 1, rows, rows), Extractors()).estimate
    assert found is not None
    assert found.value == 1
    assert (
        decide(parse_gate("precision>=0.99", METRICS), "m", {"precision": found}, {}).decision == "undecided"
    )


def test_a_distance_from_itself_is_no_spread_and_that_of_a_student_has_both_ways() -> None:
    teacher, student = (
        Features(inception=torch.randn(16, 2, generator=torch.Generator().manual_seed(seed)))
        for seed in (1, 2)
    )
    one, other = (
        _set_metric("fid-to-teacher", found, Sets(8, 2, None, teacher), Extractors())
        for found in (teacher, student)
    )
    parts = [Sets(8, 2, None, None).by_seed(found.inception) for found in (teacher, student)]
    assert math.isnan(one.floor)
    assert one.estimate is not None
    assert one.estimate.value == pytest.approx(fid(parts[0][0], parts[0][1]))
    both = [fid(parts[1][i], parts[0][1 - i]) for i in (0, 1)]
    assert other.floor == pytest.approx(abs(both[0] - both[1]))
    single = [
        _set_metric("fid-to-teacher", found, Sets(16, 1, None, teacher), Extractors())
        for found in (teacher, student)
    ]
    rows = metric_rows("m", {"fid-to-teacher": single[1]}, {"fid-to-teacher": single[0]})
    assert (rows[0]["verdict"], single[0].estimate and single[0].estimate.value) == ("no floor", 0)


def test_the_floor_of_a_kind_is_the_larger_spread_between_its_seeds() -> None:
    scores = np.array([[0.1, 0.3], [0.2, 0.4], [0.15, 0.35], [0.1, 0.3], [0.5, 0.5]])  # prompts, seeds
    models = {"teacher": scores, "m": scores - [0, 0.01]}

    def rows_by(kinds: str, seeds: int) -> pd.DataFrame:
        found = {name: {"clip": Measured(None, values=one[:, :seeds])} for name, one in models.items()}
        return pd.DataFrame(kind_rows(list(kinds), found, "teacher")).set_index(["kind", "model"])

    rows = rows_by("aaaab", 2)
    assert rows.loc[("a", "m"), "difference"] == pytest.approx(-0.005)
    assert rows.loc[("a", "m"), "floor"] == pytest.approx(0.2)
    assert rows.loc[("b", "m"), "floor"] == pytest.approx(0.01)
    assert rows.loc[("a", "m"), "verdict"] == "not told apart"
    assert rows.loc[("b", "m"), "verdict"] == "no interval"  # of one prompt
    models["m"] = models["m"] - 1
    assert rows_by("aaaaa", 1).loc[("a", "m"), "verdict"] == "worse"
    assert rows_by("aaabb", 1)["low"].isna().all()  # of three prompts it would be as wide as all there is


class OneRow(nn.Module):
    """The features of the first picture alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:1, :8]


class OneNumber(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


class OneLogit(nn.Module):
    """Features, and one number where logits belong."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1)[:, :8], x.mean()


class Unsure(nn.Module):
    """As ``ByItself``, but with logits in the place of probabilities."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.float().flatten(1)[:, :8]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OneRow, r"features of 3 pictures, found \(1, 8\)"),
        (OneNumber, r"features of 3 pictures, found \(\)"),
        (OneLogit, r"logits of 3 pictures, found \(\)"),
        (Unsure, "probabilities of classes"),
    ],
)
def test_answers_that_are_not_of_the_pictures_are_refused(
    kind: type[nn.Module], said: str, tmp_path: Path
) -> None:
    extract, _ = load_inception(scripted(kind(), tmp_path / "inception.pt"))
    with pytest.raises(ModelFormatError, match=said):
        extract(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8))


def test_what_is_no_torchscript_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    pickled, ran = tmp_path / "pickled.pt", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save({"a": Evil()}, pickled)
    (tmp_path / "text.pt").write_text("no program")
    for path in (pickled, tmp_path / "text.pt"):
        with pytest.raises(ModelFormatError, match="no TorchScript"):
            load_inception(path)
    assert not ran.exists()
    with pytest.raises(StorageError):
        load_inception(tmp_path / "missing.pt")


@pytest.mark.long
def test_all_metrics_are_measured_where_everything_is_there(ask: Any, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    for i in range(13):  # more than features
        noise = torch.randint(0, 256, (20, 40, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(real / f"{i}.png")
    many = tmp_path / "many.txt"
    many.write_text("\n".join(f"cat {i}" for i in range(14)))
    inception = scripted(Plain(), tmp_path / "inception.pt")
    found = ask(tmp_path / "out", prompts=many, real=real, inception=inception, batch=16)
    frame = found.metrics.frame()
    assert set(frame["verdict"]) <= {
        "",
        "better",
        "worse",
        "higher",
        "lower",
        "not told apart",
        "no interval",
    }
    assert frame["value"].notna().all()
    by = frame.set_index(["model", "metric"])
    assert by.loc[("other", "fid"), "features"] == by.loc[("other", "precision"), "features"] == "inception"
    assert 1 <= by.loc[("other", "is"), "value"] <= 5
    assert "fewer than" not in str(by.loc[("other", "fid"), "reason"])
    assert (
        by.loc[("other", "fid"), "low"] < by.loc[("other", "fid"), "value"] < by.loc[("other", "fid"), "high"]
    )
    assert len(found.kinds) == 0
    few = ask(tmp_path / "few", real=real, inception=inception)
    few_by = few.metrics.frame().set_index(["model", "metric"])
    assert "5 pictures are fewer than 12 features" in few_by.loc[("other", "fid"), "reason"]
    assert "one row at least for each part" in few_by.loc[("other", "is"), "reason"]


# The preset ------------------------------------------------------------------------------------------------------


def test_the_preset_keeps_jpegs_of_256_pixels_and_says_what_they_are_not(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="which it sets"):
        ask(tmp_path / "out", preset="coco30k")
    seen: dict[str, Any] = {}
    draw = drawing.drawn_batches

    def quick(*given: Any, steps: int, guidance: float, **more: Any) -> Any:
        seen.update(steps=steps, guidance=guidance)
        return draw(*given, steps=1, guidance=1.0, **more)

    monkeypatch.setattr(drawing, "drawn_batches", quick)
    found = ask(tmp_path / "out", preset="coco30k", settings={}, images=2, gates=["clip>=0.1"])
    assert seen == {"steps": 25, "guidance": 7.5}
    drawn = sorted((tmp_path / "out" / "other").glob("0*"))
    assert len(drawn) == 2  # one picture of each prompt
    for path in drawn:
        with Image.open(path) as picture:
            assert (picture.format, picture.size) == ("JPEG", (256, 256))
    for name in ("metrics", "by_kind", "gates"):
        table = pd.read_csv(tmp_path / "out" / f"{name}.csv")
        assert set(table["note"]) == {NOT_COMPARABLE}
    assert found.metrics.notes[0] == NOT_COMPARABLE
    assert (tmp_path / "out" / "README.md").read_text().count(NOT_COMPARABLE) >= 3
    assert found.metrics.frame()["floor"].isna().all()


# The command line ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_exit_code_says_what_became_of_the_gates(
    tmp_path: Path,
    tiny_pipeline_folder: Path,
    other_folder: Path,
    tiny_scorer_folder: Path,
    prompts_file: Path,
) -> None:
    given = [
        "evaluate",
        tiny_pipeline_folder,
        other_folder,
        "--prompts",
        prompts_file,
        "--out",
        tmp_path / "out",
    ]
    given += ["--clip", tiny_scorer_folder, "--device", "cpu", "--set", "evaluate.steps=1", "--json"]
    given += ["--set", "evaluate.guidance=1.0"]

    def call(*gates: str, more: tuple[object, ...] = ()) -> Any:
        asked = [*given, *more, *(word for gate in gates for word in ("--gate", gate))]
        return CliRunner().invoke(app, [str(one) for one in asked])

    passed = call("clip<=5")
    assert passed.exit_code == 0, passed.output
    rows = json.loads(passed.stdout)
    assert rows["code"] == 0
    assert [row["verdict"] for row in rows["gates"]] == ["passed"]
    assert call("clip<=5", "clip>=5").exit_code == 1
    assert call("clip<=5", "fid<=5").exit_code == 3
    wrong = call("clap<=5", more=("--force",))
    assert wrong.exit_code == 2
    assert "no metric 'clap'" in wrong.stderr
    assert len(files(tmp_path / "out" / "other")) == 10  # refused before anything was removed
    given.remove("--json")
    told = call()
    assert told.exit_code == 0
    assert "Metrics over 5 prompts" in told.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("reference", "--gate", "clip>=1"), "give --prompts FILE"),
        (("reference", "--prompts", "default"), "--out DIR"),
        (("reference", "--prompts", "default", "--out", "o", "--prompt", "a"), "leave one out"),
        (("reference", "--prompts", "default", "--out", "o", "--gate", "clip>=0.9x teacher"), "no teacher"),
        (("reference", "--prompts", "default", "--out", "o", "--preset", "coco"), "coco30k"),
        (("reference", "--prompts", "default", "--out", "o", "--images", "0"), "images = 0"),
        (("reference", "reference", "--prompts", "shipped", "--out", "o"), "beside itself"),
    ],
)
def test_mistakes_are_told_in_one_line(
    given: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["evaluate", *given])
    assert found.exit_code == 2
    (line,) = [one for one in found.stderr.splitlines() if one.startswith("error")]
    assert said in line
    assert not (tmp_path / "o").exists()


def test_the_shipped_scorer_judges_no_others(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(PruneLabError, match="judges the shipped models alone"):
        ask(tmp_path / "out", clip="reference")
    found = ask(tmp_path / "out", clip="none")
    by = found.metrics.frame().set_index(["model", "metric"])
    assert by.loc[("other", "clip"), "verdict"] == "not measured"
    assert by.loc[("other", "diversity"), "features"] == "pixels"


def test_an_embedding_that_is_no_number_names_its_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    import prune_lab.zero_shot.features as features

    def embedded(_: Any, pictures: torch.Tensor, prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.ones(len(prompts), 4)
        return found.masked_fill(
            torch.tensor([[one == "a dog"] for one in prompts]), float("nan")
        ), torch.ones(2, 4)

    monkeypatch.setattr(features, "clip_embeddings", embedded)
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batches = [(pictures, ["a", "b"]), (pictures, ["c", "a dog"])]
    with pytest.raises(DataError, match=r"the picture of 'a dog' \(number 4 of the pictures of one\)"):
        features.features_of(batches, features.Extractors(clip=("a model", None)), "pictures of one", 2)  # type: ignore[arg-type]
