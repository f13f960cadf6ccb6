"""The miniature's detector: a small classifier that describes a picture and its quarters.

`papers.m3p.miniature` trains the network as a separate stage. Its features are written once, in the layout of published
region features, so the same class reads them. At paper scale, regions come from a real detector (`assemble data m3p
--extract-regions`) or from third-party files.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data.datasets.captioned import LanguageCaptioned
from common.data.image_transforms import ImageTransform
from common.data.media import MediaError, read_image
from common.data.regions import RegionError, RegionFeatures, Regions, write_regions
from common.encoders.checkpoint_files import CheckpointError, named_tensors, read_checkpoint
from common.encoders.image import ImageResNet
from common.files import cache_folder, exclusive, named, write_atomically

logger = logging.getLogger(__name__)

#: Regions per picture: the whole picture and its quarters.
REGIONS = 5
_AT_ONCE = 256  # pictures
# Part of the cache key: increase it when the computation of the features changes.
_VERSION = 1


class RegionNetwork(nn.Module):
    """A residual network and a linear classifier; `channels` are those of the four stages.

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
        return self.encoder(images)


def read_region_network(checkpoint: str | Path) -> RegionNetwork:
    """The trained network of a `papers.m3p.miniature.RegionClassifier` checkpoint, in evaluation mode."""
    content = read_checkpoint(checkpoint)
    settings = content.get("hyper_parameters") or {}
    try:
        network = RegionNetwork(settings["classes"], settings["channels"], settings["side"])
        weights = {name.removeprefix("network."): value for name, value in named_tensors(content["state_dict"]).items()}
        network.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint}: no checkpoint of papers.m3p.miniature.RegionClassifier ({error}); the stage `regions` "
            "makes one"
        ) from error
    return network.eval()


def prepare_regions(
    dataset: LanguageCaptioned, splits: Iterable[str], checkpoint: str | Path, folder: Path | None = None
) -> Path:
    """Compute and cache region features of a data set's pictures in the published layout, `<split>.npz`.

    One process computes them while the others wait. Set the data set's `regions_root` to the returned folder, which is
    the same for data sets of the same pictures. `checkpoint` is of a `papers.m3p.miniature.RegionClassifier`.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint}: no such checkpoint file; the stage `regions` makes one")
    pictures = getattr(dataset, "coco", dataset).root.resolve()
    with named(checkpoint):
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
            with contextlib.suppress(RegionError):
                # Another data set may split the same pictures differently.
                keys = dict.fromkeys([*RegionFeatures(path).keys, *keys])
            network = network or read_region_network(checkpoint)
            skipped: list[str] = []
            rows = region_rows(network, ((key, dataset.image_path(key, split)) for key in keys), skipped)
            try:
                write_regions(path, rows)
            except ValueError as error:
                raise MediaError(f"{pictures}: no picture of split {split!r} can be read ({error})") from error
            write_atomically(_list_of_skipped(path), "".join(f"{key}\n" for key in skipped))
    return folder


def _all_there(path: Path, keys: Iterable[str]) -> bool:
    """Whether a file has the features of all keys, except pictures that were unreadable when it was made."""
    if not _list_of_skipped(path).is_file():
        return False
    skipped = set(_list_of_skipped(path).read_text(encoding="utf-8").split("\n"))
    try:
        return not set(RegionFeatures(path).missing(keys)) - skipped
    except RegionError:
        return False  # made anew


def _list_of_skipped(path: Path) -> Path:
    """Path of the skipped keys; written last, so its existence means the features are complete."""
    return path.with_suffix(".skipped.txt")


@torch.inference_mode()
def region_rows(
    network: RegionNetwork, pictures: Iterable[tuple[str, Path]], skipped: list[str] | None = None
) -> Iterator[tuple[str, Regions]]:
    """Key and regions of each readable picture and its quarters; unreadable keys are appended to `skipped`.

    Class c + 1 is category c of the network; class 0, the background, never occurs.
    """
    transform = ImageTransform(crop=network.side, resize=network.side, squeeze=True, training=False)
    held: list[tuple[str, np.ndarray, int, int]] = []
    crops: list[Tensor] = []

    def described() -> Iterator[tuple[str, Regions]]:
        features = network.features(torch.stack(crops).to(next(network.parameters()).device))
        probabilities = network.classifier(features).softmax(-1).cpu()
        features = features.cpu()
        columns = zip(held, features.split(REGIONS), probabilities.split(REGIONS))
        for (key, boxes, height, width), feature, probability in columns:
            labels = 1 + probability.argmax(-1)
            distribution = np.pad(probability.numpy(), [(0, 0), (1, 0)])
            yield key, Regions(feature.numpy(), boxes, labels.numpy(), height, width, distribution)

    for key, path in pictures:
        try:
            image = read_image(path)
        except MediaError as error:
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
