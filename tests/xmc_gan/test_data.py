"""Test XMC-GAN's data: batches of minibatches, pairs of captions and images, the test's order, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.datasets.coco import COCO
from common.data.datasets.coco_2014 import COCO2014
from common.data.datasets.localized_narratives import LocalizedNarrativesCOCO
from common.data.text import WordPieceTokenizer
from common.data.text_features import (
    StoredFeatures,
    bert_digest,
    encode_texts,
    make_store,
)
from common.data.worlds.two_objects import TwoObjectsWorld
from papers.xmc_gan.data import TextToImageData
from papers.xmc_gan.text import BertText
from tests.data.image_layouts import write_coco, write_ln_coco
from tests.data.worlds import read_caption
from tests.protocols.parts import attached
from tests.xmc_gan.test_text import write_bert

T = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TwoObjectsWorld:
    made = TwoObjectsWorld(seed=1, train=24, test=12, captions_per_image=8, root=str(tmp_path_factory.mktemp("worlds")))
    made.prepare()
    return made


def mini(world: TwoObjectsWorld, **changes: Any) -> TextToImageData:
    options: dict[str, Any] = {
        "tokenizer": WordPieceTokenizer(None, 256, T),
        "world": world,
        "image_size": 32,
        "flip": 0.0,
        "captions_per_image": 8,
        "test_samples": 7,
        "reference_samples": None,
        "batch_size": 4,
        "test_batch_size": 5,
        "num_workers": 0,
        "seed": 5,
    }
    return TextToImageData(COCO2014("unused"), **{**options, **changes})


def small(root: Path, **changes: Any) -> TextToImageData:
    """Write a data set of photographs of different sizes in COCO's layout, and make its data module."""
    options: dict[str, Any] = {
        "tokenizer": WordPieceTokenizer(None, 256, T),
        "image_size": 8,
        "test_samples": 5,
        "reference_samples": 2,
        "batch_size": 2,
        "num_workers": 0,
    }
    return TextToImageData(COCO(write_coco(root, train=8, val=6)), **{**options, **changes})


# ------------------------------------------------------------------------------------------------------------ training
def test_halves_of_a_batch_are_the_same_minibatches_for_any_number_of_processes(world: TwoObjectsWorld) -> None:
    whole = next(iter(attached(mini(world)).train_dataloader()))["index"].split(4)
    ranks = [
        next(iter(attached(mini(world), rank=rank, world_size=2).train_dataloader()))["index"].split(2)
        for rank in (0, 1)
    ]
    for minibatch, first, second in zip(whole, *ranks):
        assert torch.stack([first, second], 1).flatten().tolist() == minibatch.tolist()


def test_an_image_comes_with_its_own_caption(world: TwoObjectsWorld) -> None:
    data = attached(mini(world))
    truth = data.attributes("train")
    assert truth.shape == (24, 5)
    drawn = world.draw("train", range(24))
    assert truth.tolist() == drawn.attributes.tolist()
    for batch in data.train_dataloader():
        for text, index, image in zip(data.texts("train", batch["caption"]), batch["index"].tolist(), batch["image"]):
            assert read_caption(text) == tuple(truth[index].tolist())
            assert (image * 255).round().byte().permute(1, 2, 0).numpy().tolist() == drawn.images[index].tolist()
        tokens, length = encode_texts(data.texts("train", batch["caption"]), data.tokenizer)
        assert torch.equal(tokens, batch["tokens"])
        assert torch.equal(length, batch["length"])


def test_captions_are_drawn_anew_from_seed_epoch_and_item(world: TwoObjectsWorld) -> None:
    data = attached(mini(world))
    images, again = data.train_dataloader().dataset, attached(mini(world)).train_dataloader().dataset
    other = attached(mini(world, seed=6)).train_dataloader().dataset
    seen = np.array([[int(images[epoch, item]["caption"]) for epoch in range(200)] for item in range(3)])
    assert seen[:, :5].tolist() == [[int(again[epoch, item]["caption"]) for epoch in range(5)] for item in range(3)]
    assert seen[:, :5].tolist() != [[int(other[epoch, item]["caption"]) for epoch in range(5)] for item in range(3)]
    for item in range(3):
        counts = np.bincount(seen[item] - 8 * item, minlength=8)
        assert len(counts) == 8
        assert counts.min() > 10  # 25 are expected per caption


def test_images_are_flipped_also_in_the_test_as_officially(tmp_path: Path) -> None:
    for quirks in (True, False):
        data = attached(small(tmp_path / str(quirks), flip=1.0, official_quirks=quirks))
        plain = attached(small(tmp_path / str(quirks), flip=0.0))
        for split in ("train", "test", "reference"):
            name = f"{split}_loader" if split == "reference" else f"{split}_dataloader"
            mine, theirs = (getattr(module, name)().dataset[1]["image"] for module in (data, plain))
            assert mine.shape == (3, 8, 8)  # resized from 24 x 20
            assert torch.equal(mine, theirs.flip(2) if quirks or split == "train" else theirs)


# ---------------------------------------------------------------------------------------------------------------- test
def test_draws_follow_the_reference_and_go_round(tmp_path: Path) -> None:
    data = attached(small(tmp_path, test_samples=9, reference_samples=4))
    order = data.items_of("reference")[1]["image"].tolist() + data.items_of("test")[1]["image"].tolist()[:2]
    assert sorted(order) == list(range(6))
    assert data.items_of("test")[1]["image"].tolist() == [*order[4:], *order, *order[:1]]
    batches = list(data.test_dataloader())
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(9))
    # When an image is visited again, its caption may be another one.
    captions = torch.cat([batch["caption"] for batch in batches]).tolist()
    assert all(caption // 2 == row for caption, row in zip(captions, data.items_of("test")[1]["image"]))
    assert [batch["index"].tolist() for batch in data.reference_loader()] == [[0, 1, 2, 3]]
    everything = attached(small(tmp_path, test_samples=None, reference_samples=None))
    assert (
        sorted(everything.items_of("test")[1]["image"].tolist())
        == sorted(everything.items_of("reference")[1]["image"].tolist())
        == [*range(6)]
    )


@pytest.mark.parametrize("official", [True, False])
def test_too_few_real_images_are_taken_again_as_officially(tmp_path: Path, official: bool) -> None:
    data = attached(small(tmp_path, test_samples=8, reference_samples=8, official_quirks=official))
    rows = data.items_of("reference")[1]["image"].tolist()
    assert sorted(rows[:6]) == list(range(6))
    assert rows[6:] == (rows[:2] if official else [])
    assert data.items_of("test")[1]["image"].tolist() == [*rows[:6], *rows[:2]]


def test_what_is_measured_on_does_not_depend_on_the_seed(world: TwoObjectsWorld) -> None:
    first, second = (attached(mini(world, seed=seed)) for seed in (0, 1))
    for mine, theirs in zip(first.test_dataloader(), second.test_dataloader(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# ----------------------------------------------------------------------------------------------------------- narratives
def test_every_narrative_is_an_item(tmp_path: Path) -> None:
    root = write_ln_coco(tmp_path)
    data = attached(
        TextToImageData(
            LocalizedNarrativesCOCO(root),
            WordPieceTokenizer(None, 256, 64),
            items="captions",
            captions_per_image=1000,
            image_size=8,
            test_samples=4,
            batch_size=3,
            minibatches=1,
            num_workers=0,
        )
    )
    (batch,) = data.train_dataloader()
    assert sorted(batch["index"].tolist()) == sorted(batch["caption"].tolist()) == [0, 1, 2]
    assert data.items_of("train")[1]["image"].tolist() == [0, 0, 1]
    assert data.texts("train", [0, 1, 2]) == ["A man rides a bike.", "In the front a bike.", "A woman cuts a cake."]
    assert torch.equal(batch["index"], batch["caption"])
    assert batch["tokens"].shape == (3, 64)
    # There is one test narrative, so it is used four times.
    (test,) = data.test_dataloader()
    assert test["caption"].tolist() == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ features
@pytest.fixture(scope="module")
def bert(world: TwoObjectsWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer: Any = attached(mini(world)).tokenizer
    pieces = tokenizer._vocabulary.get_vocab()
    return write_bert(tmp_path_factory.mktemp("bert"), sorted(pieces, key=pieces.__getitem__))


@pytest.mark.parametrize("pool", ["official", "masked_mean"])
def test_stored_features_are_those_of_the_model(world: TwoObjectsWorld, bert: Path, tmp_path: Path, pool: Any) -> None:
    features, tokenizer = StoredFeatures(str(tmp_path), str(bert)), WordPieceTokenizer(str(bert), max_tokens=T)
    tokenizer.prepare()
    for split in ("train", "val"):
        captions: Any = COCO2014(world.root_of("coco_2014")).annotations(split).captions
        path = features.path("coco_2014", split, T)
        make_store(path, captions, tokenizer, BertText(str(bert)), bert_digest(bert), batch_size=50)
    data, plain = (
        attached(mini(world, tokenizer=WordPieceTokenizer(str(bert), max_tokens=T), **options))
        for options in ({"text_features": features, "sentence_pool": pool}, {})
    )
    encoder = BertText(str(bert), pool)
    loaders = ("train_dataloader", "test_dataloader")
    for mine, theirs in zip(*([b for name in loaders for b in getattr(module, name)()] for module in (data, plain))):
        assert "tokens" not in mine
        assert mine["words"].shape == (len(mine["index"]), T, 12)
        for name in ("image", "index", "caption", "length"):
            assert torch.equal(mine[name], theirs[name])
        words, sentence = encoder(theirs["tokens"], theirs["length"])
        torch.testing.assert_close(mine["words"], words, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(mine["sentence"], sentence, atol=4e-3, rtol=2e-3)
    assert data.describe()["training (coco_2014)"]["text_features"] == bert_digest(bert)[:16]


# -------------------------------------------------------------------------------------------------------------- faults
def test_what_stands_in_for_a_broken_image_brings_its_own_caption(tmp_path: Path) -> None:
    data = attached(small(tmp_path, max_skipped_fraction=0.2))
    (tmp_path / "train2017" / f"{23:012d}.jpg").write_bytes(b"no picture")
    batches = list(data.train_dataloader())
    assert sum(int((batch["skipped"] > 0).sum()) for batch in batches) == 1
    assert all(torch.equal(batch["caption"] // 2, batch["index"]) for batch in batches)
    assert data.describe()["training (coco)"]["skipped_names"] == [f"train2017/{23:012d}.jpg"]
