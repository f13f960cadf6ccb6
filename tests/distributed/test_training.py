"""Two processes train AVID to the same weights, banks and normalizer as one process with the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papers.avid_cma.loss import BankLoss
from tests.distributed.stages import over, require_close, require_equal, train, train_on_two
from tests.stages import read_metrics, request


class NormalizedLinear(nn.Module):
    """An encoder with batch statistics: two halves of a batch are the whole if groups are of a fixed size."""

    def __init__(self, channels: int, feature_dim: int = 6) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.linear = nn.Linear(channels * 16, feature_dim)
        self.norm = nn.BatchNorm1d(feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        grid = nn.functional.adaptive_avg_pool2d(x.flatten(1, 2) if x.ndim == 5 else x, 4)
        channels = self.linear.in_features // 16
        return self.norm(torch.tanh(self.linear(grid[:, :channels].flatten(1))))


LAYER: dict[str, Any] = {
    "trainer": {
        "max_epochs": 2,
        "limit_train_batches": 4,
        "log_every_n_steps": 1,
        "limit_val_batches": 1.0,
        "check_val_every_n_epoch": 2,
    },
    # The loss is validated on them: an odd number, one more in one process than in the other.
    "data": {"init_args": {"world": {"init_args": {"pretrain": 61}}}},
    "model": {
        "init_args": {
            "video_encoder": {
                "class_path": "tests.distributed.test_training.NormalizedLinear",
                "init_args": {"channels": 3},
            },
            "audio_encoder": {
                "class_path": "tests.distributed.test_training.NormalizedLinear",
                "init_args": {"channels": 1},
            },
            "learning_rate": 0.01,
        }
    },
}


def _negatives_by_anchor(self: BankLoss, index: Tensor, positives: Tensor, training: bool) -> Tensor:
    """The same negatives for an anchor in whichever process it is."""
    rows = torch.arange(self.negatives)[None] * 7 + index[:, None] * 3 + self.step
    return (index[:, None] + 1 + rows % (self.num_items - 1)) % self.num_items


@pytest.mark.parametrize("group", [4, 8])
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """With batch statistics of four samples, a group for each process, and of all eight, over both."""
    monkeypatch.setattr(BankLoss, "draw_negatives", _negatives_by_anchor)
    shared = ("--batch_norm_group", str(group))
    stages = [
        request("avid/avid_joint", tmp_path / str(devices), *shared, layer=over(LAYER, devices)) for devices in (1, 2)
    ]
    one, ranks = train(stages[0]), train_on_two(stages[1])
    validated = [read_metrics(stage.directory / "metrics.csv")["val/loss"] for stage in stages]
    assert validated[1] == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in validated[0]]
    for rank in ranks:
        # Without the loss of this rank's half.
        require_equal(rank["state"], one["state"], 1e-4, 2e-6, without=("progress.first", "progress.recent"))
    require_close(ranks[0]["metrics"], one["metrics"], without=("test/loss_first", "test/loss_last"))
