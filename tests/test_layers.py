"""Which module may import which, what an import may do, and how fast --help can be."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import prune_lab

PACKAGE = Path(prune_lab.__file__).resolve().parent

# A module imports from the lines above its own, and on its own line from what stands to its left.
LAYERS = (
    (
        "version",
        "errors",
        "exit_codes",
        "schemas",
        "runtime",
        "processes",
        "families",
        "counting",
        "live_bytes",
        "assets",
    ),
    ("config", "blocks", "runs", "text_tables", "prompts", "width", "orders"),
    ("plans", "forms", "models"),
    ("surgery", "probes", "prefix_sharing", "runtimes", "reuse"),
    ("metrics", "profiling", "evaluation", "importance"),
    ("search", "candidates", "repair", "few_steps"),
    ("distill",),
    ("ranking", "applications"),
    ("cluster", "session", "engines"),
    ("report", "export"),
    ("zero_shot",),
    ("workflow",),
    ("tables", "api"),
    ("cli", "__main__"),
)
RANK = {name: (line, place) for line, names in enumerate(LAYERS) for place, name in enumerate(names)}
HEAVY = ("torch", "diffusers", "transformers", "pandas", "matplotlib", "scipy", "datasets")


def sources() -> Iterator[tuple[str, Path]]:
    """The top-level module or package each source file belongs to, and the file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.parts != ("__init__.py",):
            yield relative.parts[0].removesuffix(".py"), path


def imports_in(source: str, package: str) -> set[str]:
    """The top-level modules of prune_lab that ``source`` imports, wherever in the file the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"a relative import in {package}, line {node.lineno}")
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "prune_lab" and len(parts) > 1 and not parts[1].startswith("__"):
                found.add(parts[1])
    return found - {package}


def upward(package: str, imported: set[str]) -> list[str]:
    return sorted(name for name in imported if RANK.get(name, (99, 0)) >= RANK[package])


def test_every_module_has_its_place() -> None:
    assert {name for name, _ in sources()} <= set(RANK)


@pytest.mark.parametrize(
    ("package", "path"), list(sources()), ids=lambda value: getattr(value, "name", value)
)
def test_no_module_imports_upwards(package: str, path: Path) -> None:
    wrong = upward(package, imports_in(path.read_text(encoding="utf-8"), package))
    assert not wrong, f"{path.name} (of {package}) imports {wrong}, which stand at its level or below"


def modules_imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of prune_lab, by full name, that ``path`` imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules | ({node.module or ""} & modules if names - modules else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = {
        ".".join(("prune_lab", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for _, path in sources()
    }
    imported = {name: modules_imported(path, set(paths)) - {name} for name, path in paths.items()}
    in_order = TopologicalSorter(imported).static_order()  # CycleError names the circle
    assert set(in_order) == set(paths)


@pytest.mark.parametrize(
    ("package", "line", "wrong"),
    [
        ("plans", "from prune_lab.surgery import bypassed", ["surgery"]),
        ("plans", "def f():\n    import prune_lab.cli", ["cli"]),
        ("plans", "from prune_lab import report", ["report"]),
        ("probes", "from prune_lab.surgery import bypassed", []),
        ("surgery", "from prune_lab.probes import Probe", ["probes"]),
        ("plans", "from prune_lab.errors import PlanError", []),
        ("plans", "from prune_lab.plans.presets import PRESETS", []),
        ("plans", "from prune_lab.version import __version__", []),
        ("plans", "from prune_lab.unheard_of import x", ["unheard_of"]),
    ],
)
def test_the_check_sees_what_it_should(package: str, line: str, wrong: list[str]) -> None:
    assert upward(package, imports_in(line, package)) == wrong


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter prints when it runs ``code`` in ``folder``."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


LIGHT = (
    "prune_lab",
    "prune_lab.errors",
    "prune_lab.schemas",
    "prune_lab.config",
    "prune_lab.runs",
    "prune_lab.tables",
    "prune_lab.api.settings",
)
VERBS = (
    None,
    "blocks",
    "profile",
    "prune",
    "generate",
    "export",
    "convert",
    "push",
    "score",
    "run",
    "report",
)


# What can be told from the options alone; a budget is read without the model that it is for.
MISTAKES = {
    "prune-lab search reference --solver best": "search.solver = 'best' cannot be used",
    "prune-lab search reference --axes depth,height": "search.axes",
    "prune-lab search reference --plans 0": "search.count = 0",
    "prune-lab search reference --macs=-5%": "-5% is below 0",
    "prune-lab search reference --latency 0x": "no model takes so little",
    "prune-lab search reference --params 65%%": "cannot read '65%%'",
    "prune-lab search reference --macs 1.2x": "at most the whole",
    "prune-lab search reference --set search.budgets=flops<=5": "cannot read the budget 'flops<=5'",
    "prune-lab search reference --macs 60% --round-to 8": "asked for --round-to, found the axes depth",
    "prune-lab search reference --macs 60% --axes width --solver greedy": "with the solver greedy, which removes",
    "prune-lab search reference --memory 60% --axes width": "the peak of memory of a narrower model",
    "prune-lab score reference --samples 1": "probe.samples = 1",
    "prune-lab run reference --run runs/new --plans 0": "search.count = 0",
}


def help_of(verb: str | None) -> str:
    return f"prune-lab {verb} --help" if verb else "prune-lab --help"


# Each case in a child of its own, which has imported nothing of ours: one interpreter starts instead of twelve.
COMMANDS = """
import importlib, json, os, sys, traceback

def main(command):
    if command.startswith("import "):
        return importlib.import_module(command.removeprefix("import "))
    sys.argv = command.split()
    from prune_lab.cli import main
    try:
        main()
    except SystemExit as stop:
        assert (stop.code or 0) == (2 if command in {mistakes!r} else 0), stop.code

for command in {commands!r}:
    read, write = os.pipe()
    if not os.fork():
        try:
            os.dup2(write, 1), os.dup2(write, 2)
            main(command)
            print("MODULES" + json.dumps(sorted(sys.modules)), flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        print(json.dumps([command, pipe.read()]))
    os.wait()
"""


@pytest.fixture(scope="module")
def output_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of a fresh interpreter prints, and after the word MODULES what it has imported."""
    commands = [*(f"import {module}" for module in LIGHT), *(help_of(verb) for verb in VERBS), *MISTAKES]
    code = COMMANDS.format(commands=commands, mistakes=list(MISTAKES))
    found = run_python(code, tmp_path_factory.mktemp("light"))
    assert found.returncode == 0, found.stderr
    return dict(json.loads(line) for line in found.stdout.splitlines())


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_stay_light(module: str, output_of: dict[str, str]) -> None:
    text, modules = output_of[f"import {module}"].split("MODULES")
    assert text == ""
    assert set(json.loads(modules)).isdisjoint(HEAVY)


@pytest.mark.parametrize("verb", VERBS)
def test_help_answers_without_the_heavy_libraries(verb: str | None, output_of: dict[str, str]) -> None:
    text, modules = output_of[help_of(verb)].split("MODULES")
    assert "Usage" in text
    assert set(json.loads(modules)).isdisjoint(HEAVY)


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_in_options_are_told_without_the_heavy_libraries(
    command: str, output_of: dict[str, str]
) -> None:
    text, modules = output_of[command].split("MODULES")
    assert MISTAKES[command] in text
    assert len(text.splitlines()) == 1
    assert set(json.loads(modules)).isdisjoint(HEAVY)


EVERYTHING = """
import os, random, sys, warnings
import matplotlib, numpy, torch, diffusers, transformers
def state():
    return [
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
        torch.random.initial_seed(), torch.get_rng_state().tolist(), numpy.random.get_state()[2], random.getstate(),
        matplotlib.rcParams.copy(), list(warnings.filters), dict(os.environ), os.getcwd(),
        diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity(),
        transformers.utils.logging.is_progress_bar_enabled(),
    ]
import importlib
for name in {others!r}:
    importlib.import_module(name)
before = state()
for name in {modules!r}:
    importlib.import_module(name)
names = "threads dtype grad seed rng numpy random matplotlib warnings environ cwd diffusers transformers bars".split()
changed = [name for name, old, new in zip(names, before, state(), strict=True) if old != new]
sys.exit(f"changed by importing prune_lab: {{changed}}" if changed else 0)
"""


@pytest.mark.long
def test_importing_everything_changes_nothing(tmp_path: Path) -> None:
    # What the libraries themselves do when they are first imported is not ours to answer for.
    others = sorted(
        {
            name
            for _, path in sources()
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            if name.split(".")[0] not in ("prune_lab", "__future__")
        }
    )
    modules = [
        ".".join(("prune_lab", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for _, path in sources()
        if path.name != "__main__.py"
    ]
    found = run_python(EVERYTHING.format(others=others, modules=modules), tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout == ""
    assert list(tmp_path.iterdir()) == []


def outside(source: str) -> set[str]:
    """What ``source`` imports of the repository beside prune_lab, which stands on top of the package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names} & {"recipes", "benchmarks", "tests"}


def test_the_package_imports_nothing_that_stands_on_top_of_it() -> None:
    assert outside("import recipes.reference_model") == outside("from recipes import x") == {"recipes"}
    assert outside("def f():\n    from benchmarks.search import x") == {"benchmarks"}
    for path in sorted(PACKAGE.rglob("*.py")):
        assert not outside(path.read_text(encoding="utf-8")), path


# Texts that tell a user how plain diffusers loads a student with code of its own, and the process that proves that it
# does: what it runs is a file whose hash the package knows (``check_code``, right before).
CODE = PACKAGE / "families" / "own_code"
ALLOWED: dict[str, set[str]] = {
    **{
        name: {"trust_remote_code=True"}
        for name in ("export/snippets.py", "report/tournament.py", "surgery/code.py", "surgery/prover.py")
    },
    **{f"families/own_code/{path.name}": {"trust_remote_code=True"} for path in CODE.glob("*.py")},
}


def test_nothing_unpickles_or_runs_foreign_code() -> None:
    # `weights_only`, `pickle` and friends have no use here at all, so their mere presence is a mistake
    forbidden = ("import pickle", "torch.load(", "trust_remote_code=True", "np.load(", "allow_pickle")
    for _, path in sources():
        text = path.read_text(encoding="utf-8")
        found = {word for word in forbidden if word in text}
        assert found <= ALLOWED.get(str(path.relative_to(PACKAGE)), set()), path
