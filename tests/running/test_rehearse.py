"""Test the rehearsal of the published recipes: it covers all recipes, and judges their stages."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from assemble.commands.main import main
from assemble.reporting import records
from assemble.reporting.papers import existing_papers, project_root
from assemble.reporting.promote import REFUSED, promote
from assemble.reporting.tables import expand
from assemble.stages import rehearse
from assemble.stages.configuration import check_arguments, resolve
from assemble.stages.given import Given
from assemble.stages.layers import load_yaml
from assemble.stages.needs import needs_of
from assemble.stages.paper_modules import optional_part
from assemble.stages.plan import plan_stages
from assemble.stages.recipe_data import datasets_of
from assemble.stages.recipes import REHEARSAL, family_of, recipes_of, scales_of
from assemble.stages.reproduce import _check_files
from assemble.stages.request import Selection
from common.encoders.checkpoint_files import read_checkpoint
from common.encoders.image import ImageResNet
from common.errors import StageError

GOLDEN = project_root() / "tests" / "golden"
NAMES = [paper.name for paper in existing_papers() if optional_part(paper.name, "rehearsal")]


@pytest.mark.parametrize("paper", NAMES)
def test_every_recipe_of_a_paper_is_rehearsed(paper: str) -> None:
    recipes = {instance.recipe for instance in expand(paper, "paper")}
    for recipe in sorted(recipes):
        published, rehearsed = (resolve(paper, recipe, scale="paper", rehearsal=own) for own in (False, True))
        assert records.config_hash(rehearsed.config) != records.config_hash(published.config)
        assert rehearsed.trains == published.trains
        assert rehearsed.deviations
        assert not published.deviations
        assert rehearsed.config["data"]["init_args"]["batch_size"] < 8
        check_arguments(rehearsed.with_placeholders(DATA="data"), rehearsed.layers)
    families = load_yaml(project_root() / "configs" / paper / f"{REHEARSAL}.yaml")["families"]
    assert {one for recipe in recipes_of(paper) for one in family_of(recipe, families)} == {*families}


@pytest.mark.parametrize("paper", NAMES)
def test_every_data_set_of_a_paper_is_written(paper: str, tmp_path: Path) -> None:
    importlib.import_module(f"papers.{paper}.rehearsal").write_datasets(tmp_path)
    found = datasets_of(paper, tmp_path)
    assert found
    for dataset in found:
        status = dataset.status()
        assert status.present, status.problems
        assert not [note for note in status.notes if "no region features" in note], status.notes
    # The check before a long run must find all data sets too. This test writes no weights.
    titles = {dataset.full_title for dataset in found}
    for scale in {"paper", "single"} & {*scales_of(paper)}:
        everything = Selection(scale, runs=tmp_path, data=tmp_path, rehearsal=True, everything=True)
        rows = needs_of(plan_stages(paper, everything)).rows
        assert not [problem for title, _, problem in rows if title in titles and problem]


def test_a_rehearsal_runs_is_gone_on_with_and_is_never_promoted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["rehearse", "avid", "--stages", "dcase@avid_audioset", "--folder", str(tmp_path), "--jobs", "1"]
    assert main(command) == 0
    printed = capfd.readouterr().out
    assert "AVID-CMA: 2 of 2 stages passed" in printed
    assert " metrics, 0 of them not finite, " in printed
    child, parent = ("dcase@avid_audioset", "avid_audioset")
    home = tmp_path / "avid_cma" / "paper" / "seed0"
    record = records.read(home / parent / "record.json")
    assert (record.steps, record.rehearsal, record.wandb_run_id) == (2, True, None)
    assert record.hardware["peak_memory_gib"] > 0.2
    assert not list(home.rglob("*.ckpt")), "no stage starts from them any more"

    # A rerun skips finished stages.
    assert main(command) == 0
    assert "2 stages, 2 done, 0 to run" in capfd.readouterr().out
    promoted = promote("avid_cma", ("paper",), tmp_path)
    assert {(one.action, one.record.stage) for one in promoted} == {(REFUSED, child), (REFUSED, parent)}
    assert all("it is a rehearsal" in one.reason for one in promoted)
    assert main(["promote", "avid", "--scale", "paper", "--runs", str(tmp_path)]) == 1

    # To run a child again, its parent must run again too, because the parent's checkpoint was removed.
    (home / child / "record.json").unlink()
    planned = plan_stages(
        "avid_cma",
        Selection(scale="paper", runs=tmp_path, data=tmp_path / "data" / "avid_cma", stages=(child,), rehearsal=True),
    )
    rehearse._forget_removed_parents(planned)
    assert not (home / parent / "record.json").exists()

    # A failed stage is printed and sets the exit status.
    monkeypatch.setattr(rehearse, "run_paper", lambda *_, **__: {(0, child): "no memory left"})
    assert main(command) == 1
    printed = capfd.readouterr().out
    assert f"{child}: FAILED, no memory left" in printed
    assert f"{parent}: FAILED, did not run" in printed
    assert "AVID-CMA: 0 of 2 stages passed" in printed


def test_a_stage_must_have_measured_what_a_table_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = plan_stages(
        "mct", Selection(scale="paper", runs=tmp_path, data=tmp_path, stages=("in_sup",), rehearsal=True)
    )

    def judged(metrics: dict[str, float | None], steps: int, failure: str | None = None) -> rehearse.Rehearsed:
        record = SimpleNamespace(metrics=metrics, steps=steps, wall_seconds=7.2, hardware={"peak_memory_gib": 1.5})
        monkeypatch.setattr(rehearse, "finished_record", lambda request: record)
        return rehearse._judged(item, rehearse.load("mct"), failure)

    monkeypatch.setattr(rehearse, "published_keys", lambda source, scale: {"in_sup": {"test/top1", "test/meteor"}})
    assert judged({}, 2).problem == "measured nothing that the tables read: test/meteor, test/top1"
    assert judged({"test/top1": 1.0}, 0).problem == "took no step"
    assert judged({"test/top1": 1.0}, 2, "broke").problem == "broke"
    passed = judged({"test/top1": 1.0, "test/other": None}, 2)
    assert (passed.problem, passed.absent) == ("", ("test/meteor",))
    told = "without test/meteor, 2 steps, 2 metrics, 1 of them not finite, 7 s, 1.5 GiB"
    assert str(passed) == f"  in_sup: passed, {told}"
    assert str(judged({}, 2, "broke")) == "  in_sup: FAILED, broke"


def test_tables_are_rehearsed_from_files_in_the_released_layouts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write one file in the format of an old torch and one in half precision, both with data parallelism's prefix."""
    command = ["rehearse", "avid", "--released", "--folder", str(tmp_path), "--jobs", "1"]
    assert main([*command, "--stages", "dcase@avid_cma", "dcase@cma_audioset"]) == 0
    printed = capfd.readouterr().out
    assert "AVID-CMA at scale paper: 4 stages, 2 given, 0 done, 2 to run" in printed
    assert "AVID-CMA: 2 of 2 stages passed" in printed
    assert "Transfer after pre-training on AudioSet, from the authors' weights (paper)" in printed
    assert "A rehearsal: random weights and tiny data; the numbers mean nothing." in " ".join(printed.split())
    assert printed.count("† Measured here from the authors' weights, which we did not pre-train") == 2
    folder = tmp_path / "data" / "avid_cma" / "released"
    weights = read_checkpoint(folder / "AVID-CMA_Kinetics_InstX-N1024-PosW-N64-Top32_checkpoint.pth.tar")["model"]
    golden = json.loads((GOLDEN / "avid_cma" / "official_state_dict.json").read_text("utf-8"))
    assert {n: list(x.shape) for n, x in weights.items()} == {f"module.{n}": s for n, s in golden["model"].items()}
    # A file of another paper, stage or data set is rejected with an error that says what differs.
    network = {f"module.encoder_q.{name}": value for name, value in ImageResNet((1, 1, 1, 1)).state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": network}, tmp_path / "moco.pth.tar")
    others = {
        "AVID_Audioset_Cross-N1024_checkpoint.pth.tar": "view1_mem has 1,784,108 rows, expected about 240,000",
        "AVID-CMA_Kinetics_InstX-N1024-PosW-N64-Top32_checkpoint.pth.tar": "positive_set has 32 mined positives",
        "../../../moco.pth.tar": "no weights of an audio-visual model; its entries are encoder_q.conv1.weight",
    }
    for name, message in others.items():
        monkeypatch.setattr(
            rehearse, "write_released", lambda *_, name=name: {"avid": Given((folder / name).resolve(), "somewhere")}
        )
        assert main([*command, "--stages", "dcase@avid"]) == 2
        error = capfd.readouterr().err
        assert "the file for avid cannot replace it: " in error
        assert message in error


@pytest.mark.parametrize("paper", ["mct", "m3p"])
def test_released_layouts_fit_their_stages_and_no_others(paper: str, tmp_path: Path) -> None:
    selection = Selection("paper", runs=tmp_path, data=tmp_path, rehearsal=True)
    given = rehearse.write_released(paper, tmp_path / "released", selection)
    assert len(given) == {"mct": 3, "m3p": 1}[paper]
    planned = plan_stages(paper, replace(selection, given=given))
    _check_files(planned)
    wrong = tmp_path / "audio.pth"
    torch.save({"model": {"module.audio_model.conv1.weight": torch.zeros(4)}}, wrong)
    for stage in given:
        planned = plan_stages(paper, replace(selection, given={**given, stage: Given(wrong)}))
        with pytest.raises(StageError, match=rf"the file for {stage} cannot replace it: .*audio_model"):
            _check_files(planned)
