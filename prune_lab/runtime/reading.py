"""Files from outside, read with suspicion: regular ones only, of a bounded size, and JSON of a bounded depth.

Every reader of the package comes here. A pipe would wait for its writer and a device may never end, so nothing is
opened before it is known to be a file.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

from prune_lab.errors import DataError, StorageError

MOST_BYTES = 64 * 2**20  # of a text or JSON that is read whole; the largest known tokenizer takes half of it
DEEPEST = 100  # levels of JSON: further in, whatever walks the value would end in a RecursionError
_MOST_SHOWN = 300  # characters of a name in a message
_INSTEAD = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
# UTF-32 before UTF-16: the mark of the one begins with that of the other.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def printable(text: str, most: int = _MOST_SHOWN) -> str:
    """``text`` for a message: on one line, of ``most`` characters or a few more, whatever it holds."""
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[:most]}..."


def path_text(path: Path | str) -> str:
    """``path`` for a message, see ``printable``."""
    return printable(str(path))


# Files -----------------------------------------------------------------------------------------------------------


def what_is(path: Path | str, mode: int | None = None) -> str:
    """What lies at ``path``, as a line calls it; ``mode`` is that of its status, where it is known."""
    mode = Path(path).stat().st_mode if mode is None else mode
    other = next((what for is_it, what in _INSTEAD if is_it(mode)), "no regular file")
    return "a file" if stat.S_ISREG(mode) else other


def _refuse_others(path: Path | str, mode: int) -> None:
    """Raise StorageError, which says what ``path`` is, unless its ``mode`` is that of a regular file."""
    if not stat.S_ISREG(mode):
        raise StorageError(
            f"asked to read {path_text(path)}, found {what_is(path, mode)}; give a regular file"
        )


def open_regular(path: Path | str) -> BinaryIO:
    """The file ``path``, opened to read bytes; links are followed, and nothing is waited for.

    Raises StorageError when it is not there, may not be read, or is a folder, a pipe, a device or a socket.
    """
    try:
        _refuse_others(path, Path(path).stat().st_mode)  # before: opening alone may rewind a tape
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(handle, "rb")
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"asked to read {path_text(path)}: {error.strerror or error}; check the path"
        ) from None
    except ValueError:  # a NUL, or half of a character
        raise StorageError(
            f"asked to read {path_text(path)}, which is no name of a file; check the path"
        ) from None
    try:
        _refuse_others(path, os.fstat(handle).st_mode)  # what took the place of the file since
    except StorageError:
        file.close()
        raise
    return file


def read_bytes(path: Path | str, *, most: int = MOST_BYTES) -> bytes:
    """The content of the regular file ``path``, ``most`` bytes or fewer.

    Raises StorageError, as ``open_regular`` does, and when it holds more.
    """
    with open_regular(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise StorageError(
                f"asked to read {path_text(path)}: {error.strerror or error}; check the file"
            ) from None
        if len(content) > most:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise StorageError(
                f"asked to read {path_text(path)}, found {size:,} bytes; at most {most:,} are read: give a smaller file"
            )
    return content


# Text and JSON ---------------------------------------------------------------------------------------------------


def decode_text(content: bytes, errors: str = "strict") -> str:
    """The text of UTF-8 with or without a byte-order mark, or of UTF-16 or UTF-32 with one; without the mark.

    Raises UnicodeDecodeError for other bytes, unless ``errors`` says what becomes of them.
    """
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    return content.decode(encoding, errors)


def text_of(content: bytes, path: Path | str) -> str:
    """The text that ``content``, which was read from ``path``, is, as ``decode_text`` says.

    Raises DataError, which names ``path``, for other bytes than text.
    """
    try:
        return decode_text(content)
    except UnicodeDecodeError as error:
        raise DataError(
            f"asked for the text in {path_text(path)}, found other bytes than UTF-8 at byte {error.start:,}; save it "
            "as UTF-8"
        ) from None


def read_text(path: Path | str, *, most: int = MOST_BYTES) -> str:
    """The text in ``path``, as ``decode_text`` says.

    Raises StorageError, as ``read_bytes`` does, and DataError for other bytes than text.
    """
    return text_of(read_bytes(path, most=most), path)


def _depth(value: object) -> int:
    """Levels of lists and objects in a JSON ``value``; 0 for one that is neither."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, (dict, list))]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def parse_json(content: bytes | str, *, once: bool = False) -> object:
    """The value of the JSON ``content``; of a key that is there twice the last counts, as in every reader.

    Bytes may be UTF-8, 16 or 32, with or without a byte-order mark. Raises ValueError, which says why in one line, when
    it is not JSON or deeper than ``DEEPEST`` levels; with ``once`` also for a key that is there twice.
    """
    try:
        value: object = json.loads(content, object_pairs_hook=_once if once else None)
    except RecursionError:
        raise ValueError(f"its brackets are nested deeper than {DEEPEST} levels") from None
    openings = (b"[", b"{") if isinstance(content, bytes) else ("[", "{")
    # The count alone settles it for nearly every file.
    if sum(map(content.count, openings)) > DEEPEST and _depth(value) > DEEPEST:  # type: ignore[arg-type]
        raise ValueError(f"its brackets are nested deeper than {DEEPEST} levels")
    return value


def read_json(path: Path | str, *, most: int = MOST_BYTES, once: bool = False) -> object:
    """The value that the JSON file ``path`` holds; ``once`` as of ``parse_json``.

    Raises StorageError, as ``read_bytes`` does, and DataError when it is not JSON.
    """
    content = read_bytes(path, most=most)
    try:
        return parse_json(content, once=once)
    except ValueError as error:
        raise DataError(
            f"asked to read {path_text(path)} as JSON, found {error}; write the file again"
        ) from None
