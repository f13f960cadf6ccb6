"""A live page over a folder of runs, on this machine alone: the standard library's server, and the files of the runs.

What it answers is read from disk at the time. It writes nothing but the report page, into a temporary folder.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from common.errors import ReportingError
from common.reporting import media
from common.reporting.curves import importance, read_curves
from common.reporting.runs import (
    BASICS,
    Run,
    config_differences,
    metric_differences,
    read_run,
    run_folders,
    text_of,
)

HOSTS = {"127.0.0.1", "localhost", "[::1]"}
"""Names under which the page is asked for. Another one is a foreign site whose name was pointed at this machine."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: The report brings its own script, style and media along.
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; media-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LARGE = 5 * 2**20
"""Curves of a running stage that take more bytes than this are read again every half minute only."""
_TEMPLATES = Path(__file__).parent / "templates"


class Runs:
    """The runs in a folder, each read again only when one of its files changed.

    Args:
        root: folder of runs.
        papers: package names; all when empty.
    """

    def __init__(self, root: Path, papers: Sequence[str] = ()) -> None:
        self.root, self.papers = root, papers
        self._known: dict[Path, tuple[tuple[int, ...], Run]] = {}
        self._lock = threading.Lock()

    def stamp(self) -> tuple[Any, ...]:
        """Changes whenever something of a run did."""
        return tuple((str(folder), _stamp(folder)) for folder in run_folders(self.root, self.papers))

    def all(self) -> list[Run]:
        """Every run."""
        with self._lock:
            fresh = {}
            for folder in run_folders(self.root, self.papers):
                stamp = _stamp(folder)
                known = self._known.get(folder)
                run = known[1] if known and known[0] == stamp else read_run(self.root, folder)
                if run is not None:
                    fresh[folder] = stamp, run
            self._known = fresh
            return [run for _, run in fresh.values()]

    def named(self, names: Sequence[str]) -> list[Run]:
        """The runs of these names, in their order; unknown ones are left out, since a run may go at any time."""
        known = {run.name: run for run in self.all()}
        return [known[name] for name in names if name in known]


def _stamp(folder: Path) -> tuple[int, ...]:
    found = []
    for name in ("record.json", "identity.json", "progress.json", "metrics.csv", "media"):
        try:
            status = (folder / name).stat()
        except OSError:
            found.append(0)
            continue
        large = name == "metrics.csv" and status.st_size > LARGE
        found.append(status.st_mtime_ns // (30 * 10**9) if large else status.st_mtime_ns)
    # A process that is killed changes no file: runs without a record are looked at again now and then.
    return (*found, 0 if found[0] else int(time.time() // 20))


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """All runs with the values by which they are told apart, without fields of the configuration that are all equal."""
    configured: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.config.items():
            configured.setdefault(name, set()).add(text_of(value))
    varying = [name for name, values in configured.items() if len(values) > 1]
    metrics = {name for run in runs if run.record for name in run.record.metrics} | {n for r in runs for n in r.curves}
    return {
        "fields": [*BASICS, *sorted(metrics), *sorted(set(varying) - metrics - set(BASICS))],
        "runs": [
            {
                "name": run.name,
                "curves": [name for name in run.curves if f"{name}:min" in run.curves],
                "values": {
                    name: value
                    for name in (*BASICS, *metrics, *varying)
                    if (value := run.value(name)) not in (None, "")
                },
            }
            for run in runs
        ],
    }


def curves_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The curves of some runs, the most telling first."""
    found = []
    for run in runs:
        curves = read_curves(run.folder / "metrics.csv")
        found.append({"run": run.name, "curves": {name: curves[name] for name in sorted(curves, key=importance)}})
    return found


def media_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What some runs left to look at: pictures and clips by address, small tables whole."""
    found = []
    for run in runs:
        files: list[dict[str, Any]] = []
        for path in sorted((run.folder / "media").glob("*")):
            if not media.is_own(path, run.folder):
                continue
            if path.suffix.lower() in media.MIMES:
                kind = media.MIMES[path.suffix.lower()].partition("/")[0]
                files.append({"name": path.name, "kind": kind, "changed": path.stat().st_mtime_ns // 10**6})
            elif path.suffix == ".csv":
                try:
                    sheet = media.read_sheet(path)
                except (csv.Error, OSError) as error:
                    sheet = media.Sheet(path.name, ["cannot be read"], [[str(error)]])
                files.append(
                    {"name": path.name, "kind": "table", "head": sheet.header, "rows": sheet.rows, "more": sheet.more}
                )
        found.append({"run": run.name, "files": files})
    return found


def differences(first: Run, second: Run) -> dict[str, Any]:
    """What differs between two runs, as texts."""
    return {
        "config": [[d.field, text_of(d.first), text_of(d.second), d.counts] for d in config_differences(first, second)],
        "metrics": [[d.field, d.first, d.second] for d in metric_differences(first, second)],
    }


def _finite(value: Any) -> Any:
    """The same with numbers that JSON lacks as texts: a browser reads no `Infinity`."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def media_file(root: Path, name: str) -> Path | None:
    """The picture or clip that an address below `/media/` means; None for anything else.

    Args:
        root: folder of runs.
        name: `<paper>/<scale>/<draw>/<stage>/<file>`, decoded.
    """
    parts = name.split("/")
    if len(parts) != 5 or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        return None
    folder = root.joinpath(*parts[:4])
    path = folder / "media" / parts[4]
    inside = folder.resolve().is_relative_to(root.resolve()) and media.is_own(path, folder)
    return path if inside and path.suffix.lower() in media.MIMES else None


class Server(ThreadingHTTPServer):
    """Serves one folder of runs on the loopback interface until it is shut down.

    Args:
        root: folder of runs.
        port: 0 for any that is free.
        papers: package names; all when empty.
        interval: seconds between two looks at the files, for pages that wait for changes.

    Raises:
        ReportingError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int, papers: Sequence[str] = (), interval: float = 2.0) -> None:
        self.runs, self.interval = Runs(root, papers), interval
        self.closing = threading.Event()
        self._reporting = threading.Lock()
        self._reported: tuple[Any, bytes] | None = None
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise ReportingError(f"--port {port}: {error}; choose another one, 0 takes any that is free") from None

    @property
    def address(self) -> str:
        """Address of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def report(self) -> bytes:
        """The report page of these runs, made again when something changed."""
        from common.reporting.report import build

        with self._reporting:
            stamp = self.runs.stamp()
            if self._reported is None or self._reported[0] != stamp:
                folder = Path(tempfile.mkdtemp())
                try:
                    page = build(folder / "report.html", self.runs.papers or None, runs=self.runs.root)
                    self._reported = stamp, page.read_bytes()
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
            return self._reported[1]

    def shutdown(self) -> None:
        """Stop, pages that wait included."""
        self.closing.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page may be closed at any time."""


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD."""

    protocol_version = "HTTP/1.1"
    server_version = "assemble"
    sys_version = ""
    timeout = 60
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what the page asks for is no news."""

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer, or say why not."""
        # The name alone: with a tunnel the port is another one.
        host = re.sub(r":\d+$", "", self.headers.get("Host", ""))
        if host.lower() not in HOSTS:
            self._text(403, f"this page answers to {', '.join(sorted(HOSTS))} alone")
            return
        where = urlsplit(self.path)
        asked = parse_qs(where.query)
        try:
            self._route(unquote(where.path), asked)
        except (ReportingError, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            self._text(500, str(error))

    def _route(self, path: str, asked: dict[str, list[str]]) -> None:
        runs = self.server.runs
        if path == "/":
            self._send((_TEMPLATES / "serve.html").read_bytes(), "text/html; charset=utf-8")
        elif path == "/serve.css":
            style = b"".join((_TEMPLATES / name).read_bytes() for name in ("report.css", "serve.css"))
            self._send(style, "text/css; charset=utf-8")
        elif path == "/serve.js":
            self._send((_TEMPLATES / "serve.js").read_bytes(), "text/javascript; charset=utf-8")
        elif path == "/report":
            self._send(self.server.report(), "text/html; charset=utf-8", REPORT_POLICY)
        elif path == "/api/runs":
            self._json(overview(runs.all()))
        elif path == "/api/curves":
            self._json(curves_of(runs.named(asked.get("run", []))))
        elif path == "/api/media":
            self._json(media_of(runs.named(asked.get("run", []))))
        elif path == "/api/diff" and len(pair := runs.named(asked.get("run", []))) == 2:
            self._json(differences(*pair))
        elif path == "/events":
            self._events()
        elif path.startswith("/media/") and (file := media_file(runs.root, path.removeprefix("/media/"))):
            self._send(file.read_bytes(), media.MIMES[file.suffix.lower()])
        else:
            self._text(404, "there is nothing here")

    def _events(self) -> None:
        """Say of every change that there was one, until the page or the server closes."""
        self.close_connection = True
        self._head(200, "text/event-stream", None)
        known, spoke = None, 0.0
        while self.command == "GET" and not self.server.closing.is_set():
            stamp = hash(self.server.runs.stamp())
            if stamp != known or time.monotonic() - spoke > 15:
                # A comment when nothing changed, so that a page that is gone is noticed.
                self.wfile.write(f"data: {stamp}\n\n".encode() if stamp != known else b": still here\n\n")
                self.wfile.flush()
                known, spoke = stamp, time.monotonic()
            self.server.closing.wait(self.server.interval)

    def _json(self, content: Any) -> None:
        text = json.dumps(_finite(content), ensure_ascii=False, allow_nan=False, default=str)
        self._send(text.encode(), "application/json")

    def _text(self, status: int, text: str) -> None:
        self._send(text.encode(), "text/plain; charset=utf-8", status=status)

    def _send(self, content: bytes, kind: str, policy: str = POLICY, status: int = 200) -> None:
        part = content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        extra = {}
        if status == 200 and asked and int(asked[1]) < len(content):  # players ask for films in parts
            end = min(int(asked[2] or len(content) - 1), len(content) - 1)
            part, status = content[int(asked[1]) : end + 1], 206
            extra["Content-Range"] = f"bytes {asked[1]}-{end}/{len(content)}"
        self._head(status, kind, len(part), policy, extra)
        if self.command != "HEAD":
            self.wfile.write(part)

    def _head(
        self, status: int, kind: str, length: int | None, policy: str = POLICY, extra: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Security-Policy": policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            **({"Connection": "close"} if length is None else {"Content-Length": str(length)}),
            **(extra or {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
