"""Serve the report page on the loopback interface, and render it again when a run changes."""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from assemble.reporting import progress
from assemble.reporting.runs import run_folders
from common.errors import ReportingError

#: Refuse other host names: a foreign site may point its name at this machine (DNS rebinding).
HOSTS = ("127.0.0.1", "localhost")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; media-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILES = ("record.json", "identity.json", "metrics.csv", "progress.json")


class LiveReport(ThreadingHTTPServer):
    """Serve a page on the loopback interface until it is shut down. Port 0 takes any free port.

    Args:
        render: makes the page from a stamp, which identifies the page's version.
        runs: folder of runs; a change in this folder renders the page again.
    """

    def __init__(self, render: Callable[[str], str], runs: Path, port: int) -> None:
        self._render, self._runs = render, runs
        self._lock = threading.Lock()
        self._page, self._stamp, self._next = b"", "", 0.0
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ReportingError(f"--port {port}: {error}; choose another port, or 0 for any free one") from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def stamp(self) -> str:
        """Return a stamp that changes when a run changes. Delay changes so that rendering takes 10 % of the time."""
        if time.monotonic() < self._next:
            return self._stamp
        return str(hash(tuple(_state(folder) for folder in run_folders(self._runs))))

    def page(self) -> bytes:
        with self._lock:
            stamp, began = self.stamp(), time.monotonic()
            if stamp != self._stamp:
                self._page, self._stamp = self._render(stamp).encode(), stamp
                self._next = time.monotonic() + 10 * (time.monotonic() - began)
            return self._page

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that closed its connection."""


def _state(folder: Path) -> tuple[Any, ...]:
    times = [path.stat().st_mtime_ns if (path := folder / name).is_file() else 0 for name in _FILES]
    # If a process is killed, no file changes, but its last progress becomes outdated.
    return folder.name, *times, progress.read(folder, time.time() - 120) is None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    server: LiveReport

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        # Compare only the host, since a tunnel changes the port.
        if re.sub(r":\d+$", "", self.headers.get("Host", "")).lower() not in HOSTS:
            return self._send(403, "text/plain", f"this page only answers to {', '.join(HOSTS)}".encode())
        if self.path not in ("/", "/stamp"):
            return self._send(404, "text/plain", b"not found")
        try:
            content = self.server.page() if self.path == "/" else self.server.stamp().encode()
        except Exception:
            return self._send(500, "text/plain", traceback.format_exc().encode())
        return self._send(200, "text/html" if self.path == "/" else "text/plain", content)

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
