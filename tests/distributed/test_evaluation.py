"""Check that an evaluation with two processes counts every sample once and equals the evaluation with one."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from common.metrics.gathering import OncePerSample, RowsOncePerSample, gather_rows
from common.protocols.classification import (
    ActionRecognition,
    LinearClassification,
    LinearProbes,
    MultiLabelTagging,
    SupervisedClassification,
)
from tests.distributed.harness import run_distributed
from tests.protocols.parts import (
    CLASSES,
    SameOnAll,
    distributed_trainer,
    image_encoder,
    loader,
    pictures,
    results_of,
    trainer,
    video_encoder,
    videos,
)


def gather_uneven(rank: int) -> Any:
    none_here = torch.zeros(0, 2) if rank == 0 else torch.full((3, 2), 5.0)
    return [
        gather_rows(torch.arange(rank + 1) + 10 * rank).tolist(),
        gather_rows(none_here).tolist(),
    ]


def mean_of_uneven(rank: int) -> Any:
    meter, silent = OncePerSample("score"), OncePerSample("score")
    # A distributed sampler deals out seven samples in turns, and repeats the first sample to fill up.
    index = torch.tensor([[0, 2, 4, 6], [1, 3, 5, 0]][rank])
    for start in (0, 2):
        part = index[start : start + 2]
        meter.update(part, score=part.float())
        if rank == 1:
            silent.update(part, score=part.float())
    mean, late = meter.compute(), silent.compute("cpu")
    return [mean["count"].item(), mean["score"].item(), late["count"].item(), late["score"].item()]


def test_rows_of_uneven_processes_are_joined_in_rank_order() -> None:
    for joined, of_one in run_distributed(gather_uneven):
        assert joined == [0, 10, 11]
        assert of_one == [[5.0, 5.0]] * 3


def rows_of_the_second(rank: int) -> Any:
    table = RowsOncePerSample("pair")
    if rank == 1:
        table.update(torch.tensor([5, 3]), pair=torch.tensor([[5, -5], [3, -3]]).half())
    index, rows = table.compute()
    return index.tolist(), str(rows["pair"].dtype), rows["pair"].tolist()


def test_a_process_without_samples_gets_the_rows_of_the_others() -> None:
    for found in run_distributed(rows_of_the_second):
        assert found == [[3, 5], "torch.float16", [[3, -3], [5, -5]]]


def test_odd_number_of_samples_is_counted_exactly_once() -> None:
    for result in run_distributed(mean_of_uneven):
        assert result == [7, 3.0, 4, pytest.approx(9 / 4)]


def test_fine_tuning_is_trained_and_tested_alike(tmp_path: Path) -> None:
    module = ActionRecognition(video_encoder(), CLASSES, warmup_epochs=1, learning_rate=1e-2)
    distributed_trainer(tmp_path, max_epochs=2, callbacks=[SameOnAll()]).fit(module, loader(videos(8), 2))
    loaders = [loader(videos(7, clips=2), 2), loader(videos(7, clips=3), 2)]
    one = results_of(trainer(tmp_path), module, loaders)
    two = results_of(distributed_trainer(tmp_path), module, loaders)
    assert one["test/videos"] == 7
    assert two == pytest.approx(one)


def probes() -> tuple[pl.LightningModule, Any]:
    return LinearProbes(video_encoder(), CLASSES, layers={"conv2x": 2, "conv5x": 1}), loader(videos(9, clips=2), 2)


def linear() -> tuple[pl.LightningModule, Any]:
    module = LinearClassification(image_encoder(), CLASSES, learning_rates=[0.1, 1.0, 10.0])
    return module, [loader(pictures(5), 2), loader(pictures(9, 1), 2)]


def supervised() -> tuple[pl.LightningModule, Any]:
    return SupervisedClassification(image_encoder(), CLASSES), loader(pictures(9), 2)


def tagging() -> tuple[pl.LightningModule, Any]:
    return MultiLabelTagging(image_encoder(), CLASSES), loader(pictures(9, tags=True), 2)


@pytest.mark.parametrize("protocol", [probes, linear, supervised, tagging])
def test_protocols_are_tested_alike(protocol: Any, tmp_path: Path) -> None:
    one, two = (results_of(start(tmp_path), *protocol()) for start in (trainer, distributed_trainer))
    assert one.get("test/images", one.get("test/videos")) == 9
    assert two == pytest.approx(one)


def test_linear_classifiers_are_trained_alike(tmp_path: Path) -> None:
    module = LinearClassification(image_encoder(), CLASSES, learning_rates=[0.1, 3e38])
    run = distributed_trainer(tmp_path, max_epochs=2, callbacks=[SameOnAll()])
    run.fit(module, loader(pictures(8), 2))
