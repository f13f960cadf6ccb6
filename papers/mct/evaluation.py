"""Downstream protocols: linear and supervised classification, multi-label classification, cross-modal search.

All of them but the supervised baseline leave the image encoder as it is. Detection is in ``detection.py``.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Self

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.utils.parallel import Parallel, delayed
from torch import Tensor, nn

from common.data.text import text_numbers
from common.files import write_atomically
from common.losses.margin import in_batch_hinge
from common.memory.collective import all_gather_concat, is_distributed, rank, world_size
from common.metrics.average_precision import average_precisions
from common.metrics.classification import hits
from common.metrics.gathering import OncePerSample, RowsOncePerSample
from common.metrics.linear_svm import ClassVerdict, judge_class
from common.metrics.retrieval import caption_retrieval, owner_rows
from common.training.optimisers import warm_up_then_cosine
from papers.mct.weights import load_into_encoder

Batch = dict[str, Tensor]
Schedule = Literal["steps", "cosine"]


class FrozenEncoderModule(pl.LightningModule):
    """What the protocols on frozen features share: an encoder that nothing changes, which is checked after training.

    Args:
        image_encoder: Encoder with ``feature_dim`` features.
        pretrained: Checkpoint with the pre-trained encoder; None judges the initial weights.
    """

    def __init__(self, image_encoder: nn.Module, pretrained: str | None) -> None:
        super().__init__()
        self.image_encoder = image_encoder.requires_grad_(False)
        self.pretrained = pretrained
        self._frozen: dict[str, Tensor] | None = None

    def setup(self, stage: str) -> None:
        """Before training only, load the pre-trained encoder."""
        if stage == "fit":
            self._frozen = None
            if self.pretrained is not None:
                self.load_pretrained(self.pretrained)
                # Kept before a resumed run restores its own copy, which must be the same.
                self._frozen = self._frozen_state()

    def load_pretrained(self, path: str) -> None:
        """Load what is judged from a checkpoint."""
        load_into_encoder(self.image_encoder, path, field="model.pretrained")

    def frozen(self) -> dict[str, nn.Module]:
        """The encoders that are left as they are, by name."""
        return {"image_encoder": self.image_encoder}

    def _frozen_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value.detach().cpu().clone()
            for name, encoder in self.frozen().items()
            for key, value in encoder.state_dict().items()
        }

    def train(self, mode: bool = True) -> Self:
        """Switch the mode of everything but the encoder: its batch normalisation never learns statistics."""
        super().train(mode)
        for encoder in self.frozen().values():
            encoder.eval()
        return self

    def on_train_start(self) -> None:
        """Freeze the statistics of the encoder, too, and remember its weights."""
        self.train()
        self._frozen = self._frozen or self._frozen_state()

    def on_train_end(self) -> None:
        """Make sure that the encoder is what it was.

        Raises:
            RuntimeError: A weight or a buffer of the encoder changed.
        """
        assert self._frozen is not None
        changed = [
            name
            for name, value in self._frozen_state().items()
            # Half precision rounds the weights once, when training starts.
            if not _same(value, self._frozen[name].to(value.dtype))
        ]
        if changed:
            raise RuntimeError(
                f"{len(changed)} tensors of a frozen encoder changed, the first is {changed[0]}; "
                "the result would not be that of the pre-trained encoder. Does a callback train it or put it into "
                "training mode?"
            )

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features [B, feature_dim] of images [B, 3, H, W]."""
        return self.image_encoder(images)


class LinearClassification(FrozenEncoderModule):
    """A linear classifier on frozen features, one for every learning rate of a sweep, trained side by side.

    How well a learning rate works depends on the scale of the features, which differs a hundredfold between methods.
    ``trainer.test`` takes two loaders: images held out from the training set, seen as in the test, choose the learning
    rate, and the test images judge it; training needs no validation loop. Logged are ``test/top1`` and ``test/top5``
    of the chosen one, the choice itself as ``test/learning_rate``, and for every rate ``test/top1_lr_<rate>`` and
    ``test/validation_top1_lr_<rate>``. Of equally good rates the first is chosen, and never one with scores that are
    not finite. A rate that diverges in training is left out of the steps where it does, and the others do not notice.

    Args:
        image_encoder: Encoder with ``feature_dim`` features; its weights are replaced by those of ``pretrained``.
        num_classes: Number of classes.
        pretrained: Checkpoint with the pre-trained encoder; None probes the initial weights.
        learning_rates: Of SGD, one classifier for each.
        momentum: Of SGD.
        weight_decay: L2 in the gradient.
        schedule: The learning rates fall in ``steps`` at the milestones, or along a ``cosine`` over the whole training.
        milestones: Epochs at which the learning rates fall.
        gamma: Factor of the learning rates at every milestone.
        normalise_features: ``none``, the protocol; ``l2`` for unit length; ``batch_norm`` to standardise every feature
            over the training set, without learnt parameters.

    Shapes:
        Batch: ``image`` [B, 3, H, W], ``label`` [B], ``index`` [B].

    Raises:
        ValueError: In the constructor for a setting of no use; in the test when there are not two loaders, or every
            learning rate diverged.

    Source: specification 9, ImageNet linear, and 12.4.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        num_classes: int,
        pretrained: str | None = None,
        learning_rates: Sequence[float] = (0.3, 3.0, 30.0),
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Schedule = "steps",
        milestones: Sequence[int] = (60, 80),
        gamma: float = 0.1,
        normalise_features: Literal["none", "l2", "batch_norm"] = "none",
    ) -> None:
        super().__init__(image_encoder, pretrained)
        self.save_hyperparameters(ignore=["image_encoder"], logger=False)
        self.rates = {f"{rate:g}": float(rate) for rate in learning_rates}
        if len(self.rates) != len(learning_rates) or not self.rates or min(self.rates.values()) <= 0:
            raise ValueError(f"learning_rates: expected different positive values, got {list(learning_rates)}")
        width = int(image_encoder.feature_dim)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm1d(width, affine=False) if normalise_features == "batch_norm" else nn.Identity()
        self.classifiers = nn.ModuleList(_linear(width, num_classes) for _ in self.rates)
        self.validation_meter = OncePerSample(*(f"{kind} {rate}" for rate in self.rates for kind in ("top1", "finite")))
        self.test_meter = OncePerSample(*(f"{kind} {rate}" for rate in self.rates for kind in ("top1", "top5")))

    def setup(self, stage: str) -> None:
        """Check the classes and, before training only, load the pre-trained encoder."""
        _check_num_classes(self.trainer, self.hparams["num_classes"])
        super().setup(stage)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [rates, B, num_classes] of images [B, 3, H, W], at full precision also under autocast."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.classifiers[0].weight.dtype)  # type: ignore[arg-type]
            if self.hparams["normalise_features"] == "l2":
                features = F.normalize(features, dim=1)
            features = self.norm(features)
            return torch.stack([classifier(features) for classifier in self.classifiers])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the cross-entropies of all classifiers that are sound."""
        logits, labels = self(batch["image"]), batch["label"]
        # A diverged classifier gets neither loss nor gradient: under a common loss scale or a common norm of the
        # gradient, the others would go down with it.
        sound = logits.detach().isfinite().flatten(1).all(1)
        logits = torch.where(sound[:, None, None], logits, 0.0)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
        losses = losses.view(len(logits), -1).mean(1)
        sound = sound & losses.detach().isfinite()  # two finite scores may be infinitely far from each other
        loss = torch.where(sound, losses, 0.0).sum()
        loss = torch.where(sound.any(), loss, torch.nan)
        size = len(labels)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=size)
        each = torch.where(sound, losses.detach(), torch.nan)
        self.log_dict({f"train/loss_lr_{rate}": each[i] for i, rate in enumerate(self.rates)}, batch_size=size)
        return loss

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        _require_test_loaders(self, "images held out from the training set, then the test images")
        self.validation_meter.reset()
        self.test_meter.reset()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Classify a few images with every classifier."""
        found: dict[str, Tensor] = {}
        for rate, scores in zip(self.rates, self(batch["image"])):
            found[f"top1 {rate}"] = hits(scores, batch["label"])
            if dataloader_idx == 0:
                found[f"finite {rate}"] = scores.isfinite().all(1)
            else:
                found[f"top5 {rate}"] = hits(scores, batch["label"], 5)
        meter = self.validation_meter if dataloader_idx == 0 else self.test_meter
        meter.update(batch["index"], **found)

    def on_test_epoch_end(self) -> None:
        """Choose the learning rate and log the accuracies in percent."""
        validation, test = self.validation_meter.compute(self.device), self.test_meter.compute(self.device)
        if not (validation["count"] > 0 and test["count"] > 0):
            raise ValueError("test_dataloaders: one of the two has no image; hold out a part of the training set")
        sound = [rate for rate in self.rates if validation[f"finite {rate}"] == 1]
        if not sound:
            raise ValueError(
                f"learning_rates: training diverged with each of {', '.join(self.rates)}; add smaller ones"
            )
        chosen = max(sound, key=lambda rate: float(validation[f"top1 {rate}"]))
        metrics = {
            "test/top1": 100 * test[f"top1 {chosen}"],
            "test/top5": 100 * test[f"top5 {chosen}"],
            "test/learning_rate": torch.tensor(self.rates[chosen]),
            "test/images": test["count"],
            "test/validation_images": validation["count"],
        }
        for rate in self.rates:
            metrics[f"test/top1_lr_{rate}"] = 100 * test[f"top1 {rate}"]
            metrics[f"test/validation_top1_lr_{rate}"] = 100 * validation[f"top1 {rate}"]
        log_results(self, metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a learning rate of its own for every classifier."""
        groups = [
            {"params": list(classifier.parameters()), "lr": rate}
            for classifier, rate in zip(self.classifiers, self.rates.values())
        ]
        return _sgd(self, groups)


class SupervisedClassification(pl.LightningModule):
    """The image encoder trained with labels from the start, as the supervised baseline.

    Its checkpoint holds the encoder under ``image_encoder.``. Logged are ``test/top1`` and ``test/top5`` of the last
    weights.

    Args:
        image_encoder: Encoder with ``feature_dim`` features.
        num_classes: Number of classes.
        pretrained: Checkpoint with an encoder to start from; None, the baseline, starts from the initial weights.
        learning_rate: Of SGD.
        momentum: Of SGD.
        weight_decay: L2 in the gradient of every parameter.
        schedule: The learning rate falls in ``steps`` at the milestones, or along a ``cosine`` over the whole training.
        milestones: Epochs at which the learning rate falls.
        gamma: Factor of the learning rate at every milestone.

    Shapes:
        Batch: ``image`` [B, 3, H, W], ``label`` [B], ``index`` [B].

    Source: specification 11, ``in_sup``: torchvision's recipe of its first ResNet-50 weights.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        num_classes: int,
        pretrained: str | None = None,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        schedule: Schedule = "steps",
        milestones: Sequence[int] = (30, 60),
        gamma: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_encoder"], logger=False)
        self.image_encoder = image_encoder
        self.classifier = nn.Linear(int(image_encoder.feature_dim), num_classes)  # type: ignore[arg-type]
        self.meter = OncePerSample("top1", "top5")

    def setup(self, stage: str) -> None:
        """Check the classes and, before training only, load the encoder to start from."""
        _check_num_classes(self.trainer, self.hparams["num_classes"])
        if stage == "fit" and self.hparams["pretrained"] is not None:
            load_into_encoder(self.image_encoder, self.hparams["pretrained"], field="model.pretrained")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W], at full precision also under autocast."""
        features = self.image_encoder(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.to(self.classifier.weight.dtype))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        logits, labels = self(batch["image"]), batch["label"]
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        self.log("train/top1", 100 * hits(logits.detach(), labels).mean(), batch_size=len(labels))
        return loss

    def on_test_epoch_start(self) -> None:
        """Start counting anew."""
        self.meter.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Classify a few images."""
        logits, labels = self(batch["image"]), batch["label"]
        self.meter.update(batch["index"], top1=hits(logits, labels), top5=hits(logits, labels, 5))

    def on_test_epoch_end(self) -> None:
        """Log the accuracies in percent."""
        means = self.meter.compute(self.device)
        metrics = {"test/top1": 100 * means["top1"], "test/top5": 100 * means["top5"], "test/images": means["count"]}
        log_results(self, metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD."""
        return _sgd(self, [{"params": list(self.parameters()), "lr": self.hparams["learning_rate"]}])


class MultiLabelSVM(FrozenEncoderModule):
    """Linear support vector machines on the frozen features, one a class. Only tested, never fitted by a trainer.

    ``trainer.test`` takes two loaders: images to learn from, images to judge. Logged are ``test/map``, the mean of the
    average precisions of all classes that could be judged, how many these are (``test/classes``), how many of them
    chose each C (``test/classes_with_C_<C>``), and ``test/images``. ``media/average_precision.json`` has every class.
    Several processes share the extraction of features and the fitting. Memory: the features of all images on every
    process, ``images * dims * 4`` bytes (VOC07: 9,963 * 2,048 * 4 = 82 MB), and twice those of the training images
    while a machine is fitted.

    Args:
        image_encoder: Encoder with ``feature_dim`` features and ``forward_map``.
        pretrained: Checkpoint with the pre-trained encoder; None judges the initial weights.
        pool: Side of the grid of means that the last map is reduced to; 1 for the current protocol, 2 for the 8192
            features of VirTex v0.9.
        costs: The values of C to choose from.
        folds: Folds of the cross-validation that chooses.
        positive_weight: Weight of a positive sample against a negative one.
        max_iterations: When the solver stops at the latest.
        random_state: Seed of the solver.
        jobs: Machines fitted at a time by every process.

    Shapes:
        Batch: ``image`` [B, 3, H, W], ``labels`` [B, C] of 1 (present), 0 (absent) and -1 (difficult), ``index`` [B].

    Source: specification 9, VOC07 linear SVM.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        pretrained: str | None = None,
        pool: Literal[1, 2] = 1,
        costs: Sequence[float] = (0.01, 0.1, 1.0, 10.0),
        folds: int = 3,
        positive_weight: float = 2.0,
        max_iterations: int = 2000,
        random_state: int = 0,
        jobs: int = 1,
    ) -> None:
        super().__init__(image_encoder, pretrained)
        self.save_hyperparameters(ignore=["image_encoder"], logger=False)
        self.tables: list[RowsOncePerSample] = []

    def setup(self, stage: str) -> None:
        """Load the pre-trained encoder."""
        if self.pretrained is not None:
            load_into_encoder(self.image_encoder, self.pretrained, field="model.pretrained")

    def configure_optimizers(self) -> None:
        """None: nothing here is learnt by gradients."""
        return None

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of unit length [B, feature_dim * pool * pool] of images [B, 3, H, W], in float32."""
        feature_map = self.image_encoder.forward_map(images)  # type: ignore[operator]
        return F.normalize(F.adaptive_avg_pool2d(feature_map.float(), self.hparams["pool"]).flatten(1), dim=1)

    def on_test_epoch_start(self) -> None:
        """Prepare an empty table of features for each loader."""
        _require_test_loaders(self, "images to learn from, then images to judge")
        self.tables = [RowsOncePerSample("features", "labels") for _ in range(2)]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Extract the features of a few images."""
        labels = batch["labels"].to(torch.int8)
        self.tables[dataloader_idx].update(batch["index"], features=self.features(batch["image"]), labels=labels)

    def on_test_epoch_end(self) -> None:
        """Fit and judge the machines, and log the results in percent."""
        train, test = (
            {name: rows.cpu().numpy() for name, rows in table.compute(self.device)[1].items()} for table in self.tables
        )
        self.tables = []
        classes = train["labels"].shape[1]
        if test["labels"].shape[1] != classes:
            raise ValueError(f"labels: {classes} classes in training, but {test['labels'].shape[1]} in the test")
        verdicts = self._judge(train, test)
        average = np.array([verdict.average_precision for verdict in verdicts])
        details = [{"C": None if v.left_out else v.cost, "left_out": v.left_out} for v in verdicts]
        metrics = _mean_average_precision(self, average, details)
        chosen = Counter(verdict.cost for verdict in verdicts if not verdict.left_out)
        for cost in self.hparams["costs"]:
            metrics[f"test/classes_with_C_{cost:g}"] = torch.tensor(float(chosen[float(cost)]))
        log_results(self, {**metrics, "test/images": torch.tensor(float(len(test["labels"])))})

    def _judge(self, train: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray]) -> list[ClassVerdict]:
        """The verdict on every class; the processes share the classes."""
        settings: Any = self.hparams
        own = range(rank(), train["labels"].shape[1], world_size())
        verdicts = Parallel(n_jobs=settings["jobs"])(
            delayed(judge_class)(
                train["features"],
                train["labels"][:, position],
                test["features"],
                test["labels"][:, position],
                costs=settings["costs"],
                folds=settings["folds"],
                positive_weight=settings["positive_weight"],
                max_iterations=settings["max_iterations"],
                random_state=settings["random_state"],
            )
            for position in own
        )
        if not is_distributed():
            return list(verdicts)
        # Fitting takes longer than a collective usually waits, so the processes meet in a patient group of their own.
        group: Any = dist.new_group(backend="gloo", timeout=timedelta(days=2))
        shared: list[Any] = [None] * world_size()
        dist.all_gather_object(shared, dict(zip(own, verdicts)), group=group)
        dist.destroy_process_group(group)
        joined = {position: verdict for part in shared for position, verdict in part.items()}
        return [joined[position] for position in sorted(joined)]


class MultiLabelTagging(FrozenEncoderModule):
    """A linear layer on frozen features that says which tags an image has: the stand-in for the private Stock tables.

    On COCO's 80 categories every number of it is a "COCO stand-in". Logged are ``test/map``, the mean of the average
    precisions of all tags with a positive test image, how many these are (``test/classes``), and ``test/images``;
    ``media/average_precision.json`` has every tag. Entries marked as difficult count neither in training nor in the
    test.

    Args:
        image_encoder: Encoder with ``feature_dim`` features; its weights are replaced by those of ``pretrained``.
        num_classes: Number of tags.
        pretrained: Checkpoint with the pre-trained encoder; None judges the initial weights.
        learning_rate: Of SGD; the loss is summed over tags, so it means the same for any number of them.
        momentum: Of SGD.
        weight_decay: L2 in the gradient.
        schedule: The learning rate falls in ``steps`` at the milestones, or along a ``cosine`` over the whole training.
        milestones: Epochs at which the learning rate falls.
        gamma: Factor of the learning rate at every milestone.

    Shapes:
        Batch: ``image`` [B, 3, H, W], ``labels`` [B, C] of 1 (present), 0 (absent) and -1 (difficult), ``index`` [B].

    Source: specification 8, Stock; the learning rate and its schedule are ours.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        num_classes: int,
        pretrained: str | None = None,
        learning_rate: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Schedule = "steps",
        milestones: Sequence[int] = (60, 80),
        gamma: float = 0.1,
    ) -> None:
        super().__init__(image_encoder, pretrained)
        self.save_hyperparameters(ignore=["image_encoder"], logger=False)
        self.classifier = _linear(int(image_encoder.feature_dim), num_classes)  # type: ignore[arg-type]
        self.table = RowsOncePerSample("scores", "labels")

    def setup(self, stage: str) -> None:
        """Check the tags and, before training only, load the pre-trained encoder."""
        _check_num_classes(self.trainer, self.hparams["num_classes"])
        super().setup(stage)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, 3, H, W], at full precision also under autocast."""
        features = self.features(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.classifier(features.to(self.classifier.weight.dtype))

    def _labels(self, batch: Batch) -> Tensor:
        labels, expected = batch["labels"], self.hparams["num_classes"]
        if labels.ndim != 2 or labels.shape[1] != expected:
            raise ValueError(f"num_classes: the model has {expected}, but the labels have shape {list(labels.shape)}")
        return labels

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Binary cross-entropy, summed over tags, mean over images."""
        logits, labels = self(batch["image"]), self._labels(batch)
        losses = F.binary_cross_entropy_with_logits(logits, (labels == 1).to(logits.dtype), reduction="none")
        loss = torch.where(labels >= 0, losses, 0.0).sum(1).mean()
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        return loss

    def on_test_epoch_start(self) -> None:
        """Start collecting anew."""
        self.table = RowsOncePerSample("scores", "labels")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score the tags of a few images."""
        labels = self._labels(batch).to(torch.int8)
        self.table.update(batch["index"], scores=self(batch["image"]).float(), labels=labels)

    def on_test_epoch_end(self) -> None:
        """Log the mean average precision in percent."""
        rows = {name: rows.cpu().numpy() for name, rows in self.table.compute(self.device)[1].items()}
        average = average_precisions(rows["scores"], rows["labels"])
        notes = [{"left_out": "no positive test sample" if np.isnan(value) else ""} for value in average]
        metrics = _mean_average_precision(self, average, notes)
        log_results(self, {**metrics, "test/images": torch.tensor(float(len(rows["labels"])))})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD on the linear layer."""
        return _sgd(self, [{"params": list(self.classifier.parameters()), "lr": self.hparams["learning_rate"]}])


class SearchSpace(nn.Module):
    """The common space of images and captions: unit vectors, compared by their inner product.

    Args:
        feature_dim: Width of the image features.
        text_encoder: From tokens [B, L] and lengths [B] to [B, embedding_dim].
        embedding_dim: Width of the space.

    Source: specification 9, cross-modal search.
    """

    def __init__(self, feature_dim: int, text_encoder: nn.Module, embedding_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_dim, embedding_dim)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.text_encoder = text_encoder

    def image(self, features: Tensor) -> Tensor:
        """Embeddings [B, embedding_dim] of image features [B, feature_dim], in float32."""
        features = F.normalize(features.float(), dim=1).to(self.projection.weight.dtype)
        return F.normalize(self.projection(features).float(), dim=1)

    def text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Embeddings [B, embedding_dim] of captions [B, L] with their lengths [B], in float32."""
        return F.normalize(self.text_encoder(tokens, lengths).float(), dim=1)


class CrossModalSearch(FrozenEncoderModule):
    """Search for captions by images and for images by captions, on frozen image features (the recipe of VSE++).

    A linear layer maps the features into a common space with the captions' encoder. Whoever is in the batch is a
    negative; under several processes the batches are joined, so that a global batch means the same for any number.

    After every epoch the weights are judged by the sum of the six recalls on the validation split, and the best ones
    are tested. They are part of the module, ``selected``, and so of every checkpoint: the record of a run says that the
    last checkpoint is tested, and this one holds the selection. Judging is not left to Lightning's validation loop,
    which a run resumed at the end of an epoch would skip: it happens before the first step of the next epoch, or at the
    end, and whether it did is in the checkpoint as well.

    The data module's ``val_dataloader`` and ``test_dataloader`` give two loaders each, images and captions. Logged are
    ``test/i2t_r1``, ``_r5``, ``_r10``, ``_medr`` and ``_meanr`` for images as queries, the same as ``test/t2i_...``
    for captions, all once more with the ending ``_equal_text``, where captions with the same tokens as an own one
    count as own ones, and ``test/selected_epoch`` and ``test/validation_recall_sum``.

    Args:
        image_encoder: Encoder with ``feature_dim`` features; its weights are replaced by those of ``pretrained``.
        text_encoder: From tokens [B, L] and lengths [B] to [B, embedding_dim].
        pretrained: Checkpoint with the pre-trained encoder; None judges the initial weights.
        embedding_dim: Width of the common space.
        margin: By how much a pair must beat its negatives.
        hardest: Only the hardest negative of every image and caption counts, instead of all of them.
        mask_same_image: Captions of the same image in a batch are no negatives. A batch drawn by images has none.
        learning_rate: Of Adam.
        milestones: Epochs at which the learning rate falls.
        gamma: Factor of the learning rate at every milestone.
        fold_size: Images that are searched at a time in the test; None for all of them. Validation searches all.

    Shapes:
        Training batch: ``image`` [B, 3, H, W], ``tokens`` [B, L], ``lengths`` [B], ``image_index`` [B]. Batch of
        images: ``image``, ``index`` [B]. Batch of captions: ``tokens``, ``lengths``, ``index`` [B], and ``image_index``
        [B], the ``index`` of the caption's image.

    Raises:
        ValueError: In the constructor when ``text_encoder`` says that it has another ``feature_dim``; in setup when
            there is no data module to select by.

    Source: specification 9, cross-modal search.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        pretrained: str | None = None,
        embedding_dim: int = 1024,
        margin: float = 0.2,
        hardest: bool = True,
        mask_same_image: bool = True,
        learning_rate: float = 2e-4,
        milestones: Sequence[int] = (15,),
        gamma: float = 0.1,
        fold_size: int | None = 1000,
    ) -> None:
        super().__init__(image_encoder, pretrained)
        self.save_hyperparameters(ignore=["image_encoder", "text_encoder"], logger=False)
        width = getattr(text_encoder, "feature_dim", embedding_dim)
        if width != embedding_dim:
            raise ValueError(
                f"embedding_dim: the common space has {embedding_dim} dimensions, but text_encoder gives {width}; "
                "the two must be equal"
            )
        self.space = SearchSpace(int(image_encoder.feature_dim), text_encoder, embedding_dim)  # type: ignore[arg-type]
        self.selected = copy.deepcopy(self.space).requires_grad_(False)
        # Plain numbers, not buffers: half precision would round the sum that later epochs are compared with.
        self.selected_epoch = 0
        self.selected_recall_sum = -1.0
        self.judged_step = 0

    # -- training ------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Before training only, load the pre-trained encoder and make sure that there is something to select by."""
        super().setup(stage)
        size = getattr(self.space.text_encoder, "vocabulary_size", None)
        needed = getattr(getattr(self.trainer, "datamodule", None), "vocabulary_size", 0)
        if size is not None and needed > size:
            raise ValueError(
                f"the tokenizer has {needed} words, model.text_encoder {size} embeddings; raise "
                "model.text_encoder.vocabulary_size"
            )
        if stage == "fit" and getattr(self.trainer, "datamodule", None) is None:
            raise ValueError("data: CrossModalSearch selects its weights by the val_dataloader of a data module")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Hinge loss of the pairs of the global batch."""
        image = _joined(self.space.image(self.features(batch["image"])))
        text = _joined(self.space.text(batch["tokens"], batch["lengths"]))
        with torch.autocast(image.device.type, enabled=False):
            scores = image @ text.T
            if self.hparams["mask_same_image"]:
                owner = all_gather_concat(batch["image_index"])
                same = (owner[:, None] == owner).fill_diagonal_(False)
                # Below every similarity by more than the margin: never violates it.
                scores = scores.masked_fill(same, -2.0 - self.hparams["margin"])
            loss = in_batch_hinge(scores, self.hparams["margin"], self.hparams["hardest"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["tokens"]))
        # Every process has the whole loss but only its own part of the gradient, and these parts are averaged.
        return loss * world_size()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Judge the epoch that is over."""
        if batch_idx == 0 and self.global_step > self.judged_step:
            self._judge(self.global_step)

    def on_train_end(self) -> None:
        """Judge the last epoch, and make sure that the encoder is what it was."""
        if self.global_step > self.judged_step:
            self._judge(self.global_step - 1)
        super().on_train_end()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; the learning rate falls at the milestones."""
        settings: Any = self.hparams
        optimizer = torch.optim.Adam(self.space.parameters(), lr=settings["learning_rate"])
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings["milestones"]), settings["gamma"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    # -- selection -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _judge(self, log_at: int) -> None:
        """Keep the current weights if they are the best so far on the validation split."""
        tables = _search_tables()
        strategy = self.trainer.strategy
        self.eval()
        # Loaders draw a seed for their workers: training must not depend on whether it was judged in between.
        with torch.random.fork_rng(devices=[]), strategy.precision_plugin.forward_context():
            for kind, loader in enumerate(self._validation_loaders()):
                for batch in loader:
                    batch = strategy.batch_to_device(strategy.precision_plugin.convert_input(batch))
                    self._collect(self.space, tables, kind, batch)
        self.train()
        values = {name: float(value) for name, value in self._search(tables).items()}
        recall_sum = sum(values[f"{direction}_r{k}"] for direction in ("i2t", "t2i") for k in (1, 5, 10))
        if recall_sum > self.selected_recall_sum:
            self.selected.load_state_dict(self.space.state_dict())
            self.selected_recall_sum, self.selected_epoch = recall_sum, self.current_epoch
        self.judged_step = self.global_step
        for logger in self.loggers:
            logger.log_metrics({f"val/{name}": v for name, v in {**values, "recall_sum": recall_sum}.items()}, log_at)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which weights are the selected ones, and how far was judged."""
        checkpoint["selection"] = {
            "epoch": self.selected_epoch,
            "recall_sum": self.selected_recall_sum,
            "judged_step": self.judged_step,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        selection = checkpoint["selection"]
        self.selected_epoch, self.selected_recall_sum = selection["epoch"], selection["recall_sum"]
        self.judged_step = selection["judged_step"]

    def _validation_loaders(self) -> Iterable[Iterable[Batch]]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        loaders = data.val_dataloader()
        if not isinstance(loaders, list | tuple) or len(loaders) != 2:
            raise ValueError("val_dataloader: CrossModalSearch needs two loaders, images and captions")
        return loaders

    def _collect(self, space: SearchSpace, tables: Sequence[RowsOncePerSample], kind: int, batch: Batch) -> None:
        """Embed a few images (kind 0) or captions (kind 1)."""
        if kind == 0:
            tables[0].update(batch["index"], embedding=space.image(self.features(batch["image"])))
        else:
            tokens, lengths = batch["tokens"], batch["lengths"]
            tables[1].update(
                batch["index"],
                embedding=space.text(tokens, lengths),
                image_index=batch["image_index"].long(),
                text=text_numbers(tokens, lengths),
            )

    def _search(
        self, tables: Sequence[RowsOncePerSample], fold_size: int | None = None, equal_text: bool = False
    ) -> dict[str, Tensor]:
        """Recalls and ranks in both directions."""
        index, image = tables[0].compute(self.device)
        index = index.long()
        _, caption = tables[1].compute(self.device)
        row, known = owner_rows(index, caption["image_index"])
        text = caption["text"][known] if equal_text else None
        return caption_retrieval(image["embedding"], caption["embedding"][known], row, fold_size, text)

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        """Start collecting anew."""
        _require_test_loaders(self, "images, then captions")
        self.tables = _search_tables()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embed a few images or captions with the selected weights."""
        self._collect(self.selected, self.tables, dataloader_idx, batch)

    def on_test_epoch_end(self) -> None:
        """Log recalls in percent, and ranks."""
        fold_size = self.hparams["fold_size"]
        metrics = self._search(self.tables, fold_size)
        equal = self._search(self.tables, fold_size, equal_text=True)
        metrics |= {f"{name}_equal_text": value for name, value in equal.items()}
        selection = {"selected_epoch": self.selected_epoch, "validation_recall_sum": self.selected_recall_sum}
        metrics |= {name: torch.tensor(float(value)) for name, value in selection.items()}
        log_results(self, {f"test/{name}": value for name, value in metrics.items()})


def _search_tables() -> list[RowsOncePerSample]:
    return [RowsOncePerSample("embedding"), RowsOncePerSample("embedding", "image_index", "text")]


def _joined(rows: Tensor) -> Tensor:
    """Rows of all processes in rank order; the own ones keep their gradient."""
    if not is_distributed():
        return rows
    start = rank() * len(rows)
    gathered = all_gather_concat(rows)
    return torch.cat([gathered[:start], rows, gathered[start + len(rows) :]])


def _linear(width: int, classes: int) -> nn.Linear:
    """A linear classifier as the protocols start it."""
    layer = nn.Linear(width, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _sgd(module: pl.LightningModule, groups: list[dict[str, Any]]) -> OptimizerLRScheduler:
    """SGD with the schedule of the module's settings; every group has its own ``lr``."""
    settings: Any = module.hparams
    optimizer = torch.optim.SGD(
        groups, lr=groups[0]["lr"], momentum=settings["momentum"], weight_decay=settings["weight_decay"]
    )
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if settings["schedule"] == "cosine":
        factor = warm_up_then_cosine(0, int(module.trainer.estimated_stepping_batches))
        scheduler, interval = torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "step"
    else:
        milestones = list(settings["milestones"])
        scheduler, interval = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, settings["gamma"]), "epoch"
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def _check_num_classes(trainer: pl.Trainer, num_classes: int) -> None:
    """Stop when the data module says that its data have another number of classes."""
    found = getattr(getattr(trainer, "datamodule", None), "num_classes", None)
    if found is not None and found != num_classes:
        raise ValueError(f"num_classes: the model has {num_classes}, but the data have {found}; set it to {found}")


def _require_test_loaders(module: pl.LightningModule, expected: str) -> None:
    loaders = module.trainer.test_dataloaders
    if not isinstance(loaders, list | tuple) or len(loaders) != 2:
        raise ValueError(f"test_dataloaders: {type(module).__name__} needs two of them: {expected}")


def _mean_average_precision(
    module: pl.LightningModule, average: np.ndarray, details: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Mean over the classes that could be judged, in percent; every class goes into a file, and is named if left out.

    Args:
        module: Its trainer says where the file goes; its data module may give the ``class_names``.
        average: Average precision of every class [C], NaN for those left out.
        details: More about every class; ``left_out`` says why.

    Raises:
        ValueError: No class could be judged.
    """
    judged = ~np.isnan(average)
    names = getattr(getattr(module.trainer, "datamodule", None), "class_names", None) or range(len(average))
    left_out = {str(name): detail["left_out"] for name, detail in zip(names, details) if detail["left_out"]}
    if not judged.any():
        raise ValueError(f"labels: no class can be judged; {next(iter(left_out.values()), 'there is none')}")
    if left_out:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:5])
        rank_zero_warn(f"{len(left_out)} of {len(average)} classes are left out of the mean ({listed})")
    if module.trainer.is_global_zero:
        classes = [
            {"class": str(name), **detail, "average_precision": None if np.isnan(value) else 100 * float(value)}
            for name, detail, value in zip(names, details, average)
        ]
        path = Path(module.trainer.default_root_dir) / "media" / "average_precision.json"
        write_atomically(path, json.dumps(classes, indent=1) + "\n")
    return {
        "test/map": torch.tensor(100 * float(average[judged].mean())),
        "test/classes": torch.tensor(float(judged.sum())),
    }


def log_results(module: pl.LightningModule, metrics: Mapping[str, Tensor]) -> None:
    """Log what all processes have computed alike; averaging over them again could only round it."""
    module.log_dict({name: value.float().to(module.device) for name, value in metrics.items()})
