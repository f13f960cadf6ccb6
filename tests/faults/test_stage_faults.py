"""Check that wrong input gives a message that says what to do, and that broken files are skipped and reported."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from assemble.commands.main import main
from assemble.stages import training
from assemble.stages.request import StageRequest
from assemble.stages.run import run_stage
from common.data.listing import DatasetError
from common.errors import STOP, NonFiniteLossError, StageError
from common.training.callbacks import WholeCheckpoints
from papers.avid_cma.module import AVIDModule
from tests.stages import request
from tests.trained import copied_avid


def test_cma_without_avid(tmp_path: Path) -> None:
    with pytest.raises(
        StageError, match=r"starts from avid .*first run `assemble reproduce avid --scale smoke --stages avid`"
    ):
        run_stage(request("avid/avid_cma", tmp_path))
    for recipe in ("avid/cma", "avid/ablation_cma"):  # the tables have no such stages, so the message names no command
        with pytest.raises(ValueError, match=r"(?s)CMA starts from a trained AVID: .*model.warm_start"):
            run_stage(request(recipe, tmp_path))


def test_a_finished_parent_without_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = copied_avid(tmp_path)
    parent.checkpoint().unlink()
    advice = f"last.ckpt; restore it, or delete {parent.directory} to train avid again"
    flags = ["avid", "--scale", "smoke", "--runs", str(tmp_path), "--stages", "avid_cma"]
    assert main(["reproduce", *flags]) == 2
    assert advice in capsys.readouterr().out
    assert main(["plan", *flags]) == 0
    assert advice in capsys.readouterr().out
    with pytest.raises(StageError, match=rf"starts from avid .*: missing: .*{advice}"):
        run_stage(request("avid/avid_cma", tmp_path))
    assert main(["reproduce", *flags[:-1], "avid"]) == 0  # nobody needs the checkpoint


@pytest.mark.parametrize(
    ("stage", "words", "arguments"),
    [
        ("avid/ucf101_fine_tune", "only the classifier learns", ("--model.warmup_epochs", "9")),
        ("avid/esc50_svm", "folds: 3 expected", ("--model.folds", "3")),
        ("mct/voc07_svm", "folds is 1", ("--model.folds", "1")),
    ],
)
def test_settings_without_effect(stage: str, words: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises((ValueError, StageError), match=words):
        run_stage(request(stage, tmp_path, *arguments))


def test_banks_of_another_listing_on_resume(tmp_path: Path) -> None:
    stage = copied_avid(tmp_path)
    path = stage.directory / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["listing_fingerprint"] = "0" * 64
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"another data set listing"):
        run_stage(stage)


def test_a_full_disk_while_writing_the_record_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = request("avid/avid", tmp_path)
    genuine = os.replace

    def full(source: Any, target: Any) -> None:
        if str(target).endswith("record.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert (
        main(["reproduce", "avid", "--scale", "smoke", "--stages", "avid", "--jobs", "1", "--runs", str(tmp_path)]) == 1
    )
    monkeypatch.undo()
    printed = "".join(capsys.readouterr())
    assert "record.json" in printed
    assert printed.count("Free space") == 1
    assert not (stage.directory / "record.json").exists()
    # The checkpoint exists, so rerunning the command needs no training.
    record = run_stage(stage)
    assert record.steps == 4
    assert (stage.directory / "record.json").is_file()


def test_a_full_disk_while_writing_a_checkpoint_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeCheckpoints("AVID").save_checkpoint({"global_step": 1}, path)
    # A temporary file in another folder may be on another disk, so the writer must not use one.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    WholeCheckpoints("AVID").save_checkpoint({"global_step": 2}, path)

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("of torch, which hides the disk's")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left on device: .*last\.ckpt"):
        WholeCheckpoints("AVID").save_checkpoint({"global_step": 3}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"global_step": 2, "module": "AVID"}
    assert list(path.parent.iterdir()) == [path]


def test_a_loss_that_is_not_finite_stops_with_step_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AVIDModule.training_step

    def broken(self: AVIDModule, batch: Any, batch_idx: int) -> Any:
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if batch_idx == 1 else loss

    monkeypatch.setattr(AVIDModule, "training_step", broken)
    stage = request("avid/avid", tmp_path)
    with pytest.raises(
        NonFiniteLossError, match=r"not finite at batch 1 .*samples of that batch: \d+, .*non_finite.ckpt"
    ):
        run_stage(stage)
    assert (stage.directory / "checkpoints" / "non_finite.ckpt").is_file()
    assert not (stage.directory / "checkpoints" / "last.ckpt").exists()


AVID = ["fit", "avid/avid", "--scale", "smoke"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*AVID, "--model.out_dim", "0"], "model.out_dim is 0"),
        ([*AVID, "--model.betas", "[2, 3]"], "model.betas is [2, 3]"),
        ([*AVID, "--model.loss.temperature", "hot"], "temperature"),
        ([*AVID, "--model.temperature", "[1"], "--model.temperature [1"),
        ([*AVID, "--model.temperature", "!!set {1}"], "--model.temperature !!set {1}: values must be text, numbers"),
        ([*AVID, "--trainer.devices", "many"], "trainer: `devices`"),
        ([*AVID, "--config", "configs"], "configs: "),
        ([*AVID, "--data.batch_size", "64"], "data.batch_size (64) is larger than the 60 samples"),
        ([*AVID, "--seed_everything", "5"], "--seed"),
        (["test", *AVID[1:], "--checkpoint", "none.ckpt"], "none.ckpt"),
        (["test", *AVID[1:], "--checkpoint", "README.md"], "README.md: "),
    ],
)
def test_the_command_line_names_what_is_wrong(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--runs", str(tmp_path)]) in (1, 2)
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
    assert "Given value" not in error


def test_a_damaged_checkpoint_is_named_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = copied_avid(tmp_path)
    (stage.directory / "record.json").unlink()
    checkpoint = stage.directory / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:20_000])
    with pytest.raises(StageError, match=r"last\.ckpt is damaged .*: delete it"):
        run_stage(stage)
    assert main(["embed", "avid", __file__, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.npz")]) == 2
    assert "last.ckpt" in capsys.readouterr().err
    # A damaged configuration in the same folder is reported as well.
    (stage.directory / "config.yaml").write_text("model: [", encoding="utf-8")
    assert main(["embed", "avid", __file__, "--checkpoint", str(checkpoint), "--output", str(tmp_path / "x.npz")]) == 2
    assert "config.yaml: not valid YAML" in capsys.readouterr().err
    checkpoint.unlink()
    assert run_stage(stage).steps == 4


def test_an_error_of_a_loader_process_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        told = "\nOriginal Traceback (most recent call last):\n  File\ncommon.data.listing.DatasetError: 3 of 4 files"
        raise DatasetError(f"Caught DatasetError in DataLoader worker process 0.{told}\n")

    monkeypatch.setattr(training, "train_and_test", failing)
    assert main(["fit", "avid/avid", "--scale", "smoke", "--runs", str(tmp_path)]) == 1
    assert "assemble: 3 of 4 files" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "saved"), [(signal.SIGTERM, False), (signal.SIGHUP, True)])
def test_a_stopped_stage_says_where_it_resumes(
    number: int, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error after the signal must not count as a failure of the stage."""

    def stopped(stage: StageRequest, *_: Any, **__: Any) -> None:
        if saved:
            (stage.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            (stage.directory / "checkpoints" / "last.ckpt").touch()
        os.kill(os.getpid(), number)
        while STOP.received is None:  # another thread may get the signal
            time.sleep(0.01)
        raise AttributeError("module 'numpy' has no attribute 'void'")

    monkeypatch.setattr(training, "train_and_test", stopped)
    arguments = ["--scale", "smoke", "--runs", str(tmp_path)]
    assert main(["fit", "avid/avid", *arguments]) == 128 + number
    resume, start = (
        "rerun the command to resume from its last checkpoint",
        "no checkpoint was saved yet: rerun the command",
    )
    told = f"avid: stopped by {signal.Signals(number).name}; {resume if saved else start}"
    assert told in capsys.readouterr().out
