"""A hub of data sets on this machine, as far as ``datasets`` and ``huggingface_hub`` ask it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

REVISION = "a" * 40


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
    """The address of a hub whose data sets are the folders ``root``/owner/name, all of one revision."""

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
            owner, name, *rest = [*path.removeprefix("/api").removeprefix("/datasets/").split("/"), ""]
            repository = root / owner / name
            verb, below = rest[0], "/".join(rest[2:]).strip("/")
            if not repository.is_dir():
                self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
            elif api and verb in ("", "revision"):
                self.answer(json.dumps({"id": f"{owner}/{name}", "sha": REVISION, "siblings": []}).encode())
            elif api and verb == "tree" and (repository / below).is_dir():
                found = listing(repository, below, "recursive=true" in self.path.lower())
                self.answer(json.dumps(found).encode())
            elif not api and (repository / below).is_file():
                content = (repository / below).read_bytes()
                tag = f'"{hashlib.sha1(content).hexdigest()}"'
                self.answer(content, ETag=tag, X_Repo_Commit=REVISION)
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
