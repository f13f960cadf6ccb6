"""Check that all readers accept the fuzzer's good files. Otherwise the fuzzer would find nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.__main__ import judge
from tests.fuzz.targets import TARGETS


# The target of `assemble embed` trains a stage first, so it is slow.
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "assemble embed")) for n in TARGETS])
def test_good_files_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    TARGETS[name].write(folder)
    path = next(path for path in sorted(folder.rglob("*")) if path.is_file())
    came, text = judge(TARGETS[name], folder, path)
    assert came == "read", text
