"""`assemble data <paper>`: what the paper scale needs."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path

import pytest

from common.commands.main import main
from common.data.regions import RegionFeatures
from common.data.released_files import released_files
from common.errors import StageError
from common.reporting.papers import existing_papers
from common.stages.recipe_data import files_of


def test_every_file_that_a_recipe_reads_is_described(tmp_path: Path):
    known = {file.path: file for file in released_files()}
    named = {
        paper.name: {status.path.relative_to(tmp_path).as_posix(): status for status in files_of(paper.name, tmp_path)}
        for paper in existing_papers()
    }
    used = {path for own in named.values() for path in own}
    # No recipe reads what nobody describes, and nothing is described that no recipe reads.
    described = {path: next((own for own in known if fnmatch.fnmatchcase(path, own)), None) for path in used}
    assert None not in described.values()
    assert set(described.values()) == set(known)
    for file in known.values():
        assert all((file.title, file.size, file.license, file.source)), file.path
        assert "unknown" not in (file.size, file.license), file.path
    assert named["mct"]["bert-base-uncased"].recipes
    assert "weights/t5-base" in named["vx2text"]
    assert "audioset/unbalanced_train-100k.txt" in named["avid_cma"]
    assert not any(status.present for own in named.values() for status in own.values())


def test_the_command_lists_sets_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "m3p", "--data", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for word in ("Multi30K", "STAIR Captions", "Weights and other files", "XLM-R base", "Dictionaries from English"):
        assert word in printed
    assert "Lacks: en-de.txt, en-fr.txt, en-cs.txt, en-ja.txt, en-zh.txt" in printed
    assert f"hf download FacebookAI/xlm-roberta-base --local-dir {tmp_path}/weights/xlm-roberta-base" in printed


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for package in ("h5py", "wandb_workspaces"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "train.h5").write_bytes(b"")
    with pytest.raises(StageError, match="make extra-features"):
        RegionFeatures(tmp_path / "train.h5")
    assert main(["wandb-report", "mct", "--offline"]) == 2
    assert "make extra-wandb-reports" in capsys.readouterr().err
