"""Linear support vector machines on the features of a frozen encoder. There is no training loop, only a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.metrics.gathering import RowsOncePerSample
from common.metrics.linear_svm import classify_windowed, evaluate_class
from common.protocols.base import (
    Batch,
    EncoderModule,
    check_num_classes,
    log_results,
    mean_average_precision,
    required,
)
from common.protocols.classification import of_stages, stage_channels
from common.types import AtLeastTwo, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class FeatureSVM(EncoderModule):
    """Base of the SVM protocols: a frozen encoder on one device. The CPU fits `jobs` SVMs in parallel."""

    def __init__(self, encoder: nn.Module, **kwargs: Any) -> None:
        super().__init__(encoder, frozen=True, **kwargs)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(
                f"trainer.devices: {type(self).__name__} runs on one device, got {self.trainer.world_size}; set "
                "trainer.devices and trainer.num_nodes to 1, and model.jobs to the number of parallel fits"
            )
        if self.pretrained is not None:
            self.load_pretrained(self.pretrained)


class SoundSVM(FeatureSVM):
    """Linear SVMs on the stages of an audio encoder, for files of several windows each.

    The test takes two loaders: augmented windows for training, and regular windows for testing. With several `folds`,
    both loaders hold all files. Each fold is tested with an SVM trained on the other folds, and the result is the mean
    over folds. With one fold, the loaders hold different files. Logs `test/<stage>_top1`, and the maximum
    `test/best_top1`. Every file counts once.

    The features of a stage and loader take `files * windows * dims * 4` bytes of memory. For ESC-50 at full size, that
    is 2,000 * 10 * 9,216 * 4 = 737 MB, and 5.6 GB for all stages and loaders. A fit takes about seven times the size of
    the training features, because float64 values are stored with indices.

    Args:
        audio_encoder: encoder with `forward_stages` and `stage_channels`.
        layers: maps stages to the side of the grid to average to.
        C: weight of errors in the SVM: 10 for ESC-50, 1 for DCASE.
        folds: 5 for ESC-50; 1 for a fixed division into training and test files.
        standardize_epsilon: added to the standard deviation of every feature.

    Shapes:
        Batch: `audio` [B, windows, 1, T, F], `label` [B], `index` [B], and `fold` [B] if there are folds.

    Source: docs/papers/avid_cma.md [10.3].
    """

    def __init__(
        self,
        audio_encoder: nn.Module,
        layers: dict[str, PositiveInt],
        C: PositiveFloat = 10.0,
        folds: PositiveInt = 5,
        standardize_epsilon: PositiveFloat = 0.01,
        tolerance: PositiveFloat = 1e-4,
        max_iterations: PositiveInt = 200,
        random_state: NonNegativeInt = 0,
        jobs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(audio_encoder, **kwargs)
        stage_channels(audio_encoder, layers)
        self.layers, self.folds, self.jobs = dict(layers), folds, jobs
        self.standardize_epsilon = standardize_epsilon
        options = {"C": C, "loss": "hinge", "tol": tolerance, "max_iter": max_iterations, "random_state": random_state}
        self.options: dict[str, Any] = options

    def setup(self, stage: str) -> None:
        check_num_classes(self)
        listing = getattr(getattr(self.trainer, "datamodule", None), "listing", None)
        if listing is not None and self.folds > 1:
            folds = np.unique(listing.numbers["fold"])
            if len(folds) != self.folds:
                raise ValueError(f"folds: {self.folds} expected, but the files belong to folds {folds.tolist()}")
        super().setup(stage)

    def forward(self, audio: Tensor) -> dict[str, Tensor]:
        """Compute each stage's features [B, channels * side * side] of spectrograms [B, 1, T, F]."""
        stages = self.encoder.forward_stages(audio)  # type: ignore[operator]
        return {
            layer: F.adaptive_avg_pool2d(stages[layer].float(), size).flatten(1) for layer, size in self.layers.items()
        }

    def on_test_epoch_start(self) -> None:
        names = ("features", "label", "fold")
        self.tables = [{layer: RowsOncePerSample(*names) for layer in self.layers} for _ in range(2)]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        audio, index, label = batch["audio"], batch["index"].cpu(), batch["label"].cpu()
        fold = batch["fold"].cpu() if self.folds > 1 else torch.zeros_like(label)
        for layer, rows in self(audio.flatten(0, 1)).items():
            features = rows.unflatten(0, audio.shape[:2]).cpu()
            self.tables[dataloader_idx][layer].update(index, features=features, label=label, fold=fold)

    def on_test_epoch_end(self) -> None:
        from sklearn.utils.parallel import Parallel, delayed  # here, because it slows planning

        # `pop` drops the batches of a stage before those of the next stage are joined.
        train, test = ({layer: table.pop(layer).compute()[1] for layer in self.layers} for table in self.tables)
        layer = next(iter(self.layers))  # all stages have the same files
        label, fold = (train[layer][name].numpy() for name in ("label", "fold"))
        test_label, test_fold = (test[layer][name].numpy() for name in ("label", "fold"))
        tasks = [(layer, number) for layer in self.layers for number in np.unique(fold)]
        guesses = Parallel(n_jobs=self.jobs)(
            delayed(classify_windowed)(
                train[layer]["features"].numpy(),
                test[layer]["features"].numpy(),
                label,
                train_mask=fold != number if self.folds > 1 else np.ones(len(fold), dtype=bool),
                test_mask=test_fold == number,
                standardize_epsilon=self.standardize_epsilon,
                options=self.options,
            )
            for layer, number in tasks
        )
        right: dict[str, list[float]] = {layer: [] for layer in self.layers}
        for (layer, number), guess in zip(tasks, guesses):
            right[layer].append(100 * float(np.mean(guess == test_label[test_fold == number])))
        results = of_stages({layer: torch.tensor(np.mean(values)) for layer, values in right.items()})
        results["files"] = torch.tensor(float(len(test_label)))
        log_results(self, {f"test/{name}": value for name, value in results.items()})


class MultiLabelSVM(FeatureSVM):
    """Linear SVMs on the features of an image encoder, one per class, for images with several labels.

    The test takes two loaders: images for training, and images for testing. Logs `test/map` over the measured classes,
    their number as `test/classes`, how many classes chose each C (`test/classes_with_C_<C>`), and `test/images`.
    `media/average_precision.csv` lists every class. Every image counts once. Features take `images * dims * 4` bytes of
    memory (VOC07: 9,963 * 2,048 * 4 = 82 MB). A fit takes twice the size of the training features.

    Args:
        image_encoder: encoder with `forward_map`.
        pool: side of the grid to which the last feature map is averaged. VirTex v0.9 uses 2 (8192 features).
        costs, folds: values of C to choose from, and number of folds of the cross-validation.
        positive_weight: weight of a positive sample, relative to a negative one.

    Shapes:
        Batch: `image` [B, 3, H, W], `labels` [B, C] of 1 (present), 0 (absent) and -1 (difficult), `index` [B].

    Source: docs/papers/mct.md [9], VOC07 linear SVM.
    """

    test_loaders = ("images to learn from", "test images")

    def __init__(
        self,
        image_encoder: nn.Module,
        pool: Literal[1, 2] = 1,
        costs: Sequence[PositiveFloat] = (0.01, 0.1, 1.0, 10.0),
        folds: AtLeastTwo = 3,
        positive_weight: NonNegativeFloat = 2.0,
        max_iterations: PositiveInt = 2000,
        random_state: NonNegativeInt = 0,
        jobs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_encoder, **kwargs)
        required(image_encoder, "forward_map")
        self.pool, self.jobs = pool, jobs
        self.options: dict[str, Any] = {
            "costs": costs, "folds": folds, "positive_weight": positive_weight, "max_iterations": max_iterations,
            "random_state": random_state,
        }  # fmt: skip

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute features of unit length [B, channels * pool * pool] of images [B, 3, H, W], in float32."""
        feature_map = self.encoder.forward_map(images)  # type: ignore[operator]
        channels = getattr(self.encoder, "num_features", feature_map.shape[1])  # timm's networks have it
        if feature_map.ndim != 4 or feature_map.shape[1] != channels:
            raise ValueError("model.image_encoder: the SVM pools a map [B, C, h, w]: use a convolutional network")
        return F.normalize(F.adaptive_avg_pool2d(feature_map.float(), self.pool).flatten(1))

    def on_test_epoch_start(self) -> None:
        self.tables = [RowsOncePerSample("features", "labels") for _ in range(2)]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        labels = batch["labels"].to(torch.int8)
        self.tables[dataloader_idx].update(batch["index"], features=self(batch["image"]), labels=labels)

    def on_test_epoch_end(self) -> None:
        from sklearn.utils.parallel import Parallel, delayed  # here, because it slows planning

        train, test = (
            {name: rows.cpu().numpy() for name, rows in table.compute(self.device)[1].items()} for table in self.tables
        )
        self.tables = []
        classes = train["labels"].shape[1]
        if test["labels"].shape[1] != classes:
            raise ValueError(f"labels: {classes} classes in training, but {test['labels'].shape[1]} in the test")
        verdicts = Parallel(n_jobs=self.jobs)(
            delayed(evaluate_class)(
                train["features"], train["labels"][:, c], test["features"], test["labels"][:, c], **self.options
            )
            for c in range(classes)
        )
        average = np.array([verdict.average_precision for verdict in verdicts])
        details = [{"C": None if v.left_out else v.cost, "left_out": v.left_out} for v in verdicts]
        metrics = mean_average_precision(self, average, details)
        chosen = Counter(verdict.cost for verdict in verdicts if not verdict.left_out)
        for cost in self.options["costs"]:
            metrics[f"test/classes_with_C_{cost:g}"] = torch.tensor(float(chosen[float(cost)]))
        log_results(self, {**metrics, "test/images": torch.tensor(float(len(test["labels"])))})
