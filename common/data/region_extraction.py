"""Extract region features of new pictures with a torchvision detector and local weights.

Regions are chosen like in MMF's script for M3P's features. Every class except the background scores the proposals, and
non-maximum suppression within a class drops duplicates. The proposals with the highest remaining scores are kept, in
the order that the script uses.

Source: docs/papers/m3p.md [4]; `tools/scripts/features/extract_features_vmb.py` of MMF.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import batched_nms, clip_boxes_to_image
from torchvision.transforms.functional import to_tensor

from common.data.datasets.base import IMAGE_SUFFIXES, walk
from common.data.media import MediaError, read_image
from common.data.regions import RegionFeatures, Regions, picture_key, write_regions
from common.encoders.checkpoint_files import read_checkpoint, tensors_in
from common.errors import StageError, printable
from common.files import stamp_of, write_atomically

logger = logging.getLogger(__name__)

WEIGHTS = "https://download.pytorch.org/models/fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
# Proposals of a class that overlap more (IoU) are duplicates.
_OVERLAP = 0.5
# Ignore lower scores: of a thousand proposals with a hundred classes, only a few score higher.
_LEAST_SCORE = 1e-3


def load_detector(weights: Path) -> GeneralizedRCNN:
    """Load torchvision's Faster R-CNN from a file. The weights determine the number of classes.

    The file is a state dict like torchvision's, or a checkpoint with a state dict under `model` or `state_dict`.
    """
    if not weights.is_file():
        raise StageError(f"no detector at {weights}: give --detector FILE, such as {WEIGHTS}; nothing is downloaded")
    content = read_checkpoint(weights)
    state = tensors_in(content)
    try:
        classes = len(state["roi_heads.box_predictor.cls_score.bias"])
        detector = fasterrcnn_resnet50_fpn(weights_backbone=None, num_classes=classes)
        # The released weights have no `num_batches_tracked`.
        counts = {key: value for key, value in detector.state_dict().items() if key.endswith("num_batches_tracked")}
        detector.load_state_dict({**counts, **state})
    except (KeyError, RuntimeError) as error:
        raise StageError(f"{weights}: not weights of torchvision's fasterrcnn_resnet50_fpn ({error})") from None
    if not any(key.endswith("num_batches_tracked") for key in state):
        # The released weights were trained with frozen statistics and without an epsilon.
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    return detector.eval()


class RegionExtractor:
    """Finds the regions of pictures. Features come from the detector's box head (1024 wide in torchvision).

    `origin` identifies the detector, for example by a digest. A rerun only reuses results with the same `origin`.
    """

    def __init__(
        self,
        detector: GeneralizedRCNN,
        regions: int = 100,
        device: str = "cpu",
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self.detector = detector.eval().to(device)
        self.regions = regions
        self.device = torch.device(device)
        self.identity: dict[str, Any] = {**(origin or {}), "regions": regions}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> list[Regions]:
        """Return the regions of pictures, each [3, H, W] RGB in [0, 1]."""
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        batch, _ = self.detector.transform([image.to(self.device) for image in images])
        maps = self.detector.backbone(batch.tensors)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        proposals, _ = self.detector.rpn(batch, maps)
        heads: Any = self.detector.roi_heads
        features = heads.box_head(heads.box_roi_pool(maps, proposals, batch.image_sizes))
        scores = heads.box_predictor(features)[0].softmax(-1)
        counts = [len(boxes) for boxes in proposals]
        return [
            self._chosen(*parts)
            for parts in zip(proposals, features.split(counts), scores.split(counts), batch.image_sizes, sizes)
        ]

    def _chosen(
        self, boxes: Tensor, features: Tensor, scores: Tensor, shown: tuple[int, int], size: tuple[int, int]
    ) -> Regions:
        if not len(boxes):
            # If there are no proposals, the whole picture is one region with zero features.
            head = np.zeros((1, features.shape[-1]), dtype=np.float32)
            whole = np.array([[0, 0, size[1], size[0]]], dtype=np.float32)
            shares = np.eye(1, scores.shape[1], dtype=np.float32)
            return Regions(head, whole, np.zeros(1, dtype=np.int64), *size, shares)
        class_scores = scores[:, 1:]
        rows, classes = torch.nonzero(class_scores >= _LEAST_SCORE, as_tuple=True)
        kept = batched_nms(boxes[rows], class_scores[rows, classes], classes, _OVERLAP)
        best = torch.zeros(len(boxes), device=boxes.device)
        best.scatter_reduce_(0, rows[kept], class_scores[rows[kept], classes[kept]], "amax")
        # Rank duplicates last instead of dropping them, in case there are too few others.
        order = torch.argsort(best + 1e-6 * class_scores.amax(1), descending=True, stable=True)[: self.regions]
        scale = torch.tensor([size[1] / shown[1], size[0] / shown[0]] * 2, device=boxes.device)
        final_boxes = clip_boxes_to_image(boxes[order] * scale, size)
        return Regions(
            features[order].float().cpu().numpy(),
            final_boxes.cpu().numpy(),
            1 + class_scores[order].argmax(1).cpu().numpy().astype(np.int64),
            *size,
            scores[order].cpu().numpy(),
        )


def extract_regions(
    folder: Path, output: Path, extractor: RegionExtractor, batch_size: int = 4, distribution: bool = False
) -> tuple[int, tuple[str, ...]]:
    """Write region features of all pictures in a folder and its subfolders to a new `.h5` or `.npz` file, by file name.

    A rerun resumes from `<output>.parts`; `<output>.skipped.txt` lists unreadable pictures. `distribution` also stores
    the class probabilities. Returns the number of pictures in the file, and the names of unreadable pictures.
    """
    pictures = _pictures(folder)
    keys = list(pictures)
    parts = output.with_name(f"{output.name}.parts")
    files: list[Path] = []
    for start in track(range(0, len(keys), batch_size), "extracting regions"):
        batch = keys[start : start + batch_size]
        made_of = json.dumps([extractor.identity, distribution, [(key, stamp_of(pictures[key])) for key in batch]])
        part = parts / f"{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.npz"
        if not part.exists():
            images: dict[str, Tensor] = {}
            for key in batch:
                try:
                    images[key] = to_tensor(read_image(pictures[key]))
                except MediaError as error:
                    logger.warning("skipped %s", printable(str(error)))
            if not images:
                continue
            regions = extractor(list(images.values()))
            regions = regions if distribution else [replace(item, distribution=None) for item in regions]
            write_regions(part, zip(images, regions))
        files.append(part)
    if not files:
        raise StageError(f"{folder}: none of its {len(pictures)} images, such as {pictures[keys[0]]}, can be read")
    # Hold only one part in memory at a time.
    write_regions(output, ((key, part[key]) for part in map(RegionFeatures, files) for key in part.keys))
    shutil.rmtree(parts)
    features = RegionFeatures(output)
    skipped = tuple(str(pictures[key]) for key in features.missing(keys))
    if skipped:
        listed = output.with_name(f"{output.name}.skipped.txt")
        write_atomically(listed, os.fsencode("".join(f"{path}\n" for path in skipped)))
    return len(features), skipped


def _pictures(folder: Path) -> dict[str, Path]:
    pictures: dict[str, Path] = {}
    for name, _ in walk(folder, IMAGE_SUFFIXES, []):
        key = picture_key(Path(name).name)
        if key in pictures:
            raise StageError(f"{folder}: {pictures[key].relative_to(folder)} and {name} would both be called {key!r}")
        pictures[key] = folder / name
    if not pictures:
        raise StageError(f"{folder}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return pictures
