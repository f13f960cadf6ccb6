"""Where the miniature's region features come from: a small network that knows categories, in place of a detector.

At paper scale a detector has found the regions (`assemble data m3p --extract-regions`, or files of others). In the
miniature a classifier of drawings by sub-category is trained as a stage of its own; its features of a picture and of
its quarters are then written once, in the layout in which region features are published, and read by the same class.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.data.datasets.captioned import LanguageCaptioned
from common.data.datasets.imagenet import ImageNet
from common.data.image_transforms import ImageTransform
from common.data.images import ImageError, ImageItems, read_image
from common.data.regions import RegionError, RegionFeatures, Regions, write_regions
from common.data.worlds.base import World
from common.encoders.checkpoint_files import CheckpointError, named_tensors, read_checkpoint
from common.encoders.image import ImageResNet
from common.files import cache_folder, exclusive, write_atomically
from common.metrics.classification import hits
from common.training.data_module import ShardedDataModule
from common.training.optimisers import warm_up_then_cosine

logger = logging.getLogger(__name__)

#: Regions of a picture: all of it, and its quarters.
REGIONS = 5
_AT_ONCE = 256  # pictures
# Part of the name of kept features: a change of how they are made must change it.
_VERSION = 1


class RegionNetwork(nn.Module):
    """A residual network and a linear classifier.

    Args:
        classes: number of categories.
        channels: of the four stages; the last is the width of a region's features.
        side: side of its input in pixels.

    Shapes:
        [B, 3, side, side] -> scores [B, classes]; `features` -> [B, channels[-1]].
    """

    def __init__(self, classes: int, channels: Sequence[int], side: int) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {"classes": classes, "channels": list(channels), "side": side}
        self.encoder = ImageResNet(
            layers=(1, 1, 1, 1),
            bottleneck=False,
            channels=channels,
            stem_channels=channels[0],
            stem_kernel=3,
            stem_stride=1,
            stem_pool=True,
        )
        self.classifier = nn.Linear(self.encoder.feature_dim, classes)
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """What a region is described by."""
        return self.encoder(images)


class RegionClassifier(pl.LightningModule):
    """Training of the network that stands in for a detector.

    The checkpoint holds all that `prepare_regions` needs.

    Args:
        classes: number of categories, at least as many as the data have.
        channels, side: see :class:`RegionNetwork`.
        smoothing: share of the target that is spread over all classes.
        learning_rate, weight_decay: of AdamW, after a warm-up over `warmup_share` of the steps, falling on a cosine.
        warmup_share: share of the steps.

    Source: specification 13.2 (b) and 13.3.
    """

    def __init__(
        self,
        classes: int = 96,
        channels: Sequence[int] = (16, 32, 64, 64),
        side: int = 32,
        smoothing: float = 0.1,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.05,
        warmup_share: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters({**_plain(locals()), "channels": list(channels)}, logger=False)
        self.network = RegionNetwork(classes, channels, side)
        self._found: list[Tensor] = []

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.class_count > self.hparams["classes"]:
            raise ValueError(f"model.classes: {self.hparams['classes']} are too few for {data.class_count} categories")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self.network(batch["image"])
        loss = F.cross_entropy(scores, batch["label"], label_smoothing=self.hparams["smoothing"])
        self.log("train/loss", loss.detach(), batch_size=len(scores))
        return loss

    def on_test_start(self) -> None:
        self._found = []

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        scores = self.network(batch["image"])
        right = torch.stack([torch.ones(len(scores), device=scores.device), hits(scores, batch["label"]),
                             hits(scores, batch["label"], 5)])  # fmt: skip
        # A picture in place of a broken one is there twice.
        self._found.append((right * (batch["skipped"] == 0)).sum(dim=1))

    def on_test_epoch_end(self) -> None:
        count, first, five = self.trainer.strategy.reduce(torch.stack(self._found).sum(0), reduce_op="sum").tolist()
        values = {"test/top1": 100 * first / count, "test/top5": 100 * five / count}
        self.log_dict(values, rank_zero_only=False, sync_dist=False)

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        optimizer = torch.optim.AdamW(self.parameters(), lr=h.learning_rate, weight_decay=h.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        factor = warm_up_then_cosine(round(h.warmup_share * total), total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if isinstance(value, bool | int | float | str)}


class RegionPictures(ShardedDataModule):
    """Pictures by category to train :class:`RegionClassifier` on.

    Args:
        image: what a picture becomes; crops as small as a quarter make it know quarters.
        test_batch_size: pictures per test step, per device.
        dataset, world, batch_size, kwargs: see ShardedDataModule.
    """

    def __init__(
        self,
        dataset: ImageNet,
        world: World | None = None,
        image: ImageTransform | None = None,
        batch_size: int = 128,
        test_batch_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, **kwargs)
        self.image = image or ImageTransform()
        self.test_batch_size = test_batch_size

    @property
    def class_count(self) -> int:
        """Categories of the data."""
        return len(self.dataset.listing("train").classes)

    def items(self, split: str, training: bool) -> ImageItems:
        """The samples of a split."""
        return ImageItems(self.dataset.listing(split), self.image, training=training, **self.item_options)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.items("train", training=True))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader(self.items("validation", training=False), self.test_batch_size)


# -- features of a data set --------------------------------------------------------------------------------------------


def read_region_network(checkpoint: str | Path) -> RegionNetwork:
    """The trained network, ready to use.

    Args:
        checkpoint: of a :class:`RegionClassifier`.

    Raises:
        CheckpointError: the file is missing, damaged, or of something else.
    """
    content = read_checkpoint(checkpoint)
    settings = content.get("hyper_parameters") or {}
    try:
        network = RegionNetwork(settings["classes"], settings["channels"], settings["side"])
        weights = {name.removeprefix("network."): value for name, value in named_tensors(content["state_dict"]).items()}
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint}: no checkpoint of papers.m3p.regions.RegionClassifier ({error}); the stage `regions` "
            "makes one"
        ) from error
    return network.eval()


def prepare_regions(
    dataset: LanguageCaptioned, splits: Iterable[str], checkpoint: str | Path, folder: Path | None = None
) -> Path:
    """Region features of a data set's pictures, made once and kept: `<split>.npz` in the layout that is published.

    When several processes ask at once, one makes them and the others wait.

    Args:
        dataset: its pictures must be there; then point its `regions_root` at what is returned.
        splits: which of its splits.
        checkpoint: of a :class:`RegionClassifier`.
        folder: where features are kept; None for `regions` in the cache folder.

    Returns:
        The folder that holds them, the same for data sets of the same pictures.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ImageError: no picture of a split can be read.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such checkpoint file; the stage `regions` makes one")
    pictures = getattr(dataset, "coco", dataset).root.resolve()
    digest = hashlib.sha256(f"{_VERSION}\0{pictures}\0".encode() + checkpoint.read_bytes()).hexdigest()[:24]
    folder = (folder or cache_folder() / "regions") / digest
    network: RegionNetwork | None = None
    for split in splits:
        path = folder / f"{split}.npz"
        keys = dict.fromkeys(key for language in dataset.languages for key in dataset.captions(split, language).keys)
        if _all_there(path, keys):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f".{split}.lock"):
            if _all_there(path, keys):
                continue
            with contextlib.suppress(RegionError, FileNotFoundError):
                # Another data set of the same pictures may divide them otherwise.
                keys = dict.fromkeys([*RegionFeatures(path).keys, *keys])
            network = network or read_region_network(checkpoint)
            skipped: list[str] = []
            rows = region_rows(network, ((key, dataset.image_path(key, split)) for key in keys), skipped)
            try:
                write_regions(path, rows)
            except ValueError as error:
                raise ImageError(f"{pictures}: no picture of split {split!r} can be read ({error})") from error
            write_atomically(_list_of_skipped(path), "".join(f"{key}\n" for key in skipped))
    return folder


def _all_there(path: Path, keys: Iterable[str]) -> bool:
    """Whether a file has the features of some pictures, but for those that could not be read when it was made."""
    if not _list_of_skipped(path).is_file():
        return False
    skipped = set(_list_of_skipped(path).read_text(encoding="utf-8").split("\n"))
    try:
        return not set(RegionFeatures(path).missing(keys)) - skipped
    except (RegionError, FileNotFoundError):
        return False  # made anew


def _list_of_skipped(path: Path) -> Path:
    """Written last, so it also tells that the features are whole."""
    return path.with_suffix(".skipped.txt")


@torch.inference_mode()
def region_rows(
    network: RegionNetwork, pictures: Iterable[tuple[str, Path]], skipped: list[str] | None = None
) -> Iterator[tuple[str, Regions]]:
    """Whole and quarters of some pictures, described by a network; pictures that cannot be read are passed over.

    Args:
        network: see `read_region_network`.
        pictures: key and file of each.
        skipped: gets the keys of those that cannot be read.

    Returns:
        Key and regions of each. Class 0, the background, never occurs: category c of the network is class c + 1.
    """
    transform = ImageTransform(crop=network.side, resize=network.side, squeeze=True, training=False)
    held: list[tuple[str, np.ndarray, int, int]] = []
    crops: list[Tensor] = []

    def described() -> Iterator[tuple[str, Regions]]:
        stacked = torch.stack(crops)
        features = network.features(stacked)
        shares = network.classifier(features).softmax(-1)
        for place, (key, boxes, height, width) in enumerate(held):
            rows = slice(place * REGIONS, (place + 1) * REGIONS)
            labels = 1 + shares[rows].argmax(-1)
            own = np.pad(shares[rows].numpy(), [(0, 0), (1, 0)])
            yield key, Regions(features[rows].numpy(), boxes, labels.numpy(), height, width, own)

    for key, path in pictures:
        try:
            image = read_image(path)
        except ImageError as error:
            logger.warning("skipped %s", error)
            if skipped is not None:
                skipped.append(key)
            continue
        boxes = region_boxes(image.height, image.width)
        crops += [transform(image.crop(tuple(box)))[0] for box in boxes.astype(int).tolist()]
        held.append((key, boxes, image.height, image.width))
        if len(held) == _AT_ONCE:
            yield from described()
            held, crops = [], []
    if held:
        yield from described()


def region_boxes(height: int, width: int) -> np.ndarray:
    """The whole picture and its quarters: left, top, right, bottom in pixels, float32 [5, 4]."""
    middle, half = width // 2, height // 2
    return np.array(
        [
            (0, 0, width, height),
            (0, 0, middle, half),
            (middle, 0, width, half),
            (0, half, middle, height),
            (middle, half, width, height),
        ],
        dtype=np.float32,
    )
