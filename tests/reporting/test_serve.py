"""The live page's server: what it answers, to whom, and that it follows the files; without a browser."""

from __future__ import annotations

import csv
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from common.errors import ReportingError
from common.reporting.records import Record
from common.reporting.serve import Server
from tests.reporting.test_report import PIXEL

Save = Callable[[Record], Path]
RUN = "mct/mini/seed0/base+1"


@pytest.fixture
def server(project: Path, make_record: Callable[..., Record], save: Save) -> Iterator[Server]:
    """A server over two runs, one of them with a curve, pictures and a table."""
    save(make_record("esc@base", 1, 60.0))
    config = {"seed_everything": 0, "model": {"rate": 0.2}, "data": {"root": "/d"}}
    folder = save(make_record("base+1", 0, 50.0, config=config))
    (folder / "metrics.csv").write_text("step,name,value\n0,train/loss,3\n5,train/loss,1\n")
    (folder / "media").mkdir()
    (folder / "media" / "a picture.png").write_bytes(PIXEL)
    (folder / "media" / "script.svg").write_text("<svg onload='alert(1)'/>")
    (folder / "media" / "texts.csv").write_text("question,answer\nwhat,<b>\n")
    (project / "secret.png").write_bytes(b"secret")
    (folder / "secret.png").write_bytes(b"secret")
    (folder / "media" / "link.png").symlink_to(project / "secret.png")
    found = Server(project / "runs", 0, interval=0.05)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()


def get(
    server: Server, path: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_page_and_its_parts(server: Server) -> None:
    for path, kind in (("/", "text/html"), ("/serve.css", "text/css"), ("/serve.js", "text/javascript")):
        status, headers, content = get(server, path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert content
        assert b"http://" not in content.replace(b"http://www.w3.org", b"")  # it asks nobody else
        assert b"https://" not in content
        assert get(server, path, method="HEAD")[2] == b""


def test_runs_curves_media_and_differences(server: Server) -> None:
    told = json.loads(get(server, "/api/runs")[2])
    assert [run["name"] for run in told["runs"]] == [RUN, "mct/mini/seed1/esc@base"]
    first = told["runs"][0]
    assert first["curves"] == ["train/loss"]
    assert first["values"]["train/loss:min"] == 1.0
    assert first["values"]["model.rate"] == 0.2
    assert first["values"]["test/top1"] == 50.0
    assert {"test/top1", "model.rate", "state"} <= set(told["fields"])
    (curves,) = json.loads(get(server, f"/api/curves?run={quote(RUN)}&run=gone")[2])
    assert curves == {"run": RUN, "curves": {"train/loss": [[0.0, 3.0], [5.0, 1.0]]}}
    (media,) = json.loads(get(server, f"/api/media?run={quote(RUN)}")[2])
    by_name = {file["name"]: file for file in media["files"]}
    assert set(by_name) == {"a picture.png", "texts.csv"}
    assert by_name["texts.csv"]["rows"] == [["what", "<b>"]]
    diff = json.loads(get(server, f"/api/diff?run={quote(RUN)}&run=mct/mini/seed1/esc@base")[2])
    assert ["model.rate", "0.2", "0.1", True] in diff["config"]
    assert diff["metrics"] == [["test/top1", 50.0, 60.0], ["train/loss", 1.0, None]]
    assert get(server, f"/api/diff?run={quote(RUN)}")[0] == 404
    status, _, page = get(server, "/report")
    assert status == 200
    assert b"Transfer" in page


def test_what_json_lacks_and_a_table_with_a_long_cell_are_told(
    server: Server, make_record: Callable[..., Record], save: Save
) -> None:
    csv.field_size_limit(131_072)  # as it is at the start; readers of annotations raise it for the whole process
    media = server.runs.root / RUN / "media"
    (media / "long.csv").write_text(f"text\n{'a' * 200_000}\n")
    (told,) = json.loads(get(server, f"/api/media?run={quote(RUN)}")[2])
    by_name = {file["name"]: file for file in told["files"]}
    assert by_name["long.csv"]["head"] == ["cannot be read"]
    assert "field larger than field limit" in by_name["long.csv"]["rows"][0][0]
    assert by_name["texts.csv"]["rows"] == [["what", "<b>"]]

    stopped = server.runs.root / "mct/mini/seed0/stopped"
    stopped.mkdir()
    (stopped / "identity.json").write_text("{}")
    (stopped / "config.yaml").write_text("{model: {rate: .inf}, data: {root: 2020-01-02}}\n")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    runs = json.loads(get(server, "/api/runs")[2], parse_constant=refuse)["runs"]
    (values,) = [run["values"] for run in runs if run["name"].endswith("/stopped")]
    assert values["model.rate"] == "inf"
    assert values["data.root"] == "2020-01-02"
    assert get(server, f"/api/diff?run={quote(RUN)}&run=mct/mini/seed0/stopped")[0] == 200


def test_pictures_are_served_whole_and_in_parts(server: Server) -> None:
    path = f"/media/{quote(RUN)}/a%20picture.png"
    status, headers, content = get(server, path)
    assert (status, headers["Content-Type"], content) == (200, "image/png", PIXEL)
    status, headers, content = get(server, path, {"Range": "bytes=2-5"})
    assert (status, content) == (206, PIXEL[2:6])
    assert headers["Content-Range"] == f"bytes 2-5/{len(PIXEL)}"
    assert get(server, path, {"Range": "bytes=3-"})[2] == PIXEL[3:]
    assert get(server, path, {"Range": "bytes=99999-"})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        f"/media/{RUN}/../secret.png", f"/media/{RUN}/..%2Fsecret.png", f"/media/{RUN}/link.png",
        f"/media/{RUN}/script.svg", "/media/../../../secret.png", "/media/..%2f..%2f..%2f..%2fsecret.png",
        "/media/mct/mini/seed0/../a.png",
        f"/media/{RUN}/%00.png", f"/media/{RUN}/", "/media//etc/passwd", "/record.json", f"/media/{RUN}/record.json",
        "/media/mct/mini/..%5cseed0/base/x.png", "//media", "/api/secret",
    ],
)  # fmt: skip
def test_nothing_else_is_served(server: Server, path: str) -> None:
    status, _, content = get(server, path)
    assert status == 404
    assert b"secret" not in content


def test_a_folder_that_leads_elsewhere_is_not_followed(server: Server, project: Path) -> None:
    away = project / "away" / "media"
    away.mkdir(parents=True)
    (away / "x.png").write_bytes(PIXEL)
    (server.runs.root / "mct" / "mini" / "seed0" / "linked").symlink_to(project / "away")
    assert get(server, "/media/mct/mini/seed0/linked/x.png")[0] == 404


def test_other_names_and_methods_are_refused(server: Server) -> None:
    port = server.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost.evil", "0.0.0.0"):
        assert get(server, "/api/runs", {"Host": host})[0] == 403, host
    for host in ("localhost", f"localhost:{port}", "127.0.0.1:9", "[::1]:80", "LOCALHOST"):
        assert get(server, "/api/runs", {"Host": host})[0] == 200, host
    for method in ("POST", "PUT", "DELETE"):
        assert get(server, "/api/runs", method=method)[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_changes_are_told(server: Server) -> None:
    """A new point of a curve, and a new run, reach whoever listens."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as page:
        page.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        lines = page.makefile("rb")

        def told() -> bytes:
            return next(line for line in lines if line.startswith(b"data: "))

        first = told()
        run = server.runs.root / RUN
        with (run / "metrics.csv").open("a") as file:
            file.write("9,train/loss,0.5\n")
        second = told()
        (run.parent.parent / "seed2" / "esc@base").mkdir(parents=True)
        (run.parent.parent / "seed2" / "esc@base" / "identity.json").write_text("{}")
        assert len({first, second, told()}) == 3
    (curves,) = json.loads(get(server, f"/api/curves?run={quote(RUN)}")[2])
    assert curves["curves"]["train/loss"][-1] == [9.0, 0.5]
    states = {run["name"]: run["values"]["state"] for run in json.loads(get(server, "/api/runs")[2])["runs"]}
    assert states["mct/mini/seed2/esc@base"] == "stopped"


def test_a_port_that_is_taken_is_named(server: Server) -> None:
    with pytest.raises(ReportingError, match=r"--port \d+: .*in use; choose another one"):
        Server(server.runs.root, server.server_address[1])
    with pytest.raises(ReportingError, match="--port 70000"):
        Server(server.runs.root, 70000)
