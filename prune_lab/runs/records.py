"""Reading back what was written here: tables, JSON and pictures, each checked whole before anything of it is used.

A file is what it was written as, or it is refused in one line that names it and the cure: never used in part, and never
guessed at.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import struct
import sys
import types
import typing
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prune_lab.errors import DataError
from prune_lab.runtime.reading import MOST_BYTES, parse_json, path_text, read_bytes
from prune_lab.schemas import Cells, Records

if TYPE_CHECKING:  # these take a second to import
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

_MOST_TABLE = 2**29  # of a table: held-out losses of long trainings are the longest
_MOST_PIXELS = 2**26  # of a picture: 8192 x 8192
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # which Pillow does not look for

Kind = TypeVar("Kind")


# What to say -----------------------------------------------------------------------------------------------------


def run_around(path: Path) -> Path | None:
    """The run folder that ``path`` lies in; None where it lies in none."""
    return next((one for one in path.parents if (one / "config.toml").is_file()), None)


def damaged(path: Path, found: str, *, made_with: Path | None = None) -> DataError:
    """The error to raise for the damaged file ``path``: what was ``found`` in it, and what to do.

    ``made_with`` is the folder that is only made as a whole.
    """
    folder, it = run_around(path), "it" if made_with is None else path_text(made_with)
    cure = f"delete {it} and make it again"
    if folder is not None:
        shown = path_text(folder)
        cure = (
            f"delete {it} and run again: prune-lab run --run {shown}; prune-lab doctor {shown} lists what else is "
            "damaged"
        )
    return DataError(f"asked to read {path_text(path)}, found {found}; {cure}")


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 50 else f"{text[:50]}..."


def _content(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file that was written here; StorageError where there is none, DataError for something else."""
    if path.is_dir():
        raise damaged(path, "a folder in its place")
    if path.is_file() and (size := path.stat().st_size) > most:
        raise damaged(path, f"{size:,} bytes, more than such a file ever has")
    return read_bytes(path, most=most)


# Tables ----------------------------------------------------------------------------------------------------------


def _rows_of(path: Path) -> list[list[str]]:
    """The cells of the CSV in ``path``, line by line with the names of the columns first."""
    content = _content(path, _MOST_TABLE)
    if not content.strip():
        raise damaged(path, "an empty file")
    try:
        text = content.decode("utf-8-sig")  # a spreadsheet writes a mark
    except UnicodeDecodeError as error:
        raise damaged(path, f"other bytes than text at byte {error.start:,}") from None
    if not text.endswith("\n"):
        raise damaged(path, "that its last line is cut off")
    longest = csv.field_size_limit(sys.maxsize)
    try:
        return list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise damaged(path, f"no CSV ({error})") from None
    finally:
        csv.field_size_limit(longest)


def _is_plain(texts: Sequence[str], characters: str) -> bool:
    # int() and float() take more than what is written here: blanks, underscores, digits of other alphabets
    return set("".join(texts)) <= set(characters)


def _wrong_cell(text: str, cells: Cells) -> str:
    """What is wrong with the ``text`` of one cell; empty where nothing is."""
    if not text:
        return "" if cells.missing else "nothing"
    if cells.kind == "text":
        return "" if not cells.words or text in cells.words else _shown(text)
    if cells.kind == "truth":
        return "" if text in ("True", "False") else _shown(text)
    infinite = text.lstrip("+-") == "inf"
    try:
        value = float(text)
    except ValueError:
        return _shown(text)
    plain = infinite or _is_plain([text], "0123456789+-.eE")
    whole = cells.kind == "number" or (math.isfinite(value) and value.is_integer() and abs(value) < 2**63)
    finite = math.isfinite(value) or (infinite and cells.infinite)
    return "" if plain and whole and finite and value >= cells.least else _shown(text)


def _wanted(cells: Cells) -> str:
    words = {
        "text": " or ".join(cells.words) or "text",
        "integer": "a whole number",
        "number": "a number" if cells.infinite else "a finite number",
        "truth": "True or False",
    }[cells.kind]
    least = "" if math.isinf(cells.least) else f" of at least {cells.least:g}"
    return words + least + (" or nothing" if cells.missing else "")


def _numbers(texts: Sequence[str], cells: Cells) -> NDArray[Any] | None:
    """The values of a column of numbers; None where a cell is wrong or unusual, so that each has to be looked at."""
    import numpy as np

    filled = [text for text in texts if text]
    if not _is_plain(filled, "0123456789+-.eE" + ("inf" if cells.infinite else "")):
        return None
    try:
        if cells.kind == "integer" and len(filled) == len(texts):
            values = np.array([int(text) for text in texts], dtype=np.int64)
        else:
            values = np.array([float(text) if text else math.nan for text in texts])
    except (ValueError, OverflowError):
        return None
    known = values[~np.isnan(values)]
    fine = len(known) == len(filled) and (cells.infinite or np.isfinite(known).all())
    fine = fine and (cells.missing or len(filled) == len(texts))
    whole = cells.kind == "number" or (known == np.floor(known)).all()
    return values if fine and whole and (known >= cells.least).all() else None


def _column(texts: Sequence[str], cells: Cells) -> pd.Series[Any]:
    """The cells of a column that are known to be right, as pandas holds them; missing ones are NaN."""
    import pandas as pd

    if cells.kind == "text":
        return pd.Series([text or None for text in texts], dtype="str")
    if cells.kind == "truth":
        values = [{"True": True, "False": False, "": math.nan}[text] for text in texts]
        return pd.Series(values, dtype="bool" if all(texts) else "object")
    numbers = [float(text) if text else math.nan for text in texts]
    return pd.Series(numbers).astype("int64" if cells.kind == "integer" and all(texts) else "float64")


def _check_names(path: Path, found: Sequence[str], records: Records) -> None:
    missing = [name for name in records.columns if name not in found]
    if missing:
        raise damaged(path, f"no column {', '.join(missing)}")
    known = {*records.columns, *records.optional}
    unknown = [_shown(name) for name in found if name not in known]
    if unknown or len(set(found)) < len(found):
        raise damaged(path, f"the column {unknown[0]}" if unknown else "a column that is there twice")


def read_records(path: Path, records: Records) -> pd.DataFrame:
    """The table in the CSV file ``path``, one of ``records``, as ``runtime.write_frame`` wrote it.

    Text is text, whatever it looks like (``NA``, ``007``, ``12e4``); an empty cell is missing (NaN). Columns of
    integers are int64, or float64 where one is missing; numbers have every digit that was written. Raises StorageError
    when the file cannot be read, and DataError, which names row and column, when it is damaged: cut off, of other
    columns, a cell of another kind, a number that is not finite, a row twice.
    """
    import pandas as pd

    path = Path(path)
    names, *rows = _rows_of(path)
    _check_names(path, names, records)
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise damaged(path, f"{len(row)} cells in row {number}, which should have {len(names)}")
    if records.rows and not rows:
        raise damaged(path, "no rows")
    columns: dict[str, Any] = {}
    for name, texts in zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True):
        cells = records.cells_of(name)
        numbers = _numbers(texts, cells) if cells.kind in ("integer", "number") else None
        if numbers is None:
            for number, text in enumerate(texts, 1):
                if wrong := _wrong_cell(text, cells):
                    raise damaged(path, f"{wrong} in row {number} of {name}, which holds {_wanted(cells)}")
        columns[name] = _column(texts, cells) if numbers is None else numbers
    frame = pd.DataFrame(columns, columns=names)
    if records.key and (twice := frame.duplicated(list(records.key))).any():
        number = 1 + int(twice.to_numpy().argmax())
        raise damaged(path, f"row {number} a second time (by {', '.join(records.key)})")
    return frame


# JSON ------------------------------------------------------------------------------------------------------------


def _at(place: str) -> str:
    return f" at {place}" if place else ""


def _wrong(wanted: str, value: object, place: str) -> ValueError:
    found = {list: "a list", dict: "an object", type(None): "null"}.get(type(value), _shown(value))
    return ValueError(f"{found} where {wanted} belongs{_at(place)}")


def _fields(hint: Any, value: object, place: str) -> dict[str, Any]:
    """The checked entries of an object that is to be a dataclass or a TypedDict."""
    if not isinstance(value, dict):
        raise _wrong("an object", value, place)
    hints = typing.get_type_hints(hint)
    if dataclasses.is_dataclass(hint):
        needed = {
            one.name
            for one in dataclasses.fields(hint)
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        }
        if unknown := [name for name in value if name not in hints]:
            raise ValueError(f"the unknown entry {_shown(unknown[0])}{_at(place)}")
    else:
        whole = typing.get_type_hints(hint, include_extras=True)  # where annotations are text, only these tell
        optional = {name for name, one in whole.items() if typing.get_origin(one) is typing.NotRequired}
        needed = set(hint.__required_keys__) - optional
    if lacking := sorted(needed - value.keys()):
        raise ValueError(f"no {lacking[0]!r}{_at(place)}")
    return {
        name: typed(hints[name], one, f"{place}.{name}".lstrip(".")) if name in hints else one
        for name, one in value.items()
    }


def _items(hint: Any, value: object, place: str) -> list[Any]:
    """The checked items of a list that is to be a list or a tuple."""
    if not isinstance(value, list):
        raise _wrong("a list", value, place)
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is list or kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{len(value)} items where {len(kinds)} belong{_at(place)}")
    return [
        typed(kind, one, f"{place}[{number}]")
        for number, (kind, one) in enumerate(zip(kinds, value, strict=True))
    ]


def _scalar(hint: Any, value: object, place: str) -> Any:
    if type(value) is int and abs(value) >= 2**63:  # none is written here, and no float may hold it
        raise _wrong("a number below 2**63", value, place)
    if hint is float:
        # Every integer is a number here, and true is neither.
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise _wrong("a finite number", value, place)
        return float(value)  # type: ignore[arg-type]
    if type(value) is not hint and not (hint is str and isinstance(value, str)):
        words = {int: "a whole number", str: "text", bool: "true or false", types.NoneType: "null"}
        raise _wrong(words[hint], value, place)
    return value


def typed(hint: Any, value: object, place: str = "") -> Any:
    """``value``, of a JSON file, as the type ``hint`` says; ``place`` is where it stands in the file.

    A hint is a dataclass (built from an object, no other entries), a TypedDict (other entries stay), list, tuple,
    Mapping, Literal, a union, str, int, bool, None, or float, which is finite. Raises ValueError, which says in one
    line what was found instead.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if dataclasses.is_dataclass(hint):
        return typing.cast("type[Any]", hint)(**_fields(hint, value, place))
    if typing.is_typeddict(hint):
        return _fields(hint, value, place)
    if origin in (list, tuple):
        items = _items(hint, value, place)
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _wrong("an object", value, place)
        return {name: typed(inner[1], one, f"{place}.{name}".lstrip(".")) for name, one in value.items()}
    if origin is typing.Literal:
        if not any(type(value) is type(one) and value == one for one in inner):
            raise _wrong(" or ".join(map(str, inner)), value, place)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in inner:
            return None
        *others, last = (one for one in inner if one is not types.NoneType)
        for one in others:
            try:
                return typed(one, value, place)
            except ValueError:
                continue
        return typed(last, value, place)
    return _scalar(hint, value, place)


def read_typed(path: Path, hint: type[Kind]) -> Kind:
    """What the JSON file ``path`` holds, as the type ``hint`` says; see ``typed``.

    Raises StorageError when the file cannot be read, and DataError, which says where, when it is damaged.
    """
    path = Path(path)
    content = _content(path)
    try:
        return typing.cast("Kind", typed(hint, parse_json(content)))
    except ValueError as error:
        raise damaged(path, str(error) if content.strip() else "an empty file") from None


# Pictures --------------------------------------------------------------------------------------------------------


def read_picture(path: Path) -> NDArray[np.uint8]:
    """The picture in the PNG file ``path``, (H, W, 3) uint8, with every checksum of the file as it should be.

    Raises StorageError when the file cannot be read, DataError when it is missing, damaged or another kind of picture.
    """
    import numpy as np
    from PIL import Image

    path = Path(path)
    if not path.is_file():
        raise damaged(path, "a folder in its place" if path.is_dir() else "no such file", made_with=path.parent)
    content = _content(path)
    if content[:8] != _PNG or len(content) < 24:
        raise damaged(path, "no PNG picture" if content else "an empty file", made_with=path.parent)
    try:
        if not content.endswith(_PNG_END):
            raise ValueError("its end is missing")
        width, height = struct.unpack(">II", content[16:24])
        if width * height > _MOST_PIXELS:
            raise ValueError(f"{width:,} x {height:,} pixels are too many")
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.verify()
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.mode != "RGB":
                raise ValueError(f"mode {image.mode}")
            return np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error) as error:
        why = ascii(str(error))[1:-1] or type(error).__name__
        raise damaged(path, f"a damaged picture ({why})", made_with=path.parent) from None
