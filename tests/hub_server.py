"""A hub of data sets and models on this machine, as far as ``datasets`` and ``huggingface_hub`` ask it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "a" * 40
TAG, TAGGED = (
    "v2",
    "b" * 40,
)  # a second revision, of repositories that have a folder of that name with @v2 behind it


def listing(repository: Path, below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders in the folder ``below``, as the hub describes them."""
    paths = sorted((repository / below).rglob("*") if recursive else (repository / below).iterdir())
    return [described(repository, path.relative_to(repository).as_posix()) for path in paths]


def described(repository: Path, name: str) -> dict[str, Any]:
    path = repository / name
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    content = path.read_bytes()
    return {"type": "file", "path": name, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """The address of a hub whose data sets and models are the folders ``root``/owner/name.

    All are of one revision; the folder ``root``/owner/name@v2 is a second one of its model.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path)
            api = path.startswith("/api/")
            kind, inner = re.match(r"/(?:(datasets|models)/)?(.*)", path.removeprefix("/api")).groups()  # type: ignore[union-attr]
            owner, name, *rest = [*inner.split("/"), "", ""]
            repository, commit = root / owner / name, REVISION
            verb, below = rest[0], "/".join(rest[2:]).strip("/")
            if kind != "datasets" and rest[1:2] in ([TAG], [TAGGED]):
                repository, commit = root / owner / f"{name}@{TAG}", TAGGED
            if not (root / owner / name).is_dir():
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            elif not repository.is_dir() or (kind == "models" and rest[1:2] == ["missing"]):
                self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            elif api and verb in ("", "revision"):
                files = [one["path"] for one in listing(repository, "", True) if one["type"] == "file"]
                siblings = [{"rfilename": file} for file in files] if kind == "models" else []
                self.answer(
                    json.dumps({"id": f"{owner}/{name}", "sha": commit, "siblings": siblings}).encode()
                )
            elif api and verb == "tree" and (repository / below).is_dir():
                found = listing(repository, below, "recursive=true" in self.path.lower())
                self.answer(json.dumps(found).encode())
            elif not api and (repository / below).is_file():
                content = (repository / below).read_bytes()
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(content, ETag=tag, X_Repo_Commit=commit)
            else:
                self.answer(b"{}", 404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            repository = root.joinpath(*unquote(self.path).split("/")[3:5])
            found = [described(repository, name) for name in asked if (repository / name).exists()]
            self.answer(json.dumps(found).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
