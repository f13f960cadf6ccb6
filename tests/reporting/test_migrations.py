"""Records that are rewritten because the code states their configuration differently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.reporting.papers import paper_named
from migrations import rewrite as rewriting
from migrations.rewrite import rewrite


def _moved(paper: str, config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "moved": 1}


def _content(folder: Path) -> dict[str, Any]:
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}


def test_a_migration_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = next((paper_named("mct").results / "mini").glob("seed0"))
    for name in ("whole", "stopped"):
        shutil.copytree(source, tmp_path / name)
    assert rewrite(tmp_path / "whole", "one", _moved) == len(_content(tmp_path / "whole"))
    written: list[Path] = []
    genuine = rewriting.write_atomically

    def killed(path: Path, content: str) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        genuine(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(rewriting, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            rewrite(tmp_path / "stopped", "one", _moved)
    assert rewrite(tmp_path / "stopped", "one", _moved) == len(_content(tmp_path / "stopped")) - 4
    assert _content(tmp_path / "stopped") == _content(tmp_path / "whole")
    assert rewrite(tmp_path / "stopped", "one", _moved) == 0


def test_records_that_a_migration_does_not_change_stay_as_they_are(tmp_path: Path) -> None:
    shutil.copytree(paper_named("mct").results / "mini" / "seed0", tmp_path / "one")
    before = _content(tmp_path / "one")

    def probed(paper: str, config: dict[str, Any]) -> dict[str, Any]:
        return _moved(paper, config) if config["model"]["class_path"].endswith(".VirTex") else config

    rewrite(tmp_path / "one", "probed", probed)
    changed = {name for name, record in _content(tmp_path / "one").items() if record != before[name]}
    # VirTex and what was measured on it.
    assert changed == {name for name in before if name == "virtex.json" or name.endswith("@virtex.json")}
    assert len(changed) > 2
