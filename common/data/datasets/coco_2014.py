"""COCO 2014 as it was released: 82,783 training and 40,504 validation images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from common.data.datasets.coco import COCO


class COCO2014(COCO):
    """COCO 2014: photographs with five captions each, and the outlines of objects of 80 categories.

    The validation split is the whole official split: Karpathy's restval (30,504), val (5,000) and test (5,000).

    Source: docs/papers/xmc_gan.md [7] ("COCO-14").
    """

    year = "2014"
    name = "coco_2014"
    title = "COCO 2014"
    published_counts: ClassVar[Mapping[str, int]] = {"train": 82_783, "val": 40_504}
    expected_layout = (
        "train2014/COCO_train2014_<image id:012d>.jpg and val2014/COCO_val2014_...\n"
        "annotations/captions_train2014.json and captions_val2014.json\n"
        "annotations/instances_train2014.json and instances_val2014.json   (tags and boxes; optional for captions)"
    )
    size = "20 GB"
