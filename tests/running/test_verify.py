"""Test `assemble verify`: the first steps of the smoke stages equal the recorded steps, and differences are named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from assemble.commands.main import main
from assemble.reporting.papers import existing_papers, paper_named
from assemble.stages import verify
from assemble.stages.like_cpu import like_cpu
from assemble.stages.request import Selection
from common.errors import StageError
from tests.trained import finished


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_the_main_stage_and_its_parents_compute_what_was_recorded(paper: str) -> None:
    values = {stage.stage: verify.logged(stage) for stage in finished(paper)}
    differences, relative = verify.compare(verify.read(paper_named(paper)), values, values)
    assert not differences
    assert max(difference for _, difference in relative) < verify.FLOOR
    for name in ("train/loss", "gradient_norm"):  # these are logged at every step
        steps = {len(curve) for logged in values.values() for key, curve in logged.items() if key.startswith(name)}
        assert steps
        assert min(steps) > 1


@pytest.mark.parametrize("rehearsal", [False, True])
def test_one_stage_of_each_recipe_is_recorded(rehearsal: bool) -> None:
    for paper in existing_papers():
        recorded = verify.read(paper, rehearsal)
        planned = verify.plan_stages(paper.name, verify.selection(paper, Path("none"), rehearsal=rehearsal))
        assert sorted(recorded.stages) == sorted(item.request.stage for item in planned)
        everything = Selection("paper" if rehearsal else "smoke", rehearsal=rehearsal)
        recipes = {item.request.recipe for item in verify.plan_stages(paper.name, everything)}
        assert {item.request.recipe for item in planned} == recipes
        assert all(
            np.isfinite([*curve.values()]).all() for stage in recorded.stages.values() for curve in stage.values()
        )


def test_the_first_difference_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = paper_named("xmcgan")
    recorded = verify.read(paper)
    command = ["verify", "xmcgan", "--stages", "mini_evaluator", "--folder", str(tmp_path), "--jobs", "1"]
    assert main([*command, "--precision", "32", "bf16"]) == 0
    assert "XMC-GAN  1 stages, " in (told := capsys.readouterr().out)
    assert ": agrees (largest difference " in told
    assert "XMC-GAN  bf16: half of the losses differ by up to " in told
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["papers"]["xmc_gan"]["agrees"]
    assert 1e-4 < result["papers"]["xmc_gan"]["bf16"]["half"] < 0.1  # too large to agree, but not judged
    assert {"cpu", "isa"} <= set(result["machine"])
    # Simulate a change of the code by changing a recorded value.
    curve = recorded.stages["mini_evaluator"]["train/loss"]
    monkeypatch.setitem(curve, "1", curve["1"] * (1 + 2 * verify.FLOOR))
    monkeypatch.setattr(verify, "read", lambda *_: recorded)
    assert main(command) == 1
    told = capsys.readouterr().out
    assert "XMC-GAN  differs\n  first   mini_evaluator, step 1, train/loss: " in told
    assert "assemble verify xmcgan --record" in told
    monkeypatch.undo()
    monkeypatch.setattr(verify, "path_of", lambda *_: tmp_path / "none.json")
    assert main(command) == 2
    assert "none.json is missing" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the GPU of this machine")
def test_what_cannot_be_compared_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, problem in (
        (["--device", "cuda"], "torch finds no GPU on this machine"),
        (["--precision", "tf32"], "add --device cuda"),
        (["--record", "--precision", "bf16"], "leave out --device and --precision"),
        (["--stages", "baseline", "--rehearsal", "--precision", "16"], "'16'"),
    ):
        assert main(["verify", "xmcgan", *options]) == 2
        assert problem in capsys.readouterr().err


def test_a_gpu_draws_the_random_numbers_of_the_cpu() -> None:
    def drawn() -> list[torch.Tensor]:
        torch.manual_seed(0)
        rows = torch.ones(40, 6)
        heads = torch.linspace(-1, 1, 192).view(2, 3, 8, 4)
        return [
            torch.nn.functional.dropout(rows, 0.3), torch.randperm(9), torch.empty(5).uniform_(), torch.rand_like(rows),
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4),
        ]  # fmt: skip

    expected = drawn()
    with like_cpu():
        assert all(map(torch.equal, drawn(), expected))
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    torch.manual_seed(0)  # dropout calls this operation on a GPU
    assert torch.equal(torch.native_dropout(torch.ones(40, 6), 0.3, True)[0], expected[0])


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
    differences, relative = verify.compare(fingerprint, mine)
    assert [(item.stage, item.step, item.quantity) for item in differences] == [
        ("a", 2, "test/top1"), ("b", 0, "train/loss"), ("b", 0, "gradient_norm"), ("b", 1, "train/loss"), ("c", 0, "x"),
    ]  # fmt: skip
    assert (differences[0].value, differences[-1].recorded) == (None, None)
    assert [name for name, _ in relative] == ["gradient_norm", "train/loss", "train/loss"]  # recorded without a spread
    # Another device may differ by more, but not by 10 %.
    near = {"b": {"gradient_norm": {"0": 1.0004, "1": 20.0}, "train/loss": {"0": 3.001, "1": 2.2}}}
    differences, _ = verify.compare(fingerprint, near, ["b"], verify.FLOORS["cuda"])
    assert [(item.step, item.quantity) for item in differences] == [(1, "train/loss")]


def test_a_fingerprint_has_the_spread_of_instruction_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "instruction_sets_here", lambda: list(verify.ROUNDINGS))
    monkeypatch.setattr(verify, "path_of", lambda *_: tmp_path / "fingerprint.json")
    planned = SimpleNamespace(request=SimpleNamespace(stage="a", recipe="a", overrides={}))
    monkeypatch.setattr(verify, "plan_stages", lambda *_: [planned])
    monkeypatch.setattr(verify, "code_of", lambda *_: {"papers/a.py": "0123"})
    losses, scores = {"sse41": 2.00001, "avx2": 2.0, "native": 2.0}, {"sse41": 5.0, "avx2": 6.0, "native": 5.0}
    monkeypatch.setattr(
        verify,
        "measure",
        lambda paper, wanted, jobs, show: {
            "a": {"train/loss": {"0": losses[wanted.isa]}, "test/top1": {"1": scores[wanted.isa]}}
        },
    )
    paper = paper_named("avid")
    fingerprint = verify.record(paper, tmp_path, False, 1, print)
    assert fingerprint.spread == {"a": {"test/top1": {"1": 1.0}}}
    assert replace(verify.read(paper), made={}) == replace(fingerprint, made={})
    assert len((tmp_path / "fingerprint.json").read_text(encoding="utf-8").splitlines()) < 40
    monkeypatch.setattr(verify, "instruction_sets_here", lambda: ["native"])
    with pytest.raises(StageError, match="several instruction sets"):
        verify.record(paper, tmp_path, False, 1, print)
