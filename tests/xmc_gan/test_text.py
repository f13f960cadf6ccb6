"""Test the text side of XMC-GAN: pooling, the encoders, and the command that stores BERT's features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.sequences import Rows
from common.data.text import WordPieceTokenizer
from common.data.text_features import encode_texts, pool_sentence
from papers.xmc_gan.miniature import NGramText
from papers.xmc_gan.text import BertText

GOLDEN = Path(__file__).parents[1] / "golden" / "xmc_gan" / "losses.npz"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "dog", "cat", "on", "the", "mat", "##s")
CAPTIONS = Rows.texts(
    [("a red dog", "a dog on the mat"), ("the cat",), ("a blue cat on the red mat on the blue mat", "dogs", "?")]
)
T = 8


def write_bert(folder: Path, words: Sequence[str] = WORDS, width: int = 12) -> Path:
    """Write a tiny random BERT in the released layout."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes, initializer_range=0.5)
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def tokenizer_of(bert: Path) -> WordPieceTokenizer:
    tokenizer = WordPieceTokenizer(str(bert), max_tokens=T)
    tokenizer.prepare()
    return tokenizer


# ------------------------------------------------------------------------------------------------------------- pooling
@pytest.mark.parametrize("case", ["a", "b"])
def test_the_official_pooling_is_the_official_codes(case: str) -> None:
    arrays = np.load(GOLDEN)
    words, length = (torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("word", "max_len"))
    found = pool_sentence(words, length[:, 0].long(), "official")
    np.testing.assert_allclose(found.numpy(), arrays[f"{case}/sentence_from_words"], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ encoders
@pytest.mark.parametrize("kind", [BertText, NGramText])
def test_every_encoder_gives_words_and_sentences(bert: Path, kind: type) -> None:
    encoder = BertText(str(bert), "masked_mean") if kind is BertText else NGramText(len(WORDS), 12)
    tokens, length = encode_texts([text for own in CAPTIONS for text in own], tokenizer_of(bert))
    words, sentence = encoder(tokens, length)
    assert encoder.feature_dim == 12
    assert words.shape == (6, T, 12)
    assert words.dtype == sentence.dtype == torch.float32
    for row, count in enumerate(length.tolist()):
        assert words[row, :count].abs().sum(1).min() > 0
        assert words[row, count:].abs().sum() == 0
        torch.testing.assert_close(sentence[row], words[row, :count].mean(0))
    # Tokens after the end must not change the result.
    dirty = torch.where(torch.arange(T) < length[:, None], tokens, 9)
    for mine, theirs in zip(encoder(dirty, length), (words, sentence)):
        torch.testing.assert_close(mine, theirs)
    assert not torch.allclose(words[0, 1:3], words[3, 1:3])  # other captions give other vectors


def test_bert_is_that_of_transformers_and_frozen(bert: Path) -> None:
    from transformers import BertModel

    encoder = BertText(str(bert)).train()
    tokens, length = encode_texts(["a red dog", "the cat"], tokenizer_of(bert))
    words, sentence = encoder(tokens, length)
    # Compare with transformers' own BERT and its two-dimensional mask.
    network: Any = BertModel.from_pretrained(bert, attn_implementation="eager").eval()
    with torch.no_grad():
        states = network(tokens, (torch.arange(T) < length[:, None]).long()).last_hidden_state
    for row, count in enumerate(length.tolist()):
        torch.testing.assert_close(words[row, :count], states[row, :count], atol=1e-5, rtol=1e-5)
        # The official sentence vector includes BERT's output at padded positions.
        torch.testing.assert_close(sentence[row], states[row].sum(0) / count, atol=1e-5, rtol=1e-5)
    assert not encoder.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not words.requires_grad
    assert not torch.allclose(sentence, pool_sentence(words, length, "masked_mean"), atol=1e-3)


def test_ngram_features_are_those_that_were_written_down() -> None:
    encoder = NGramText(20, 6)
    assert [tuple(state.shape) for state in encoder.state_dict().values()] == [(7, 20, 6)]
    assert list(encoder.parameters()) == []
    tokens, length = torch.tensor([[2, 7, 9, 11, 3, 0, 0]]), torch.tensor([5])
    words, _ = encoder(tokens, length)
    table = encoder.table
    for place in range(5):
        around = [(offset, place + offset) for offset in range(-3, 4) if 0 <= place + offset < 5]
        expected = torch.tanh(sum(table[3 + offset, tokens[0, where]] for offset, where in around) / 1.5)
        torch.testing.assert_close(words[0, place], expected)
    # The table must be the same in every process, even if the run has another seed.
    torch.manual_seed(99)
    assert torch.equal(NGramText(20, 6).table, table)
    large = NGramText(2000, 48).table[:, 1:]
    np.testing.assert_allclose(large.std(dim=(1, 2)).numpy(), [0.7] * 3 + [1.0] + [0.7] * 3, rtol=0.02)


def test_features_are_the_same_where_the_rest_trains_in_half_precision(bert: Path) -> None:
    encoder = BertText(str(bert))
    tokens, length = encode_texts(["a red dog", "the cat"], tokenizer_of(bert))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(tokens, length)
    for mine, theirs in zip(mixed, encoder(tokens, length)):
        assert torch.equal(mine, theirs)
