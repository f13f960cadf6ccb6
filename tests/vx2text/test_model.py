"""Test the tokens of modalities in texts, the category table, and the path of gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from papers.vx2text.fusion import VX2Text
from papers.vx2text.gumbel import gumbel_noise
from papers.vx2text.language_model import LanguageModel, OptionClassifier
from papers.vx2text.loss import per_answer
from papers.vx2text.tokens import (
    ModalityClassifier,
    ModalityTokens,
    SigmoidClassifier,
    Tokenization,
    category_names,
    pieces_of,
    place,
    table_of,
)

NAMES = ["red", "big dog", "cat", "blue sky now"]


class Pooled(nn.Module):
    """An encoder of clips [B, 3, T, H, W] that averages over time and space."""

    def __init__(self, feature_dim: int = 6) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.linear = nn.Linear(3, feature_dim)
        self.norm = nn.BatchNorm1d(feature_dim)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(torch.tanh(self.linear(x.mean((2, 3, 4))))))


class Words:
    """A vocabulary in which every word of NAMES is one token."""

    def encode(self, text: str) -> list[int]:
        known = sorted({word for name in NAMES for word in name.split()})
        return [known.index(word) + 3 for word in text.split()]


def small() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(40, width=8, layers=1, attention_heads=2, key_width=4, feed_forward_width=16, dropout=0.0)


def tokens(tokenization: Tokenization = "st_topk", **options: Any) -> ModalityTokens:
    torch.manual_seed(1)
    made = ModalityTokens(ModalityClassifier(Pooled(), NAMES), 8, 2, tokenization, **options)
    if options.get("table", "learned") == "learned":
        made.load_state_dict({"table.weight": torch.randn(4, 8)}, strict=False)
    made.classifier.encoder.dropout.p = 0.0  # type: ignore[union-attr, assignment]
    return made


def clips() -> Tensor:
    return torch.randn(3, 2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(2))


# -- the category table ------------------------------------------------------------------------------------------------


def test_a_row_is_the_mean_of_the_embeddings_of_its_pieces() -> None:
    model, words = small(), Words()
    table = table_of(pieces_of(NAMES, words), model)
    for row, name in zip(table, NAMES):
        torch.testing.assert_close(row, model.t5.shared.weight[words.encode(name)].mean(0))


def test_category_names_from_lists_files_and_kinetics(tmp_path: Path) -> None:
    assert len(category_names(None)) == 400
    assert category_names(["Dog", "CAT"]) == ["dog", "cat"]
    indices = tmp_path / "class_labels_indices.csv"
    indices.write_text('index,mid,display_name\n0,/m/1,"Speech, human"\n1,/m/2,Dog\n', encoding="utf-8")
    assert category_names(str(indices)) == ["speech, human", "dog"]
    with pytest.raises(ValueError, match="no name twice"):
        category_names(["Dog", "dog"])


def test_sigmoids_share_what_they_sum_to() -> None:
    class Scores(nn.Module):
        feature_dim = 4

        def forward(self, clip: Tensor) -> Tensor:
            return clip

    plain = ModalityClassifier(Scores(), ["a", "b", "c"])
    other = SigmoidClassifier(Scores(), ["a", "b", "c"])
    other.load_state_dict(plain.state_dict())
    clips = 3 * torch.randn(5, 4)
    sigmoids = plain(clips).sigmoid()
    torch.testing.assert_close(other(clips).softmax(1), sigmoids / sigmoids.sum(1, keepdim=True))
    tokens = ModalityTokens(other, 6, 2)
    torch.testing.assert_close(tokens(clips[:, None])[2][:, 0], sigmoids.log())


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenization", get_args(Tokenization))
def test_a_gradient_reaches_the_classifier_only_when_it_should(tokenization: Tokenization) -> None:
    made = tokens(tokenization).train()
    shape = made.noise_shape(2)
    assert (shape is None) == (tokenization in ("frozen", "continuous"))
    noise = None if shape is None else gumbel_noise(3, *shape)
    made(clips(), noise)[0].pow(2).sum().backward()
    reached = {name for name, p in made.classifier.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    if tokenization in ("frozen", "nondifferentiable"):
        assert reached == set()
        assert not any(p.requires_grad for p in made.classifier.parameters())
    else:
        assert "encoder.linear.weight" in reached
        assert ("fc.weight" in reached) == (tokenization != "continuous")
    trained = [name for name, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert trained == []  # distributed training needs a gradient for each parameter


def test_batch_normalization_keeps_its_statistics_and_a_frozen_classifier_is_in_evaluation_mode() -> None:
    # The modes must be right without a call of `train`, since Lightning doesn't always call it.
    fresh, frozen = tokens(), tokens("frozen")
    assert fresh.training
    assert not fresh.classifier.encoder.norm.training  # type: ignore[union-attr]
    assert not any(module.training for module in frozen.classifier.modules())
    made = tokens().train()
    norm = made.classifier.encoder.norm  # type: ignore[union-attr]
    before = norm.running_mean.clone()  # type: ignore[union-attr, operator]
    made(clips(), gumbel_noise(3, 2, 1, 4))
    assert torch.equal(norm.running_mean, before)  # type: ignore[union-attr, arg-type]
    assert made.classifier.encoder.dropout.training  # type: ignore[union-attr]
    assert not tokens("frozen").train().classifier.encoder.dropout.training  # type: ignore[union-attr]


def test_a_tied_table_sends_its_gradient_to_the_words() -> None:
    model, made = small(), tokens(table="tied").train()
    assert not any("table" in name for name, _ in made.named_parameters())
    table = table_of(pieces_of(NAMES, Words()), model)
    embeddings, chosen, _ = made(clips(), None, table)
    assert torch.equal(embeddings, table[chosen])
    embeddings.sum().backward()
    assert model.t5.shared.weight.grad is not None


def test_the_tokens_of_a_clip_do_not_depend_on_the_other_clips() -> None:
    made = tokens().train()
    noise = gumbel_noise(3, 2, 1, 4)
    whole = made(clips(), noise)[0]
    for row in range(3):
        for clip in range(2):
            alone = made(clips()[row : row + 1, clip : clip + 1], noise[row : row + 1, clip : clip + 1])[0]
            torch.testing.assert_close(whole[row, 2 * clip : 2 * clip + 2], alone[0])


# -- places ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 1000))
def test_tokens_stand_in_their_places_and_words_stay(batch: int, video: int, audio: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (batch, 12), generator=generator)
    order = torch.stack([torch.randperm(12, generator=generator) for _ in range(batch)])
    for row in range(batch):
        for token in range(video):
            ids[row, order[row, token]] = -1 - token
        for token in range(audio):
            ids[row, order[row, 3 + token]] = -101 - token
    words = torch.randn(batch, 12, 4, generator=generator)
    found = {"video": torch.randn(batch, 3, 4, generator=generator), "audio": torch.randn(batch, 3, 4)}
    placed = place(place(words, ids, found["video"], "video"), ids, found["audio"], "audio")
    for row in range(batch):
        for column in range(12):
            number = int(ids[row, column])
            expected = words[row, column]
            if -100 <= number < 0:
                expected = found["video"][row, -1 - number]
            elif number <= -101:
                expected = found["audio"][row, -101 - number]
            assert torch.equal(placed[row, column], expected)


# -- the language model ------------------------------------------------------------------------------------------------


def test_parameters_of_t5_base() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in LanguageModel().parameters()) == 222_903_552


def test_padding_changes_nothing() -> None:
    model = small().eval()
    embeddings, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    labels = torch.tensor([[4, 5, 1], [6, 1, -100]])
    longer = torch.cat([embeddings, torch.randn(2, 3, 8)], 1)
    wider = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(embeddings, mask, labels), model(longer, wider, labels))
        assert torch.equal(model.generate(embeddings, mask, 3, 6), model.generate(longer, wider, 3, 6))


def test_scores_of_options_are_mean_likelihoods() -> None:
    model = small().eval()
    embeddings, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    options = torch.tensor([[[4, 5, 1], [6, 1, -100]], [[7, 1, -100], [8, 9, 1]]])
    scores = model.option_scores(embeddings, mask, options)
    for option in range(2):
        with torch.no_grad():
            loss, number = per_answer(model(embeddings, mask, options[:, option]), options[:, option])
        torch.testing.assert_close(scores[:, option], -loss / number)


def test_an_option_is_picked_from_the_state_of_the_last_position_that_counts() -> None:
    torch.manual_seed(0)
    model = OptionClassifier(5, vocabulary_size=40, width=16, layers=1, attention_heads=2, key_width=8).eval()
    assert not any(name.startswith("t5.decoder") for name, _ in model.named_parameters())
    ids = torch.randint(1, 40, (3, 7))
    mask = torch.arange(7) < torch.tensor([7, 5, 4])[:, None]
    mask[0, 2] = False
    scores = model(model.embed(ids), mask)
    assert scores.shape == (3, 1, 5)
    for row in range(3):
        kept = ids[row, : int(mask[row].nonzero().max()) + 1]
        alone = model.t5(inputs_embeds=model.embed(kept[None]), attention_mask=mask[row, None, : len(kept)].long())
        torch.testing.assert_close(scores[row, 0], model.head(alone.last_hidden_state[0, -1]))


# -- options and texts -------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer whose token 3 + n is the n-th letter of the alphabet."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(94 + number) for number in ids if number > 2)


def prompts(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, 8), torch.ones(count, 4, dtype=torch.bool)


def test_duplicated_options_go_to_the_lower_one() -> None:
    model, (embeddings, mask) = VX2Text(small().eval(), modalities=()), prompts(1)
    labels = torch.tensor([[[9, 1], [5, 1], [5, 1], [7, 1], [9, 1]]])
    scores = model.language_model.option_scores(embeddings, mask, labels)
    assert scores[0, 1] == scores[0, 2]
    assert scores[0, 0] == scores[0, 4]
    options = [["nine", "five", "five", "seven", "nine"]]
    texts, picked = model.texts({"options": options, "option_labels": labels}, embeddings, mask, Letters())
    assert picked is not None
    assert picked.item() in (0, 1, 3)
    assert texts == [options[0][picked]]


def test_the_label_is_the_most_probable_first_word_of_the_five() -> None:
    model, (embeddings, mask) = VX2Text(small().eval(), modalities=()), prompts()
    letters = torch.tensor([[3, 4, 5, 6, 7]]).expand(2, 5)
    with torch.no_grad():
        first = model.language_model(embeddings, mask, torch.full((2, 1), 30))[:, 0]
    torch.testing.assert_close(model.language_model.letter_scores(embeddings, mask, letters), first[:, 3:8])
    batch = {"options": [list("abcde")] * 2, "answer_options": letters}
    texts, picked = model.texts(batch, embeddings, mask, Letters())
    assert picked is not None
    assert picked.tolist() == first[:, 3:8].argmax(1).tolist()
    assert texts == ["abcde"[number] for number in picked.tolist()]
