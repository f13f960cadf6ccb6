"""Compare M3P trained by two processes with one process on the joined batch, and score each pair once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from assemble.stages.request import StageRequest
from tests.distributed.stages import over, require_close, require_equal, train, train_on_two
from tests.m3p.stages import stage

# No dropout, since each process would drop different units.
MODEL = {
    "init_args": {
        "model": {"init_args": {"encoder": {"init_args": {"dropout": 0.0, "attention_dropout": 0.0}}}},
        "clip_norm": None,
    }
}
# In double precision, the order of the terms changes a sum by only 1e-16.
TRAINER = {"max_epochs": 1, "log_every_n_steps": 1, "precision": "64-true"}
LAYERS: dict[str, dict[str, Any]] = {
    "m3p": {
        "trainer": {**TRAINER, "limit_train_batches": 4},
        "model": MODEL,
        "data": {"init_args": {"steps_per_epoch": 4, "test_sets": ["multi30k_fr", "stair_ja"], "test_batch_size": 3}},
    },
    "fine_tune": {
        "trainer": {**TRAINER, "limit_train_batches": 3},
        "model": MODEL,
        "data": {
            "init_args": {
                "train_sets": ["multi30k_en", "multi30k_de"],
                "test_sets": ["multi30k_de"],
                "test_batch_size": 3,
            }
        },
    },
}


def _request(recipe: str, runs: Path, devices: int) -> StageRequest:
    return stage(recipe, runs, layer=over(LAYERS[recipe], devices))


def _plain_steps(module: pl.LightningModule, learning_rate: float, warmup_steps: int) -> Any:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("recipe", ["m3p", "fine_tune"])
def test_two_processes_equal_one(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Use plain SGD without clipping, because Adam and clipping would hide a gradient that is twice too large.
    monkeypatch.setattr("papers.m3p.module.adam", _plain_steps)
    one = train(_request(recipe, tmp_path / "one", 1))
    ranks = train_on_two(_request(recipe, tmp_path / "two", 2))
    for rank in ranks:
        require_equal(rank["state"], one["state"], rtol=0, atol=1e-9)
        require_close(rank["metrics"], one["metrics"])
