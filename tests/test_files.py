"""Check that files appear complete or not at all, and that leftovers of killed processes are removed."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from common.errors import Preempted, StageError
from common.files import (
    exclusive,
    lock,
    open_inside,
    parse_yaml,
    parsing,
    read_bytes,
    read_yaml,
    require_writable,
    sweep,
    temporary_of,
    whole_folder,
    write_atomically,
    write_whole,
)
from common.training.callbacks import WholeCheckpoints


def test_writing_is_atomic_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "index.json"
    write_atomically(path, "old\nä")

    for error in (OSError("disk full"), KeyboardInterrupt()):
        monkeypatch.setattr(os, "replace", Mock(side_effect=error))
        with pytest.raises(type(error)):
            write_atomically(path, b"new")
        assert path.read_bytes() == "old\nä".encode()
        assert [entry.name for entry in path.parent.iterdir()] == ["index.json"]


def test_a_writer_sees_the_suffix_and_its_own_errors_stay_what_they_are(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "a.b.npz", lambda temporary: np.savez(temporary, x=np.arange(3)))
    with np.load(path) as content:
        assert content["x"].tolist() == [0, 1, 2]

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise FileNotFoundError("no such sample")

    with pytest.raises(FileNotFoundError, match="no such sample"):
        write_whole(path, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.b.npz"]


#: An id larger than that of any process.
DEAD = 9_999_999


def aged(*paths: Path) -> None:
    old = time.time() - 3600
    for path in paths:
        os.utime(path, (old, old))


def test_what_killed_processes_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = temporary_of(tmp_path / "last.ckpt")
    monkeypatch.setattr(os, "getpid", lambda: DEAD)
    theirs, fresh = temporary_of(tmp_path / "last.ckpt"), temporary_of(tmp_path / "new.json")
    for path in (ours, theirs, fresh):
        path.write_text("half")
    aged(ours, theirs)
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {ours, fresh}
    sweep(tmp_path / "absent")


def test_files_of_other_programs_are_not_swept(tmp_path: Path) -> None:
    names = [".notes.4194000.tmp", ".foo.4194002.tmp.txt", f".page.{DEAD}.tmp", f".x.0F3A8C11.{DEAD}.tmp", ".hidden"]
    names += [f"x.0f3a8c11.{DEAD}.tmp", f".x.0f3a8c11.{DEAD}.tmp.a.b", ".x.0f3a8c11.99999999999999999999.tmp"]
    folders = [".cfg.4194001.tmp", f".export.0f3a8c11.{DEAD}.tmp"]
    for name in names:
        (tmp_path / name).write_text("mine")
    for name in folders:
        (tmp_path / name / "deep").mkdir(parents=True)
    aged(*tmp_path.iterdir())
    write_atomically(tmp_path / "another", "")
    with whole_folder(tmp_path / "cfg"):
        pass
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"another", "cfg", *names, *folders}


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def write(text: str, error: Exception | None = None) -> None:
        with whole_folder(tmp_path / "model.v1") as partial:
            (partial / "config").write_text(text)
            if error is not None:
                raise error

    (tmp_path / ".model.v1.unfinished" / "deep").mkdir(parents=True)  # left by a killed process
    with pytest.raises(KeyError):
        write("new", KeyError())
    assert not list(tmp_path.iterdir())
    write("old")
    with pytest.raises(OSError, match="not empty"):
        write("new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model.v1", "model.v1/config"]
    assert (tmp_path / "model.v1" / "config").read_text() == "old"


class WrongError(Exception):
    pass


@pytest.mark.parametrize("error", [KeyError("stage"), ValueError("no number"), OSError(5, "Input/output error")])
def test_any_error_of_a_parser_names_the_file(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(WrongError, match="page"), parsing(tmp_path / "page", WrongError):
        raise error
    with pytest.raises(WrongError, match=r"^as it is$"), parsing(tmp_path / "page", WrongError):
        raise WrongError("as it is")


def test_a_reader_waits_for_no_pipe_and_keeps_no_signal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(WrongError, match=f"{name}: is not a regular file"), parsing(tmp_path / name, WrongError):
            read_bytes(tmp_path / name)
    (tmp_path / "large").write_bytes(b"12345")
    assert read_bytes(tmp_path / "large", 5) == b"12345"
    with pytest.raises(OSError, match="has 5 bytes, more than 4"):
        read_bytes(tmp_path / "large", 4)
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        read_bytes(tmp_path)
    for stop in (Preempted(15), SystemExit(1)):
        with pytest.raises(type(stop)), parsing(tmp_path, WrongError):
            raise stop


def test_a_file_of_an_untrusted_folder_is_in_that_folder(tmp_path: Path) -> None:
    (tmp_path / "run" / "media").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "run" / "media" / "file").write_bytes(b"mine")
    (tmp_path / "run" / "media" / "link").symlink_to("file")
    (tmp_path / "run" / "up").symlink_to("..")
    (tmp_path / "linked").symlink_to("run")
    for folder in ("run", "linked"):  # the folder itself may be a link
        with open_inside(tmp_path / folder, "media/file") as file:
            assert file.read() == b"mine"
    for name in ("media/link", "up/secret", "../secret", "media/../../secret", str(tmp_path / "secret"), "media", "."):
        with pytest.raises((OSError, ValueError)):
            open_inside(tmp_path / "run", name)
    assert not [file for file in Path("/proc/self/fd").iterdir() if tmp_path.name in os.path.realpath(file)]


def test_a_disk_without_locks_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(number: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        refused(number)
        with exclusive(tmp_path / ".lock"), (tmp_path / ".lock").open("a") as stream:
            assert not lock(stream, wait=False)
    refused(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), exclusive(tmp_path / ".lock"):
        pass


def test_what_was_written_survives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the order: sync the content, rename the file, sync its folder. New parent folders are synced first."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(f"sync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        done.append(f"rename {source}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    for writer in (WholeCheckpoints("Net").save_checkpoint, lambda content, path: write_atomically(path, "text")):
        done.clear()
        path = tmp_path / writer.__name__ / "checkpoints" / "last.ckpt"
        writer({"global_step": 1}, path)
        temporary = temporary_of(path)
        assert done[-3:] == [f"sync {temporary}", f"rename {temporary}", f"sync {path.parent}"]
        assert {f"sync {path.parents[1]}", f"sync {tmp_path}"} <= set(done[:-3])


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: {c: 2, c: 3}", "a: [1", "? [1, 2]\n: 3", "a: " + "[" * 5000 + "]" * 5000, "!!int ''",
        "a: \xff", "on: 1", "a: !!binary aGVsbG8=", "!!set {a, b}", "a: 2026-01-01", "a: 0x" + "f" * 10_000,
    ],
)  # fmt: skip
def test_yaml_is_strict(tmp_path: Path, text: str) -> None:
    path = tmp_path / "page.yaml"
    path.write_text(text, encoding="latin1")
    with pytest.raises(RuntimeError, match=r"page\.yaml"):
        read_yaml(path, RuntimeError)


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("-3.5e-2", -0.035), ("12", 12), ("e5", "e5"), ("16-mixed", "16-mixed")]
)
def test_numbers_of_yaml(text: str, value: object) -> None:
    assert parse_yaml(text) == value


def test_what_cannot_be_written_is_found_without_making_anything(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "deeper", "--output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StageError, match=r"--output .*file/deeper"):
        require_writable(tmp_path / "file" / "deeper", "--output")
