"""Compare the metrics of generated images with one and two processes, and with uneven numbers of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.metrics.generation import FeatureStatistics
from common.protocols.generation import NETWORKS, GenerationEvaluation
from papers.xmc_gan.miniature import MiniatureEvaluation
from tests.distributed.harness import run_distributed
from tests.protocols.test_generation import IMAGES, REAL, TINY, Real, TinyData, module
from tests.xmc_gan.test_miniature import Reader, drawn, painted


def own_batches(rank: int, world: int, count: int) -> list[torch.Tensor]:
    """Return the batches of a process, distributed as by the suite's data loaders."""
    return list(torch.tensor(list(range(rank, count, world))).split(8))


def _metrics(rank: int, world: int, folder: str) -> dict[str, float]:
    import os

    os.environ["ASSEMBLE_CACHE"] = f"{folder}/cache-of-{world}"
    NETWORKS.update({name: NETWORKS[name]._replace(build=kind) for name, kind in TINY.items()})

    class Part(TinyData):
        def reference_loader(self) -> Any:
            class Loader(list):
                dataset = Real()

            return Loader({"image": REAL[part], "index": part} for part in own_batches(rank, world, len(REAL)))

    files = {name: f"{folder}/{name}.pth" for name in TINY}
    evaluation = GenerationEvaluation(**files, repeats=2, folds=4, candidates=20, object_copies=0)
    maker = module(Part(), len(IMAGES))
    maker.trainer.is_global_zero = rank == 0
    evaluation.begin(maker)
    for repeat, images in enumerate((IMAGES, IMAGES.flip(0))):
        for part in own_batches(rank, world, len(IMAGES)):
            evaluation.update(images[part], {"index": part, "caption": part}, repeat)
    return evaluation.compute()


def test_the_metrics_over_two_processes(tmp_path: Path) -> None:
    for name in TINY:
        (tmp_path / f"{name}.pth").write_bytes(b"weights")
    expected, *others = run_distributed(_metrics, 1, 1, str(tmp_path))
    assert set(expected) >= {"fid", "fid_tv", "inception_score", "r_precision", "soa_c", "soa_i", "fid_spread"}
    assert not others
    for found in run_distributed(_metrics, 2, 2, str(tmp_path)):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert len(list((tmp_path / "cache-of-2" / "generation").iterdir())) == 2


COUNT = 61


def _miniature(rank: int, world: int, checkpoint: str) -> dict[str, float]:
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
    expected = _miniature(0, 1, str(path))
    assert expected["captions"] == COUNT
    assert 30 < expected["mini_r_precision"] < 90
    for found in run_distributed(_miniature, 2, 2, str(path)):
        assert found == pytest.approx(expected, rel=1e-5)


def _same_sample_twice(rank: int) -> str:
    statistics = FeatureStatistics()
    own = torch.tensor([rank, 2, 3 + rank])
    statistics.update(own, torch.ones(3, 5))
    try:
        statistics.compute()
    except ValueError as error:
        return str(error)
    return ""


def test_a_sample_of_two_processes_is_refused() -> None:
    for message in run_distributed(_same_sample_twice):
        assert message.startswith("two processes counted the same 1 samples")
