"""The pages of the report: one HTML file that works offline, the same content as Markdown, and the tables as CSV."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from prune_lab import __version__
from prune_lab.report.document import Chart, LiveMap, SectionItem, Table, Text
from prune_lab.report.figures import DARK, LIGHT, freeze_layout, save_png, svg_uri
from prune_lab.report.sections import report_sections
from prune_lab.report.tables import RunTables, read_run
from prune_lab.runs import Run
from prune_lab.runtime import atomic_write, write_text

# The tables that are copied beside the page, as the steps wrote them.
_CSV_FILES = (
    *("blocks", "importance", "importance_parts", "criteria", "costs", "reductions", "pipeline_profile"),
    *("ranking", "tournament", "sources"),
)


def write_report(run: Run) -> Path:
    """The path of the report on ``run``, one HTML file; Markdown, PNG and CSV files are written beside it.

    Reads only files of the run folder, so it can be called after any step; the report names steps that are missing.
    Raises RunError when the folder holds nothing to report, DataError when one of its files is damaged.
    """
    tables = read_run(run)
    # Every figure is drawn and written, and embedded in the HTML page.
    sections = [
        {"key": section.key, "title": section.title, "parts": [_render(part, run) for part in section.parts]}
        for section in report_sections(tables)
    ]
    page = {
        "title": tables.title,
        "facts": _facts(tables),
        "sections": sections,
        "version": __version__,
    }
    for source in (*(getattr(run, name) for name in _CSV_FILES), run.folder / "steps.csv"):
        if source.exists():
            _copy(source, run.report_dir / source.name)
    for plan in tables.plans:
        recovery = run.candidate(plan.id).recovery
        if recovery.exists():
            _copy(recovery, run.report_dir / f"recovery-{plan.id}.csv")
    write_text(run.report_dir / "report.md", _template("page.md.jinja", autoescape=False, page=page))
    write_text(run.report, _template("page.html.jinja", autoescape=True, page=page))
    return run.report


def _render(part: SectionItem, run: Run) -> dict[str, Any]:
    match part:
        case Text():
            return {"kind": "text", **asdict(part)}
        case Table():
            return {"kind": "table", **asdict(part)}
        case LiveMap():
            return {"kind": "live", **asdict(part)}
        case Chart():
            light, dark = part.draw(LIGHT), part.draw(DARK)
            area = freeze_layout(light)
            file = f"{part.name}.png"
            save_png(light, run.report_dir / file, area)
            uris = {"light": svg_uri(light, area), "dark": svg_uri(dark, freeze_layout(dark))}
            return {"kind": "drawing", "alt": part.alt, "caption": part.caption, "file": file, **uris}


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def _facts(tables: RunTables) -> list[tuple[str, str]]:
    """(name, value) pairs that identify the run, for the head of the page."""
    environment = tables.environment
    facts = {
        "Model": tables.model,
        "Seed": tables.settings.get("seed"),
        "Device": environment.get("device_name") or environment.get("device"),
        "Number format": environment.get("dtype"),
        "torch": environment.get("torch"),
        "diffusers": environment.get("diffusers"),
        "Config": tables.config_digest,
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


# Templates -------------------------------------------------------------------------------------------------------


def _template(name: str, *, autoescape: bool, page: dict[str, Any]) -> str:
    # S701 does not apply to the Markdown page: its filters escape what Markdown would interpret.
    environment = Environment(
        autoescape=autoescape,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        loader=FunctionLoader(_source),
    )
    environment.filters |= {"inline": _inline, "plain": _plain, "prose": _prose, "json": _json}
    environment.globals["script"] = lambda file: Markup(_source(file))  # our own file, not a reader's words
    return environment.get_template(name).render(**page)


def _source(name: str) -> str:
    return resources.files("prune_lab.report").joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> Markup:
    """``value`` as JSON inside a script element: no ``<`` of it can end the element."""
    return Markup(json.dumps(value, ensure_ascii=False).replace("<", "\\u003c"))


def _inline(text: str) -> Markup:
    """``text`` escaped for HTML, with `code` and *emphasis* marked up."""
    escaped = html.escape(text, quote=True)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return Markup(re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?!\w)", r"<em>\1</em>", escaped))


def _plain(text: object) -> str:
    """``text`` with all Markdown markup escaped, for a table or a line."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", str(text).replace("\n", " "))


def _prose(text: str) -> str:
    """``text`` for a paragraph of Markdown: `code` and *emphasis* stay, HTML tags are escaped."""
    return re.sub(r"([<>])", r"\\\1", text)
