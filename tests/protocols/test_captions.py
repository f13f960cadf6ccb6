"""Test images with captions: rows, pairs, collation, and an epoch of cross-modal search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.text import WordVocabulary
from common.protocols.bridge import BridgeData
from common.protocols.captions import CaptionData, CaptionRows
from common.protocols.search import SearchData
from common.training.examples import RandomTensors
from tests.data.image_layouts import write_coco, write_karpathy
from tests.data.text_layouts import write_json
from tests.protocols.parts import attached
from tests.protocols.test_data import SMALL

SIDED = ("A ball left of the bright box.", "The left ball, no box on the right.", "Only a ball.")


class Sentences(WordVocabulary):
    """A tokenizer that numbers the texts, so that a test can decode a token to its text."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [len(self.texts)]

    def decode(self, tokens: Any) -> str:
        return self.texts[int(tokens[0]) - 1]


def coco(root: Path, captions: tuple[str, ...] = SIDED, train: int = 6) -> COCO:
    """Write COCO with the same given captions for every training image."""
    write_coco(root, train=train, val=3, captions={"train": captions})
    return COCO(root)


# -- rows --------------------------------------------------------------------------------------------------


def test_captions_know_their_images() -> None:
    tokenizer = Sentences()
    rows = CaptionRows([("A dog.", "a  DOG."), (), ("A cat.",), ("a dog.", "a dog")], tokenizer)
    assert len(rows) == 5
    samples = [rows[item] for item in range(5)]
    assert [int(sample["image_index"]) for sample in samples] == [0, 0, 2, 3, 3]
    assert [int(sample["index"]) for sample in samples] == [0, 1, 2, 3, 4]
    assert len(CaptionRows([], tokenizer)) == 0


def test_collate_pads_to_the_longest_caption() -> None:
    data = CaptionData(COCO("none"), WordVocabulary(), image=SMALL)
    rows = [[1, 2], [1, 5, 6, 2], [1]]
    batch = data.collate([{"tokens": row, "index": torch.tensor(n)} for n, row in enumerate(rows)])
    assert batch["tokens"].tolist() == [[1, 2, 0, 0], [1, 5, 6, 2], [1, 0, 0, 0]]
    assert batch["lengths"].tolist() == [2, 4, 1]
    assert batch["index"].tolist() == [0, 1, 2]
    assert set(data.collate([{"tokens_reversed": [3, 1]}])) == {"tokens_reversed", "lengths_reversed"}


def test_every_process_knows_the_words(tmp_path: Path) -> None:
    """Only the first process prepares the vocabulary; the others load it. Without a tokenizer the size is 0."""
    coco(tmp_path)
    options: dict[str, Any] = {"image": SMALL, "batch_size": 3, "num_workers": 0}
    prepared, other = (CaptionData(COCO(tmp_path), WordVocabulary(min_count=1), **options) for _ in range(2))
    prepared.prepare_data()
    other.setup("fit")
    assert prepared.vocabulary_size == other.vocabulary_size > 5
    images = attached(CaptionData(COCO(tmp_path), None, **options))
    assert images.vocabulary_size == 0
    assert len(images.test_dataloader().dataset) == 3
    assert not images.held_out_images.training


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_every_caption_is_searched_once_an_epoch(tmp_path: Path) -> None:
    write_karpathy(tmp_path, train=4, val=2, test=3)
    path = tmp_path / "dataset_coco.json"
    document = json.loads(path.read_text())
    for entry in document["images"]:
        number = entry["cocoid"]
        entry["sentences"] = [{"raw": f"image {number} says {c}", "sentid": 10 * number + c} for c in range(5)]
        entry["sentids"] = [sentence["sentid"] for sentence in entry["sentences"]]
    write_json(path, document)
    data = SearchData(COCOKarpathy(tmp_path), WordVocabulary(min_count=1), image=SMALL, batch_size=4, num_workers=0)
    loader = attached(data).train_dataloader()
    for _ in range(2):
        seen = [
            (int(image), data.words.decode(row.tolist()))
            for batch in loader
            for image, row in zip(batch["image_index"], batch["tokens"])
        ]
        captions = data.dataset.annotations("train").captions
        assert sorted(seen) == sorted((n, text) for n, own in enumerate(captions) for text in own)
    assert loader.dataset.training
    for gallery, images in ((data.val_dataloader(), 2), (data.test_dataloader(), 3)):
        assert not gallery[0].dataset.training
        assert [len(loader.dataset) for loader in gallery] == [images, 5 * images]
    assert data.test_dataloader()[1].dataset is data.test_dataloader()[1].dataset


@pytest.mark.parametrize("kind", [SearchData, BridgeData])
def test_a_made_up_batch_is_one_as_the_loader_gives(tmp_path: Path, kind: Any) -> None:
    coco(tmp_path)
    options: dict[str, Any] = {"image": SMALL, "batch_size": 3, "num_workers": 0, "captions_per_image": 2}
    options |= {"held_out_fraction": 0.3} if kind is BridgeData else {"test_split": "val"}
    data = attached(kind(COCO(tmp_path), WordVocabulary(min_count=1, max_tokens=9), **options))
    example = data.example_batch(None, 3, RandomTensors())
    batch = next(iter(data.train_dataloader()))
    for name, value in example.batch.items():
        assert value.dtype == batch[name].dtype, name
        assert value.shape[0] == 3
        assert value.shape[1:] == batch[name].shape[1:] or name == "tokens"
    assert example.batch["tokens"].shape == (3, 9)
    # An epoch uses two captions of each COCO image.
    assert (example.batches, example.facts) == (2 * 118287 // 3, {})
    texts = {data.words.decode(row.tolist()) for part in data.train_dataloader() for row in part["tokens"]}
    assert (len(texts), len(data.train_dataloader().dataset)) == (2, 2 * len(data.listing))
    assert len(data.test_dataloader()[-1].dataset) == 6
    assert data.example_captions(200, RandomTensors()).unique().tolist() == list(range(5, 40))
