"""Compare weights, banks and normalizer of AVID trained by two processes with one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.memory.collective import OverlappedAverage
from papers.avid_cma.loss import BankLoss
from tests.distributed.harness import run_distributed
from tests.distributed.stages import over, require_close, require_equal, train, train_on_two
from tests.stages import read_metrics, request


class NormalizedLinear(nn.Module):
    """An encoder with batch statistics. With groups of a fixed size, two half batches equal the whole batch."""

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
    # The validation loss uses these clips. Their number is odd, so one process has one clip more than the other.
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
    """Return negatives that depend on the anchor only, and not on the process."""
    rows = torch.arange(self.negatives)[None] * 7 + index[:, None] * 3 + self.step
    return (index[:, None] + 1 + rows % (self.num_items - 1)) % self.num_items


@pytest.mark.parametrize("group", [4, 8])
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    """Test batch statistics over four samples (one group per process) and over all eight (both processes)."""
    monkeypatch.setattr(BankLoss, "draw_negatives", _negatives_by_anchor)
    shared = ("--batch_norm_group", str(group))
    stages = [
        request("avid/avid_joint", tmp_path / str(devices), *shared, layer=over(LAYER, devices)) for devices in (1, 2)
    ]
    one, ranks = train(stages[0]), train_on_two(stages[1])
    validated = [read_metrics(stage.directory / "metrics.csv")["val/loss"] for stage in stages]
    assert validated[1] == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in validated[0]]
    for rank in ranks:
        # Each rank logs the losses of its half of the batch.
        require_equal(rank["state"], one["state"], 1e-4, 2e-6, without=("progress.first", "progress.recent"))
    require_close(ranks[0]["metrics"], one["metrics"], without=("test/loss_first", "test/loss_last"))


#: For each pass: its kind, a layer that rank 1 doesn't use, and whether the gradients are averaged after the pass.
PASSES = [
    ("a", None, True), ("b", None, False), ("a", None, True), ("b", None, True), ("b", "2", True), ("a", "1", True),
]  # fmt: skip


def _passes(rank: int, alone: bool) -> list[tuple[list[str], dict[str, Tensor]]]:
    """Return events and gradients of every averaged pass through four layers and one of two heads."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(5, 5, bias=False, dtype=torch.float64) for name in [*"0123", "a", "b"]})
    parameters, averages = list(layers.parameters()), OverlappedAverage(bucket_bytes=2 * 25 * 8)
    events: list[str] = []
    for name, layer in layers.items():
        layer.weight.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    send = dist.all_reduce

    def noted(tensor: Tensor, **options: Any) -> Any:
        events.append(f"send {len(tensor) // 25}")
        return send(tensor, **options)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        for number, (kind, lacking, ends) in enumerate(PASSES):
            x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * number + rank))
            for name in [*"0123", kind]:
                if not (rank and name == lacking):
                    x = torch.tanh(layers[name](x))
            if alone or not ends:
                x.sum().backward()
            else:
                with averages.of(parameters, kind):
                    x.sum().backward()
            if ends:
                gradients = {n: p.grad.clone() for n, p in layers.named_parameters() if p.grad is not None}
                results.append((events[:], gradients))
                layers.zero_grad()
                events.clear()
    return results


def test_gradients_are_sent_once_each_while_the_backward_pass_runs() -> None:
    alone = [_passes(rank, alone=True) for rank in range(2)]
    ranks = run_distributed(lambda rank: _passes(rank, alone=False))
    for number, results in enumerate(zip(*alone)):
        for rank in ranks:
            events, averaged = rank[number]
            names = {name for _, gradients in results for name in gradients}
            assert averaged.keys() == names
            for name in names:
                mean = sum(gradients.get(name, torch.zeros(5, 5)) for _, gradients in results) / 2
                torch.testing.assert_close(torch.as_tensor(averaged[name]), mean, rtol=0, atol=1e-15)
            assert sum(int(event[5:]) for event in events if "send" in event) == len(names)  # no gradient is sent twice
    first, accumulated, overlapped, lacking, _ = (events for events, _ in ranks[0])
    assert first == ["a", "3", "2", "1", "0", "send 5"]  # the pass that records the order
    assert accumulated == ["b", "3", "2", "1", "0", "a", "3", "send 2", "2", "1", "send 2", "0", "send 1", "send 1"]
    assert overlapped == ["b", "3", "2", "1", "0", "send 5"]
    assert lacking == ["b", "3", "send 2", "2", "1", "send 2", "0", "send 1"]
    # A gradient that never comes delays its own bucket and all later buckets, which keep their order.
    assert ranks[1][3][0] == ["b", "3", "send 2", "1", "0", "send 2", "send 1"]
