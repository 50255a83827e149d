"""Kind ``text``: what people and files say, in every parser: it is understood, or refused by one of our errors.

A case is one parser and a hundred texts that hypothesis draws from the case's number; a failure is made small first.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.faults.stage import Stage
from tests.faults.verdicts import Fault, Verdict, innermost

EXAMPLES = 100
_SLOW = 10.0  # processor seconds for one text

# Texts ---------------------------------------------------------------------------------------------------------------

_ODD = [
    "",
    " ",
    "\x00",
    "\ufeff",
    "\ud800",
    "\u202e",
    "é",
    "日本",
    "\n",
    "\r\n",
    "\t",
    "'",
    '"',
    "\\",
    "%",
    "{}",
    "[",
    "nan",
    "-0",
]
numbers = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "1e400",
            "-1",
            "0",
            "1_0",
            "1,2,3",
            "0x1F",
            "٣",
            "1e-400",
            "+5",
            ".5",
            "5.",
            "9" * 30,
            "9" * 5000,
            "NaN",
            "inf",
        ]
    ),
)


def near(*pieces: str) -> st.SearchStrategy[str]:
    """Texts put together from ``pieces`` of the language, numbers and odd characters."""
    piece = st.one_of(
        st.sampled_from(pieces), st.sampled_from(pieces), numbers, st.sampled_from(_ODD), st.text(max_size=8)
    )
    return st.lists(piece, max_size=12).map("".join)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-3, 70),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(
            [10**30, -1, 0, 1e308, "16", "1e9", [], {}, [[]], "/etc/passwd", "../x", "os", "system"]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=8), inner, max_size=5)
    ),
    max_leaves=8,
)


def as_file(strategy: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    """The bytes of text files: in several encodings, and now and then with bytes that are no text."""
    coded = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"])
    whole = st.tuples(strategy, coded).map(lambda pair: pair[0].encode(pair[1], "replace"))
    return st.one_of(
        whole,
        st.tuples(whole, st.binary(max_size=6)).map(lambda pair: pair[0] + pair[1]),
        st.binary(max_size=60),
    )


def changed(value: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """``value`` with up to three keys taken away, changed or added."""
    keys = st.sampled_from([*value, "extra"])
    edits = st.lists(st.tuples(keys, st.one_of(st.just(...), values)), min_size=1, max_size=3)

    def apply(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(value)
        for key, other in pairs:
            if other is ...:
                found.pop(key, None)
            else:
                found[key] = other
        return found

    return edits.map(apply)


json_files = st.one_of(
    values.map(json.dumps),
    values.map(json.dumps).flatmap(lambda text: st.integers(0, len(text)).map(lambda cut: text[:cut])),
    st.sampled_from(
        ["[" * 100_000, '{"a":' * 50_000, "NaN", '{"a":1,"a":2}', "1" * 10_000, '"\\ud800"', "{}" * 2]
    ),
    near("{", "}", "[", "]", ":", ",", '"a"', "null", "true", "1"),
)

_TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I64", "F8_E4M3", "f32", ""]), values),
        "shape": st.one_of(st.lists(st.integers(-1, 9), max_size=4), values),
        "data_offsets": st.one_of(st.lists(st.integers(-1, 99), max_size=3), st.just([0, 16]), values),
    },
)
_HEADER = st.one_of(
    st.dictionaries(
        st.sampled_from(["a", "b.weight", "__metadata__", "", "\x00"]), st.one_of(_TENSOR, values), max_size=4
    ),
    values,
)


def _packed(header: object, tail: bytes, wrong: int) -> bytes:
    text = json.dumps(header).encode()
    return max(0, len(text) + wrong).to_bytes(8, "little") + text + tail


safetensors_files = st.one_of(
    st.builds(_packed, _HEADER, st.binary(max_size=64), st.sampled_from([0, 0, 0, 1, -1, 2**40, 2**62])),
    json_files.map(lambda text: len(text).to_bytes(8, "little") + text.encode("utf-8", "replace")),
    st.binary(max_size=80),
)

_CELLS = st.one_of(near(",", ";", "NA", "null", "007", "true", "1e5"), numbers)
tables = st.one_of(
    st.lists(st.lists(_CELLS, min_size=1, max_size=4).map(",".join), max_size=5).map(
        lambda rows: "\n".join(["file_name,text,prompt,kind", *rows])
    ),
    near("file_name", "text", "prompt", ",", ";", "\t", "|", '"', "\n", "sep=", "a.png"),
)

# Parsers -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Parser:
    """One reader of something from outside, what it is given, and what else than our own errors it may raise."""

    read: Callable[[Any, Path, Stage], object]
    given: Callable[[Stage], st.SearchStrategy[Any]]
    allowed: tuple[type[BaseException], ...] = ()


def _architecture(stage: Stage) -> Any:
    from prune_lab.models import resolve_model

    return resolve_model("sd-v1.4").architecture


def _plan(text: str, place: Path, stage: Stage) -> None:
    from prune_lab.plans import parse_plan

    architecture = _architecture(stage)
    plan = parse_plan(text, architecture)
    assert parse_plan(plan.text, architecture).removed == plan.removed, "a plan's text is another plan"


def _plan_file(ending: str) -> Callable[[bytes, Path, Stage], None]:
    def read(content: bytes, place: Path, stage: Stage) -> None:
        from prune_lab.plans import read_plans

        path = place / f"plans{ending}"
        path.write_bytes(content)
        read_plans(str(path), _architecture(stage))

    return read


def _budget(text: str, place: Path, stage: Stage) -> None:
    from prune_lab.search.budgets import check_budget_text, service_named, split_budgets

    for one in split_budgets(text):
        check_budget_text(one, _architecture(stage))
    service_named((text,))


def _toml(content: bytes, place: Path, stage: Stage) -> None:
    from prune_lab.config import load_config, to_toml
    from prune_lab.config.toml import config_from_toml

    path = place / "job.toml"
    path.write_bytes(content)
    config = load_config(path)
    assert config_from_toml(to_toml(config)) == config, "settings written and read again are other settings"


def _assignment(text: str, place: Path, stage: Stage) -> None:
    from prune_lab.config import RunConfig
    from prune_lab.config.toml import parse_assignment, with_settings

    name, value = parse_assignment(text)
    with_settings(RunConfig(), {name: value})


def _prompts(ending: str) -> Callable[[bytes, Path, Stage], None]:
    def read(content: bytes, place: Path, stage: Stage) -> None:
        from prune_lab.prompts import read_prompts

        path = place / f"prompts{ending}"
        path.write_bytes(content)
        found = read_prompts(path)
        assert found.texts, "no prompts, and no error"
        assert all(isinstance(text, str) and text for text in found.texts), "a prompt that is no text"
        assert not any("\ufeff" in text[:1] for text in found.texts), "a byte-order mark is part of a prompt"

    return read


def _captions(ending: str) -> Callable[[bytes, Path, Stage], None]:
    def read(content: bytes, place: Path, stage: Stage) -> None:
        from PIL import Image

        from prune_lab.config import DataConfig
        from prune_lab.distill import source_of

        Image.new("RGB", (40, 40)).save(place / "a.png")
        (place / f"metadata{ending}").write_bytes(content)
        source = source_of(DataConfig(source=str(place)))
        assert len(source), "no rows, and no error"

    return read


def _json_object(content: bytes, place: Path, stage: Stage) -> None:
    from prune_lab.models.files import json_object

    path = place / "config.json"
    path.write_bytes(content)
    assert isinstance(json_object(path), dict)


def _read_json(content: bytes, place: Path, stage: Stage) -> None:
    from prune_lab.runtime import read_json

    path = place / "any.json"
    path.write_bytes(content)
    read_json(path)


def _header(content: bytes, place: Path, stage: Stage) -> None:
    from safetensors import safe_open

    from prune_lab.models.files import read_header

    path = place / "model.safetensors"
    path.write_bytes(content)
    found = read_header(path)
    with safe_open(path, framework="pt") as file:  # what the library refuses must have been refused
        assert set(file.keys()) == set(found), "other tensors than the library finds"


def _shard_index(content: bytes, place: Path, stage: Stage) -> None:
    from prune_lab.models.files import weights_in

    (place / "diffusion_pytorch_model.safetensors.index.json").write_bytes(content)
    for path in weights_in(place).files:
        assert path.resolve().is_relative_to(place.resolve()), f"a shard outside of its folder: {path}"


def _model_name(text: str, place: Path, stage: Stage) -> None:
    from prune_lab.models import resolve_model

    resolve_model(text)


def _unet_config(value: dict[str, Any], place: Path, stage: Stage) -> None:
    from prune_lab.models import resolve_model

    path = place / "config.json"
    path.write_text(json.dumps(value))
    assert resolve_model(str(path)).architecture.blocks


def _run_file(name: str) -> Callable[[bytes, Path, Stage], None]:
    """A file of a finished run, read with all the others as the report does."""

    def read(content: bytes, place: Path, stage: Stage) -> None:
        import shutil

        from prune_lab.report import read_run
        from prune_lab.runs import Run

        run = place / "run"
        if not run.is_dir():
            shutil.copytree(stage.run, run, ignore=shutil.ignore_patterns("*.safetensors", "report"))
        path = run / name
        before = (stage.run / name).read_bytes()
        path.write_bytes(content)
        try:
            read_run(Run(run))
        finally:
            path.write_bytes(before)

    return read


def _changed_table(stage: Stage, name: str) -> st.SearchStrategy[bytes]:
    lines = (stage.run / name).read_text().splitlines()[:6]
    rows = [line.split(",") for line in lines]
    edits = st.lists(
        st.tuples(st.integers(0, len(rows) - 1), st.integers(0, len(rows[0]) - 1), _CELLS),
        min_size=1,
        max_size=3,
    )

    def apply(pairs: list[tuple[int, int, str]]) -> bytes:
        found = [list(row) for row in rows]
        for row, column, cell in pairs:
            if column < len(found[row]):
                found[row][column] = cell
        return "\n".join(",".join(row) for row in found).encode("utf-8", "replace")

    return st.one_of(edits.map(apply), as_file(near(lines[0], *lines[1:3], ",", "\n")))


_PLAN_WORDS = (
    "bk-base",
    "bk-small",
    "bk-tiny",
    "teacher",
    "-Md",
    "+Md",
    "-Dn1.R2",
    "-Dn1.A2",
    "+Up1",
    "-Dn1.R2+A2",
    " ",
    "-",
    "+",
    "#",
    "\n",
)
_BUDGET_WORDS = (
    "params",
    "macs",
    "latency",
    "memory",
    "paper_macs",
    "<=",
    "%",
    "x",
    "G",
    "ms",
    "GiB",
    "@",
    ",",
    "as:",
    "bk-small",
    "float16",
    "batch=",
)


def _setting_words() -> tuple[str, ...]:
    from prune_lab.config import SETTINGS

    return (*SETTINGS, "=", ",", "true", "false", "[", "]", '"', "model")


def _toml_words() -> tuple[str, ...]:
    from prune_lab.config import SETTINGS

    tables = sorted({f"[{name.split('.')[0]}]\n" for name in SETTINGS if "." in name})
    lines = [f"{name.split('.')[-1]} = " for name in SETTINGS]
    return (*tables, *lines, "\n", "true", '"a"', "[1]", "{}", "# x\n")


def _unet(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage.pipeline / "unet" / "config.json").read_text())
    return found


def _plan_json(stage: Stage) -> dict[str, Any]:
    from prune_lab.plans import parse_plan

    return parse_plan("bk-base -Md", _architecture(stage)).to_json()


def _changed_bytes(value: dict[str, Any]) -> st.SearchStrategy[bytes]:
    return changed(value).map(lambda found: json.dumps(found).encode())


def _parsers() -> dict[str, Parser]:
    from safetensors import SafetensorError

    found = {
        "plan": Parser(_plan, lambda _: near(*_PLAN_WORDS)),
        "plan.txt": Parser(_plan_file(".txt"), lambda _: as_file(near(*_PLAN_WORDS))),
        "plan.json": Parser(
            _plan_file(".json"),
            lambda stage: st.one_of(as_file(json_files), _changed_bytes(_plan_json(stage))),
        ),
        "budget": Parser(_budget, lambda _: near(*_BUDGET_WORDS)),
        "toml": Parser(_toml, lambda _: as_file(near(*_toml_words()))),
        "set": Parser(_assignment, lambda _: near(*_setting_words())),
        "json_object": Parser(_json_object, lambda _: as_file(json_files)),
        "read_json": Parser(_read_json, lambda _: as_file(json_files)),
        "header": Parser(_header, lambda _: safetensors_files, (SafetensorError,)),
        "shard index": Parser(
            _shard_index,
            lambda _: st.one_of(
                as_file(json_files),
                st.dictionaries(
                    st.sampled_from(["weight_map", "metadata"]),
                    st.one_of(
                        values,
                        st.dictionaries(
                            st.text(max_size=4),
                            st.one_of(
                                values,
                                st.sampled_from(
                                    ["../x.safetensors", "/etc/passwd", "a.safetensors", "", ".", "a\x00b"]
                                ),
                            ),
                            max_size=3,
                        ),
                    ),
                    max_size=2,
                ).map(lambda value: json.dumps(value).encode()),
            ),
        ),
        "model": Parser(
            _model_name,
            lambda _: near("sd-v1.4", "reference", "/", "~", "..", ".safetensors", "a/b", ".json", "@"),
        ),
        "unet config": Parser(_unet_config, lambda stage: changed(_unet(stage))),
    }
    for ending in (".txt", ".csv", ".tsv", ".jsonl", ".parquet"):
        rows = json_files if ending == ".jsonl" else tables
        found[f"prompts{ending}"] = Parser(_prompts(ending), lambda _, rows=rows: as_file(rows))
        if ending != ".txt":
            found[f"captions{ending}"] = Parser(_captions(ending), lambda _, rows=rows: as_file(rows))
    return found


def _of_runs(stage: Stage) -> dict[str, Parser]:
    """A parser for each kind of table and JSON in a run."""
    found, seen = {}, set()
    for path in sorted(stage.run.rglob("*")):
        name = path.relative_to(stage.run).as_posix()
        if (
            path.suffix not in (".csv", ".json")
            or name.startswith("report/")
            or "manifests/" in name
            or path.name in seen
        ):
            continue
        seen.add(path.name)
        if path.suffix == ".csv":
            found[name] = Parser(_run_file(name), lambda stage, name=name: _changed_table(stage, name))
        else:
            value = json.loads(path.read_text())
            if isinstance(value, dict):
                found[name] = Parser(
                    _run_file(name),
                    lambda _, value=value: st.one_of(as_file(json_files), _changed_bytes(value)),
                )
    return found


def parsers(stage: Stage) -> dict[str, Parser]:
    """Every parser that is tried, by name."""
    return {**_parsers(), **(_of_runs(stage) if stage.run.is_dir() else {})}


# A case --------------------------------------------------------------------------------------------------------------


def fuzzed(
    parser: Parser, stage: Stage, number: int, place: Path, *, examples: int = EXAMPLES
) -> list[Fault]:
    """What ``parser`` did wrong with ``examples`` texts drawn from ``number``; the last is the smallest found."""
    from prune_lab.errors import PruneLabError

    found: list[tuple[str, str, str]] = []

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(parser.given(stage))
    def trial(text: Any) -> None:
        begin, trouble = time.process_time(), None
        try:
            parser.read(text, place, stage)
        except PruneLabError as error:
            said = str(error)
            if not said.strip():
                trouble = ("says nothing", type(error).__name__, "")
            elif len(said) > 20_000:
                trouble = ("the line is longer than a page", type(error).__name__, said[:200])
        except parser.allowed:
            trouble = ("accepted what the library refuses", "", "")
        except AssertionError as error:
            trouble = ("wrong", str(error)[:120], str(error))
        except Exception as error:
            import traceback

            trouble = ("traceback", innermost(traceback.format_exc()), str(error)[:200])
        if time.process_time() - begin > _SLOW:
            trouble = ("takes too long", "", f"{time.process_time() - begin:.0f} s")
        if trouble:
            found.append((trouble[0], trouble[1], f"{trouble[2]}; given {text!r:.300}"))
            raise AssertionError(trouble[0])

    try:
        trial()
    except BaseException as error:
        if not found:
            return [Fault("the case itself failed", type(error).__name__, str(error)[:400])]
    return [Fault(*found[-1])] if found else []


def fuzzed_parser(stage: Stage, number: int, place: Path) -> Verdict:
    """One parser with a hundred texts."""
    import warnings

    warnings.simplefilter("ignore")
    everyone = parsers(stage)
    name = random.Random(number).choice(sorted(everyone))
    faults = fuzzed(everyone[name], stage, number, place)
    return Verdict(
        f"{EXAMPLES} texts for {name}",
        EXAMPLES,
        tuple(Fault(fault.kind, f"{name}: {fault.signature}", fault.detail) for fault in faults),
    )
