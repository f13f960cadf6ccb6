"""Test downloads of open data from a local server: verifying, unpacking, resuming, and accepting licenses."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from assemble.commands.main import main
from common.data import fetch as fetching
from common.data.fetch import OpenData, OpenFile, fetch, mirrored, open_data
from common.errors import StageError
from common.files import read_yaml

BODY = bytes(range(256)) * 4096  # 1 MiB


class Server(BaseHTTPRequestHandler):
    """Serve one file over HTTP, and break off the transfer if a test asks for it."""

    body: ClassVar[bytes] = BODY
    stops_after: ClassVar[int | None] = None
    ignores_ranges: ClassVar[bool] = False
    asked: ClassVar[list[str]] = []
    sent: ClassVar[int] = 0

    def do_GET(self) -> None:
        cls = type(self)
        cls.asked.append(self.path)
        if self.path == "/lost":
            self.send_error(404, "Not Found")
            return
        start = 0 if cls.ignores_ranges else int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start >= len(cls.body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(cls.body)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(cls.body) - start))
        self.end_headers()
        stop, cls.stops_after = cls.stops_after, cls.stops_after if cls.ignores_ranges else None
        cls.sent += (sent := cls.body[start:stop]) and len(sent)
        self.wfile.write(sent)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Server.body, Server.stops_after, Server.ignores_ranges, Server.asked, Server.sent = BODY, None, False, [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def one(address: str, **options: Any) -> OpenData:
    file = OpenFile(address, options.pop("file", "set/file.bin"), **options)
    return OpenData("A set", "CC0", "https://example.org", "1 MB", (file,))


def packed(name: str, files: dict[str, bytes]) -> bytes:
    """Make a zip archive, or a tar archive if `name` ends like one."""
    stream = io.BytesIO()
    if name.endswith(".zip"):
        with zipfile.ZipFile(stream, "w") as archive:
            for file, content in files.items():
                archive.writestr(file, content)
        return stream.getvalue()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for file, content in files.items():
            member = tarfile.TarInfo(file)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


class TestDownload:
    @pytest.mark.parametrize("kind", ["md5", "sha256"])
    def test_a_published_checksum_is_compared(self, address: str, tmp_path: Path, kind: str) -> None:
        digest = hashlib.new(kind, BODY).hexdigest()
        fetch(one(address, checksum=f"{kind}:{digest[:12]}"), tmp_path / "right")
        with pytest.raises(StageError, match=r"file\.bin: its .*kept as .*wrong"):
            fetch(one(address, checksum=f"{kind}:{'0' * 12}"), tmp_path / "wrong")
        assert sorted(path.name for path in (tmp_path / "wrong/set").iterdir()) == ["file.bin.wrong"]

    def test_a_broken_download_is_resumed(self, address: str, tmp_path: Path) -> None:
        Server.stops_after = 300_000
        fetch(one(address), tmp_path)
        assert (tmp_path / "set/file.bin").read_bytes() == BODY
        assert (len(Server.asked), Server.sent) == (2, len(BODY))
        # A later command resumes a partial file. If the partial file is too long, the download starts again.
        for there, sent in ((BODY[:700_000], len(BODY) - 700_000), (BODY, 0), (BODY + b"more", len(BODY))):
            Server.sent = 0
            (tmp_path / "set/file.bin").unlink()
            (tmp_path / "set/file.bin.part").write_bytes(there)
            fetch(one(address), tmp_path)
            assert (tmp_path / "set/file.bin").read_bytes() == BODY
            assert Server.sent == sent
        assert [path.name for path in (tmp_path / "set").iterdir()] == ["file.bin"]

    def test_a_server_that_cannot_resume_is_named(self, address: str, tmp_path: Path) -> None:
        Server.stops_after, Server.ignores_ranges = 300_000, True
        with pytest.raises(StageError, match="after 300,000 bytes; rerun the command to start over, since the server"):
            fetch(one(address), tmp_path)
        Server.stops_after = None
        fetch(one(address), tmp_path)
        assert (tmp_path / "set/file.bin").read_bytes() == BODY

    @pytest.mark.parametrize("body", [b"<!DOCTYPE html>", b"PK\x03\x04 cut off"])
    def test_a_page_or_a_part_in_place_of_a_checkpoint_is_refused(
        self, address: str, tmp_path: Path, body: bytes
    ) -> None:
        Server.body = body
        with pytest.raises(StageError, match=r"not a checkpoint, since it starts with b'<!D|end of the archive"):
            fetch(one(address, file="weights/x.pth.tar"), tmp_path)
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["x.pth.tar.wrong"]

    @pytest.mark.parametrize("place", ["{address}/lost", "http://127.0.0.1:1/x"])
    def test_errors_name_the_address(self, address: str, tmp_path: Path, place: str) -> None:
        place = place.format(address=address)
        with pytest.raises(StageError, match=f"^{re.escape(place)} cannot be downloaded"):
            fetch(one(place), tmp_path)
        assert list((tmp_path / "set").iterdir()) == []


class TestUnpack:
    def test_an_archive_is_unpacked_once(self, address: str, tmp_path: Path) -> None:
        Server.body = packed("x.zip", {"dataset-master/data/a.txt": b"a", "dataset-master/README": b"b"})
        data = one(address, file="set/x.zip", unpack="set")
        fetch(data, tmp_path)
        assert (tmp_path / "set/dataset-master/data/a.txt").read_text() == "a"
        names = ["dataset-master", "x.zip", "x.zip.unpacked"]
        assert sorted(path.name for path in (tmp_path / "set").iterdir()) == names
        (tmp_path / "set/x.zip").unlink()
        fetch(data, tmp_path)
        assert len(Server.asked) == 1

    def test_names_that_lead_out_of_the_folder_are_refused(self, address: str, tmp_path: Path) -> None:
        Server.body = packed("x.tar", {"../../out.txt": b"no"})
        with pytest.raises(StageError, match=r"x\.tar"):
            fetch(one(address, file="set/x.tar", unpack="set"), tmp_path / "data")
        assert not list(tmp_path.rglob("out.txt"))

    @pytest.mark.parametrize("name", ["x.tgz", "x.zip"])
    def test_a_damaged_archive_is_named_and_unpacked_once_it_is_whole(
        self, address: str, tmp_path: Path, name: str
    ) -> None:
        whole = packed(name, {"a/list.txt": BODY})
        data = one(address, file=f"set/{name}", unpack="set")
        for damaged in (whole[: len(whole) // 2], b"no archive"):
            Server.body = damaged
            with pytest.raises(StageError, match=name):
                fetch(data, tmp_path)
            (tmp_path / "set" / name).unlink()
        Server.body = whole
        fetch(data, tmp_path)
        assert (tmp_path / "set/a/list.txt").read_bytes() == BODY


def test_terms_come_first(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [{"address": address, "file": "set/file.bin", "checksum": None}]
    entry = {"title": "A set", "license": "CC0, no terms", "terms": "https://example.org", "size": "1 MB"}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"set": {**entry, "files": files}}))
    monkeypatch.setattr(fetching, "TABLE", tmp_path / "table.yaml")
    command = ["data", "avid", "--data", str(tmp_path / "data")]
    assert main(command) == 0
    assert main([*command, "--fetch", "sets"]) == 2
    assert "did you mean 'set'" in capsys.readouterr().err
    assert main([*command, "--fetch", "set"]) == 2
    told = capsys.readouterr()
    assert all(word in told.out for word in ("CC0, no terms", "https://example.org"))
    assert "--accept-license" in told.err
    assert not Server.asked
    assert not (tmp_path / "data").exists()
    for _ in range(2):
        assert main([*command, "--fetch", "set", "--accept-license"]) == 0
    assert (tmp_path / "data/set/file.bin").read_bytes() == BODY
    assert len(Server.asked) == 1


def test_the_table() -> None:
    """Check that every entry can be read, has files and a license, and uses a known address."""
    for name in read_yaml(fetching.TABLE, StageError):
        data = open_data(name)
        assert data.files
        assert data.license
        for file in data.files:
            assert file.address.startswith(
                ("https://", "http://images.cocodataset.org/", "http://host.robots.ox.ac.uk/")
            )
            assert not Path(file.file).is_absolute()


def test_released_weights_come_from_a_mirror_or_a_folder(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Server.body = b"\x80\x02 as an old checkpoint starts"
    first = ["data", "avid", "--data", str(tmp_path / "data"), "--fetch", "released"]
    assert main([*first, "--mirror", address]) == 2
    assert capsys.readouterr().out.count("license: CC BY-NC 4.0") == 1
    assert not Server.asked
    assert main([*first, "--mirror", address, "--accept-license"]) == 0
    names = [
        f"AVID{'-CMA' * mined}_{data}_{'InstX-N1024-PosW-N64-Top32' if mined else 'Cross-N1024'}_checkpoint.pth.tar"
        for data in ("Kinetics", "Audioset")
        for mined in (0, 1)
    ]
    assert Server.asked == [f"/{name}" for name in names]
    # Without a network, the files come from a folder.
    second = ["data", "avid", "--data", str(tmp_path / "other"), "--fetch", "released"]
    assert main([*second, "--mirror", str(tmp_path / "data" / "weights"), "--accept-license"]) == 0
    assert sorted(path.name for path in (tmp_path / "other" / "weights").iterdir()) == sorted(names)
    assert len(Server.asked) == 4
    # If the folder lacks files, the others are copied, and one error names all missing files.
    for name in names[:2]:
        (tmp_path / "data" / "weights" / name).unlink()
    third = ["data", "avid", "--data", str(tmp_path / "third"), "--fetch", "released"]
    capsys.readouterr()
    assert main([*third, "--mirror", str(tmp_path / "data" / "weights"), "--accept-license"]) == 2
    error = capsys.readouterr().err
    assert [name in error for name in names] == [True, True, False, False]
    assert {path.name for path in (tmp_path / "third" / "weights").glob("*.tar")} == {*names[2:]}
    assert main(["data", "xmcgan", "--fetch", "released"]) == 2
    assert "XMC-GAN has no released weights" in capsys.readouterr().err
    # For a file without a known address, the message gives its source.
    assert main(["data", "m3p", "--fetch", "released"]) == 2
    assert "checkpoint.pth: get it from https://github.com/microsoft/M3P" in capsys.readouterr().out
    with pytest.raises(StageError, match=r"does not exist|No such file"):
        fetch(mirrored(one(address), str(tmp_path / "nothing")), tmp_path / "fourth")
