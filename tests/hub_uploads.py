"""A model hub on this machine that takes uploads, as far as ``huggingface_hub`` asks it: what it was sent is kept."""

from __future__ import annotations

import base64
import dataclasses
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "b" * 40


@dataclasses.dataclass
class Received:
    """What the hub was asked and sent: repositories with whether they are private, and files by repository."""

    private: dict[str, bool] = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)
    tokens: set[str] = dataclasses.field(default_factory=set)
    large: dict[str, bytes] = dataclasses.field(default_factory=dict)  # by SHA-256
    asked: list[str] = dataclasses.field(default_factory=list)
    refuse: tuple[str, int] = ("", 0)
    """A part of a path, and the status that such a request gets."""


def _commit(received: Received, repository: str, lines: list[dict[str, Any]]) -> None:
    files = received.files.setdefault(repository, {})
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            received.messages.append(value["summary"])
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = received.large[value["oid"]]
        else:
            raise AssertionError(line)


@contextmanager
def serve_uploads() -> Iterator[tuple[str, Received]]:
    """(the address of an empty hub, what it has received)."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def answer(self, value: object = None, code: int = 200) -> None:
            content = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def refused(self, content: bytes) -> bool:
            received.asked.append(f"{self.command} {self.path}")
            received.tokens.add(self.headers.get("Authorization", "").removeprefix("Bearer "))
            part, code = received.refuse
            if part and part in self.path:
                self.answer({"error": "no"}, code)
                return True
            return False

        def do_GET(self) -> None:
            if self.refused(b""):
                return
            repository = "/".join(self.path.split("/")[3:5])
            if repository not in received.private:
                self.answer({"error": "Repository not found"}, 404)
                return
            known = {"id": repository, "private": received.private[repository], "sha": SHA, "siblings": []}
            self.answer(known)

        def do_PUT(self) -> None:
            content = self.body()
            if not self.refused(content):
                received.large[self.path.rpartition("/")[2]] = content
                self.answer()

        def do_POST(self) -> None:
            content = self.body()
            if self.refused(content):
                return
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:3] == ["api", "repos", "create"]:
                asked = json.loads(content)
                repository = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
                code = 409 if repository in received.private else 200
                private = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
                received.private.setdefault(repository, private)
                self.answer({"url": f"{address}/{repository}", "id": repository}, code)
            elif parts[-2:] == ["objects", "batch"]:
                objects = [
                    {
                        "oid": one["oid"],
                        "size": one["size"],
                        "actions": {"upload": {"href": f"{address}/large/{one['oid']}"}},
                    }
                    for one in json.loads(content)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            elif parts[4] == "preupload":
                files = json.loads(content)["files"]
                modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
                found = [
                    {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                    for file, mode in zip(files, modes, strict=True)
                ]
                self.answer({"files": found})
            elif parts[4] == "branch":
                received.branches.setdefault("/".join(parts[2:4]), []).append(parts[5])
                self.answer({})
            elif parts[4] == "commit":
                repository = "/".join(parts[2:4])
                _commit(received, repository, [json.loads(line) for line in content.splitlines()])
                self.answer(
                    {"commitUrl": f"{address}/{repository}/commit/{SHA}", "commitOid": SHA, "success": True}
                )
            else:
                self.answer({"error": self.path}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield address, received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
