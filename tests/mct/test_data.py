"""Test MCT's pre-training data: tags, and the caption for each flip of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.datasets.coco import COCO
from papers.mct.data import CaptionedViews
from tests.protocols.test_captions import SIDED, Sentences, coco
from tests.protocols.test_data import SMALL


class FixedFlips:
    """A transform with given flips instead of random ones."""

    def __init__(self, flips: tuple[bool, ...]) -> None:
        self.drawn = iter(flips)

    def with_training(self, training: bool) -> FixedFlips:
        return self

    def draw(self, rng: np.random.Generator) -> list[float]:
        return [float(next(self.drawn))]

    def flips(self, draws: list[float]) -> bool:
        return bool(draws[0])

    def together(self, images: list[Image.Image], draws: Any) -> list[torch.Tensor]:
        return [torch.tensor(np.array(image)).permute(2, 0, 1).float() for image in images]


def items(dataset: COCO, **options: Any) -> CaptionedViews:
    listing = dataset.listing("train")
    fields = {"transform": SMALL, "training": True, "seed": 0, **options}
    return CaptionedViews(listing, dataset.annotations("train", listing), fields.pop("tokenizer", None), **fields)


# -- views of pre-training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("swap", [True, False])
def test_a_caption_follows_the_flip_of_the_image_it_meets(tmp_path: Path, flips: tuple[bool, bool], swap: bool) -> None:
    tokenizer = Sentences()
    pairs = items(coco(tmp_path, SIDED[:1]), tokenizer=tokenizer, transform=FixedFlips(flips), swap_sides=swap)
    sample = pairs[2]
    assert sample["image_query"].shape == sample["image_key"].shape == (3, 20, 24)
    query, key = (tokenizer.decode(sample[f"tokens_{name}"]) for name in ("query", "key"))
    plain, swapped = "a ball left of the bright box.", "a ball right of the bright box."
    # J_ic compares the query's image with the key's caption. J_ci compares the key's image with the query's caption.
    assert key == (swapped if flips[0] and swap else plain)
    assert query == (swapped if flips[1] and swap else plain)


def test_tags_and_ids_are_those_of_the_image(tmp_path: Path) -> None:
    dataset = coco(tmp_path)
    pairs = items(dataset)
    annotations = dataset.annotations("train")
    for item in range(len(pairs)):
        sample = pairs[item]
        assert sample["tags"].dtype == torch.bool
        assert sample["tags"].tolist() == annotations.tags[item].tolist()
        assert sample["image_id"] == annotations.image_ids[item]
        assert sample["index"] == item
    assert not pairs[0]["tags"].any()  # this image shows no objects
