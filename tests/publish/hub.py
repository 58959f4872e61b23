"""A hub on this machine that takes uploads as the real one does, for its own client."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Hub(ThreadingHTTPServer):
    """`files`: by path, what was committed. `commits`: how many there were. `private`: by name, the repositories that
    exist. `refuse`: by a part of a path, the status that answers a request there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.commits = 0
        self.private: dict[str, bool] = {}
        self.refuse: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/models/")
        if self._refused():
            return
        if self.path == "/api/whoami-v2":
            self._answer({"type": "user", "name": "someone"})
        elif name in self.server.private:
            self._answer({"id": name, "modelId": name, "private": self.server.private[name], "sha": "0" * 40})
        else:
            self._answer({"error": "Repository not found"}, 404, "RepoNotFound")

    def do_POST(self) -> None:
        body, hub = self._body(), self.server
        hub.tokens.add(self.headers.get("authorization"))
        if self._refused():
            return
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization'] or 'someone'}/{made['name']}"
            hub.created.append(made)
            hub.private[name] = made["visibility"] == "private"
            self._answer({"url": f"{hub.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            errors = _errors(json.loads(body)["content"])
            self._answer({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if _large(f["path"]) else "regular"}
                for f in files
            ]
            self._answer({"files": answer})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self._commit(body)
            self._answer({"commitUrl": f"{hub.address}/team/model/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({"error": self.path}, 404)

    def _refused(self) -> bool:
        status = next((status for part, status in self.server.refuse.items() if part in self.path), 0)
        if status:
            self._answer({"error": "no space for you"}, status)
        return bool(status)

    def _commit(self, body: bytes) -> None:
        self.server.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _answer(self, tree: Any, status: int = 200, code: str = "") -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


def _large(path: str) -> bool:
    return path.endswith((".safetensors", ".onnx"))


def _errors(card: str) -> list[dict[str, str]]:
    """What the hub says of a card's metadata: languages are ISO codes, and a licence is one that it knows."""
    data = yaml.safe_load(card.split("---\n")[1])
    wrong = [code for code in data.get("language") or [] if not re.fullmatch("[a-z]{2,3}", code)]
    wrong += [data["license"]] if data["license"] not in ("apache-2.0", "cc0-1.0", "other") else []
    return [{"message": f"{value} is not allowed"} for value in wrong]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
