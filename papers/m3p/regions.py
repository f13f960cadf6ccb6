"""Computes regions without a detector: a small classifier describes a picture and its quarters.

Only the miniature uses these regions. The features are written once, in the published layout. The paper's regions come
from a real detector (`assemble data m3p --extract-regions`) or from third-party files.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data.datasets.captioned import LanguageCaptioned
from common.data.image_transforms import ImageTransform
from common.data.media import read_image
from common.data.regions import RegionFeatures, Regions, write_regions
from common.encoders.checkpoint_files import CheckpointError, named_tensors, read_checkpoint
from common.encoders.image import ImageResNet
from common.files import cache_folder, exclusive, parsing

#: Number of regions per picture: the whole picture and its quarters.
REGIONS = 5
_AT_ONCE = 256  # pictures per batch
# Part of the cache key; increase it when the features are computed differently.
_VERSION = 1


class RegionNetwork(nn.Module):
    """A residual network and a linear classifier. `channels` are those of the four stages.

    Shapes:
        [B, 3, side, side] -> scores [B, classes]
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
        )
        self.classifier = nn.Linear(self.encoder.feature_dim, classes)
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.encoder(images))


def read_region_network(checkpoint: str | Path) -> RegionNetwork:
    """Load the trained network from a `papers.m3p.miniature.RegionClassifier` checkpoint, in evaluation mode."""
    content = read_checkpoint(checkpoint)
    with parsing(Path(checkpoint), CheckpointError):
        settings = content["hyper_parameters"]
        network = RegionNetwork(settings["classes"], settings["channels"], settings["side"])
        weights = {name.removeprefix("network."): value for name, value in named_tensors(content["state_dict"]).items()}
        network.load_state_dict(weights)
    return network.eval()


def prepare_regions(dataset: LanguageCaptioned, split: str, checkpoint: str | Path) -> Path:
    """Compute and cache region features of a split's pictures in the published layout, `<split>.npz`.

    One process computes the features while the others wait. Set the data set's `regions_root` to the returned folder,
    which data sets with the same pictures share. `papers.m3p.miniature.RegionClassifier` writes the `checkpoint`.
    """
    network = read_region_network(checkpoint)
    pictures = getattr(dataset, "coco", dataset).root.resolve()
    digest = hashlib.sha256(f"{_VERSION}\0{pictures}\0".encode() + Path(checkpoint).read_bytes()).hexdigest()[:24]
    path = cache_folder() / "regions" / digest / f"{split}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(key for language in dataset.languages for key in dataset.captions(split, language).keys)
    with exclusive(path.with_suffix(".lock")):
        # Keep stored regions, because another data set may split the same pictures differently.
        stored = dict.fromkeys(RegionFeatures(path).keys if path.is_file() else ())
        if not keys.keys() <= stored.keys():
            pictures = ((key, dataset.image_path(key, split)) for key in {**stored, **keys})
            write_regions(path, region_rows(network, pictures))
    return path.parent


@torch.inference_mode()
def region_rows(network: RegionNetwork, pictures: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, Regions]]:
    """Yield each picture's key and the regions of the picture and its quarters.

    Class c + 1 is category c of the network; class 0, the background, never occurs.
    """
    transform = ImageTransform(crop=network.side, resize=network.side, squeeze=True, training=False)
    device = next(network.parameters()).device
    remaining = iter(pictures)
    while batch := list(itertools.islice(remaining, _AT_ONCE)):
        images = [read_image(path) for _, path in batch]
        boxes = [region_boxes(image.height, image.width) for image in images]
        parts = [image.crop(tuple(box)) for image, rows in zip(images, boxes) for box in rows.astype(int).tolist()]
        features = network.encoder(torch.stack([transform(part)[0] for part in parts]).to(device))
        probabilities = network.classifier(features).softmax(-1).cpu().split(REGIONS)
        for (key, _), image, box, feature, shares in zip(
            batch, images, boxes, features.cpu().split(REGIONS), probabilities
        ):
            labels, distribution = 1 + shares.argmax(-1).numpy(), np.pad(shares.numpy(), [(0, 0), (1, 0)])
            yield key, Regions(feature.numpy(), box, labels, image.height, image.width, distribution)


def region_boxes(height: int, width: int) -> np.ndarray:
    """Return the boxes of the picture and its quarters: left, top, right, bottom in pixels, float32 [5, 4]."""
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
