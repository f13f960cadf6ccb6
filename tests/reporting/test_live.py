"""Test the live report page: which requests it answers, the message if rendering fails, and updates of the runs."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from assemble.reporting import live
from assemble.reporting.live import LiveReport
from assemble.reporting.report import page
from tests.chromium import needed, opened
from tests.machine import LONG, until
from tests.reporting.conftest import Saved


@pytest.fixture
def run(saved: Saved) -> Path:
    """Save a run with a curve."""
    folder = saved("base", 0, 50.0, job="pretrain")
    (folder / "metrics.csv").write_text("step,name,value\n0,train/loss,3\n5,train/loss,1\n")
    return folder


@pytest.fixture
def server(project: Path, run: Path) -> Iterator[LiveReport]:
    with LiveReport(lambda stamp: page(["mct"], None, project / "runs", stamp), project / "runs", 0) as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield found
        found.shutdown()


def get(server: LiveReport, path: str = "/", host: str = "localhost") -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=LONG)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_page_follows_its_runs(server: LiveReport, run: Path) -> None:
    status, headers, text = get(server)
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert {**live.HEADERS, "Content-Type": "text/html; charset=utf-8"}.items() <= headers.items()
    assert get(server, "/stamp")[1]["Content-Type"] == "text/plain; charset=utf-8"
    server._next = 0.0  # skips the waiting time
    stamp = get(server, "/stamp")[2]
    assert f'"{stamp}"' in text
    with (run / "metrics.csv").open("a") as file:
        file.write("9,train/loss,0.5\n")
    assert get(server, "/stamp")[2] != stamp
    assert ": 0.5 at the end" in get(server)[2]
    assert get(server)[2] == get(server)[2]


def test_a_foreign_host_is_refused(server: LiveReport) -> None:
    port = server.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost.evil", "0.0.0.0"):
        assert get(server, host=host)[0] == 403, host
    for host in ("localhost", f"localhost:{port}", "127.0.0.1:9", "LOCALHOST"):
        assert get(server, "/stamp", host)[0] == 200, host
    assert server.server_address[0] == "127.0.0.1"
    for path in ("/record.json", "/../secret.png", "//media", "/mct/mini/seed0/base/record.json"):
        assert get(server, path)[0] == 404, path


def test_a_failure_to_render_is_told_and_ends_nothing(project: Path, run: Path) -> None:
    def render(stamp: str) -> str:
        if broken:
            raise ZeroDivisionError("in a table")
        return "fine"

    broken = True
    with LiveReport(render, project / "runs", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        status, _, text = get(server)
        assert status == 500
        assert "in a table" in text
        broken = False
        assert get(server)[::2] == (200, "fine")
        server.shutdown()


def test_rendering_takes_a_tenth_of_the_time_at_most(project: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    with LiveReport(lambda stamp: now.__setitem__(0, now[0] + 3.0) or stamp, project / "runs", 0) as server:
        first = server.page()
        (run / "metrics.csv").unlink()
        now[0] = 132.9  # rendering took 3 s, so the page is kept for 30 s
        assert server.page() == first
        now[0] = 133.0
        assert server.page() != first


def test_a_killed_process_changes_the_page(server: LiveReport, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "progress.json").write_text("{}")
    stamp = get(server, "/stamp")[2]
    assert get(server, "/stamp")[2] == stamp
    later = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 130)
    monkeypatch.setattr(live, "time", later)  # two minutes without any progress
    assert get(server, "/stamp")[2] != stamp


@needed
def test_a_browser_loads_it_again(server: LiveReport, run: Path, tmp_path: Path) -> None:
    with opened(server.address, tmp_path / "profile") as tab:
        assert ": 1 at the end" in tab.page_source
        with (run / "metrics.csv").open("a") as file:
            file.write("9,train/loss,0.5\n")
        until(lambda: ": 0.5 at the end" in tab.page_source, "the curve grows")
        assert tab.get_log("browser") == []
