"""The notebooks run from a clean kernel as they are committed, and each checks itself at the end."""

from __future__ import annotations

import ast
import os
import re
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from prune_lab.runs import Run

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_of(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_six() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_blocks_and_scores",
        "02_candidates_and_costs",
        "03_distill_and_rank",
        "04_explore_a_run",
        "05_width_and_runtimes",
        "06_evaluate_and_use",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_quick_and_small(path: Path) -> None:
    cells = code_of(path)
    assert cells[0].metadata["tags"] == ["parameters"]
    assert re.search(r"^QUICK = True\b", cells[0].source, flags=re.MULTILINE)
    assert path.stat().st_size < 400_000  # room for the small pictures of an executed one, for nothing else
    assert any(isinstance(node, ast.Assert) for node in ast.parse(cells[-1].source).body)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_say_nothing_of_the_machine(path: Path) -> None:
    assert all(out.get("name") != "stderr" for cell in code_of(path) for out in cell.outputs)
    assert not re.search(r"site-packages|/home/|/root/|[.]venv", path.read_text(encoding="utf-8"))


def smaller(notebook: str, request: pytest.FixtureRequest) -> dict[str, object]:
    """Parameters that make seconds of minutes. ``make notebooks`` runs all of them as they are committed."""
    if notebook == "04_explore_a_run":
        run: Run = request.getfixturevalue("finished")
        return {"RUN": str(run.folder)}
    if notebook == "05_width_and_runtimes":
        folder: Path = request.getfixturevalue("tiny_pipeline_folder")
        return {"MODEL": str(folder), "ROUNDS": 4}
    if notebook == "06_evaluate_and_use":
        return {"DISTILLED": 4, "PROMPTS": 4, "LEARNT": 40, "STEPS": 5}
    return {}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_its_assertions_hold(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for name, value in smaller(path.stem, request).items():
        found, changed = re.subn(
            rf"^{name} = [^#\n]+", f"{name} = {value!r}  ", cells[0].source, flags=re.MULTILINE
        )
        assert changed == 1
        cells[0].source = found
    with warnings.catch_warnings():
        # The kernel's own plumbing (sockets, event loops) is not what is tested here.
        warnings.simplefilter("ignore")
        client = NotebookClient(notebook, timeout=1000, kernel_name="python3")
        client.execute(cwd=str(tmp_path))
    errors = [out for cell in notebook.cells for out in cell.get("outputs", ()) if out.output_type == "error"]
    assert errors == []
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
