"""The pages of the report: one HTML file that works offline, the same content as Markdown, and the tables as CSV."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path, PureWindowsPath
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from prune_lab.report.document import Chart, LiveMap, SectionItem, Table, Text
from prune_lab.report.figures import DARK, LIGHT, freeze_layout, save_png, svg_uri
from prune_lab.report.sections import report_sections
from prune_lab.report.tables import RunTables, read_run
from prune_lab.runs import Run
from prune_lab.runtime import atomic_write, read_text, without_folders, write_text
from prune_lab.version import __version__

# The tables that are copied beside the page, as the steps wrote them.
_CSV_FILES = (
    *("blocks", "importance", "importance_parts", "criteria", "costs", "reductions", "pipeline_profile"),
    *("gates", "gate_steps", "ranking", "repairs", "tournament", "sources"),
)


def write_report(run: Run) -> Path:
    """The path of the report on ``run``, one HTML file; Markdown, PNG and CSV files are written beside it.

    Reads only files of the run folder, so it can be called after any step; the report names steps that are missing.
    Raises RunError when the folder holds nothing to report, DataError when one of its files is damaged.
    """
    tables = read_run(run)
    places = (str(run.folder), str(run.folder.absolute()), *_paths_in(tables.settings))
    # Every figure is drawn and written, and embedded in the HTML page.
    sections: list[dict[str, Any]] = [
        {
            "key": section.key,
            "title": section.title,
            "parts": [_render(part, run, places) for part in section.parts],
        }
        for section in report_sections(tables)
    ]
    page = {
        "title": without_folders(tables.title, places),
        "facts": _told(_facts(tables), places),
        "sections": sections,
        "version": __version__,
    }
    for source in (*(getattr(run, name) for name in _CSV_FILES), run.folder / "steps.csv"):
        if source.exists():
            _copy(source, run.report_dir / source.name, places)
    for plan in tables.plans:
        recovery = run.candidate(plan.id).recovery
        if recovery.exists():
            _copy(recovery, run.report_dir / f"recovery-{plan.id}.csv", places)
    write_text(run.report_dir / "report.md", _template("page.md.jinja", autoescape=False, page=page))
    parts = [part for section in sections for part in section["parts"]]
    html_page = page | _allowed(*(part for part in parts if part["kind"] == "live"))
    write_text(run.report, _template("page.html.jinja", autoescape=True, page=html_page))
    return run.report


# What is shown names things without the folders of this machine -----------------------------------------------------


def _paths_in(settings: object) -> Iterator[str]:
    """The values of ``settings`` that are paths, also relative ones."""
    if isinstance(settings, Mapping):
        for value in settings.values():
            yield from _paths_in(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _paths_in(value)
    elif isinstance(settings, str) and "/" in settings and len(settings) < 1000 and "\n" not in settings:
        named = settings.startswith(("/", ".", "~")) or Path(settings).exists()
        yield from [settings] if named else []


def _to_paste(model: str) -> str:
    """``model`` in a command that runs where the run was started: a path from there, a name as it was given.

    A path that begins elsewhere is of this machine: its last part stands behind PATH/TO, which a reader replaces.
    """
    named = Path(model)
    if named.is_absolute() or model.startswith("~") or ".." in named.parts or "\\" in model:
        return f"PATH/TO/{PureWindowsPath(model).name}"  # which knows both kinds of slashes
    return model


def _told(value: Any, places: tuple[str, ...]) -> Any:
    """``value`` with ``without_folders`` of every text in it, also of the names of entries."""
    match value:
        case str():
            return without_folders(value, places)
        case Mapping():
            return {_told(name, places): _told(one, places) for name, one in value.items()}
        case list() | tuple():
            return [_told(one, places) for one in value]
        case _:
            return value


# The parts ---------------------------------------------------------------------------------------------------------


def _render(part: SectionItem, run: Run, places: tuple[str, ...]) -> dict[str, Any]:
    match part:
        case Text():
            return {"kind": "text", **_told(asdict(part), places)}
        case Table():
            return {"kind": "table", **_told(asdict(part), places)}
        case LiveMap():
            told = _told(asdict(part), places)
            told["data"]["model"] = _to_paste(str(part.data["model"]))
            return {"kind": "live", **told}
        case Chart():
            light, dark = part.draw(LIGHT), part.draw(DARK)
            area = freeze_layout(light)
            file = f"{part.name}.png"
            save_png(light, run.report_dir / file, area)
            uris = {"light": svg_uri(light, area), "dark": svg_uri(dark, area)}  # of the same words and sizes
            return {"kind": "drawing", "alt": part.alt, "caption": part.caption, "file": file, **uris}


def _copy(source: Path, target: Path, places: tuple[str, ...]) -> None:
    with atomic_write(target) as temporary:
        temporary.write_bytes(without_folders(read_text(source), places).encode())


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


# What the page may do ----------------------------------------------------------------------------------------------


def _color_rule(cell: Mapping[str, Any]) -> str:
    """The colours of a cell or layer of the live map, and of its letters, for light and dark pages."""
    looks = ((theme[0], cell[theme]) for theme in ("light", "dark"))
    return ";".join(f"--{first}c:{face};--{first}i:{ink}" for first, (face, ink) in looks)


def _place_rules(live: Mapping[str, Any]) -> str:
    """How large the live map is, where each cell and name of it stands, and the colours; a page without style
    attributes needs this.
    """
    least, most = min(42.0, 2.9 * live["width"]), 4.7 * live["width"]
    rules = [
        f".live-map{{aspect-ratio:{live['aspect']:.3f};min-width:{least:.1f}rem;max-width:{most:.1f}rem}}"
    ]
    for number, cell in enumerate(live["cells"], 1):
        sides = (f"{side}:{cell[side]:.3f}%" for side in ("left", "top", "width", "height"))
        rules.append(f"#live-cell-{number}{{{';'.join(sides)};{_color_rule(cell)}}}")
    layers = [layer for _, inside in live["layers"] for layer in inside]
    rules += [f"#live-layer-{number}{{{_color_rule(layer)}}}" for number, layer in enumerate(layers, 1)]
    for number, label in enumerate(live["labels"], 1):
        rules.append(f"#live-stage-{number}{{left:{label['x']:.3f}%;top:{label['y']:.3f}%}}")
    return "\n".join(rules)


def _allowed(*live: Mapping[str, Any]) -> dict[str, Markup]:
    """Style and script of the page, both our own, and the policy by which a browser runs these and loads nothing."""
    style = "\n".join([_source("page.css"), *map(_place_rules, live)])
    script = _source("live_map.js")
    rules = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _digest(style),
        "script-src": _digest(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    return {"style": Markup(style), "script": Markup(script), "policy": Markup(policy)}


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
