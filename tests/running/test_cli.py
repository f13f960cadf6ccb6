"""What the merged configuration becomes in Lightning's hands."""

from __future__ import annotations

from pathlib import Path

from common.stages.cli import build
from common.stages.configuration import resolve


def test_one_batch_is_not_a_whole_epoch(tmp_path: Path) -> None:
    run = resolve("mct", "moco_v2", scale="smoke", arguments=["--trainer.limit_train_batches", "1"])
    config = run.with_placeholders(DATA=str(tmp_path), RUN=str(tmp_path))
    config["trainer"]["limit_test_batches"] = 0.5
    cli = build(run, config, {"default_root_dir": str(tmp_path), "logger": False})
    assert cli.trainer.limit_train_batches == 1
    assert isinstance(cli.trainer.limit_train_batches, int)
    assert cli.trainer.limit_test_batches == 0.5
    resolved = cli.resolved()["trainer"]
    assert repr(resolved["limit_train_batches"]) == "1"
    assert resolved["limit_test_batches"] == 0.5
