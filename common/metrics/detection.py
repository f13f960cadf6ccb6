"""Average precision of detected boxes, by the rules of COCO and of Pascal VOC 2007."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.ops import box_iou

from common.metrics.gathering import gather_objects

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
#: Overlap thresholds of COCO, 0.5 to 0.95; division gives exact decimals.
OVERLAPS = np.arange(50, 100, 5) / 100
# Larger than the areas that COCO's evaluation counts.
_NO_AREA = 1e11


@dataclass(frozen=True)
class DetectedImage:
    """Detections and true objects of an image. A box is left, top, right, bottom.

    Attributes:
        boxes, scores, labels: the detections, [D, 4], [D], [D].
        true_boxes, true_labels: the objects, [G, 4], [G].
        difficult: True for objects to ignore, which are neither hits nor misses, [G].
    """

    boxes: Floats
    scores: Floats
    labels: Integers
    true_boxes: Floats
    true_labels: Integers
    difficult: npt.NDArray[np.bool_]


class DetectionsOncePerImage:
    """Collects detections over batches and processes. If an image repeats, keeps the first result.

    Examples:
        >>> found = DetectionsOncePerImage()
        >>> objects = {"boxes": torch.tensor([[0.0, 0.0, 9.0, 9.0]]), "labels": torch.tensor([1])}
        >>> detections = {**objects, "scores": torch.tensor([0.8])}
        >>> found.update(torch.tensor([7]), [detections], [{**objects, "difficult": torch.tensor([False])}])
        >>> round(coco_average_precision(found.compute().values())["ap"], 6)
        1.0
    """

    def __init__(self) -> None:
        self._images: dict[int, DetectedImage] = {}

    def update(
        self, index: Tensor, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add a batch of images; `index` [B] identifies the images.

        Args:
            detections: for every image `boxes` [D, 4], `scores` [D] and `labels` [D].
            targets: for every image `boxes` [G, 4], `labels` [G] and optionally `difficult` [G].
        """
        for item, found, target in zip(index.tolist(), detections, targets):
            difficult = target.get("difficult", torch.zeros(len(target["labels"]), dtype=torch.bool))
            image = DetectedImage(
                boxes=_array(found["boxes"], torch.float32).reshape(-1, 4),
                scores=_array(found["scores"], torch.float32),
                labels=_array(found["labels"], torch.int64),
                true_boxes=_array(target["boxes"], torch.float32).reshape(-1, 4),
                true_labels=_array(target["labels"], torch.int64),
                difficult=_array(difficult, torch.bool),
            )
            self._images.setdefault(item, image)

    def compute(self) -> dict[int, DetectedImage]:
        """Return the images of all processes in ascending order of the index, the same on every process."""
        found = gather_objects(list(self._images.items()))
        return dict(sorted(dict(reversed(found)).items()))  # reversed, so that the first of a repeated image wins


def coco_average_precision(images: Iterable[DetectedImage]) -> dict[str, float]:
    """Compute COCO's average precision (101 recalls, mean over classes) with pycocotools.

    Uses at most 100 detections per image and class. Difficult objects are treated like objects outside COCO's area
    range: the best match is ignored, and further matches are wrong. (COCO's rule for crowds would ignore every
    detection inside a difficult object.)

    Returns:
        `ap`, the mean over the overlaps 0.5, 0.55, ..., 0.95, `ap50` and `ap75`, from 0 to 1. Means leave out
        classes that have only difficult objects.
    """
    from pycocotools.cocoeval import COCOeval

    images = list(images)
    _require_objects(images)
    objects, detections = [], []
    for number, image in enumerate(images):
        for box, label, difficult in zip(image.true_boxes, image.true_labels, image.difficult):
            objects.append({**_coco_box(number, box, label), **({"area": _NO_AREA} if difficult else {})})
        for box, label, score in zip(image.boxes, image.labels, image.scores):
            detections.append({**_coco_box(number, box, label), "score": float(score)})
    labels = {row["category_id"] for row in objects}
    with redirect_stdout(StringIO()):
        evaluation = COCOeval(
            _coco(len(images), labels, objects), _coco(len(images), labels, detections), iouType="bbox"
        )
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("ap", "ap50", "ap75"), map(float, evaluation.stats)))


def _coco(images: int, labels: Iterable[int], rows: list[dict[str, Any]]) -> Any:
    """Build a pycocotools data set. Ids start at 1, because 0 means no match."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": number} for number in range(images)],
        "categories": [{"id": label} for label in labels],
        "annotations": [{**row, "id": number} for number, row in enumerate(rows, start=1)],
    }
    coco.createIndex()
    return coco


def _coco_box(image: int, box: Floats, label: np.int64) -> dict[str, Any]:
    left, top, right, bottom = box.tolist()
    width, height = right - left, bottom - top
    row = {"image_id": image, "category_id": int(label), "bbox": [left, top, width, height], "area": width * height}
    return {**row, "iscrowd": 0}


def voc07_average_precision(images: Iterable[DetectedImage]) -> dict[str, float]:
    """Compute the average precision at 11 recalls by the rules of Pascal VOC 2007; see `coco_average_precision`.

    A detection belongs to the object with the largest overlap among objects of the same class. The detection is correct
    if the overlap exceeds the threshold, and no detection with a higher score belongs to the object. If the object is
    difficult, the detection is ignored. detectron2, which MoCo and VirTex use, applies the same rules at every overlap.
    Unlike this function, detectron2 rounds scores to three decimals and boxes to one, and skips a recall of exactly
    0.3, 0.6 or 0.7.

    Source: M. Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge"; detectron2,
        evaluation/pascal_voc_evaluation.py.
    """
    images = list(images)
    _require_objects(images)
    scores, labels, overlaps, objects = _matched(images)
    true_labels = np.concatenate([image.true_labels for image in images])
    difficult = np.concatenate([image.difficult for image in images])
    order = np.argsort(-scores, kind="stable")
    per_class = []
    for label in np.unique(true_labels[~difficult]):
        own = order[labels[order] == label]
        count = int(np.sum((true_labels == label) & ~difficult))
        per_class.append([_eleven_points(overlaps[own], objects[own], difficult, count, t) for t in OVERLAPS])
    means = np.mean(per_class, axis=0)
    return {"ap": float(means.mean()), "ap50": float(means[0]), "ap75": float(means[5])}


def _matched(images: Sequence[DetectedImage]) -> tuple[Floats, Integers, Floats, Integers]:
    """Return each detection's score, label and largest overlap with an object of the class, and the object's number."""
    overlaps, objects = [], []
    first = 0
    for image in images:
        found, true = torch.from_numpy(image.boxes).double(), torch.from_numpy(image.true_boxes).double()
        overlap = box_iou(found, true).numpy()
        overlap[image.labels[:, None] != image.true_labels] = -1.0
        # An extra column that never wins, for images without objects.
        overlap = np.concatenate([overlap, np.full((len(overlap), 1), -1.0)], axis=1)
        objects.append(first + overlap.argmax(axis=1))
        overlaps.append(overlap.max(axis=1))
        first += len(image.true_boxes)
    return (
        np.concatenate([image.scores for image in images]),
        np.concatenate([image.labels for image in images]),
        np.concatenate(overlaps),
        np.concatenate(objects),
    )


def _eleven_points(
    overlap: Floats, objects: Integers, difficult: npt.NDArray[np.bool_], count: int, threshold: float
) -> float:
    """Compute a class's average precision at an overlap threshold. Detections are sorted, best first."""
    near = overlap > threshold
    excused = near.copy()
    excused[near] = difficult[objects[near]]
    right = np.zeros(len(overlap), dtype=np.bool_)
    candidates = np.flatnonzero(near & ~excused)
    right[candidates[np.unique(objects[candidates], return_index=True)[1]]] = True
    right = right[~excused]
    found = np.cumsum(right)
    recall, precision = found / count, found / np.arange(1, len(found) + 1)
    return float(np.mean([precision[recall >= tenth / 10].max(initial=0.0) for tenth in range(11)]))


def _require_objects(images: Sequence[DetectedImage]) -> None:
    if not any((~image.difficult).any() for image in images):
        raise ValueError(f"average precision needs objects: the {len(images)} images have none, or only difficult ones")


def _array(values: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    return values.detach().to("cpu", dtype).numpy()
