"""What lies where in a webdataset tar, so that single pictures are read without unpacking it."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from prune_lab.errors import DataError


@dataclass(frozen=True, slots=True)
class Span:
    """Where a file lies in its tar, in bytes."""

    tar: Path
    name: str
    start: int
    size: int

    def read(self) -> bytes:
        """The content of the file."""
        with self.tar.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class Sample:
    """The files of one name, by what follows its first dot, and those that were asked for as text."""

    spans: dict[str, Span] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def samples_in(path: Path, texts: Collection[str]) -> dict[str, Sample]:
    """Samples by name, in the order of the tar: files that share their name up to its first dot (webdataset's rule).

    ``texts`` names the files, and the values of .json files, that are read as text. Raises DataError for a tar that is
    damaged, cut off or compressed.
    """
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not member.isfile() or not stem or not kind:
                    continue
                sample = samples.setdefault(f"{folder}/{stem}".removeprefix("/"), Sample())
                kind = kind.lower()
                span = sample.spans[kind] = Span(path, member.name, member.offset_data, member.size)
                if kind in texts:
                    sample.texts[kind] = span.read().decode("utf-8").strip()
                elif kind == "json":
                    values = json.loads(span.read())
                    known = values if isinstance(values, dict) else {}
                    sample.texts.update(
                        {name: known[name] for name in texts if isinstance(known.get(name), str)}
                    )
            end = archive.offset
        with path.open("rb") as file:  # tarfile takes a damaged header for the end
            file.seek(end)
            if file.read(512).strip(b"\0") or file.tell() < end + 512:
                raise tarfile.ReadError(f"it breaks off after {end:,} bytes")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(
            f"asked for the pictures in {path}, cannot read them ({error}); fetch it again, and give a tar that is not "
            "compressed, with texts in UTF-8"
        ) from None
    return samples
