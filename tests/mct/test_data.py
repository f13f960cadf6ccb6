"""The data of MCT's pre-training: which caption follows which flip, caption views, and tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.datasets.coco import COCO
from common.data.text import WordVocabulary
from papers.mct.data import CaptionedViews, PretrainingData
from tests.protocols.parts import attached
from tests.protocols.test_captions import SIDED, Sentences, coco
from tests.protocols.test_data import SMALL


class FixedFlips:
    """A transform that draws the given flips."""

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
    # J_ic compares the query's image with the key's caption, J_ci the key's image with the query's caption.
    assert key == (swapped if flips[0] and swap else plain)
    assert query == (swapped if flips[1] and swap else plain)


def test_siblings_are_two_captions(tmp_path: Path) -> None:
    tokenizer = Sentences()
    pairs = items(coco(tmp_path), tokenizer=tokenizer, swap_sides=False)
    known = {text.lower() for text in SIDED}
    seen: set[tuple[str, str]] = set()
    for epoch in range(20):
        sample = pairs[epoch, 1]
        texts = tuple(tokenizer.decode(sample[f"tokens_{name}"]) for name in ("query", "key"))
        assert texts[0] != texts[1]
        assert set(texts) <= known
        seen.add(texts)  # type: ignore[arg-type]
    assert len(seen) == 6  # all ordered pairs


def test_words_are_left_out_of_both_views(tmp_path: Path) -> None:
    tokenizer = Sentences()
    text = " ".join(f"word{number}" for number in range(40))
    sample = items(coco(tmp_path, (text,)), tokenizer=tokenizer, word_dropout=0.5)[0]
    views = [tokenizer.decode(sample[f"tokens_{name}"]).split() for name in ("query", "key")]
    assert views[0] != views[1]
    assert all(5 < len(view) < 35 for view in views)


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
    assert not pairs[0]["tags"].any()  # an image without instances


# -- the module of pre-training ----------------------------------------------------------------------------------------


def test_batches_of_pretraining(tmp_path: Path) -> None:
    options: dict[str, Any] = {"image": SMALL, "batch_size": 4, "num_workers": 0, "seed": 0}
    data = attached(PretrainingData(coco(tmp_path), WordVocabulary(min_count=1), **options))
    (batch,) = data.train_dataloader()
    assert batch["image_query"].shape == batch["image_key"].shape == (4, 3, 8, 8)
    assert batch["tags"].shape == (4, 3)
    assert data.tag_names == ("person", "dog", "car")
    for name in ("query", "key"):
        tokens, lengths = batch[f"tokens_{name}"], batch[f"lengths_{name}"]
        assert tokens.dtype == torch.int64
        assert tokens.shape == (4, int(lengths.max()))
        assert torch.equal((tokens != 0).sum(1), lengths)
        # Padding is at the end.
        assert all(bool((row[:n] != 0).all()) for row, n in zip(tokens, lengths))
    assert data.vocabulary_size == data.words.vocabulary_size > 4
    images, captions = data.test_dataloader()
    assert sum(len(batch["index"]) for batch in images) == 3
    held_out = list(captions)
    assert sum(len(batch["index"]) for batch in held_out) == 6
    assert torch.cat([batch["image_index"] for batch in held_out]).tolist() == [0, 0, 1, 1, 2, 2]
