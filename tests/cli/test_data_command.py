"""Test `assemble data`: what a paper needs, and how users make stores of text features."""

from __future__ import annotations

import fnmatch
import sys
from pathlib import Path

import numpy as np
import pytest

from assemble.commands.main import main
from assemble.reporting.papers import existing_papers
from assemble.stages.recipe_data import datasets_of, files_of
from common.data.overview import released_files
from common.data.regions import RegionFeatures
from common.data.text_features import FeatureStore
from common.errors import StageError
from tests.data.image_layouts import write_coco
from tests.xmc_gan.test_text import write_bert


def test_every_file_that_a_recipe_reads_is_described(tmp_path: Path):
    known = {file.path: file for file in released_files()}
    named = {
        paper.name: {status.path.relative_to(tmp_path).as_posix(): status for status in files_of(paper.name, tmp_path)}
        for paper in existing_papers()
    }
    used = {path for own in named.values() for path in own}
    # Each file that a recipe reads must have a description, and each described file must be read by a recipe.
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


def test_a_data_set_of_several_recipes_is_read_once(tmp_path: Path) -> None:
    titles = [dataset.full_title for dataset in datasets_of("avid_cma", tmp_path)]  # probes take shorter clips
    assert titles.count("Kinetics-400") == 1


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for package in ("h5py", "wandb_workspaces"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "train.h5").write_bytes(b"")
    with pytest.raises(StageError, match="make extra-features"):
        RegionFeatures(tmp_path / "train.h5")
    assert main(["wandb-report", "mct", "--offline"]) == 2
    assert "make extra-wandb-reports" in capsys.readouterr().err


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "image", "caption", ",", ".", "0", "1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make a folder of data sets with COCO 2014, and a tiny BERT at the path in the recipes."""
    write_coco(tmp_path / "coco", train=3, year="2014")
    write_bert(tmp_path / "bert-base-uncased", WORDS, width=8)
    return tmp_path


def test_stores_are_reported_made_and_found(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data / "xmc_gan" / "text_features"
    assert main(["data", "xmc_gan", "--data", str(data)]) == 0
    printed = capsys.readouterr().out
    for title in ("COCO 2014", "Localized Narratives", "Text features", "missing", "--text-features"):
        assert title in printed
    assert "BERT is not at" not in printed
    assert main(["data", "xmc_gan", "--data", str(data), "--text-features"]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")] == [
        "coco_2014-train-17.h5",
        "coco_2014-val-17.h5",
    ]
    assert f"written to {folder / 'coco_2014-val-17.h5'}" in printed
    store = FeatureStore(folder / "coco_2014-train-17.h5")
    assert (len(store), store.width, store.max_tokens) == (6, 8, 17)
    words, sentence, length = store.read(np.arange(6), "official")
    assert length.tolist() == [8] * 6  # [CLS] image, [UNK], "," caption 0 . [SEP]
    assert words[:, :8].abs().sum(2).min() > 0
    assert sentence.isfinite().all()
    assert store.about["dataset"] == "coco_2014"
    # The command does not write an existing store again.
    changed = store.path.stat().st_mtime_ns
    main(["data", "xmc_gan", "--data", str(data), "--text-features"])
    assert store.path.stat().st_mtime_ns == changed
