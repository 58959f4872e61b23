"""An HTTP server of a folder on this host. It can have faults."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HttpFolder

    def do_HEAD(self) -> None:
        data = self._file()
        self._send(404 if data is None else 200, len(data or b""), b"")

    def do_GET(self) -> None:
        data = self._file()
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers.get("Range", "")))
        if data is None:
            return self._send(404, 0, b"")
        fault = self.server.fault(self.path) if match else ""
        if match is None or fault == "whole":
            return self._send(200, len(data), data)
        if fault == "500":
            return self._send(500, 0, b"")
        start, end = int(match[1]), int(match[2]) + 1
        part = data[start:end]
        if fault == "wrong":
            part = bytes([part[0] ^ 1]) + part[1:]
        sent = part[: len(part) // 2] if fault in ("short", "drop") else part
        self.close_connection = fault == "drop"
        stated = len(part) if fault == "drop" else len(sent)
        self._send(206, stated, sent, f"bytes {start}-{start + len(part) - 1}/{len(data)}")

    def _file(self) -> bytes | None:
        path = self.server.folder / self.path.lstrip("/")
        return path.read_bytes() if path.is_file() else None

    def _send(self, status: int, length: int, body: bytes, part: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        try:
            self.wfile.write(body)
        except ConnectionError:  # the reader needs no more
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class HttpFolder(ThreadingHTTPServer):
    """Serves a folder. The first `times` requests for a part of each file have the fault `kind`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.lock = folder, threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.kind, self.times, self._done = "", 0, Counter[str]()

    def breaks(self, kind: str, times: int = 10**9) -> None:
        self.kind, self.times = kind, times
        self._done.clear()
        self.requests.clear()

    def fault(self, path: str) -> str:
        with self.lock:
            self._done[path] += 1
            return self.kind if self._done[path] <= self.times and path.endswith(".tar") else ""

    def parts(self, name: str = ".tar") -> list[tuple[str, str]]:
        """The requests for parts of files with such a name."""
        return [(path, part) for path, part in self.requests if part and path.endswith(name)]


@contextmanager
def http_folder(folder: Path) -> Iterator[HttpFolder]:
    with HttpFolder(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
