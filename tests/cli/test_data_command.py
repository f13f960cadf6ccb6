"""`assemble data <paper>`: what the paper scale needs, and shards as a user writes them."""

from __future__ import annotations

import fnmatch
import io
from pathlib import Path

import pytest
from rich.console import Console

from common.commands.main import main
from common.data.datasets.coco import COCO
from common.data.datasets.tvc import TVC
from common.data.prepare import report
from common.data.released_files import released_files
from common.reporting.papers import existing_papers
from common.stages.single import files_of
from tests.data.image_layouts import write_coco
from tests.data.text_layouts import write_tvc, write_tvqa


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


def test_shards_of_a_paper_are_written_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, target = tmp_path / "data", tmp_path / "shards"
    write_coco(data / "coco")
    (data / "coco/train2017/000000000099.jpg").write_bytes(b"")
    (data / "coco/train2017.zip").write_bytes(b"PK")
    (data / "bert-base-uncased").mkdir()
    (data / "bert-base-uncased/vocab.txt").write_text("[PAD]\n")
    assert main(["data", "mct", "--data", str(data), "--shards", str(target), "--shard-size", "2KB"]) == 0
    printed = capsys.readouterr().out
    assert f"{data / 'imagenet'}: nothing there" in printed
    assert f"{target / 'coco'}: 6 media files" in printed
    assert "left out: train2017.zip" in printed
    assert "1 files cannot be read" in printed
    assert f"Train with --data {target}" in printed
    # All that training needs is there, and no media file but in shards.
    assert (target / "bert-base-uncased/vocab.txt").read_text() == "[PAD]\n"
    assert (target / "coco/annotations/captions_train2017.json").is_file()
    assert not list(target.rglob("*.jpg"))
    assert len(list((target / "coco/webdataset").glob("*.tar"))) > 1
    assert COCO(target / "coco").listing("train").fingerprint() == COCO(data / "coco").listing("train").fingerprint()
    (status,) = report([COCO(target / "coco")], Console(file=io.StringIO()), prepare=True)
    assert status.layout.endswith("media files in shards")
    assert (status.present, status.checked, status.broken) == (True, 6, ())
    # Another paper's sets go beside them; a set may read another one's files.
    write_tvqa(data / "tvqa")
    write_tvc(data / "tvc")
    assert main(["data", "vx2text", "--data", str(data), "--shards", str(target)]) == 0
    capsys.readouterr()
    clips = TVC(target / "tvc").listing("train").clips
    assert all(clip.path.is_dir() and clip.path.is_relative_to(target / "tvqa") for clip in clips)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard-size", "1GB"], "--shard-size goes with --shards"),
        (["--shards", "{data}/new"], "no data set of mct is in"),
    ],
)
def test_shards_that_cannot_be_written(tmp_path: Path, options: list[str], message: str, capsys):
    options = [option.format(data=tmp_path) for option in options]
    assert main(["data", "mct", "--data", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("size", ["1XB", "0", "-3", "GB"])
def test_a_size_that_is_none_is_refused(size: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["data", "mct", "--shards", "x", f"--shard-size={size}"])
    assert "is no size; write it like 500MB or 1GB" in capsys.readouterr().err
