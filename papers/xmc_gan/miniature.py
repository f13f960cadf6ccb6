"""Stand-ins for downloads in the miniature: for BERT, an ImageNet network, and the networks of metrics.

`NGramText` replaces BERT. `PictureNetwork` replaces the ImageNet network in the loss between generated and real images.
`MiniatureEvaluation` applies the formulas of the paper's metrics, as `mini_...`, to the outputs of an
`AttributeClassifier`, which names the contents of a picture. `MiniatureClassification` trains the two picture networks
in separate stages; they differ in width and task, so that the metric isn't the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.text_features import pool_sentence, valid_mask
from common.data.worlds.two_objects import TwoObjectsWorld
from common.encoders.checkpoint_files import below, load_exactly, read_checkpoint
from common.metrics.gathering import OncePerSample, RowsOncePerSample
from common.metrics.generation import FeatureStatistics, Moments, first_ranked, frechet_distance, object_accuracy
from common.protocols.generation import ImageEvaluation, print_once, without_substitutes
from common.training.optimizers import warm_up_then_cosine
from common.types import NonNegativeFloat, PositiveFloat, PositiveInt

Batch = dict[str, Any]
ATTRIBUTE_SIZES = TwoObjectsWorld.attribute_sizes()
#: Number of tokens before and after a word that change its vector.
RADIUS = 3
#: Picture networks average their last map over a grid of GRID x GRID cells.
GRID = 4


# -- text --------------------------------------------------------------------------------------------------------------


class NGramText(nn.Module):
    """Encodes captions with frozen random features of n-grams, in place of BERT.

    A word vector is the tanh of the sum of random vectors, one per token in a window with `RADIUS` tokens on each side.
    The window binds color, shape and side to one object, and the tanh preserves part of this binding in the sentence's
    mean. The random vectors replace BERT's weights, so they are the same in every run.

    Shapes:
        tokens int64 [n, T], length int64 [n] -> words [n, T, E] in (-1, 1), sentence [n, E]

    Source: [14.2].
    """

    def __init__(self, vocabulary_size: PositiveInt = 256, width: PositiveInt = 48) -> None:
        super().__init__()
        self.feature_dim = width
        self.vocabulary_size = vocabulary_size
        table = torch.randn(2 * RADIUS + 1, vocabulary_size, width, generator=torch.Generator().manual_seed(0))
        table[:RADIUS] *= 0.7
        table[RADIUS + 1 :] *= 0.7
        table[:, 0] = 0.0  # padding contributes nothing
        self.table: Tensor
        self.register_buffer("table", table)

    @torch.no_grad()
    def forward(self, tokens: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        mask = valid_mask(length, tokens.shape[1])
        windows = F.pad(tokens * mask, (RADIUS, RADIUS)).unfold(1, 2 * RADIUS + 1, 1)  # [n, T, window]
        offsets = torch.arange(2 * RADIUS + 1, device=tokens.device)
        words = torch.tanh(self.table[offsets, windows].sum(2) / 1.5) * mask[..., None]
        return words, pool_sentence(words, length, "masked_mean")


# -- networks that look at pictures ------------------------------------------------------------------------------------


class PretrainedNetwork(nn.Module):
    """A network of the miniature with the weights of its stage's checkpoint; None means random weights."""

    def __init__(self, pretrained: str | None) -> None:
        super().__init__()
        self.pretrained = pretrained

    def loss_and_accuracy(self, images: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy [B] of images [B, 3, S, S] in [0, 1]. `attributes` [B, A]: left, right, ground."""
        raise NotImplementedError

    def load_pretrained(self) -> Self:
        if self.pretrained is not None:
            weights = below(dict(read_checkpoint(self.pretrained).get("state_dict", {})), "network.")
            load_exactly(self, weights, f"{self.pretrained}: not the weights of a {type(self).__name__}")
        return self.eval().requires_grad_(False)


def convolutions(width: int, feature_dim: int) -> nn.Sequential:
    """Build three convolutions of stride 2, mean pooling to a grid, and a linear layer with ReLU.

    The first convolution has `width` channels, and each next one twice as many.

    Source: [14.4].
    """
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(GRID), nn.Flatten(), nn.Linear(4 * width * GRID**2, feature_dim), nn.ReLU()]
    return nn.Sequential(*layers, *pool)


def combination(attributes: Tensor, sizes: Sequence[int]) -> Tensor:
    """Number the combinations of attribute values: map attributes [..., A] to integers [...]. `sizes` counts values."""
    number = torch.zeros_like(attributes[..., 0])
    for values, size in zip(attributes.unbind(-1), sizes, strict=True):
        number = number * size + values
    return number


class AttributeClassifier(PretrainedNetwork):
    """Names the thing in each half of a picture and the ground, for the miniature's metrics.

    Args:
        sizes: number of values of each attribute: of the left thing, the right thing, and the ground.
        pretrained: checkpoint of the stage `mini_evaluator`.

    Source: [14.4]a.
    """

    def __init__(
        self,
        width: PositiveInt = 16,
        feature_dim: PositiveInt = 64,
        sizes: Sequence[PositiveInt] = ATTRIBUTE_SIZES,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(pretrained)
        self.sizes = list(sizes)
        self.features = convolutions(width, feature_dim)
        self.head = nn.Linear(feature_dim, sum(sizes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, feature_dim] and log-probabilities of the values of all attributes [B, sum of sizes]."""
        features = self.features(images)
        parts = self.head(features).float().split(self.sizes, dim=1)
        return features.float(), torch.cat([part.log_softmax(1) for part in parts], dim=1)

    def loss_and_accuracy(self, images: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Return every image's cross-entropy, summed over attributes [B], and whether both things are correct [B]."""
        values = self(images)[1]
        loss = -(values * self.one_hot(attributes)).sum(1)
        return loss, (self.named(values) == attributes)[:, :-1].all(1).float()

    def named(self, values: Tensor) -> Tensor:
        """Return the most probable value of every attribute [B, A]."""
        return torch.stack([part.argmax(1) for part in values.split(self.sizes, dim=1)], dim=1)

    def one_hot(self, attributes: Tensor) -> Tensor:
        """Encode attributes as one-hot vectors of their values [B, sum of sizes]."""
        pairs = zip(attributes.unbind(1), self.sizes, strict=True)
        return torch.cat([F.one_hot(a, n) for a, n in pairs], dim=1).float()


class PictureNetwork(PretrainedNetwork):
    """Replaces an ImageNet network in the loss between generated and real images. The loss compares its outputs.

    Args:
        task: `crops` trains on half pictures, which show one thing each, like ImageNet's photos.
        pretrained: checkpoint of the stage `mini_image_network`; None means random weights.

    Source: [14.4]b.
    """

    def __init__(
        self,
        task: Literal["crops"] = "crops",
        width: PositiveInt = 12,
        feature_dim: PositiveInt = 48,
        sizes: Sequence[PositiveInt] = ATTRIBUTE_SIZES,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(pretrained)
        self.thing_sizes = sizes[: len(sizes) // 2]
        self.features = convolutions(width, feature_dim)
        self.head = nn.Linear(feature_dim, math.prod(self.thing_sizes))

    def forward(self, images: Tensor) -> Tensor:
        """Score images [B, 3, S, S] or halves of images [B, 3, S, S / 2]: [B, F]."""
        return self.head(self.features(images))

    def loss_and_accuracy(self, images: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Return every image's loss [B], and whether the things in both halves are named correctly [B]."""
        things = combination(attributes[:, :-1].unflatten(1, (2, -1)), self.thing_sizes)
        scores = self(torch.stack(images.chunk(2, dim=3), dim=1).flatten(0, 1)).float()
        loss = F.cross_entropy(scores, things.flatten(), reduction="none").view(-1, 2).sum(1)
        return loss, (scores.argmax(1).view(-1, 2) == things).all(1).float()


class MiniatureClassification(pl.LightningModule):
    """Trains a network of the miniature on real pictures and their true attributes, by Adam with cosine decay to zero.

    `noise` is the largest standard deviation of noise added to pictures, so that blurred pictures get sensible scores.

    Source: [14.4].
    """

    def __init__(
        self, network: PretrainedNetwork, noise: NonNegativeFloat = 0.2, learning_rate: PositiveFloat = 2e-3
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"], logger=False)
        self.network = network

    def _attributes(self, split: str, batch: Batch) -> Tensor:
        return self.trainer.datamodule.attributes(split)[batch["index"].cpu()].to(self.device)  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = batch["image"]
        strength = torch.rand(len(images), 1, 1, 1, device=self.device) * self.hparams["noise"]
        losses, right = self.network.loss_and_accuracy(
            images + strength * torch.randn_like(images), self._attributes("train", batch)
        )
        loss = losses.mean()
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": 100 * right.mean()}, batch_size=len(images))
        return loss

    def on_test_start(self) -> None:
        self.meter = OncePerSample("loss", "accuracy")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        loss, right = self.network.loss_and_accuracy(batch["image"], self._attributes("test", batch))
        self.meter.update(batch["index"], loss=loss, accuracy=100 * right)

    def on_test_epoch_end(self) -> None:
        means = self.meter.compute(self.device)
        self.log_dict({f"test/{name}": means[name] for name in ("loss", "accuracy")} | {"test/images": means["count"]})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.hparams["learning_rate"])
        factor = warm_up_then_cosine(0, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# -- metrics -----------------------------------------------------------------------------------------------------------

#: Metrics that can select a checkpoint.
MINI_METRICS = ("mini_fd", "mini_r_precision", "mini_soa_i", "mini_soa_c", "mini_background")


class MiniatureEvaluation(ImageEvaluation):
    """The paper's metrics in the miniature, computed by a network that names the contents of a picture.

    | name | meaning |
    |---|---|
    | `mini_fd` | Frechet distance between the network's features of generated and of real pictures |
    | `mini_fd_floor` | same, with the captions' real pictures as the generated ones: a perfect generator |
    | `mini_r_precision` | captions whose attributes score above 99 others, in percent; chance is 1 |
    | `mini_r_precision_shuffled` | control with shuffled captions; should be at chance |
    | `mini_soa_i`, `mini_soa_c` | things named correctly in their half (shape, color or drawing); c: mean over things |
    | `mini_soa_i_shuffled` | control with shuffled captions; chance is 8.3 |
    | `mini_background` | pictures with the correct ground |
    | `captions` | number of captions |

    The network isn't part of the module's state. Without its checkpoint, nothing is measured and a message is printed.
    `candidates` is the number of texts to compare an image with, including the true one.

    Source: [14.5].
    """

    def __init__(self, evaluator: AttributeClassifier, candidates: PositiveInt = 100) -> None:
        self.evaluator = evaluator
        self.candidates = candidates

    def load_pretrained(self, verbose: bool = True) -> None:
        self.evaluator.load_pretrained()

    def why_not(self, metric: str) -> str:
        if metric not in MINI_METRICS:
            return f"there is no such metric; there are {', '.join(MINI_METRICS)}"
        named = self.evaluator.pretrained is not None
        return "" if named else "evaluation.evaluator.pretrained names no checkpoint of mini_evaluator"

    def begin(self, module: pl.LightningModule) -> None:
        self.device = module.device
        if self.evaluator.pretrained is None:
            print_once(f"mini_* are left out: {self.why_not('mini_fd')}")
            return
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        self.evaluator.to(self.device).eval()
        self._attributes = data.attributes("test")
        self._rows = RowsOncePerSample("features", "values", "real_features")
        statistics = FeatureStatistics()
        for batch in data.reference_loader():
            batch = without_substitutes(batch)
            statistics.update(batch["index"], self._features_and_values(batch["image"].to(self.device))[0])
        self._reference = statistics.compute()

    @torch.no_grad()
    def _features_and_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            return self.evaluator(images.float())

    def update(self, generated: Tensor, batch: Batch, repeat: int = 0) -> None:
        if self.evaluator.pretrained is None:
            return
        features, values = self._features_and_values(generated)
        real = self._features_and_values(batch["image"])[0]
        self._rows.update(batch["index"], features=features, values=values, real_features=real)

    def compute(self) -> dict[str, float]:
        if self.evaluator.pretrained is None:
            return {}
        index, rows = self._rows.compute(self.device)
        truth = self._attributes[index.cpu()]
        values = rows["values"].cpu()
        metrics = {
            "captions": float(len(index)),
            "mini_fd": frechet_distance(Moments.of(rows["features"]), self._reference),
            "mini_fd_floor": frechet_distance(Moments.of(rows["real_features"]), self._reference),
        }
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(index)))
        for suffix, said in (("", truth), ("_shuffled", truth[order])):
            text, identity = self.evaluator.one_hot(said), combination(said, self.evaluator.sizes)
            hits = first_ranked(values, text, identity, self.candidates, seed=0)
            metrics[f"mini_r_precision{suffix}"] = 100 * float(hits.double().mean())
            soa_c, metrics[f"mini_soa_i{suffix}"] = self._objects(values, said)
            if not suffix:
                metrics["mini_soa_c"] = soa_c
        ground = self.evaluator.named(values)[:, -1] == truth[:, -1]
        metrics["mini_background"] = 100 * float(ground.double().mean())
        return metrics

    def _objects(self, values: Tensor, truth: Tensor) -> tuple[float, float]:
        right = (self.evaluator.named(values) == truth)[:, :-1]
        hits = torch.cat([half.all(1) for half in right.chunk(2, dim=1)])
        shapes = torch.cat([half[:, 0] for half in truth[:, :-1].chunk(2, dim=1)])
        size = self.evaluator.sizes[0]
        return object_accuracy(shapes.bincount(minlength=size), shapes[hits].bincount(minlength=size))
