"""Devices, seeds, safe writing, progress, and a record of the machine a number was measured on."""

from __future__ import annotations

from prune_lab.runtime.devices import (
    Environment,
    device_of,
    free_bytes,
    generator_for,
    pick_device,
    pick_dtype,
    return_freed,
    seeded,
    synchronize,
    tensors_digest,
    used_bytes,
)
from prune_lab.runtime.files import (
    FILE_LIST,
    atomic_folder,
    atomic_write,
    output_folder,
    write_frame,
    write_json,
    write_text,
)
from prune_lab.runtime.places import copied_without_folders, names_alone, without_folders
from prune_lab.runtime.progress import bytes_text, duration_text, note, note_once, progress_shown, track
from prune_lab.runtime.reading import (
    decode_text,
    open_regular,
    parse_json,
    path_text,
    printable,
    read_bytes,
    read_json,
    read_text,
    text_of,
)

__all__ = [
    "FILE_LIST",
    "Environment",
    "atomic_folder",
    "atomic_write",
    "bytes_text",
    "copied_without_folders",
    "decode_text",
    "device_of",
    "duration_text",
    "free_bytes",
    "generator_for",
    "names_alone",
    "note",
    "note_once",
    "open_regular",
    "output_folder",
    "parse_json",
    "path_text",
    "pick_device",
    "pick_dtype",
    "printable",
    "progress_shown",
    "read_bytes",
    "read_json",
    "read_text",
    "return_freed",
    "seeded",
    "synchronize",
    "tensors_digest",
    "text_of",
    "track",
    "used_bytes",
    "without_folders",
    "write_frame",
    "write_json",
    "write_text",
]
