"""Classification with any encoder. Several heads are trained together, and every test sample counts once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from common.metrics.classification import hits, mean_clip_probability
from common.metrics.gathering import OncePerSample, RowsOncePerSample
from common.metrics.linear_svm import average_precision
from common.protocols.base import (
    Batch,
    EncoderModule,
    check_num_classes,
    log_results,
    mean_average_precision,
    required,
)
from common.training.callbacks import listed
from common.training.optimizers import warm_up_then_cosine
from common.types import Fraction, Momentum, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class Classification(EncoderModule):
    """Base of the classification protocols: trains heads on an encoder, and measures accuracy over distinct samples.

    Args:
        learning_rates: a learning rate for each head. The encoder uses the first.
        weight_decay: L2 penalty, added to the gradient.
        schedule: `steps` multiplies the rate by `gamma` at the milestones (epochs); `cosine` decays over the whole
            training.

    Shapes:
        Batch: `label` [B], `index` [B], and `image` [B, 3, H, W] or `video` [B, 3, T, H, W]. In a test, `video` is [B,
        clips, 3, T, H, W].
    """

    fewest_classes: ClassVar[int] = 2

    def __init__(
        self,
        encoder: nn.Module,
        heads: Mapping[str, nn.Module],
        num_classes: PositiveInt,
        learning_rates: Sequence[PositiveFloat],
        optimizer: Literal["adam", "sgd"] = "sgd",
        momentum: Momentum = 0.9,
        weight_decay: NonNegativeFloat = 0.0,
        schedule: Literal["steps", "cosine"] = "steps",
        milestones: Sequence[NonNegativeInt] = (),
        gamma: PositiveFloat = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, **kwargs)
        self.names = list(heads)
        self.heads = nn.ModuleList(heads.values())
        self.num_classes = num_classes
        self.rates = list(learning_rates)
        self.optimizer, self.momentum, self.weight_decay = optimizer, momentum, weight_decay
        self.schedule, self.milestones, self.gamma = schedule, list(milestones), gamma

    def setup(self, stage: str) -> None:
        check_num_classes(self, self.num_classes, self.fewest_classes)
        super().setup(stage)

    # -- the model -----------------------------------------------------------------------------------------------------

    @property
    def encoder_learns(self) -> bool:
        return not self.frozen()

    def features(self, inputs: Tensor) -> Mapping[str, Tensor] | Tensor:
        """Compute the inputs of the heads: a tensor for all heads, or a tensor per head by name."""
        return self.encoder(inputs)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Compute each head's logits [B, num_classes] in full precision, because rounding makes logits equal."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_learns):
            features = self.features(inputs)
        with torch.autocast(inputs.device.type, enabled=False):
            features = dict.fromkeys(self.names, features) if isinstance(features, Tensor) else features
            return {name: head(features[name].to(_dtype(head))) for name, head in zip(self.names, self.heads)}

    # -- training ------------------------------------------------------------------------------------------------------

    def losses(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {name: F.cross_entropy(scores, batch["label"]) for name, scores in logits.items()}

    def total(self, losses: Tensor) -> Tensor:
        return losses.sum()

    def curves(self, logits: Mapping[str, Tensor], losses: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Return the training curves to log with the loss."""
        return {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(_inputs(batch))
        losses = self.losses(logits, batch)
        loss = self.total(torch.stack(list(losses.values())))
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in self.curves(logits, losses, batch).items()})
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = [{"params": list(head.parameters()), "lr": rate} for head, rate in zip(self.heads, self.rates)]
        if not self.frozen():
            groups.append({"params": list(self.encoder.parameters()), "lr": self.rates[0]})
        optimizer: torch.optim.Optimizer
        if self.optimizer == "adam":
            optimizer = torch.optim.Adam(groups, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(groups, self.rates[0], self.momentum, weight_decay=self.weight_decay)
        scheduler: torch.optim.lr_scheduler.LRScheduler
        if self.schedule == "cosine":
            factor = warm_up_then_cosine(0, int(self.trainer.estimated_stepping_batches))
            scheduler, interval = torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "step"
        else:
            scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, self.milestones, self.gamma)
            interval = "epoch"
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        values = [f"{name} {value}" for name in self.names for value in ("top1", "top5", "finite")]
        self.meters = [OncePerSample(*values) for _ in listed(self.trainer.test_dataloaders)]

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        values: dict[str, Tensor] = {}
        for name, logits in self._test_logits(batch).items():
            hits_of_head = self.hits_of(logits, batch["label"], dataloader_idx)
            values |= {f"{name} {key}": value for key, value in hits_of_head.items()}
            values[f"{name} finite"] = logits.isfinite().flatten(1).all(1)
        self.meters[dataloader_idx].update(batch["index"], **values)

    def _test_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Compute logits [B, C] of images or [B, clips, C] of videos."""
        inputs = _inputs(batch)
        if "image" in batch:
            return self(inputs)
        return {name: logits.unflatten(0, inputs.shape[:2]) for name, logits in self(inputs.flatten(0, 1)).items()}

    def hits_of(self, logits: Tensor, labels: Tensor, loader: int) -> dict[str, Tensor]:
        """Return a head's hits [B]. For videos, use the mean class probabilities of the clips."""
        scores = mean_clip_probability(logits) if logits.ndim == 3 else logits
        return {"top1": hits(scores, labels), "top5": hits(scores, labels, 5)}

    def on_test_epoch_end(self) -> None:
        results = self.results([meter.compute(self.device) for meter in self.meters])
        log_results(self, {f"test/{name}": value for name, value in results.items()})

    def results(self, means: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the values to log, from each loader's mean values and `count`."""
        raise NotImplementedError


class SupervisedClassification(Classification):
    """Supervised baseline: trains an image encoder with labels. Logs `test/top1` and `test/top5`.

    Source: docs/papers/mct.md [11], `in_sup`: the recipe of torchvision's first ResNet-50 weights.
    """

    test_loaders = ("test images",)

    def __init__(
        self,
        image_encoder: nn.Module,
        num_classes: PositiveInt,
        learning_rate: PositiveFloat = 0.1,
        weight_decay: NonNegativeFloat = 1e-4,
        milestones: Sequence[NonNegativeInt] = (30, 60),
        **kwargs: Any,
    ) -> None:
        heads = {"head": nn.Linear(required(image_encoder, "feature_dim"), num_classes)}
        super().__init__(
            image_encoder, heads, num_classes, [learning_rate], "sgd", weight_decay=weight_decay, milestones=milestones,
            frozen=False, **kwargs,
        )  # fmt: skip

    def curves(self, logits: Mapping[str, Tensor], losses: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"top1": 100 * hits(logits["head"], batch["label"]).mean()}

    def results(self, means: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        (test,) = means
        return {"top1": 100 * test["head top1"], "top5": 100 * test["head top5"], "images": test["count"]}


class ActionRecognition(Classification):
    """Fine-tunes a video encoder on labeled actions.

    In the first `warmup_epochs`, only the classifier learns. Batch normalization of the encoder already adapts to the
    new data, because the encoder is in training mode. Then all weights learn. `max_epochs` counts both phases. The last
    weights are tested.

    Test batches hold several clips per video. `test/video_top1` and `test/video_top5` use the clips' mean class
    probabilities. An optional second test loader holds single, random clips for `test/clip_top1`.

    Args:
        learning_rate: learning rate of Adam, in both phases.
        milestones: epochs after the warm-up at which the learning rate falls.

    Source: docs/papers/avid_cma.md [10.1].
    """

    def __init__(
        self,
        video_encoder: nn.Module,
        num_classes: PositiveInt,
        dropout: Fraction = 0.5,
        learning_rate: PositiveFloat = 1e-4,
        warmup_epochs: NonNegativeInt = 5,
        milestones: Sequence[NonNegativeInt] = (6, 10, 14),
        gamma: PositiveFloat = 0.3,
        **kwargs: Any,
    ) -> None:
        classifier = nn.Linear(required(video_encoder, "feature_dim"), num_classes)
        heads = {"head": nn.Sequential(nn.Dropout(dropout), classifier)}
        super().__init__(
            video_encoder, heads, num_classes, [learning_rate], "adam", gamma=gamma, frozen=False,
            milestones=[warmup_epochs + epoch for epoch in milestones], **kwargs,
        )  # fmt: skip
        self.warmup_epochs = warmup_epochs

    def on_fit_start(self) -> None:
        if 0 < (self.trainer.max_epochs or 0) <= self.warmup_epochs:
            raise ValueError(
                f"trainer.max_epochs ({self.trainer.max_epochs}) includes model.warmup_epochs ({self.warmup_epochs}), "
                "in which only the classifier learns: raise it, or lower warmup_epochs"
            )

    def start_without_files(self) -> None:
        self.warmup_epochs = 0  # measure a step that trains the encoder, as most do

    @property
    def warming_up(self) -> bool:
        return self.current_epoch < self.warmup_epochs

    @property
    def encoder_learns(self) -> bool:
        # DDP needs gradients of all parameters; during warm-up, the encoder's are dropped before the step.
        return not self.warming_up or self.trainer.world_size > 1

    def on_after_backward(self) -> None:
        if self.warming_up:
            for parameter in self.encoder.parameters():
                parameter.grad = None

    def curves(self, logits: Mapping[str, Tensor], losses: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {"clip_top1": 100 * hits(logits["head"], batch["label"]).mean()}

    def hits_of(self, logits: Tensor, labels: Tensor, loader: int) -> dict[str, Tensor]:
        if loader == 0:
            return super().hits_of(logits, labels, loader)
        each = labels[:, None].expand(logits.shape[:2])
        return {"top1": hits(logits, each).mean(1), "top5": hits(logits, each, 5).mean(1)}

    def results(self, means: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        accuracies = {"video_top1": 100 * means[0]["head top1"], "video_top5": 100 * means[0]["head top5"]}
        if len(means) > 1:
            accuracies["clip_top1"] = 100 * means[1]["head top1"]
        return {**accuracies, "videos": means[0]["count"]}


class LinearProbes(Classification):
    """Linear classifiers on the stages of a frozen video encoder, trained side by side.

    Averages over a video's clips like `ActionRecognition`. Logs `test/<stage>_top1`, and the maximum `test/best_top1`.

    Args:
        video_encoder: encoder with `forward_stages` and `stage_channels`.
        layers: maps stages to the side of the grid to pool to. Time is pooled to 1.
        official_quirks: run the frozen encoder in training mode, as the released code does by accident. Batch
            normalization then uses the statistics of each batch, and the running statistics drift.

    Source: docs/papers/avid_cma.md [10.2].
    """

    test_loaders = ("test videos",)

    def __init__(
        self,
        video_encoder: nn.Module,
        num_classes: PositiveInt,
        layers: dict[str, PositiveInt],
        learning_rate: PositiveFloat = 1e-4,
        milestones: Sequence[NonNegativeInt] = (6, 9),
        official_quirks: bool = False,
        **kwargs: Any,
    ) -> None:
        channels = stage_channels(video_encoder, layers)
        heads = {stage: probe(channels[stage], side, num_classes) for stage, side in layers.items()}
        super().__init__(
            video_encoder, heads, num_classes, [learning_rate] * len(heads), "adam", milestones=milestones, frozen=True,
            **kwargs,
        )  # fmt: skip
        self.official_quirks = official_quirks

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.train(mode and self.official_quirks)
        return self

    def features(self, inputs: Tensor) -> Mapping[str, Tensor]:
        return self.encoder.forward_stages(inputs)  # type: ignore[operator]

    def curves(self, logits: Mapping[str, Tensor], losses: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {f"{stage}_loss": loss for stage, loss in losses.items()}

    def results(self, means: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        (test,) = means
        return {**of_stages({stage: 100 * test[f"{stage} top1"] for stage in self.names}), "videos": test["count"]}


def probe(channels: int, side: int, num_classes: int) -> nn.Sequential:
    """Build a linear classifier of maps [B, channels, T, H, W], which are max-pooled to a grid and batch-normalized."""
    width = channels * side * side
    pool = nn.AdaptiveMaxPool3d((1, side, side))
    return nn.Sequential(pool, nn.Flatten(), nn.BatchNorm1d(width), nn.Linear(width, num_classes))


def stage_channels(encoder: nn.Module, layers: Mapping[str, int]) -> Mapping[str, int]:
    """Return the channels of every stage, and check that the encoder has the configured stages."""
    channels: Mapping[str, int] = required(encoder, "stage_channels")
    unknown = sorted(set(layers) - set(channels))
    if unknown or not layers:
        raise ValueError(
            f"layers: expected some of {', '.join(channels)}, got {', '.join(unknown) or 'none'}; to replace all, give "
            "--model.layers null before --model.layers '{...}'"
        )
    return channels


def of_stages(top1: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename each stage's accuracy to `<stage>_top1`, and add the maximum as `best_top1`."""
    best = torch.stack(list(top1.values())).max()
    return {**{f"{stage}_top1": value for stage, value in top1.items()}, "best_top1": best}


class LinearClassification(Classification):
    """Linear classifiers on frozen features, trained side by side, one for each learning rate of a sweep.

    The best learning rate depends on the scale of the features, which differs a hundredfold between methods. The test
    takes two loaders: images held out from training, to choose the rate, and test images. The first rate with the
    highest accuracy is chosen; rates with non-finite scores are excluded. Logs `test/learning_rate`, `test/top1` and
    `test/top5` for the chosen rate, and `test/top1_lr_<rate>` and `test/validation_top1_lr_<rate>` for each rate. If
    training diverges for one rate, the other rates are not affected.

    Args:
        learning_rates: learning rates of SGD. Each trains a separate classifier.
        normalize_features: `none` is the published protocol. `l2` scales to unit length. `batch_norm` standardizes each
            feature without learned parameters: with batch statistics in training, with running statistics in the test.

    Source: docs/papers/mct.md [9], ImageNet linear.
    """

    test_loaders = ("images held out from training", "test images")

    def __init__(
        self,
        image_encoder: nn.Module,
        num_classes: PositiveInt,
        learning_rates: Sequence[PositiveFloat] = (0.3, 3.0, 30.0),
        milestones: Sequence[NonNegativeInt] = (60, 80),
        normalize_features: Literal["none", "l2", "batch_norm"] = "none",
        **kwargs: Any,
    ) -> None:
        width = required(image_encoder, "feature_dim")
        heads = {f"{rate:g}": linear(width, num_classes) for rate in learning_rates}
        if len(heads) != len(learning_rates) or not heads:
            raise ValueError(f"learning_rates: expected different values, got {list(learning_rates)}")
        super().__init__(
            image_encoder, heads, num_classes, learning_rates, "sgd", milestones=milestones, frozen=True, **kwargs
        )
        self.l2 = normalize_features == "l2"
        self.norm = nn.BatchNorm1d(width, affine=False) if normalize_features == "batch_norm" else nn.Identity()

    def features(self, inputs: Tensor) -> Tensor:
        features = self.encoder(inputs)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(_dtype(self.heads))
            return self.norm(F.normalize(features) if self.l2 else features)

    def losses(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Compute each classifier's cross entropy. For a diverged classifier, return NaN without gradient."""
        # Otherwise a shared loss scale or gradient norm would make the others diverge, too.
        valid = {name: scores.detach().isfinite().all() for name, scores in logits.items()}
        losses = super().losses({name: torch.where(valid[name], scores, 0.0) for name, scores in logits.items()}, batch)
        # The difference of two finite scores can be infinite.
        valid = {name: valid[name] & loss.detach().isfinite() for name, loss in losses.items()}
        return {name: torch.where(valid[name], loss, torch.nan) for name, loss in losses.items()}

    def total(self, losses: Tensor) -> Tensor:
        """Add the losses of all classifiers that have not diverged. Return NaN if all have diverged."""
        return torch.where(losses.detach().isnan().all(), torch.nan, losses.nansum())

    def curves(self, logits: Mapping[str, Tensor], losses: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return {f"loss_lr_{rate}": loss for rate, loss in losses.items()}

    def results(self, means: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        validation, test = means
        valid = [name for name in self.names if validation[f"{name} finite"] == 1]
        if not valid:
            raise ValueError(f"learning_rates: training diverged with all of {', '.join(self.names)}; add smaller ones")
        chosen = max(valid, key=lambda name: float(validation[f"{name} top1"]))
        results = {
            "top1": 100 * test[f"{chosen} top1"],
            "top5": 100 * test[f"{chosen} top5"],
            "learning_rate": torch.tensor(float(self.rates[self.names.index(chosen)])),
            "images": test["count"],
            "validation_images": validation["count"],
        }
        for name in self.names:
            results[f"top1_lr_{name}"] = 100 * test[f"{name} top1"]
            results[f"validation_top1_lr_{name}"] = 100 * validation[f"{name} top1"]
        return results


class MultiLabelTagging(Classification):
    """A linear layer on frozen features that predicts an image's tags.

    Logs `test/map` over the tags with a positive test image, the number of these tags as `test/classes`, and
    `test/images`. `media/average_precision.csv` lists every tag. Difficult entries are ignored.

    Args:
        learning_rate: learning rate of SGD. The loss is a sum over tags, so the rate fits any number of tags.

    Shapes:
        Batch: `image` [B, 3, H, W], `labels` [B, C] of 1 (present), 0 (absent) and -1 (difficult), `index` [B].

    Source: docs/papers/mct.md [8], Stock; the learning rate and its schedule are ours.
    """

    fewest_classes = 1
    test_loaders = ("test images",)

    def __init__(
        self,
        image_encoder: nn.Module,
        num_classes: PositiveInt,
        learning_rate: PositiveFloat = 0.3,
        milestones: Sequence[NonNegativeInt] = (60, 80),
        **kwargs: Any,
    ) -> None:
        heads = {"head": linear(required(image_encoder, "feature_dim"), num_classes)}
        super().__init__(
            image_encoder, heads, num_classes, [learning_rate], "sgd", milestones=milestones, frozen=True, **kwargs
        )

    def losses(self, logits: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        labels, scores = batch["labels"], logits["head"]
        each = F.binary_cross_entropy_with_logits(scores, (labels == 1).to(scores.dtype), reduction="none")
        return {"head": torch.where(labels >= 0, each, 0.0).sum(1).mean()}

    def on_test_epoch_start(self) -> None:
        self.table = RowsOncePerSample("scores", "labels")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        labels = batch["labels"].to(torch.int8)
        self.table.update(batch["index"], scores=self(batch["image"])["head"].float(), labels=labels)

    def on_test_epoch_end(self) -> None:
        rows = {name: rows.cpu().numpy() for name, rows in self.table.compute(self.device)[1].items()}
        average = np.array([average_precision(*columns) for columns in zip(rows["scores"].T, rows["labels"].T)])
        notes = [{"left_out": "no positive test sample" if np.isnan(value) else ""} for value in average]
        metrics = mean_average_precision(self, average, notes)
        log_results(self, {**metrics, "test/images": torch.tensor(float(len(rows["labels"])))})


def linear(width: int, classes: int) -> nn.Linear:
    """Build a linear classifier with small random weights and zero bias."""
    layer = nn.Linear(width, classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _inputs(batch: Batch) -> Tensor:
    return batch["image"] if "image" in batch else batch["video"]


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
