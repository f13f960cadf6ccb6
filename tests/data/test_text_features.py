"""The store of text features: what it holds, how it goes on after an interruption, what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.data import text_features
from common.data.annotations import TextRows
from common.data.text_features import (
    FeaturesMissing,
    FeaturesStale,
    FeatureStore,
    StoredFeatures,
    bert_digest,
    encode_texts,
    make_store,
)
from papers.xmc_gan.text import BertText
from tests.xmc_gan.test_text import CAPTIONS, WORDS, T, tokenizer_of, write_bert


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def made(folder: Path, bert: Path, **changes: Any) -> FeatureStore:
    options = {"captions": CAPTIONS, "tokenizer": tokenizer_of(bert), "encoder": BertText(str(bert)), "batch_size": 4}
    return make_store(folder, bert=bert_digest(bert), **{**options, **changes})


def test_without_locks_a_finished_store_stays_whole(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.files.lock", lambda stream: False)
    folder, seen = tmp_path / "coco-train-8", []

    def advance(count: int) -> None:
        seen.append(count)
        if len(seen) == 2:  # a second process begins and ends while the first is at work
            made(folder, bert)

    assert len(made(folder, bert, advance=advance)) == 6
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("coco")] == [folder.name]


def test_the_store_holds_what_bert_says(bert: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(bert)
    store = made(tmp_path / "coco-train-8", bert)
    assert (len(store), store.width, store.max_tokens) == (6, 12, T)
    captions = np.array([4, 0, 2, 0])
    flat = [text for own in CAPTIONS for text in own]
    tokens, length = encode_texts([flat[number] for number in captions], tokenizer)
    for pool in ("official", "masked_mean"):
        words, sentence, lengths = store.read(captions, pool)  # type: ignore[arg-type]
        assert words.dtype == sentence.dtype == torch.float32
        assert lengths.tolist() == length.tolist()
        for mine, theirs in zip((words, sentence), BertText(str(bert), pool)(tokens, length)):  # type: ignore[arg-type]
            torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)
    # Nothing but tokens that count, in half precision.
    assert np.load(tmp_path / "coco-train-8" / "words.npy").dtype == np.float16
    assert len(np.load(tmp_path / "coco-train-8" / "words.npy")) == store.lengths(np.arange(6)).sum()
    assert not (tmp_path / "coco-train-8.partial").exists()


def test_a_store_goes_to_another_process_without_its_contents(bert: Path, tmp_path: Path) -> None:
    store = made(tmp_path / "store", bert)
    store.read(np.array([0]), "official")
    copy = pickle.loads(pickle.dumps(store))
    assert copy._arrays == {}
    for mine, theirs in zip(copy.read(np.array([3, 1]), "official"), store.read(np.array([3, 1]), "official")):
        assert torch.equal(mine, theirs)


class Interrupting(BertText):
    """Stops like Ctrl-C after some batches."""

    left = 2

    def hidden_states(self, tokens: Tensor, length: Tensor) -> Tensor:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().hidden_states(tokens, length)


def test_an_interrupted_store_goes_on(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_features, "KEPT_EVERY", 2)
    whole = made(tmp_path / "whole", bert, batch_size=1)
    advanced: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "store", bert, encoder=Interrupting(str(bert)), batch_size=1)
    assert (tmp_path / "store.partial").is_dir()
    assert not (tmp_path / "store").exists()
    features = StoredFeatures(str(tmp_path), str(bert))
    (tmp_path / "store.partial").rename(tmp_path / "coco-train-8.partial")
    assert features.state("coco", "train", CAPTIONS, tokenizer_of(bert)) == "half made"
    again = Interrupting(str(bert))
    again.left = 4
    store = made(tmp_path / "coco-train-8", bert, encoder=again, batch_size=1, advance=advanced.append)
    assert advanced == [2, 1, 1, 1, 1]
    for name in ("words", "official", "masked_mean"):
        assert np.array_equal(np.load(store.folder / f"{name}.npy"), np.load(whole.folder / f"{name}.npy"))
    # What was begun of other captions is of no use.
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "other", bert, encoder=Interrupting(str(bert)), batch_size=1)
    other = TextRows([("a cat", "the dog", "a mat")])
    advanced.clear()
    made(tmp_path / "other", bert, captions=other, batch_size=1, advance=advanced.append)
    assert advanced == [0, 1, 1, 1]


def test_a_store_that_another_process_made_meanwhile_is_taken(bert: Path, tmp_path: Path) -> None:
    made(tmp_path / "store", bert)
    never = Interrupting(str(bert))
    never.left = 0
    assert len(made(tmp_path / "store", bert, encoder=never)) == 6


def test_a_full_disk_is_found_before_the_work(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(text_features.shutil, "disk_usage", lambda _: usage(10, 0, 10))
    never = Interrupting(str(bert))
    never.left = 0
    with pytest.raises(OSError, match=r"the text features need .* GB, but only"):
        made(tmp_path / "store", bert, encoder=never)


def test_weights_that_give_no_numbers_are_found(bert: Path, tmp_path: Path) -> None:
    broken = BertText(str(bert))
    with torch.no_grad():
        broken.encoder.bert.encoder.layer[1].output.dense.bias.fill_(float("nan"))  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match="BERT's features are not finite"):
        made(tmp_path / "store", bert, encoder=broken)


def test_missing_and_stale_stores_are_refused(bert: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(bert)
    features = StoredFeatures(str(tmp_path), str(bert))
    with pytest.raises(FeaturesMissing, match=r"coco-train-8 does not exist$"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    assert features.state("coco", "train", CAPTIONS, tokenizer) == "missing"
    folder = features.path("coco", "train", T)
    made(folder, bert)
    assert len(features.open("coco", "train", CAPTIONS, tokenizer)) == 6
    assert features.state("coco", "train", CAPTIONS, tokenizer) == "present"
    other = TextRows([("a red dog", "a dog on the mat"), ("the cat",), ("a blue cat", "dogs", "?")])
    with pytest.raises(FeaturesStale, match=r"coco-train-8 is out of date, it was made of other captions: delete it"):
        features.open("coco", "train", other, tokenizer)
    swapped = tmp_path / "vocabulary"
    swapped.mkdir()
    (swapped / "vocab.txt").write_text("".join(f"{word}\n" for word in (*WORDS[:8], "cat", "dog", *WORDS[10:])))
    with pytest.raises(FeaturesStale, match=r"made of other tokenizer:"):
        features.open("coco", "train", CAPTIONS, tokenizer_of(swapped))
    weights = tmp_path / "bert"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        (weights / name).write_bytes((bert / name).read_bytes() + b" ")
    with pytest.raises(FeaturesStale, match=r"made of other bert:"):
        StoredFeatures(str(tmp_path), str(weights)).open("coco", "train", CAPTIONS, tokenizer)
    # A machine that only trains has no weights of BERT to compare with.
    assert len(StoredFeatures(str(tmp_path), str(tmp_path / "none")).open("coco", "train", CAPTIONS, tokenizer)) == 6


def test_damaged_stores_are_refused(bert: Path, tmp_path: Path) -> None:
    features, tokenizer = StoredFeatures(str(tmp_path), str(bert)), tokenizer_of(bert)
    folder = features.path("coco", "train", T)
    made(folder, bert)
    words = (folder / "words.npy").read_bytes()
    (folder / "words.npy").write_bytes(words[:-10])
    with pytest.raises(FeaturesStale, match=r"is damaged .*: delete it"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    np.save(folder / "words.npy", np.zeros((3, 12), dtype=np.float16))
    with pytest.raises(FeaturesStale, match="its arrays have the shapes"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    (folder / "words.npy").unlink()
    with pytest.raises(FeaturesMissing, match=r"words\.npy is missing"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    (folder / "words.npy").write_bytes(words)
    for name in ("starts", "words", "official"):
        path = folder / f"{name}.npy"
        whole = path.read_bytes()
        path.write_bytes(b"")
        with pytest.raises(FeaturesStale, match="is damaged"):
            features.open("coco", "train", CAPTIONS, tokenizer)
        path.write_bytes(whole)
    (folder / "store.json").write_text("{")
    with pytest.raises(FeaturesStale, match="is damaged"):
        features.open("coco", "train", CAPTIONS, tokenizer)
