"""`assemble verify`: the first steps of the smoke stages are the recorded ones, and a difference is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from assemble.commands.main import main
from assemble.reporting.papers import existing_papers, paper_named
from assemble.stages import verify
from common.errors import StageError
from tests.trained import finished


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_the_main_stage_and_its_parents_compute_what_was_recorded(paper: str) -> None:
    values = {stage.stage: verify.logged(stage) for stage in finished(paper)}
    differences, largest = verify.compare(verify.read(paper_named(paper)), values, values)
    assert not differences
    assert largest < verify.FLOOR
    for name in ("train/loss", "gradient_norm"):  # of every step
        steps = {len(curve) for logged in values.values() for key, curve in logged.items() if key.startswith(name)}
        assert steps
        assert min(steps) > 1


def test_every_planned_stage_is_recorded() -> None:
    for paper in existing_papers():
        planned = [item.request.stage for item in verify.plan_stages(paper.name, verify.selection(paper, Path("none")))]
        assert list(verify.read(paper).stages) == planned


def test_the_first_difference_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = paper_named("xmcgan")
    recorded = verify.read(paper)
    command = ["verify", "xmcgan", "--stages", "mini_evaluator", "--folder", str(tmp_path), "--jobs", "1"]
    assert main(command) == 0
    assert "XMC-GAN  1 stages, " in (told := capsys.readouterr().out)
    assert ": agrees (largest difference " in told
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["papers"]["xmc_gan"]["agrees"]
    assert {"cpu", "isa"} <= set(result["machine"])
    # Other code would log this value.
    curve = recorded.stages["mini_evaluator"]["train/loss"]
    monkeypatch.setitem(curve, "1", curve["1"] * (1 + 2 * verify.FLOOR))
    monkeypatch.setattr(verify, "read", lambda paper: recorded)
    assert main(command) == 1
    told = capsys.readouterr().out
    assert "XMC-GAN  differs\n  first   mini_evaluator, step 1, train/loss: " in told
    assert "assemble verify xmcgan --record" in told
    monkeypatch.undo()
    monkeypatch.setattr(verify, "path_of", lambda paper: tmp_path / "none.json")
    assert main(command) == 2
    assert "none.json is missing" in capsys.readouterr().err


def test_what_differs_is_ordered_by_stage_and_step_and_missing_values_count() -> None:
    recorded = {
        "a": {"test/top1": {"2": 5.0}},
        "b": {"gradient_norm": {"0": 1.0, "1": 4.0}, "train/loss": {"0": 3.0, "1": 2.0}},
    }
    fingerprint = verify.Fingerprint({}, {}, {"b": {"gradient_norm": {"1": 0.5}}}, recorded)
    mine = {
        "b": {"gradient_norm": {"0": 1.1, "1": 5.9}, "train/loss": {"0": 3.1, "1": float("nan")}},
        "c": {"x": {"0": 1.0}},
    }
    differences, largest = verify.compare(fingerprint, mine)
    assert [(one.stage, one.step, one.quantity) for one in differences] == [
        ("a", 2, "test/top1"), ("b", 0, "train/loss"), ("b", 0, "gradient_norm"), ("b", 1, "train/loss"), ("c", 0, "x"),
    ]  # fmt: skip
    assert (differences[0].value, differences[-1].recorded) == (None, None)
    assert largest == 0.0


def test_a_fingerprint_has_the_spread_of_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "instruction_sets_here", lambda: list(verify.ROUNDINGS))
    monkeypatch.setattr(verify, "path_of", lambda paper: tmp_path / "fingerprint.json")
    planned = SimpleNamespace(request=SimpleNamespace(stage="a"))
    monkeypatch.setattr(verify, "plan_stages", lambda *_: [planned])
    monkeypatch.setattr(verify, "code_of", lambda paper: {"papers/a.py": "0123"})
    losses, scores = {"sse41": 2.00001, "avx2": 2.0, "native": 2.0}, {"sse41": 5.0, "avx2": 6.0, "native": 5.0}
    monkeypatch.setattr(
        verify,
        "measure",
        lambda paper, wanted, jobs, show: {
            "a": {"train/loss": {"0": losses[wanted.isa]}, "test/top1": {"1": scores[wanted.isa]}}
        },
    )
    paper = paper_named("avid")
    fingerprint = verify.record(paper, tmp_path, 1, print)
    assert fingerprint.spread == {"a": {"test/top1": {"1": 1.0}}}
    assert replace(verify.read(paper), made={}) == replace(fingerprint, made={})
    assert len((tmp_path / "fingerprint.json").read_text(encoding="utf-8").splitlines()) < 30
    monkeypatch.setattr(verify, "instruction_sets_here", lambda: ["native"])
    with pytest.raises(StageError, match="several instruction sets"):
        verify.record(paper, tmp_path, 1, print)
