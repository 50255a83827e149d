"""The public packages the picture set is built from: fetched with their own clients, read without unpacking to disk."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prune_lab.errors import DataError


@dataclass(frozen=True, slots=True)
class Package:
    """One public package: how it is fetched and what its file is called once fetched."""

    client: str
    name: str
    pattern: str


PACKAGES = {
    "noto": Package("npm", "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz"),
    "twemoji": Package("npm", "emoji-datasource-twitter@16.0.0", "emoji-datasource-twitter-16.0.0.tgz"),
    "fluent": Package("npm", "@lobehub/fluent-emoji-3d@1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz"),
    "names": Package("npm", "emojibase-data@17.0.0", "emojibase-data-17.0.0.tgz"),
    "clipart": Package("apt-get", "openclipart-png", "openclipart-png_*.deb"),
    "clipart-about": Package("apt-get", "openclipart-svg", "openclipart-svg_*.deb"),
}


def fetch_package(package: Package, folder: Path) -> Path:
    """Path of the package's file inside `folder`, fetched with its own client when not there yet.

    Raises DataError when the client is absent, fails, or leaves no such file.
    """
    found = sorted(folder.glob(package.pattern))
    if found:
        return found[-1]
    if shutil.which(package.client) is None:
        raise DataError(
            f"building the picture set needs {package.name}: {folder} holds no {package.pattern} and the "
            f"client {package.client!r} is not installed; install it, or put the file there and pass --sources"
        )
    folder.mkdir(parents=True, exist_ok=True)
    verb = "pack" if package.client == "npm" else "download"
    done = subprocess.run(
        [package.client, verb, package.name], cwd=folder, capture_output=True, text=True, check=False
    )
    found = sorted(folder.glob(package.pattern))
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(
            f"'{package.client} {verb} {package.name}' left no {package.pattern} in {folder} (exit "
            f"{done.returncode}: {last}); check the package client, or put the file there and pass --sources"
        )
    return found[-1]


def npm_files(archive: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members of an npm package whose name matches the regular expression `wanted`."""
    pattern = re.compile(wanted)
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile() and pattern.fullmatch(member.name):
                handle = tar.extractfile(member)
                assert handle is not None
                yield member.name, handle.read()


def debian_files(archive: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a Debian package whose name matches; needs the `dpkg-deb` client."""
    if shutil.which("dpkg-deb") is None:
        raise DataError(
            f"reading {archive.name} needs the client 'dpkg-deb', which is not installed; install dpkg"
        )
    pattern = re.compile(wanted)
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as tar,
    ):
        for member in tar:
            if member.isfile() and pattern.fullmatch(member.name):
                handle = tar.extractfile(member)
                assert handle is not None
                yield member.name, handle.read()
    if unpack.returncode:
        raise DataError(f"{archive} could not be unpacked (dpkg-deb exit {unpack.returncode})")
