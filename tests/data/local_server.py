"""A file server on this machine that misbehaves as told: for tests of downloads."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gr.data.download import Remote


@dataclass
class Site:
    """What the server has and what it was asked.

    Attributes:
        body: The one file, at every path but those with ``gone``.
        address: ``http://host:port``.
        cuts: For each coming answer, after how many bytes of it the connection closes; ``None``: never.
        ranges: Answers ranges, as most servers do.
        etag: Says which version this is.
        statuses: For each coming request, an HTTP status to fail with; 0: none.
        asked: The Range header of each request, in order.
    """

    body: bytes
    address: str = ""
    cuts: list[int | None] = field(default_factory=list)
    ranges: bool = True
    etag: bool = True
    statuses: list[int] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)

    @property
    def version(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:8]}"'

    def remote(self, name: str = "log.bin", md5: str | None = None) -> Remote:
        return Remote(f"{self.address}/folder/{name}", "anyone may test with it", md5)


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:  # the name that http.server calls
        site = self.site
        wanted = self.headers.get("Range")
        site.asked.append(wanted)
        status = site.statuses.pop(0) if site.statuses else 0
        if status or "gone" in self.path:
            self.send_error(status or 404)
            return
        start = 0
        if wanted and site.ranges and self.headers.get("If-Range", site.version) == site.version:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(site.body):
                self.send_error(416)
                return
        body = site.body[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(site.body) - 1}/{len(site.body)}")
        if site.etag:
            self.send_header("ETag", site.version)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = site.cuts.pop(0) if site.cuts else None
        self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True


@contextlib.contextmanager
def serve(body: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site = Site(body)
    handler = type("Handler", (_Handler,), {"site": site})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def closed_port() -> int:
    """A port on which nobody listens."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def names(folder: Path) -> list[str]:
    """Visible files of a folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
