"""Test the store of text features: its content, and the errors for files that don't fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from common.data.sequences import Rows
from common.data.text_features import (
    FeaturesError,
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


def test_the_store_holds_what_bert_says(bert: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(bert)
    counts: list[int] = []
    store = made(tmp_path / "coco-train-8.h5", bert, advance=counts.append, described={"a": "b"})
    assert (counts, store.about["a"], store.about["made_of"][:16]) == ([4, 2], "b", "02ae16c26782061d")
    store = pickle.loads(pickle.dumps(store))  # workers get a pickled copy
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
    # The store omits padding and has half precision.
    with h5py.File(store.path) as file:
        assert file["words"].dtype == np.float16
        assert len(file["words"]) == store.starts[-1] == encode_texts(flat, tokenizer)[1].sum()


def test_weights_that_give_no_numbers_are_found(bert: Path, tmp_path: Path) -> None:
    broken = BertText(str(bert))
    with torch.no_grad():
        broken.encoder.bert.encoder.layer[1].output.dense.bias.fill_(float("nan"))  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match="BERT's features are not finite"):
        made(tmp_path / "store.h5", bert, encoder=broken)


def test_missing_and_stale_stores_are_refused(bert: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(bert)
    features = StoredFeatures(str(tmp_path), str(bert))
    with pytest.raises(FeaturesError, match=r"coco-train-8\.h5"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    folder = features.path("coco", "train", T)
    made(folder, bert)
    assert len(features.open("coco", "train", CAPTIONS, tokenizer)) == 6
    other = Rows.texts([*CAPTIONS[:2], (*CAPTIONS[2][:2], "!")])  # "!" is unknown to the tokenizer, as is "?"
    with pytest.raises(FeaturesError, match=r"coco-train-8\.h5.*other captions"):
        features.open("coco", "train", other, tokenizer)
    swapped = tmp_path / "vocabulary"
    swapped.mkdir()
    (swapped / "vocab.txt").write_text("".join(f"{word}\n" for word in (*WORDS[:8], "cat", "dog", *WORDS[10:])))
    with pytest.raises(FeaturesError, match=r"another tokenizer:"):
        features.open("coco", "train", CAPTIONS, tokenizer_of(swapped))
    weights = tmp_path / "bert"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        (weights / name).write_bytes((bert / name).read_bytes() + b" ")
    with pytest.raises(FeaturesError, match=r"made by another BERT:"):
        StoredFeatures(str(tmp_path), str(weights)).open("coco", "train", CAPTIONS, tokenizer)
    # A machine that only trains has no BERT weights, so the store can't be compared with them.
    assert len(StoredFeatures(str(tmp_path), str(tmp_path / "none")).open("coco", "train", CAPTIONS, tokenizer)) == 6


def test_damaged_stores_are_refused(bert: Path, tmp_path: Path) -> None:
    features, tokenizer = StoredFeatures(str(tmp_path), str(bert)), tokenizer_of(bert)
    path = features.path("coco", "train", T)
    made(path, bert)
    whole = path.read_bytes()
    for damaged in (whole[:-10], b"", b"{" + whole[1:]):
        path.write_bytes(damaged)
        with pytest.raises(FeaturesError, match=r"coco-train-8\.h5"):
            features.open("coco", "train", CAPTIONS, tokenizer)
    path.write_bytes(whole)
    (tmp_path / "secret").write_bytes(bytes(100))
    rows, starts = (int(np.diff(FeatureStore(path).starts).sum()), FeatureStore(path).starts)
    columns: tuple[tuple[str, dict[str, Any]], ...] = (
        ("words", {"shape": (rows, 12), "dtype": np.float16, "chunks": True}),  # chunked data can't be memory-mapped
        ("words", {"shape": (rows - 1, 12), "dtype": np.float16}),
        ("words", {"shape": (rows,), "dtype": np.float16}),
        ("official", {"shape": (5, 12), "dtype": np.float16}),
        ("official", {"shape": (6, 12), "dtype": np.float32}),
        ("starts", {"data": starts[::-1].copy()}),
        ("starts", {"data": starts.astype(float)}),
        ("starts", {"data": starts[:, None]}),
        ("starts", {"shape": (7,), "dtype": np.int64, "external": [(str(tmp_path / "secret"), 0, 56)]}),
    )
    for name, changed in columns:
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            del file[name]
            file.create_dataset(name, **changed)
        with pytest.raises(FeaturesError, match=r"coco-train-8\.h5: "):
            features.open("coco", "train", CAPTIONS, tokenizer)
    for tokens in (2**40, -1, 3):
        path.write_bytes(whole)
        with h5py.File(path, "r+") as file:
            file.attrs["max_tokens"] = tokens
        with pytest.raises(FeaturesError, match=rf"coco-train-8\.h5: .*0 to {tokens} tokens"):
            features.open("coco", "train", CAPTIONS, tokenizer)
