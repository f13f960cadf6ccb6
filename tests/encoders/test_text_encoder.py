"""Test the text encoders: BERT from released files or with random weights, and the recurrent network of the search."""

from __future__ import annotations

import copy
import io
import logging
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from common.encoders.text import BertEncoder, GRUEncoder

SIZES: dict[str, Any] = {
    "vocabulary_size": 50, "hidden_size": 16, "layers": 2, "attention_heads": 4, "intermediate_size": 32,
    "max_tokens": 12,
}  # fmt: skip


def captions(rows: int = 4, length: int = 9) -> Tensor:
    tokens = torch.randint(1, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    for row in range(rows):
        tokens[row, length - row :] = 0
    return tokens


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """Write files like those of a released BERT, with a pooler and the pre-training heads."""
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=12,
    )  # fmt: skip
    with redirect_stderr(io.StringIO()):
        BertForPreTraining(config).save_pretrained(tmp_path)
    return tmp_path


def test_bert_base_without_pooler() -> None:
    with torch.device("meta"):
        encoder = BertEncoder()
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 109_482_240 - 590_592 == 108_891_648
    assert encoder.feature_dim == 768
    assert encoder.vocabulary_size == 30522


def test_released_weights_train_with_dropout_as_random_ones_do(released: Path) -> None:
    encoder = BertEncoder(str(released), dropout=0.5, **SIZES)
    assert all(module.training for module in encoder.modules())
    tokens = captions()
    assert not torch.equal(encoder(tokens), encoder(tokens))
    encoder.eval()
    assert torch.equal(encoder(tokens), encoder(tokens))


def test_padding_does_not_count() -> None:
    encoder = BertEncoder(**SIZES).eval()
    tokens = captions()
    with torch.no_grad():
        expected = encoder(tokens)
        torch.testing.assert_close(encoder(tokens, tokens != 0), expected)
        torch.testing.assert_close(encoder(tokens, (tokens != 0).long()), expected)
        torch.testing.assert_close(encoder(nn.functional.pad(tokens, (0, 3))), expected)
        torch.testing.assert_close(encoder(tokens.repeat(1, 2)[:, :9]), expected)
        torch.testing.assert_close(encoder(tokens.T.contiguous().T), expected)
        each = torch.cat([encoder(row[row != 0][None]) for row in tokens])
        torch.testing.assert_close(each, expected)
        masked = tokens.clone()
        masked[1, 3] = 49
        mask = tokens != 0
        mask[1, 3] = False
        torch.testing.assert_close(encoder(masked, mask), encoder(tokens, mask))


def test_released_weights_are_loaded(released: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import BertModel

    noise = io.StringIO()
    with redirect_stderr(noise), caplog.at_level(logging.WARNING):
        encoder = BertEncoder(str(released), **SIZES).eval()
    assert noise.getvalue() == "" == caplog.text
    with redirect_stderr(noise):
        model = BertModel.from_pretrained(released).eval()
    tokens = captions()
    with torch.no_grad():
        expected = model(tokens, attention_mask=(tokens != 0).long()).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder(tokens), expected)
    encoder.require_weights()


@pytest.mark.parametrize("field", ["vocabulary_size", "hidden_size", "layers", "intermediate_size", "max_tokens"])
def test_sizes_must_be_those_of_the_files(released: Path, field: str) -> None:
    with pytest.raises(ValueError, match=f"{SIZES[field]} .*{2 * SIZES[field]} "):
        BertEncoder(str(released), **{**SIZES, field: 2 * SIZES[field]})


def test_damaged_files_and_those_of_another_network(released: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = released / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "layer.1." not in name}, file)
    with pytest.raises(ValueError, match=r"encoder\.layer\.1"):
        BertEncoder(str(released), **SIZES)
    file.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match=re.escape(str(released))):
        BertEncoder(str(released), **SIZES)


def test_without_its_files_it_can_be_built_and_loaded_into_but_not_used(released: Path) -> None:
    # A folder without weights counts as missing.
    (released / "model.safetensors").unlink()
    for pretrained in (str(released), "some-body/some-bert"):
        encoder = BertEncoder(pretrained, **SIZES)
        twin = copy.deepcopy(encoder)
        for use in (encoder.require_weights, twin.require_weights, lambda one=encoder: one(captions())):
            with pytest.raises(FileNotFoundError, match=r"text_encoder\.pretrained"):
                use()
        both = nn.ModuleDict({"query": encoder, "key": twin})
        both.load_state_dict(both.state_dict())
        torch.testing.assert_close(encoder.eval()(captions()), twin.eval()(captions()))


# -- recurrent ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), layers=st.integers(1, 2), extra=st.integers(0, 3))
def test_the_state_after_the_last_word_as_by_packing(lengths: list[int], layers: int, extra: int) -> None:
    torch.manual_seed(0)
    encoder = GRUEncoder(20, embedding_dim=5, hidden_size=6, layers=layers)
    counts = torch.tensor(lengths)
    tokens = torch.randint(1, 20, (len(lengths), max(lengths) + extra))
    tokens[torch.arange(tokens.shape[1]) >= counts[:, None]] = 0
    with torch.no_grad():
        packed = pack_padded_sequence(encoder.embed(tokens), counts, batch_first=True, enforce_sorted=False)
        expected = nn.functional.normalize(encoder.rnn(packed)[1][-1], dim=1)
        torch.testing.assert_close(encoder(tokens), expected)


def test_the_recurrent_encoder_in_bfloat16_gives_float32() -> None:
    encoder = GRUEncoder(20, 5, 6)
    tokens = torch.tensor([[1, 4, 2]])
    expected = encoder(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(tokens)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(1))
    torch.testing.assert_close(features, expected, atol=0.05, rtol=0.05)
    assert encoder.double()(tokens).dtype == torch.float64
