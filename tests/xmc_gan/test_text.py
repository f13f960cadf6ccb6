"""Text side of XMC-GAN: pooling, the encoders, and the store of BERT features."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

from common.data.annotations import TextRows
from common.data.listing import DatasetMissing
from common.data.text import WordPieceTokenizer
from common.errors import StageError
from papers.xmc_gan import prepare
from papers.xmc_gan import text as text_module
from papers.xmc_gan.text import (
    BertText,
    FeaturesMissing,
    FeaturesStale,
    FeatureStore,
    NGramText,
    StoredFeatures,
    TransformerText,
    bert_digest,
    encode_texts,
    make_store,
    pool_sentence,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "xmc_gan" / "losses.npz"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "dog", "cat", "on", "the", "mat", "##s")
CAPTIONS = TextRows(
    [("a red dog", "a dog on the mat"), ("the cat",), ("a blue cat on the red mat on the blue mat", "dogs", "?")]
)
T = 8


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of the released layout, tiny and random."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes, initializer_range=0.5)
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return folder


def tokenizer_of(bert: Path, max_tokens: int = T) -> WordPieceTokenizer:
    tokenizer = WordPieceTokenizer(str(bert), max_tokens=max_tokens)
    tokenizer.prepare()
    return tokenizer


def reference_states(bert: Path, tokens: Tensor, length: Tensor) -> Tensor:
    """Hidden states of every place by transformers itself, with its two-dimensional mask."""
    from transformers import BertModel

    model: Any = BertModel
    with torch.no_grad():
        mask = (torch.arange(tokens.shape[1]) < length[:, None]).long()
        return model.from_pretrained(bert, attn_implementation="eager").eval()(tokens, mask).last_hidden_state


# ------------------------------------------------------------------------------------------------------------- pooling
@pytest.mark.parametrize("case", ["a", "b"])
def test_the_official_pooling_is_the_official_codes(case: str) -> None:
    arrays = np.load(GOLDEN)
    words, length = (torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("word", "max_len"))
    found = pool_sentence(words, length[:, 0].long(), "official")
    np.testing.assert_allclose(found.numpy(), arrays[f"{case}/sentence_from_words"], rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**31))
def test_poolings_agree_where_padding_is_zero(rows: int, places: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, places + 1, (rows,), generator=generator)
    words = torch.randn(rows, places, 3, generator=generator)
    masked = words * (torch.arange(places) < length[:, None])[..., None]
    mean = torch.stack([own[:count].mean(0) for own, count in zip(words, length)])
    for given_words, pool in ((words, "masked_mean"), (masked, "masked_mean"), (masked, "official")):
        torch.testing.assert_close(pool_sentence(given_words, length, pool), mean)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- tokens
def test_texts_are_cut_before_the_closing_token(bert: Path) -> None:
    tokens, length = encode_texts(["dog", "a blue cat on the red mat on the blue mat", "?", ""], tokenizer_of(bert))
    assert tokens.dtype == length.dtype == torch.int64
    assert tokens.tolist() == [
        [2, 8, 3, 0, 0, 0, 0, 0],
        [2, 5, 7, 9, 10, 11, 6, 3],
        [2, 1, 3, 0, 0, 0, 0, 0],
        [2, 3, 0, 0, 0, 0, 0, 0],
    ]
    assert length.tolist() == [3, 8, 3, 2]


# ------------------------------------------------------------------------------------------------------------ encoders
def encoders(bert: Path) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        BertText(str(bert), "masked_mean"),
        NGramText(len(WORDS), 12),
        TransformerText(len(WORDS), 12, 1, 2, T),
    ]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_every_encoder_gives_words_and_sentences(bert: Path, kind: int) -> None:
    encoder: Any = encoders(bert)[kind]
    tokens, length = encode_texts([text for own in CAPTIONS for text in own], tokenizer_of(bert))
    words, sentence = encoder(tokens, length)
    assert encoder.feature_dim == 12
    assert words.shape == (6, T, 12)
    assert words.dtype == sentence.dtype == torch.float32
    for row, count in enumerate(length.tolist()):
        assert words[row, :count].abs().sum(1).min() > 0
        assert words[row, count:].abs().sum() == 0
        torch.testing.assert_close(sentence[row], words[row, :count].mean(0))
    # What stands behind the end changes nothing.
    dirty = torch.where(torch.arange(T) < length[:, None], tokens, 9)
    for mine, theirs in zip(encoder(dirty, length), (words, sentence)):
        torch.testing.assert_close(mine, theirs)
    assert not torch.allclose(words[0, 1:3], words[3, 1:3])  # another caption, other words


def test_bert_is_that_of_transformers_and_frozen(bert: Path) -> None:
    encoder = BertText(str(bert)).train()
    tokens, length = encode_texts(["a red dog", "the cat"], tokenizer_of(bert))
    words, sentence = encoder(tokens, length)
    states = reference_states(bert, tokens, length)
    for row, count in enumerate(length.tolist()):
        torch.testing.assert_close(words[row, :count], states[row, :count], atol=1e-5, rtol=1e-5)
        # The official sentence holds what BERT says at padded places.
        torch.testing.assert_close(sentence[row], states[row].sum(0) / count, atol=1e-5, rtol=1e-5)
    assert not encoder.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not words.requires_grad
    assert not torch.allclose(sentence, pool_sentence(words, length, "masked_mean"), atol=1e-3)


def test_bert_without_files_says_so_at_the_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocabulary_size": 9, "hidden_size": 4, "layers": 1, "attention_heads": 1, "intermediate_size": 4}
    monkeypatch.setattr(text_module, "_bert_sizes", lambda _: sizes)
    encoder = BertText(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        encoder(torch.ones(1, 3, dtype=torch.long), torch.tensor([3]))
    with pytest.raises(ValueError, match="sentence_pool: 'mean' is not one of official, masked_mean"):
        BertText(str(tmp_path), "mean")  # type: ignore[arg-type]


def test_ngram_features_are_those_of_the_specification() -> None:
    encoder = NGramText(20, 6, radius=3, seed=5)
    assert [tuple(state.shape) for state in encoder.state_dict().values()] == [(7, 20, 6)]
    assert list(encoder.parameters()) == []
    tokens, length = torch.tensor([[2, 7, 9, 11, 3, 0, 0]]), torch.tensor([5])
    words, _ = encoder(tokens, length)
    table = encoder.table
    for place in range(5):
        around = [(offset, place + offset) for offset in range(-3, 4) if 0 <= place + offset < 5]
        expected = torch.tanh(sum(table[3 + offset, tokens[0, where]] for offset, where in around) / 1.5)
        torch.testing.assert_close(words[0, place], expected)
    # The same in every process, with other seeds of the run; another seed is another encoder.
    torch.manual_seed(99)
    assert torch.equal(NGramText(20, 6, seed=5).table, table)
    assert not torch.equal(NGramText(20, 6, seed=6).table, table)
    large = NGramText(2000, 48).table[:, 1:]
    np.testing.assert_allclose(large.std(dim=(1, 2)).numpy(), [0.7] * 3 + [1.0] + [0.7] * 3, rtol=0.02)


def test_small_encoders_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="attention_heads: 5 do not divide"):
        TransformerText(9, 12, 1, 5)
    with pytest.raises(ValueError, match="vocabulary_size must be positive"):
        NGramText(0)
    with pytest.raises(ValueError, match="radius"):
        NGramText(9, 4, -1)
    with pytest.raises(ValueError, match="max_tokens is 4, but texts have 5"):
        TransformerText(9, 12, 1, 4, 4)(torch.ones(1, 5, dtype=torch.long), torch.tensor([5]))


def test_the_trainable_encoder_learns() -> None:
    torch.manual_seed(0)
    encoder = TransformerText(9, 12, 1, 4, 6)
    words, sentence = encoder(torch.tensor([[2, 5, 6, 3, 0, 0]]), torch.tensor([4]))
    (words.square().sum() + sentence.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["embed.weight"][[2, 5, 6, 3]].abs().sum(1).min() > 0  # type: ignore[index]
    assert gradients["embed.weight"][0].abs().sum() == 0  # type: ignore[index]


# --------------------------------------------------------------------------------------------------------------- store
def made(folder: Path, bert: Path, **changes: Any) -> FeatureStore:
    options = {"captions": CAPTIONS, "tokenizer": tokenizer_of(bert), "encoder": BertText(str(bert)), "batch_size": 4}
    return make_store(folder, bert=bert_digest(bert), **{**options, **changes})


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
    monkeypatch.setattr(text_module, "KEPT_EVERY", 2)
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
    monkeypatch.setattr(text_module.shutil, "disk_usage", lambda _: usage(10, 0, 10))
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


def test_features_are_the_same_where_the_rest_trains_in_half_precision(bert: Path) -> None:
    encoder = BertText(str(bert))
    tokens, length = encode_texts(["a red dog", "the cat"], tokenizer_of(bert))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(tokens, length)
    for mine, theirs in zip(mixed, encoder(tokens, length)):
        assert torch.equal(mine, theirs)


def test_missing_and_stale_stores_are_refused(bert: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(bert)
    features = StoredFeatures(str(tmp_path), str(bert))
    with pytest.raises(FeaturesMissing, match=r"coco-train-8 does not exist.*assemble data xmc_gan --text-features"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    assert features.state("coco", "train", CAPTIONS, tokenizer) == "missing"
    folder = features.path("coco", "train", T)
    made(folder, bert)
    assert len(features.open("coco", "train", CAPTIONS, tokenizer)) == 6
    assert features.state("coco", "train", CAPTIONS, tokenizer) == "present"
    other = TextRows([("a red dog", "a dog on the mat"), ("the cat",), ("a blue cat", "dogs", "?")])
    with pytest.raises(FeaturesStale, match=r"coco-train-8 is out of date, it was made of other captions\."):
        features.open("coco", "train", other, tokenizer)
    swapped = tmp_path / "vocabulary"
    swapped.mkdir()
    (swapped / "vocab.txt").write_text("".join(f"{word}\n" for word in (*WORDS[:8], "cat", "dog", *WORDS[10:])))
    with pytest.raises(FeaturesStale, match=r"made of other tokenizer\."):
        features.open("coco", "train", CAPTIONS, tokenizer_of(swapped))
    weights = tmp_path / "bert"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        (weights / name).write_bytes((bert / name).read_bytes() + b" ")
    with pytest.raises(FeaturesStale, match=r"made of other bert\."):
        StoredFeatures(str(tmp_path), str(weights)).open("coco", "train", CAPTIONS, tokenizer)
    # A machine that only trains has no weights of BERT to compare with.
    assert len(StoredFeatures(str(tmp_path), str(tmp_path / "none")).open("coco", "train", CAPTIONS, tokenizer)) == 6


def test_damaged_stores_are_refused(bert: Path, tmp_path: Path) -> None:
    features, tokenizer = StoredFeatures(str(tmp_path), str(bert)), tokenizer_of(bert)
    folder = features.path("coco", "train", T)
    made(folder, bert)
    words = (folder / "words.npy").read_bytes()
    (folder / "words.npy").write_bytes(words[:-10])
    with pytest.raises(FeaturesStale, match=r"is damaged .*; delete it and make it anew"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    np.save(folder / "words.npy", np.zeros((3, 12), dtype=np.float16))
    with pytest.raises(FeaturesStale, match="its arrays have the shapes"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    (folder / "words.npy").unlink()
    with pytest.raises(FeaturesMissing, match=r"words\.npy is missing"):
        features.open("coco", "train", CAPTIONS, tokenizer)
    (folder / "words.npy").write_bytes(words)
    (folder / "store.json").write_text("{")
    with pytest.raises(FeaturesStale, match="is damaged"):
        features.open("coco", "train", CAPTIONS, tokenizer)


# ------------------------------------------------------------------------------------------------------------- command
class Captions:
    """A data set of captions alone."""

    name = "coco"
    title = "COCO"

    def __init__(self, missing: bool = False) -> None:
        self.missing = missing

    def annotations(self, split: str) -> Any:
        if self.missing:
            raise DatasetMissing("nothing there")
        return type("Annotations", (), {"captions": CAPTIONS})()


def test_the_command_makes_what_is_missing(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = StoredFeatures(str(tmp_path / "features"), str(bert))
    tokenizer = WordPieceTokenizer(str(bert), max_tokens=T)
    stores = [
        prepare.WantedStore(Captions(), "train", tokenizer, features),
        prepare.WantedStore(Captions(missing=True), "val", tokenizer, features),
    ]
    monkeypatch.setattr(prepare, "wanted_stores", lambda *_: stores)

    def printed(command: Any, **options: Any) -> tuple[str, Any]:
        stream = io.StringIO()
        result = command(tmp_path, console=Console(file=stream, width=200), **options)
        return stream.getvalue(), result

    text, _ = printed(prepare.report)
    assert "missing" in text
    assert "assemble data xmc_gan --text-features" in text
    text, paths = printed(prepare.text_features, batch_size=2)
    assert paths == [tmp_path / "features" / "coco-train-8"]
    assert "BERT reads COCO, train" in text
    assert "6/6" in text
    assert "COCO, val: the data set is missing" in text
    identity = json.loads((paths[0] / "store.json").read_text())
    assert (identity["dataset"], identity["split"], identity["width"]) == ("coco", "train", 12)
    text, _ = printed(prepare.report)
    assert "present" in text
    assert "the data set is missing" in text
    with pytest.raises(StageError, match="no store was made"):
        printed(prepare.text_features)
    monkeypatch.setattr(prepare, "wanted_stores", lambda *_: stores[:1])
    assert "assemble data" not in printed(prepare.report)[0]
    assert printed(prepare.text_features)[1] == []


def test_the_command_needs_bert(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(bert)
    nowhere = StoredFeatures(str(tmp_path), str(tmp_path / "bert"))
    monkeypatch.setattr(
        prepare, "wanted_stores", lambda *_: [prepare.WantedStore(Captions(), "train", tokenizer, nowhere)]
    )
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json and model\.safetensors.*hf download"):
        prepare.text_features(tmp_path)
    here = StoredFeatures(str(tmp_path), str(bert))
    monkeypatch.setattr(
        prepare, "wanted_stores", lambda *_: [prepare.WantedStore(Captions(), "train", tokenizer, here)]
    )
    with pytest.raises(StageError, match="--device nonsense"):
        prepare.text_features(tmp_path, device="nonsense")
