"""Test `assemble explain` on the recorded results, on a run, and on wrong names."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from assemble.commands.main import main
from assemble.reporting.aggregate import collect
from assemble.reporting.papers import existing_papers
from assemble.reporting.records import IGNORED_KEYS, RECORD_FILE, SEED_KEYS, config_hash, write
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import load
from assemble.stages.explain import explain

PAPERS = [paper.name for paper in existing_papers()]


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert main(["explain", *arguments]) == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


@pytest.mark.parametrize("paper", PAPERS)
def test_recorded_cells_of_every_paper_are_explained(capsys: pytest.CaptureFixture[str], paper: str) -> None:
    results = [one for one in collect(load(paper), "mini", find_promoted(paper)) if one.measured]
    assert results
    for result in (results[0], results[-1]):
        (label, metric), cell = next((key, cell) for key, cell in reversed(result.cells.items()) if cell.values)
        output = said(capsys, paper, result.table.id, label.upper(), metric, "--scale", "mini")
        digits = result.table.metric(metric).decimals
        flat = " ".join(output.split())
        assert all(f"seed {draw.label}: {value:.{digits}f}" in flat for draw, value in cell.values.items())
        assert all(record.configuration in output for record in cell.records)
        assert re.search(r"^Differs from the paper in$", output, re.MULTILINE)
        assert re.search(
            rf"^  measured by (common|papers)\.[\w.]+; protocol: docs/papers/{paper}.md$", output, re.MULTILINE
        )
        assert f"--stages {' '.join(cell.instances)}" in output


def test_a_cell_says_what_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    output = said(capsys, "xmcgan", "mini", "s + w", "fd")
    assert re.search(r"^s_w +s_w +mini_evaluator ", output, re.MULTILINE)
    assert "Differs from the row I (D + V) in" in output
    assert re.search(r"^model.loss.weight_word +1 +0 *$", output, re.MULTILINE)
    assert re.search(r"^s_w +trainer.precision +32-true +bf16-mixed *$", output, re.MULTILINE)
    assert "trainer.max_epochs" not in output
    assert "trainer.max_epochs" in said(capsys, "xmcgan", "mini", "s + w", "fd", "--fields")
    assert "measured by papers.xmc_gan.module.XMCGANModule; protocol: docs/papers/xmc_gan.md" in output
    published = said(capsys, "xmcgan", "coco", "attngan", "FID")
    assert published.endswith("published  33.10 at paper scale (LAFITE's table)\n  not measured at paper\n")
    assert "recorded   –" in said(capsys, "xmcgan", "ablation", "S", "fid")  # the stages, but no value
    some = explain("vx2text", "avsd", "VX2TEXT", "meteor", "mini", None)  # machines without Java can't measure METEOR
    assert {record.draw for record in some.records} == some.cell.values.keys()


def test_a_run_is_explained_in_place_of_the_records(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for record in find_promoted("xmc_gan", "mini"):
        if record.stage in ("mini_evaluator", "s_w", "baseline") and record.draw.folder in ("seed0", "seed2"):
            seed, git = record.seed, {"revision": f"{record.seed:020d}", "dirty": record.seed == 2}
            made = {**record.metrics, "test/mini_fd": 123.0 + seed}
            config = record.config | ({"extra": 1} if record.stage == "s_w" else {})
            mine = replace(record, metrics=made, wall_seconds=60.0 * (1 + seed), git=git, config=config)
            write(mine.folder(tmp_path) / RECORD_FILE, mine)
    cell = ["xmcgan", "mini", "S + W", "fd", "--run"]
    output = said(capsys, *cell, str(tmp_path / "xmc_gan" / "mini" / "seed2" / "s_w"))
    assert "this run   125.0 (n=1)\n             seed 2: 125.0\n" in output
    assert "recorded   " in output
    assert output.rstrip().endswith("--seeds 2")
    assert "this run   124.0 ± 1.4 (n=2)" in said(capsys, *cell, str(tmp_path))
    found = explain("xmcgan", "mini", "S + W", "fd", None, tmp_path)
    now = [config_hash(one.configuration.config, IGNORED_KEYS | SEED_KEYS) for one in found.stages]
    told = ("2.0", "0000000000 (dirty) and 1 more")
    assert found.stage_rows() == [
        ("mini_evaluator", "mini_evaluator", "-", now[0], *told),
        ("s_w", "s_w", "mini_evaluator", f"{found.cell.records[0].configuration} (now {now[1]})", *told),
    ]
    assert found.commands() == ["assemble reproduce xmcgan --scale mini --stages s_w --seeds 0 2"]
    assert (True, "s_w", "data.flip", "0", "0.5") in found.differences_from_paper()
    copy = shutil.copytree(tmp_path / "xmc_gan" / "mini" / "seed0" / "s_w", tmp_path / "copy")
    assert "this run   123.0 (n=1)" in said(capsys, *cell, str(copy))
    assert "did not measure this cell; it has baseline at mini" in said(
        capsys, "xmcgan", "mini", "W", "fd", "--run", str(tmp_path), status=2
    )


def test_a_cell_from_the_authors_weights_names_their_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for record in find_promoted("avid_cma", "mini"):
        if record.stage in ("esc@avid", "esc@avid_cma") and record.draw.folder == "seed0":
            given = {
                str(record.row): {"file": f"{record.row}.pth", "sha256": "ab" * 32, "source": "https://example.org"}
            }
            released = replace(record, scale="paper", given=given, metrics={"test/best_top1": 60.0})
            write(released.folder(tmp_path) / RECORD_FILE, released)
    output = said(capsys, "avid", "kinetics_transfer", "AVID-CMA", "esc", "--run", str(tmp_path))
    assert "this run   60.0 (n=1) (from the authors' weights)" in output
    assert re.search(r"^avid_cma +given +avid_cma.pth ", output, re.MULTILINE)
    assert not re.search(r"^avid ", output, re.MULTILINE), "the file does not start from it"
    differing = output.partition("Differs from the row AVID in")[2].partition("Metric")[0]
    assert re.search(r"^model.pretrained +avid_cma +avid *$", differing, re.MULTILINE)
    assert "model.loss" not in differing, "recipes that did not make the files"
    assert "--stages esc@avid_cma --released FOLDER --seeds 0" in output
