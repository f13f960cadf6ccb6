"""Files appear whole or not at all, and what killed processes left behind goes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from common.errors import StageError
from common.files import (
    AtomicWriteError,
    cache_folder,
    described,
    exclusive,
    lock,
    named,
    parse_yaml,
    read_yaml,
    require_writable,
    sweep,
    temporary_of,
    write_atomically,
    write_whole,
)
from common.training.callbacks import WholeCheckpoints


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("ASSEMBLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "representation-assemble"


def test_writing_is_atomic_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "index.json"
    write_atomically(path, "old\nä")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(AtomicWriteError, match=r"index\.json: disk full\. The file that was there before"):
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


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    ours = temporary_of(tmp_path / "last.ckpt")
    theirs = [tmp_path / ours.name.replace(str(os.getpid()), str(process.pid)), tmp_path / f".page.{process.pid}.tmp"]
    fresh = tmp_path / f".new.{process.pid}.tmp.json"
    kept = [ours, fresh, tmp_path / "last.ckpt", tmp_path / ".hidden"]
    for path in (*theirs, *kept):
        path.write_text("half")
    folder = tmp_path / f".export.{process.pid}.tmp"
    (folder / "deep").mkdir(parents=True)
    old = time.time() - 3600
    for path in (*theirs, folder, ours, kept[3]):
        os.utime(path, (old, old))
    write_atomically(tmp_path / "another", "")
    assert {path.name for path in tmp_path.iterdir()} == {"another", *(path.name for path in kept)}
    sweep(tmp_path / "absent")


def test_the_age_of_what_was_left_is_told_by_the_clock_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
    fresh = tmp_path / f".new.{process.pid}.tmp.json"
    fresh.write_text("half")
    ours = time.time()
    monkeypatch.setattr(time, "time", lambda: ours + 7200)  # another machine's process may be writing it
    write_atomically(tmp_path / "another", "")
    assert fresh.exists()


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
    """Content, name and new folders are on the disk in this order, so that none is there without the one before."""
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
    ("text", "words"),
    [
        ("a: 1\nb: {c: 2, c: 3}", r"page\.yaml is not valid YAML: key 'c' stands here twice"),
        ("a: [1", r"page\.yaml is not valid YAML"),
        ("? [1, 2]\n: 3", r"page\.yaml is not valid YAML: a key must be a text or a number"),
        ("? {a: 1}\n: 3", r"page\.yaml is not valid YAML: a key must be a text or a number"),
        ("a: " + "[" * 5000 + "]" * 5000, r"page\.yaml is not valid YAML: "),
        ("a: " + "[" * 300 + "]" * 300, r"page\.yaml is not valid YAML: "),
    ],
)
def test_yaml_is_strict(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "page.yaml"
    path.write_text(text)
    with pytest.raises(RuntimeError, match=words):
        read_yaml(path, RuntimeError)
    with pytest.raises(RuntimeError, match="absent does not exist"):
        read_yaml(tmp_path / "absent", RuntimeError)
    path.write_bytes(b"a: \xff")
    with pytest.raises(RuntimeError, match="is not UTF-8"):
        read_yaml(path, RuntimeError)


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("1e6", 1e6), ("-3.5e-2", -0.035), ("12", 12), ("1.5", 1.5)]
)
def test_numbers_of_yaml(text: str, value: float) -> None:
    assert parse_yaml(text) == value


def test_words_that_look_like_numbers_stay_words() -> None:
    assert parse_yaml("e5") == "e5"
    assert parse_yaml("16-mixed") == "16-mixed"


def test_what_cannot_be_written_is_found_without_making_anything(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "deeper", "--output")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StageError, match=r"--output .*file/deeper cannot be written: .*file: Not a directory"):
        require_writable(tmp_path / "file" / "deeper", "--output")
    if Path("/proc/self").exists():
        with pytest.raises(StageError, match=r"--output /proc/none cannot be written"):
            require_writable(Path("/proc/none"), "--output")


def test_an_error_of_the_system_in_the_cache_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    full = OSError(28, "No space left on device", str(tmp_path / "cache" / "worlds" / "clip.mp4"))
    assert "clip.mp4: No space left on device. It lies in the cache folder; ASSEMBLE_CACHE" in described(full)
    elsewhere = OSError(28, "No space left on device", str(tmp_path / "runs" / "last.ckpt"))
    assert "ASSEMBLE_CACHE" not in described(elsewhere)
    assert described(ValueError("as it is")) == "as it is"


def test_errors_of_the_system_name_the_file_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a")
    with pytest.raises(OSError, match=r"Input/output error: '.*list\.txt'"), named(path):
        raise OSError(5, "Input/output error")
    with pytest.raises(FileNotFoundError, match=r"absent"), named(tmp_path / "absent"):
        (tmp_path / "absent").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"is no regular file: '.*pipe'"), named(tmp_path / "pipe"):
        (tmp_path / "pipe").read_bytes()
