"""Compare VX2TEXT trained by two processes with one process on the joined batch, and check the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from assemble.stages.request import StageRequest
from papers.vx2text.loss import text_loss
from tests.distributed.harness import run_distributed
from tests.distributed.stages import over, require_close, require_equal, train, train_on_two
from tests.stages import read_metrics, request
from tests.vx2text.stages import WITHOUT_PARENTS, batch_of, started

# No dropout, since each process would drop different units. The number of test samples is odd.
LAYER: dict[str, Any] = {
    "trainer": {
        "max_epochs": 2,
        "limit_train_batches": 3,
        "limit_val_batches": 1.0,
        "check_val_every_n_epoch": 2,
        "log_every_n_steps": 1,
        # In double precision, the order of the terms changes a sum by only 1e-16. In single precision, a gradient that
        # is only rounding error would give a full step, because AdamW divides each gradient by its size.
        "precision": "64-true",
        "gradient_clip_val": None,
    },
    "model": {
        "init_args": {
            "model": {
                "init_args": {
                    "language_model": {"init_args": {"dropout": 0.0}},
                    "audio_classifier": {"init_args": {"encoder": {"init_args": {"dropout": 0.0}}}},
                }
            },
            "learning_rate": 0.01,
            "video_learning_rate": 0.01,
            "audio_learning_rate": 0.01,
        }
    },
    "data": {"init_args": {"world": {"init_args": {"dialogs_test": 9}}, "test_batch_size": 2}},
}


def _request(runs: Path, devices: int) -> StageRequest:
    return request("vx2text/avsd", runs, *WITHOUT_PARENTS, layer=over(LAYER, devices))


def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Use plain SGD without clipping, because AdamW and clipping would hide a gradient that is twice too large.
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)
    stages = _request(tmp_path / "one", 1), _request(tmp_path / "two", 2)
    one, ranks = train(stages[0]), train_on_two(stages[1])
    validated = [read_metrics(stage.directory / "metrics.csv")["val/loss"] for stage in stages]
    assert validated[1] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in validated[0]]
    assert one["metrics"]["test/samples"] == 9
    for rank in ranks:
        require_equal(rank["state"], one["state"], rtol=0, atol=1e-10)
        require_close(rank["metrics"], one["metrics"])


def _validated(module: Any, batches: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the loss and the weight that a process logs for each of its batches."""
    logged: list[tuple[float, float]] = []

    def log(name: str, value: Tensor, batch_size: float, sync_dist: bool) -> None:
        assert name == "val/loss"
        assert sync_dist  # Lightning adds up value x weight and the weights over all processes
        assert isinstance(batch_size, float)  # with integer weights, Lightning rounds the mean
        logged.append((value.item(), batch_size))

    module.log = log
    with torch.no_grad():
        for number, batch in enumerate(batches):
            module.validation_step(batch, number)
    return logged


def test_a_process_with_a_batch_less_is_not_waited_for_in_validation(tmp_path: Path) -> None:
    cli = started("avsd", tmp_path)
    module, batch = cli.model.eval(), batch_of(cli, "valid", 3)
    # The answers have different lengths, so the mean over batches differs from the mean over words.
    batch["labels"][0, 1:] = -100
    ones = [
        {name: value[n : n + 1] if isinstance(value, Tensor | list) else value for name, value in batch.items()}
        for n in range(3)
    ]
    parts = run_distributed(lambda rank: _validated(module, ones[rank::2]), 2)
    assert [len(part) for part in parts] == [2, 1]
    logged = [both for part in parts for both in part]
    (((whole, words),),) = [_validated(module, [batch])]
    assert sum(weight for _, weight in logged) == words
    assert sum(value * weight for value, weight in logged) / words == pytest.approx(whole, rel=1e-5)


def _part_of_loss(rank: int, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    own = logits[rank::2].clone().requires_grad_()
    loss = text_loss(own, labels[rank::2])
    loss.backward()
    assert own.grad is not None
    return loss.detach(), own.grad / 2  # as in data parallelism


# In the second case, one of the two processes has no word to learn from.
@pytest.mark.parametrize("lengths", [(6, 1, 3, 0, 2), (6, 0, 3, 0, 2)])
def test_answers_of_different_lengths_weigh_by_their_words(lengths: tuple[int, ...]) -> None:
    logits = torch.randn(5, 6, 7)
    labels = torch.randint(0, 7, (5, 6))
    for row, words in enumerate(lengths):
        labels[row, words:] = -100
    whole = logits.clone().requires_grad_()
    loss = text_loss(whole, labels)
    loss.backward()
    parts = run_distributed(_part_of_loss, 2, logits, labels)
    assert sum(float(part[0]) for part in parts) / 2 == pytest.approx(loss.item(), rel=1e-5)
    for rank, (_, gradient) in enumerate(parts):
        torch.testing.assert_close(torch.as_tensor(gradient), whole.grad[rank::2])  # type: ignore[index]
