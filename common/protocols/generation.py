"""FID, inception score, R-precision and semantic object accuracy. Over all processes, every sample counts once."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor, nn

from common.data.datasets.coco import CLASSES
from common.files import cache_folder
from common.metrics.gathering import gather_objects
from common.metrics.generation import (
    FeatureStatistics,
    InceptionScore,
    Moments,
    ObjectAccuracy,
    RPrecision,
    frechet_distance,
    mentioned_classes,
    object_captions,
)
from common.metrics.generation.networks import ClipEmbeddings, InceptionV3, ObjectDetector, TensorFlowInception
from common.monitoring.figures import draw_row
from common.types import AtLeastTwo, NonNegativeInt, PositiveInt

Batch = dict[str, Any]


class ImageEvaluation(ABC):
    """Evaluates images: call `load_pretrained`, `begin`, `update` for each batch and repetition, then `compute`."""

    repeats: int = 1  # how often to generate all images, with different noise

    @abstractmethod
    def load_pretrained(self, verbose: bool = True) -> None:
        """Read the networks, so that a wrong file stops a run before training."""

    @abstractmethod
    def why_not(self, metric: str) -> str:
        """Return why a metric cannot be measured (missing network or unknown name), or "" if it can."""

    @abstractmethod
    def begin(self, module: pl.LightningModule) -> None:
        """Reset the evaluation, and load the statistics of real images."""

    @abstractmethod
    def update(self, generated: Tensor, batch: Batch, repeat: int = 0) -> None:
        """Add a batch of generated images. If captions are used several times, `repeat` counts the repetitions from 0.

        Args:
            generated: images [B, 3, S, S] in [0, 1].
            batch: `index` [B] of the samples; `caption` [B], the number of each sample's caption; `image`, the real
                images.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Compute all metrics. Every process gets the same values."""


class NetworkFile(NamedTuple):
    """A released network: how to build it, the metrics that need it, and a description of the file for messages."""

    build: Callable[[str], nn.Module]
    metrics: tuple[str, ...]
    wanted: str


NETWORKS = {
    "inception": NetworkFile(
        InceptionV3, ("fid", "inception_score"), "inception_v3_google-0cc3c7bd.pth of torchvision"
    ),
    "inception_tv": NetworkFile(
        TensorFlowInception, ("fid_tv",), "weights-inception-2015-12-05-6726825d.pth of torch-fidelity"
    ),
    "clip": NetworkFile(
        ClipEmbeddings, ("r_precision",), "a folder of CLIP with its tokenizer, as save_pretrained writes it"
    ),
    "detector": NetworkFile(
        ObjectDetector, ("soa_c", "soa_i"), "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth of torchvision"
    ),
}
DISTANCES = ("inception", "inception_tv")
METRICS = tuple(name for network in NETWORKS.values() for name in network.metrics)


class GenerationEvaluation(ImageEvaluation):
    """Measures the metrics of text-to-image generation with released networks.

    | name | network | comparable to published numbers |
    |---|---|---|
    | `fid`, `inception_score` | `inception`: torchvision's Inception V3 | no: papers use Keras's or TensorFlow's |
    | `fid_tv` | `inception_tv`: torchmetrics' Inception of 2015 | to numbers of this network |
    | `r_precision` | `clip` | no: papers train their own encoders |
    | `soa_c`, `soa_i` | `detector`: torchvision's Faster R-CNN | roughly: the detector and the word lists differ |

    With several repetitions, `<name>_spread` is the standard deviation over repetitions (for object accuracy only if
    `object_copies` is 0). `r_precision_fold_spread` is the standard deviation over folds. Statistics of real images are
    cached. The networks are not part of the module's state.

    The module needs `images_of(batch, seed)`, which returns images [B, 3, S, S] for a batch's captions. Its data module
    needs `reference_loader()` of real images, and `texts("test", numbers)`, which returns captions by number. Object
    accuracy also needs `caption_count` and `caption_loader(numbers)`, which loads captions without images.

    Args:
        inception, inception_tv, clip, detector: files of networks (CLIP: a folder). Metrics of missing networks are
            skipped.
        splits: number of parts for the inception score.
        candidates, folds: arguments of `r_precision`.
        object_copies, person_captions: see `object_captions`. SOA generates separate images for the captions of the
            test split. With 0 copies, SOA uses the images of the other metrics.
        seed: seed of random choices and of the noise for SOA's images.

    Source: docs/papers/xmc_gan.md [9].
    """

    def __init__(
        self,
        inception: str | None = None,
        inception_tv: str | None = None,
        clip: str | None = None,
        detector: str | None = None,
        repeats: PositiveInt = 3,
        splits: PositiveInt = 1,
        candidates: AtLeastTwo = 100,
        folds: PositiveInt = 10,
        object_copies: NonNegativeInt = 3,
        person_captions: PositiveInt = 30_000,
        seed: NonNegativeInt = 0,
    ) -> None:
        self.files = {"inception": inception, "inception_tv": inception_tv, "clip": clip, "detector": detector}
        self.repeats = repeats
        self.splits = splits
        self.candidates = candidates
        self.folds = folds
        self.object_copies = object_copies
        self.person_captions = person_captions
        self.seed = seed
        self.missing: dict[str, str] = {}

    @cached_property
    def networks(self) -> dict[str, nn.Module]:
        """Return the available networks by the names of their arguments."""
        loaded: dict[str, nn.Module] = {}
        for name, path in self.files.items():
            build, metrics, wanted = NETWORKS[name]
            reason = ""
            if path is None:
                reason = f"evaluation.{name} is null (expected: {wanted})"
            elif not Path(path).exists():
                reason = f"{path} does not exist (expected: {wanted})"
            else:
                try:
                    loaded[name] = build(path)
                except ModuleNotFoundError as error:
                    reason = str(error)
            if reason:
                self.missing.update(dict.fromkeys(metrics, f"{' and '.join(metrics)} will be left out: {reason}"))
        return loaded

    def load_pretrained(self, verbose: bool = True) -> None:
        _ = self.networks
        for line in dict.fromkeys(self.missing.values()) if verbose else ():
            print_once(line)

    def why_not(self, metric: str) -> str:
        _ = self.networks
        if metric not in METRICS:
            return f"unknown metric; known are {', '.join(METRICS)}"
        return self.missing.get(metric, "")

    def begin(self, module: pl.LightningModule) -> None:
        self.module: Any = module
        for network in self.networks.values():
            network.to(module.device)
        self.data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
        total = len(module.trainer.test_dataloaders.dataset)  # type: ignore[union-attr]
        self._features = {(k, r): FeatureStatistics() for k in DISTANCES for r in range(self.repeats)}
        self._scores = [InceptionScore(self.splits, total) for _ in range(self.repeats)]
        self._precision = [RPrecision(self.candidates, self.folds, self.seed) for _ in range(self.repeats)]
        self._objects = [ObjectAccuracy() for _ in range(self.repeats)]
        self._real = {name: self._real_moments(name) for name in DISTANCES if name in self.networks}

    @torch.no_grad()
    def update(self, generated: Tensor, batch: Batch, repeat: int = 0) -> None:
        rows: Batch = {name: batch[name] for name in ("index", "caption", "skipped") if name in batch}
        rows = without_substitutes({**rows, "generated": generated})
        if len(rows["index"]):
            with torch.autocast(generated.device.type, enabled=False):
                self._measure(rows["index"], rows["generated"].float(), rows["caption"], repeat)

    def _measure(self, index: Tensor, images: Tensor, captions: Tensor, repeat: int) -> None:
        for name in self._real:
            features = self.networks[name](images)
            if name == "inception":
                features, probabilities = features
                self._scores[repeat].update(index, probabilities)
            self._features[name, repeat].update(index, features)
        texts = self.data.texts("test", captions.tolist())
        if "clip" in self.networks:
            clip = cast(ClipEmbeddings, self.networks["clip"])
            identity = torch.tensor([_identity(text) for text in texts], device=images.device)
            self._precision[repeat].update(index, clip.images(images), clip.texts(texts), identity)
        if "detector" in self.networks and self.object_copies == 0:
            named = _multi_hot([mentioned_classes(text) for text in texts])
            self._objects[repeat].update(index, named, self.networks["detector"](images))

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for repeat in range(self.repeats):
            for name, real in self._real.items():
                distance = frechet_distance(self._features[name, repeat].compute(), real)
                values.setdefault("fid" if name == "inception" else "fid_tv", []).append(distance)
            if "inception" in self.networks:
                values.setdefault("inception_score", []).append(self._scores[repeat].compute()[0])
            if "clip" in self.networks:
                mean, spread = self._precision[repeat].compute(self.module.device)
                values.setdefault("r_precision", []).append(mean)
                values.setdefault("r_precision_fold_spread", []).append(spread)
            if "detector" in self.networks and (repeat == 0 or self.object_copies == 0):
                if self.object_copies > 0:
                    self._look_for_objects()
                found = self._objects[repeat].compute()
                if found is not None:
                    values.setdefault("soa_c", []).append(found[0])
                    values.setdefault("soa_i", []).append(found[1])
                elif repeat == 0:
                    print_once("soa_c and soa_i are left out: no caption names a class of COCO")
        means = {name: float(np.mean(repeated)) for name, repeated in values.items()}
        spreads = {
            f"{name}_spread": float(np.std(repeated))
            for name, repeated in values.items()
            if len(repeated) > 1 and name in METRICS
        }
        return {**means, **spreads}

    def _look_for_objects(self) -> None:
        captions = self.data.texts("test", list(range(self.data.caption_count)))
        wanted = object_captions(captions, self.object_copies, self.person_captions, self.seed)
        if not wanted:
            return
        module = self.module
        loader = self.data.caption_loader([image.caption for image in wanted])
        silent = not module.trainer.is_global_zero
        for batch in track(loader, "  images for object accuracy", disable=silent):
            batch = move_data_to_device(batch, module.device)
            with module.trainer.precision_plugin.forward_context():
                images = module.images_of(batch, self.seed)
            named = _multi_hot([wanted[number].classes for number in batch["index"].tolist()])
            self._objects[0].update(batch["index"], named, self.networks["detector"](images))

    @torch.no_grad()
    def _real_moments(self, name: str) -> Moments:
        loader = self.data.reference_loader()
        path = cache_folder() / "generation" / f"{self._key(name, loader)}.npz"
        if all(gather_objects([path.is_file()])):  # every machine has a cache, which may differ
            return Moments.load(path)
        statistics = FeatureStatistics()
        network = self.networks[name]
        for batch in loader:
            batch = without_substitutes(batch)
            features = network(batch["image"].to(self.module.device))
            statistics.update(batch["index"], features[0] if isinstance(features, tuple) else features)
        moments = statistics.compute()
        if self.module.trainer.is_global_zero:
            moments.save(path)
        return moments

    def _key(self, name: str, loader: Any) -> str:
        weights = hashlib.sha256(Path(str(self.files[name])).read_bytes()).hexdigest()
        dataset = loader.dataset
        stamps = [clip.stamps() for clip in dataset.listing]
        content = repr((name, weights, dataset.describe(), len(dataset), vars(self.data.transform), stamps))
        return hashlib.sha256(content.encode()).hexdigest()[:24]


class RealImages(pl.LightningModule):
    """Evaluates the real images of the test captions: the score of a perfect generator."""

    def __init__(self, evaluation: ImageEvaluation) -> None:
        super().__init__()
        if (evaluation.repeats, getattr(evaluation, "object_copies", 0)) != (1, 0):
            raise ValueError("evaluation: real images can't be generated again: set repeats to 1, object_copies to 0")
        self.evaluation = evaluation

    def setup(self, stage: str) -> None:
        self.evaluation.load_pretrained()

    def on_test_start(self) -> None:
        self.evaluation.begin(self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluation.update(batch["image"], batch)

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in self.evaluation.compute().items()})
        draw_row(self, itemgetter("image"))


def without_substitutes(batch: Batch) -> Batch:
    """Drop samples that replace broken files. These samples already count at their original position."""
    if "skipped" not in batch:
        return batch
    own = batch["skipped"] == 0
    return {name: value[own.to(value.device)] if isinstance(value, Tensor) else value for name, value in batch.items()}


@rank_zero_only
def print_once(line: str) -> None:
    print(f"  {line}")


def _multi_hot(classes: Sequence[Sequence[int]]) -> Tensor:
    rows = torch.zeros(len(classes), len(CLASSES), dtype=torch.bool)
    for row, numbers in zip(rows, classes):
        row[list(numbers)] = True
    return rows


def _identity(text: str) -> int:
    """Hash a text to a number. Unlike with `hash`, the number is equal on every process."""
    words = " ".join(text.lower().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big")
