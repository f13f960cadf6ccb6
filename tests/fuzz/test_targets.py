"""The good files of the fuzzer are good: a target whose files nothing reads would find nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.fuzz import __main__ as fuzz
from tests.fuzz.__main__ import judge
from tests.fuzz.targets import TARGETS, Target


# One trains a stage first.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "assemble embed")) for n in TARGETS])
def test_good_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    TARGETS[name].write(folder)
    path = next(path for path in sorted(folder.rglob("*")) if path.is_file())
    came, text = judge(TARGETS[name], folder, path)
    assert came == "read", text


def test_what_is_no_good_end_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "files" / "list.txt"
    path.parent.mkdir()
    path.write_text("a")

    def ended(read: object) -> str:
        return judge(Target(lambda _: None, read), path.parent, path)[0]  # type: ignore[arg-type]

    def refused(folder: Path) -> None:
        raise ValueError(f"{path}: no list")

    def unnamed(folder: Path) -> None:
        raise ValueError("damaged")

    def bug(folder: Path) -> None:
        raise KeyError("a")

    assert ended(refused) == "told"
    assert [ended(read) for read in (unnamed, bug, lambda _: path.write_text("b"))] == ["FOUND"] * 3
    assert ended(lambda _: os._exit(3)) == "FOUND"
    monkeypatch.setattr(fuzz, "PATIENCE", 1.0)
    assert ended(lambda _: time.sleep(60)) == "FOUND"
