"""What is measured of generated images, and the small networks that measure it in the miniature.

`GenerationEvaluation` applies the paper's metrics with released networks. `MiniatureEvaluation` applies the same
formulas to the miniature, with a network that learned to name what is in a picture; its metrics are called `mini_...`.
This network, and the one that stands in for an ImageNet network in the loss between generated and real images, are
trained by stages of their own (`MiniatureClassification`) and differ in width and task: a metric must not be the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor, nn

from common.data.worlds.two_objects import ATTRIBUTE_SIZES
from common.encoders.checkpoint_files import CheckpointError, below, differences, read_checkpoint
from common.files import cache_folder
from common.metrics.captioning.meter import gather_objects
from common.metrics.gathering import OncePerSample, RowsOncePerSample
from common.metrics.generation import (
    CLASSES,
    FeatureStatistics,
    InceptionScore,
    Moments,
    ObjectAccuracy,
    RPrecision,
    first_ranked,
    frechet_distance,
    mentioned_classes,
    object_accuracy,
    object_captions,
)
from common.training.optimisers import warm_up_then_cosine
from papers.xmc_gan.judges import ClipJudge, InceptionV3, ObjectDetector, TensorFlowInception

Batch = dict[str, Any]
Task = Literal["pairs", "crops", "untrained"]


# -- the miniature's networks ------------------------------------------------------------------------------------------


class PretrainedNetwork(nn.Module):
    """A network of the miniature, trained by a stage of its own and read from that stage's checkpoint.

    Args:
        pretrained: checkpoint; None keeps the random weights.
    """

    def __init__(self, pretrained: str | None) -> None:
        super().__init__()
        self.pretrained = pretrained

    def judge(self, images: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of every image [B].

        Args:
            images: [B, 3, S, S] in [0, 1].
            attributes: left shape, left colour, right shape, right colour, ground [B, 5].
        """
        raise NotImplementedError

    def load_pretrained(self) -> Self:
        """Read the weights where there are any, and freeze the network.

        Raises:
            CheckpointError: the file is missing, damaged or of another network.
        """
        if self.pretrained is not None:
            found = below(dict(read_checkpoint(self.pretrained).get("state_dict", {})), "network.")
            problem = differences(self.state_dict(), found)
            if problem:
                raise CheckpointError(f"{self.pretrained}: not the weights of a {type(self).__name__}: {problem}")
            self.load_state_dict(found)
        return self.eval().requires_grad_(False)


def convolutions(width: int, feature_dim: int, grid: int) -> nn.Sequential:
    """Three convolutions of stride 2, a grid of means, and a layer of ReLU features.

    Args:
        width: channels of the first; doubled by each further one.
        feature_dim: number of features.
        grid: cells of the grid a side; 1 forgets where things are.

    Source: specification 14.4.
    """
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(4 * width * grid**2, feature_dim), nn.ReLU()]
    return nn.Sequential(*layers, *pool)


class AttributeClassifier(PretrainedNetwork):
    """Names shape and colour in both halves of a picture, and its ground: the network that the miniature is judged by.

    Args:
        width, feature_dim, grid: see `convolutions`.
        sizes: number of values of each attribute.
        pretrained: checkpoint of the stage `mini_evaluator`.

    Source: specification 14.4a.
    """

    def __init__(
        self,
        width: int = 16,
        feature_dim: int = 64,
        grid: int = 4,
        sizes: Sequence[int] = ATTRIBUTE_SIZES,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(pretrained)
        self.sizes = list(sizes)
        self.features = convolutions(width, feature_dim, grid)
        self.head = nn.Linear(feature_dim, sum(sizes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, feature_dim], and log-probabilities of the values of all attributes [B, sum of sizes]."""
        features = self.features(images)
        parts = self.head(features).float().split(self.sizes, dim=1)
        return features.float(), torch.cat([part.log_softmax(1) for part in parts], dim=1)

    def judge(self, images: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropies of every image [B], and whether both objects are named right [B]."""
        values = self(images)[1]
        loss = -(values * self.one_hot(attributes)).sum(1)
        return loss, (self.named(values) == attributes)[:, :4].all(1).float()

    def named(self, values: Tensor) -> Tensor:
        """The most probable value of every attribute [B, 5]."""
        return torch.stack([part.argmax(1) for part in values.split(self.sizes, dim=1)], dim=1)

    def one_hot(self, attributes: Tensor) -> Tensor:
        """Marks of the values [B, sum of sizes]."""
        return torch.cat([F.one_hot(a, n) for a, n in zip(attributes.unbind(1), self.sizes)], dim=1).float()

    def identity(self, attributes: Tensor) -> Tensor:
        """A number for every combination of values [B]."""
        number = torch.zeros_like(attributes[:, 0])
        for values, size in zip(attributes.unbind(1), self.sizes):
            number = number * size + values
        return number


class PictureNetwork(PretrainedNetwork):
    """Stands in for an ImageNet network in the loss between generated and real images; its outputs are the features.

    Args:
        task: what it learns. `pairs`: which combinations of colour and shape a picture shows, and its ground, without
            places. `crops`: the combination in a half of a picture, as networks for photos of one thing learn; a weaker
            teacher. `untrained`: nothing, the weakest.
        width, feature_dim, grid: see `convolutions`.
        sizes: number of values of each attribute.
        pretrained: checkpoint of the stage `mini_image_network`; None for random weights.

    Raises:
        ValueError: an unknown task.

    Source: specification 14.4b and 14.8.
    """

    def __init__(
        self,
        task: Task = "pairs",
        width: int = 12,
        feature_dim: int = 48,
        grid: int = 4,
        sizes: Sequence[int] = ATTRIBUTE_SIZES,
        pretrained: str | None = None,
    ) -> None:
        super().__init__(pretrained)
        if task not in get_args(Task):
            raise ValueError(f"task: {task!r} is not one of {', '.join(get_args(Task))}")
        self.task = task
        self.colours = sizes[1]
        self.pairs = sizes[0] * sizes[1]
        self.grounds = 0 if task == "crops" else sizes[4]
        self.features = convolutions(width, feature_dim, grid)
        self.head = nn.Linear(feature_dim, self.pairs + self.grounds)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, F] of images [B, 3, S, S] or of halves of them [B, 3, S, S / 2]."""
        return self.head(self.features(images))

    def judge(self, images: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every image [B], and whether all of its objects are named right [B].

        Raises:
            ValueError: the task has nothing to learn.
        """
        pairs = attributes[:, [0, 2]] * self.colours + attributes[:, [1, 3]]
        if self.task == "crops":
            halves = torch.stack(images.chunk(2, dim=3), dim=1)
            scores = self(halves.flatten(0, 1)).float()
            loss = F.cross_entropy(scores, pairs.flatten(), reduction="none").view(-1, 2).sum(1)
            return loss, (scores.argmax(1).view(-1, 2) == pairs).all(1).float()
        if self.task == "untrained":
            raise ValueError("a PictureNetwork with the task untrained has nothing to learn: leave its stage out")
        present, ground = self(images).float().split([self.pairs, self.grounds], dim=1)
        marks = torch.zeros_like(present).scatter_(1, pairs, 1.0)
        loss = F.binary_cross_entropy_with_logits(present, marks, reduction="none").sum(1)
        loss = loss + F.cross_entropy(ground, attributes[:, 4], reduction="none")
        return loss, ((present > 0) == marks.bool()).all(1).float()


class MiniatureClassification(pl.LightningModule):
    """Training of a network of the miniature on real pictures and the truth about them.

    Args:
        network: what is trained; its checkpoint holds it under `network.`.
        noise: largest standard deviation of the noise that pictures get, so that unsharp ones are judged sensibly.
        learning_rate: of Adam; half a cosine to zero.

    Source: specification 14.4.
    """

    def __init__(self, network: PretrainedNetwork, noise: float = 0.2, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"], logger=False)
        self.network = network
        self.meter = OncePerSample("loss", "accuracy")

    def _attributes(self, split: str, batch: Batch) -> Tensor:
        return self.trainer.datamodule.attributes(split)[batch["index"].cpu()].to(self.device)  # type: ignore[attr-defined]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = batch["image"]
        strength = torch.rand(len(images), 1, 1, 1, device=self.device) * self.hparams["noise"]
        losses, right = self.network.judge(
            images + strength * torch.randn_like(images), self._attributes("train", batch)
        )
        loss = losses.mean()
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": 100 * right.mean()}, batch_size=len(images))
        return loss

    def on_test_start(self) -> None:
        self.meter = OncePerSample("loss", "accuracy")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        loss, right = self.network.judge(batch["image"], self._attributes("test", batch))
        self.meter.update(batch["index"], loss=loss, accuracy=100 * right)

    def on_test_epoch_end(self) -> None:
        found = self.meter.compute(self.device)
        self.log_dict({f"test/{name}": found[name] for name in ("loss", "accuracy")} | {"test/images": found["count"]})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.hparams["learning_rate"])
        factor = warm_up_then_cosine(0, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RealImages(pl.LightningModule):
    """The real images of the test captions, judged as if they were generated: the first row of the ablation.

    Args:
        evaluation: `MiniatureEvaluation` or `GenerationEvaluation`.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__()
        self.evaluation = evaluation

    def setup(self, stage: str) -> None:
        self.evaluation.load_pretrained()

    def on_test_start(self) -> None:
        self.evaluation.begin(self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation.update(batch["image"], batch)

    def on_test_epoch_end(self) -> None:
        from papers.xmc_gan.diagnostics import draw_real

        self.log_dict({f"test/{name}": value for name, value in self.evaluation.compute().items()})
        draw_real(self)


# -- the miniature's metrics -------------------------------------------------------------------------------------------


class MiniatureEvaluation:
    """The paper's metrics in the miniature, by a network that names what is in a picture.

    | name | of |
    |---|---|
    | `mini_fd` | Frechet distance of the network's features to those of other real pictures |
    | `mini_fd_floor` | the same of the captions' own real pictures, as many: what a perfect generator reaches |
    | `mini_r_precision` | captions whose attributes out-score 99 different ones, in percent; chance is 1 |
    | `mini_r_precision_shuffled` | the same with the captions in another order: the control, at chance |
    | `mini_soa_i`, `mini_soa_c` | objects whose half has the right shape and colour, and the mean over shapes |
    | `mini_soa_i_shuffled` | the control; chance is 8.3 |
    | `mini_background` | pictures with the right ground |
    | `captions` | how many there were |

    Its network is no part of the module's state.

    Args:
        evaluator: the network, with the checkpoint of its stage. Without one nothing is measured, and a line says so.
        candidates: texts that an image is compared with, its own among them.
        seed: of their draw.

    Source: specification 14.5.
    """

    repeats = 1

    def __init__(self, evaluator: AttributeClassifier, candidates: int = 100, seed: int = 0) -> None:
        self.evaluator = evaluator
        self.candidates = candidates
        self.seed = seed
        self._loaded = False

    def load_pretrained(self) -> None:
        """Read the network, so that a wrong file ends a run before it trains.

        Raises:
            CheckpointError: the file is missing, damaged or of another network.
        """
        if not self._loaded:
            self.evaluator.load_pretrained()
            self._loaded = True

    def begin(self, module: pl.LightningModule) -> None:
        """Start anew, and look at the real pictures that generated ones are compared with.

        Args:
            module: its device is used, and its trainer's data module brings pictures and the truth about them.
        """
        self.load_pretrained()
        self.device = module.device
        if self.evaluator.pretrained is None:
            _say("mini_* are left out: evaluation.evaluator.pretrained names no checkpoint of mini_evaluator")
            return
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        self.evaluator.to(self.device).eval()
        self._attributes = data.attributes("test")
        self._rows = RowsOncePerSample("features", "values", "real_features")
        statistics = FeatureStatistics()
        for batch in data.reference_loader():
            batch = _without_substitutes(batch)
            statistics.update(batch["index"], self._judged(batch["image"].to(self.device))[0])
        self._reference = statistics.compute()

    @torch.no_grad()
    def _judged(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            return self.evaluator(images.float())

    def update(self, generated: Tensor, batch: Batch, repeat: int = 0) -> None:
        """Add a batch.

        Args:
            generated: [B, 3, S, S] in [0, 1].
            batch: the real pictures `image` of the same captions, and `index` of the samples [B].
            repeat: not used.
        """
        if self.evaluator.pretrained is None:
            return
        features, values = self._judged(generated)
        real = self._judged(batch["image"])[0]
        self._rows.update(batch["index"], features=features, values=values, real_features=real)

    def compute(self) -> dict[str, float]:
        """All metrics, the same on every process."""
        if self.evaluator.pretrained is None:
            return {}
        index, rows = self._rows.compute(self.device)
        truth = self._attributes[index.cpu()]
        values = rows["values"].cpu()
        found = {
            "captions": float(len(index)),
            "mini_fd": frechet_distance(Moments.of(rows["features"]), self._reference),
            "mini_fd_floor": frechet_distance(Moments.of(rows["real_features"]), self._reference),
        }
        order = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(index)))
        for suffix, own in (("", truth), ("_shuffled", truth[order])):
            text, identity = self.evaluator.one_hot(own), self.evaluator.identity(own)
            hits = first_ranked(values, text, identity, self.candidates, self.seed)
            found[f"mini_r_precision{suffix}"] = 100 * float(hits.double().mean())
            soa_c, soa_i = self._objects(values, own)
            found[f"mini_soa_i{suffix}"] = soa_i
            if not suffix:
                found["mini_soa_c"] = soa_c
        ground = self.evaluator.named(values)[:, 4] == truth[:, 4]
        found["mini_background"] = 100 * float(ground.double().mean())
        return found

    def _objects(self, values: Tensor, truth: Tensor) -> tuple[float, float]:
        right = self.evaluator.named(values) == truth
        hits = torch.cat([right[:, 0] & right[:, 1], right[:, 2] & right[:, 3]])
        shapes = torch.cat([truth[:, 0], truth[:, 2]])
        size = self.evaluator.sizes[0]
        return object_accuracy(shapes.bincount(minlength=size), shapes[hits].bincount(minlength=size))


# -- the paper's metrics -----------------------------------------------------------------------------------------------


class GenerationEvaluation:
    """The paper's metrics with released networks.

    | name | network | comparable with the tables |
    |---|---|---|
    | `fid`, `inception_score` | `inception`: torchvision's Inception V3 | yes, up to the conversion of the weights |
    | `fid_tv` | `inception_tv`: torchmetrics' Inception of 2015 | no: another network |
    | `r_precision` | `clip` | no: the paper's encoder is not published |
    | `soa_c`, `soa_i` | `detector`: torchvision's Faster R-CNN | roughly: another detector, other lists of words |

    Each comes with its standard deviation over the repetitions, `<name>_spread`, and `r_precision_fold_spread` is that
    over the folds. A network that is not at hand leaves its metrics out, and a line at the start says which file is
    missing. Statistics of real images are kept in the cache folder. The networks are no part of the module's state.

    Args:
        inception, inception_tv, clip, detector: files and, for CLIP, a folder; None leaves the metrics out.
        repeats: how often all images are generated, each time with other noise.
        splits: of the inception score.
        candidates, folds: of R-precision.
        object_copies, person_captions: of SOA, see `object_captions`; it takes images of its own for all captions
            of the test split. 0 copies measure it on the images of the other metrics instead, and count every caption.
        seed: of draws and of the noise of SOA's images.

    Source: specification 9.
    """

    def __init__(
        self,
        inception: str | None = None,
        inception_tv: str | None = None,
        clip: str | None = None,
        detector: str | None = None,
        repeats: int = 3,
        splits: int = 1,
        candidates: int = 100,
        folds: int = 10,
        object_copies: int = 3,
        person_captions: int = 30_000,
        seed: int = 0,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats: must be at least 1, got {repeats}")
        self.files = {"inception": inception, "inception_tv": inception_tv, "clip": clip, "detector": detector}
        self.repeats = repeats
        self.splits = splits
        self.candidates = candidates
        self.folds = folds
        self.object_copies = object_copies
        self.person_captions = person_captions
        self.seed = seed
        self._networks: dict[str, nn.Module] | None = None
        self.missing: list[str] = []

    def load_pretrained(self) -> None:
        """Read the networks that are at hand and say which are not; before training, when a file can still be fetched.

        Raises:
            CheckpointError: a file is there but is damaged or of another network.
        """
        if self._networks is not None:
            return
        self._networks, self.missing = {}, []
        for name, path in self.files.items():
            kind, metrics, wanted = _JUDGES[name]
            if path is None or not Path(path).exists():
                where = f"evaluation.{name} is null" if path is None else f"{path} does not exist"
                self.missing.append(f"{metrics} will be left out: {where} (wanted: {wanted})")
                continue
            try:
                self._networks[name] = kind(path)
            except ModuleNotFoundError as error:
                self.missing.append(f"{metrics} will be left out: {error}")
        for line in self.missing:
            _say(line)

    def begin(self, module: pl.LightningModule) -> None:
        """Start anew; look at the real images where their statistics are not in the cache.

        Args:
            module: its device is used and its trainer's data module; SOA generates images with it.
        """
        self.load_pretrained()
        assert self._networks is not None
        self.module = module
        for network in self._networks.values():
            network.to(module.device)
        self.data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        total = len(module.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
        self._features = {(k, r): FeatureStatistics() for k in _FEATURES for r in range(self.repeats)}
        self._scores = [InceptionScore(self.splits, total) for _ in range(self.repeats)]
        self._precision = [RPrecision(self.candidates, self.folds, self.seed) for _ in range(self.repeats)]
        self._objects = [ObjectAccuracy() for _ in range(self.repeats)]
        self._real = {name: self._real_moments(name) for name in _FEATURES if name in self._networks}

    @torch.no_grad()
    def update(self, generated: Tensor, batch: Batch, repeat: int = 0) -> None:
        """Add a batch.

        Args:
            generated: [B, 3, S, S] in [0, 1].
            batch: `index` of the samples and numbers of their `caption` [B].
            repeat: which repetition, from 0 to `repeats` - 1.
        """
        assert self._networks is not None
        rows: Batch = {name: batch[name] for name in ("index", "caption", "skipped") if name in batch}
        rows = _without_substitutes({**rows, "generated": generated})
        if len(rows["index"]):
            with torch.autocast(generated.device.type, enabled=False):
                self._judge(rows["index"], rows["generated"].float(), rows["caption"], repeat)

    def _judge(self, index: Tensor, images: Tensor, captions: Tensor, repeat: int) -> None:
        assert self._networks is not None
        for name in self._real:
            features = self._networks[name](images)
            if name == "inception":
                features, probabilities = features
                self._scores[repeat].update(index, probabilities)
            self._features[name, repeat].update(index, features)
        texts = self.data.texts("test", captions.tolist())
        if "clip" in self._networks:
            judge = cast(ClipJudge, self._networks["clip"])
            identity = torch.tensor([_number(text) for text in texts], device=images.device)
            self._precision[repeat].update(index, judge.images(images), judge.texts(texts), identity)
        if "detector" in self._networks and self.object_copies == 0:
            named = _marks([mentioned_classes(text) for text in texts])
            self._objects[repeat].update(index, named, self._networks["detector"](images))

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """All metrics whose network is at hand, the same on every process."""
        assert self._networks is not None
        device = self.module.device
        found: dict[str, list[float]] = {}
        for repeat in range(self.repeats):
            for name, real in self._real.items():
                distance = frechet_distance(self._features[name, repeat].compute(), real)
                found.setdefault(_FEATURES[name], []).append(distance)
            if "inception" in self._networks:
                found.setdefault("inception_score", []).append(self._scores[repeat].compute()[0])
            if "clip" in self._networks:
                share, spread = self._precision[repeat].compute(device)
                found.setdefault("r_precision", []).append(share)
                found.setdefault("r_precision_fold_spread", []).append(spread)
            if "detector" in self._networks and (repeat == 0 or self.object_copies == 0):
                if self.object_copies > 0:
                    self._look_for_objects()
                soa_c, soa_i = self._objects[repeat].compute(device)
                found.setdefault("soa_c", []).append(soa_c)
                found.setdefault("soa_i", []).append(soa_i)
        means = {name: float(np.mean(values)) for name, values in found.items()}
        repeated = {name: values for name, values in found.items() if len(values) > 1 and name in _SPREAD}
        spreads = {f"{name}_spread": float(np.std(values)) for name, values in repeated.items()}
        return {**means, **spreads}

    def _look_for_objects(self) -> None:
        """Generate an image of every caption that names a class, several times, and look for the class in it."""
        assert self._networks is not None
        captions = self.data.texts("test", list(range(self.data.caption_count)))
        wanted = object_captions(captions, self.object_copies, self.person_captions, self.seed)
        module: Any = self.module
        loader = self.data.caption_loader([image.caption for image in wanted])
        silent = not module.trainer.is_global_zero
        for batch in track(loader, "  images for object accuracy", disable=silent):
            batch = {
                name: value.to(module.device) if isinstance(value, Tensor) else value for name, value in batch.items()
            }
            z = noise_of(batch["index"], module.generator.z_dim, self.seed).to(module.device)
            with module.trainer.precision_plugin.forward_context():
                images = module.generate(module.captions(batch), z)
            named = _marks([wanted[number].classes for number in batch["index"].tolist()])
            self._objects[0].update(batch["index"], named, self._networks["detector"](images))

    @torch.no_grad()
    def _real_moments(self, name: str) -> Moments:
        """Statistics of real images, from the cache or made and kept there."""
        assert self._networks is not None
        loader = self.data.reference_loader()
        path = cache_folder() / "generation" / f"{self._key(name, loader)}.npz"
        if all(gather_objects([path.is_file()])):  # processes may run on machines with caches of their own
            return Moments.load(path)
        statistics = FeatureStatistics()
        network = self._networks[name]
        for batch in loader:
            batch = _without_substitutes(batch)
            features = network(batch["image"].to(self.module.device))
            statistics.update(batch["index"], features[0] if isinstance(features, tuple) else features)
        moments = statistics.compute()
        if self.module.trainer.is_global_zero:
            moments.save(path)
        return moments

    def _key(self, name: str, loader: Any) -> str:
        """Hash of what decides the statistics: the weights, the pictures and how they are read."""
        weights = hashlib.sha256(Path(str(self.files[name])).read_bytes()).hexdigest()
        content = repr((name, weights, loader.dataset.describe(), len(loader.dataset), vars(self.data.transform)))
        return hashlib.sha256(content.encode()).hexdigest()[:24]


_FEATURES = {"inception": "fid", "inception_tv": "fid_tv"}
#: Metrics whose standard deviation over the repetitions is given, too.
_SPREAD = ("fid", "fid_tv", "inception_score", "r_precision", "soa_c", "soa_i")
#: Of every network its metrics, and the file or folder that it is read from.
_JUDGES: dict[str, tuple[Callable[[str], nn.Module], str, str]] = {
    "inception": (InceptionV3, "fid and inception_score", "inception_v3_google-0cc3c7bd.pth of torchvision"),
    "inception_tv": (TensorFlowInception, "fid_tv", "weights-inception-2015-12-05-6726825d.pth of torch-fidelity"),
    "clip": (ClipJudge, "r_precision", "a folder of CLIP with its tokenizer, as save_pretrained writes it"),
    "detector": (ObjectDetector, "soa_c and soa_i", "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth of torchvision"),
}


#: What measures generated images.
Evaluation = MiniatureEvaluation | GenerationEvaluation


def noise_of(index: Tensor, size: int, seed: int) -> Tensor:
    """Noise [B, size] of samples [B]: a function of seed and sample alone, whatever process and batch they are in."""
    rows = [np.random.default_rng((seed, number)).standard_normal(size, dtype=np.float32) for number in index.tolist()]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, size)


def _without_substitutes(batch: Batch) -> Batch:
    """A batch without samples that stand in for a broken file: they are counted at their own place."""
    if "skipped" not in batch:
        return batch
    kept = batch["skipped"] == 0
    return {name: value[kept.to(value.device)] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _marks(classes: Sequence[Sequence[int]]) -> Tensor:
    marks = torch.zeros(len(classes), len(CLASSES), dtype=torch.bool)
    for row, numbers in zip(marks, classes):
        row[list(numbers)] = True
    return marks


def _number(text: str) -> int:
    """The same number for the same words, on every process."""
    words = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")


@rank_zero_only
def _say(line: str) -> None:
    print(f"  {line}")
