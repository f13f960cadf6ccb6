"""Test linear SVMs on frozen features of tiny synthetic data sets."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from common.metrics.linear_svm import evaluate_class
from common.protocols.svm import MultiLabelSVM, SoundSVM
from tests.protocols.parts import (
    CLASSES,
    Samples,
    audio_encoder,
    average_precisions_of,
    distributed_trainer,
    image_encoder,
    loader,
    pictures,
    relabeled,
    results_of,
    sounds,
    trainer,
)


def plain_svm(module: SoundSVM, layer: str, train: Samples, test: Samples, folds: list[int]) -> float:
    """Compute the protocol of docs/papers/avid_cma.md [10.3] in float64 without saving memory."""

    def features(item: dict[str, Tensor]) -> np.ndarray:
        with torch.no_grad():
            maps = module.encoder.forward_stages(item["audio"])[layer]  # type: ignore[operator]
        size = module.layers[layer]
        return nn.functional.adaptive_avg_pool2d(maps, size).flatten(1).double().numpy()

    accuracies = []
    for fold in folds:
        learn = [item for item in train if len(folds) == 1 or item["fold"] != fold]
        judge = [item for item in test if len(folds) == 1 or item["fold"] == fold]
        x = np.concatenate([features(item) for item in learn])
        y = np.concatenate([[int(item["label"])] * len(item["audio"]) for item in learn])
        mean, std = x.mean(0), x.std(0) + 0.01
        machine = LinearSVC(
            C=module.options["C"], loss="hinge", tol=1e-4, max_iter=200, intercept_scaling=1, random_state=0
        )
        machine.fit((x - mean) / std, y)
        right = [
            machine.decision_function((features(item) - mean) / std).mean(0).argmax() == item["label"] for item in judge
        ]
        accuracies.append(100 * float(np.mean(right)))
    return float(np.mean(accuracies))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
class TestSoundSVM:
    layers = {"conv5x": 2, "conv2x": 3}  # noqa: RUF012

    def test_five_folds(self, tmp_path: Path) -> None:
        module = SoundSVM(audio_encoder(), layers=self.layers)
        train, test = sounds(30, 2, 5, noise=1), sounds(30, 3, 5, noise=2)
        metrics = results_of(trainer(tmp_path), module, [loader(train, 4), loader(test, 7)])
        for layer in self.layers:
            expected = plain_svm(module.eval(), layer, train, test, [1, 2, 3, 4, 5])
            assert metrics[f"test/{layer}_top1"] == pytest.approx(expected, abs=1e-4)
        assert metrics["test/best_top1"] == max(metrics[f"test/{layer}_top1"] for layer in self.layers)
        assert metrics["test/files"] == 30
        assert metrics["test/best_top1"] > 60

    def test_fixed_lists(self, tmp_path: Path) -> None:
        module = SoundSVM(audio_encoder(), layers=self.layers, C=1.0, folds=1)
        train, test = sounds(21, 2, 1, noise=1), sounds(9, 3, 1, noise=2)
        metrics = results_of(trainer(tmp_path), module, [loader(train), loader(test)])
        assert metrics["test/files"] == 9
        expected = plain_svm(module.eval(), "conv5x", train, test, [1])
        assert metrics["test/conv5x_top1"] == pytest.approx(expected, abs=1e-4)
        with pytest.raises(ValueError, match="layers"):
            SoundSVM(audio_encoder(), {"absent": 1})

    def test_order_repeated_files_and_several_processes_change_nothing(self, tmp_path: Path) -> None:
        module, parallel = (SoundSVM(audio_encoder(), layers=self.layers, folds=2, jobs=jobs) for jobs in (1, 2))
        train, test = sounds(24, 2, 2, noise=1), sounds(24, 2, 2, noise=2)
        once = results_of(trainer(tmp_path), module, [loader(train), loader(test)])
        order = [*torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist(), 3, 3, 17]
        mixed = [loader(torch.utils.data.Subset(part, order)) for part in (train, test)]
        repeated = results_of(trainer(tmp_path), parallel, mixed)
        assert repeated == once


class TestMultiLabelSVM:
    @pytest.mark.parametrize("pool", [1, 2])
    def test_equals_the_protocol_written_plainly(self, tmp_path: Path, pretrained: str, pool: Any) -> None:
        labels = torch.stack([one["labels"] for one in pictures(40, tags=True)])
        labels[::7, 0] = -1
        train = relabeled(pictures(40, 1, tags=True), labels)
        test = relabeled(pictures(23, 2, tags=True), labels[:23])
        module = MultiLabelSVM(image_encoder(), pretrained=pretrained, pool=pool, costs=[0.1, 1])
        metrics = results_of(trainer(tmp_path), module, [loader(train, 7), loader(test, 5)])

        def features(part: list[dict[str, Tensor]]) -> np.ndarray:
            with torch.no_grad():
                maps = image_encoder(7).eval().forward_map(torch.stack([item["image"] for item in part]))
                rows = nn.functional.adaptive_avg_pool2d(maps, pool).flatten(1)
            return nn.functional.normalize(rows).numpy()

        verdicts = [
            evaluate_class(features(train), labels.numpy()[:, c], features(test), labels[:23].numpy()[:, c], [0.1, 1])
            for c in range(CLASSES)
        ]
        average = [100 * verdict.average_precision for verdict in verdicts]
        assert metrics["test/map"] == pytest.approx(np.mean(average), abs=1e-3)
        assert metrics["test/classes"] == CLASSES
        assert metrics["test/images"] == 23
        for cost in (0.1, 1):
            chosen = sum(verdict.cost == cost for verdict in verdicts)
            assert metrics[f"test/classes_with_C_{cost}"] == chosen
        listed = average_precisions_of(tmp_path)
        assert [entry["average_precision"] for entry in listed] == pytest.approx(average, abs=1e-3)
        assert [entry["C"] for entry in listed] == [verdict.cost for verdict in verdicts]

    def test_classes_that_cannot_be_judged_are_left_out_and_named(self, tmp_path: Path) -> None:
        labels = torch.stack([one["labels"] for one in pictures(24, tags=True)])
        train, test = labels.clone(), labels.clone()
        train[:, 0] = 0  # training has no example
        test[:, 1] = torch.where(test[:, 1] == 1, -1, 0)  # the test has only difficult examples
        loaders = [loader(relabeled(pictures(24, n, tags=True), part)) for n, part in enumerate((train, test))]

        class Data(pl.LightningDataModule):
            class_names = ("cat", "dog", "cow")

            def test_dataloader(self) -> Any:
                return loaders

        module = MultiLabelSVM(image_encoder())
        with pytest.warns(UserWarning, match=r"cat: .*dog: "):
            metrics = results_of(trainer(tmp_path), module, Data())
        assert metrics["test/classes"] == 1
        listed = average_precisions_of(tmp_path)
        assert [entry["class"] for entry in listed] == ["cat", "dog", "cow"]
        assert [entry["average_precision"] for entry in listed] == [None, None, pytest.approx(metrics["test/map"])]
        assert listed[1]["left_out"] == "no positive test sample"
        assert listed[1]["C"] is None


def test_several_devices_are_refused(tmp_path: Path) -> None:
    module = SoundSVM(audio_encoder(), {"conv5x": 2}, folds=1)
    run = distributed_trainer(tmp_path)
    with pytest.raises(Exception, match=r"trainer\.devices"):
        run.test(module, [loader(sounds(6, 1, 1, noise)) for noise in (1, 2)], verbose=False)
