"""The metrics of XMC-GAN's miniature are the same over two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from papers.xmc_gan.miniature import MiniatureEvaluation
from tests.distributed.harness import run_distributed
from tests.distributed.test_generation import own_batches
from tests.protocols.test_generation import module
from tests.xmc_gan.test_miniature import Reader, drawn, painted

COUNT = 61


def _metrics(rank: int, world: int, checkpoint: str) -> dict[str, float]:
    truth, others = drawn(COUNT), drawn(COUNT, seed=1)

    class Data:
        attributes = staticmethod({"test": truth}.__getitem__)

        def reference_loader(self) -> Any:
            return [{"image": painted(others[part]), "index": part} for part in own_batches(rank, world, COUNT)]

    evaluation = MiniatureEvaluation(Reader(pretrained=checkpoint), candidates=20)
    evaluation.begin(module(Data(), COUNT))
    for part in own_batches(rank, world, COUNT):
        shown = torch.where(part[:, None] % 3 == 0, others[part], truth[part])
        evaluation.update(painted(shown), {"image": painted(truth[part]), "index": part})
    return evaluation.compute()


def test_the_miniature_over_two_processes(tmp_path: Path) -> None:
    path = tmp_path / "reader.ckpt"
    torch.save({"state_dict": {f"network.{k}": v for k, v in Reader().state_dict().items()}}, path)
    expected = _metrics(0, 1, str(path))
    assert expected["captions"] == COUNT
    assert 30 < expected["mini_r_precision"] < 90
    for found in run_distributed(_metrics, 2, 60, 2, str(path)):
        assert found == pytest.approx(expected, rel=1e-5)
