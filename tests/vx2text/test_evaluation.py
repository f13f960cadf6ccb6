"""Picked options, generated text and chosen categories as they are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from papers.vx2text.evaluation import TextTest, WordsTest, Written, first_largest, pick_by_label, pick_by_likelihood
from papers.vx2text.model import LanguageModel


class Letters:
    """Piece 3 + n is the n-th letter of the alphabet."""

    pad_id, eos_id = 0, 1

    def decode(self, ids: list[int]) -> str:
        ids = ids[1:] if ids and ids[0] == 0 else ids
        ids = ids[: ids.index(1)] if 1 in ids else ids
        return "".join(chr(94 + number) for number in ids if number > 2)


class Writes(LanguageModel):
    """Generates the given rows."""

    def __init__(self, rows: list[list[int]]) -> None:
        super().__init__(40, 8, 1, 2, 4, 16)
        self.rows = rows

    def generate(self, embeddings: Tensor, mask: Tensor, beams: int = 5, max_tokens: int = 30) -> Tensor:
        return torch.tensor([self.rows.pop(0) for _ in range(len(mask))])


def prompts(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4, 8), torch.ones(count, 4, dtype=torch.bool)


def network() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(40, 8, 1, 2, 4, 16, dropout=0.0).eval()


# -- options -----------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lower_option() -> None:
    assert first_largest(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, -1.0, 5.0]])).tolist() == [1, 0, 2]


def test_duplicated_options_go_to_the_lower_one() -> None:
    model, (embeddings, mask) = network(), prompts(1)
    options = torch.tensor([[[9, 1], [5, 1], [5, 1], [7, 1], [9, 1]]])
    picked, scores = pick_by_likelihood(model, embeddings, mask, options)
    assert scores[0, 1] == scores[0, 2]
    assert scores[0, 0] == scores[0, 4]
    assert picked.item() in (0, 1, 3)


def test_the_label_is_the_most_probable_first_word_of_the_five() -> None:
    model, (embeddings, mask) = network(), prompts()
    letters = torch.tensor([[3, 4, 5, 6, 7]]).expand(2, 5)
    picked, scores = pick_by_label(model, embeddings, mask, letters)
    with torch.no_grad():
        first = model(embeddings, mask, torch.full((2, 1), 30))[:, 0]
    torch.testing.assert_close(scores, first[:, 3:8])
    assert picked.tolist() == first[:, 3:8].argmax(1).tolist()


def test_an_option_is_judged_by_its_mean_and_not_by_its_length() -> None:
    model, (embeddings, mask) = network(), prompts(1)
    short, long = [5, 1, -100, -100], [5, 6, 7, 1]
    scores = model.option_scores(embeddings, mask, torch.tensor([[short, long]]))
    labels = torch.tensor([long])
    with torch.no_grad():
        log = model(embeddings, mask, labels).log_softmax(-1)[0]
    torch.testing.assert_close(scores[0, 1], log.gather(1, labels.T).mean())


# -- text --------------------------------------------------------------------------------------------------------------


def batch(index: list[int], answers: list[str], **more: Any) -> dict[str, Any]:
    return {
        "index": torch.tensor(index),
        "correct": torch.full((len(index),), -1),
        "labels": torch.full((len(index), 2), 4),
        "answer_text": answers,
        "references": [[answer] if answer else [] for answer in answers],
        "question_text": ["what"] * len(index),
        "kind": ["shape", "color"][: len(index)],
        **more,
    }


def test_every_sample_counts_once_and_kinds_apart() -> None:
    test = TextTest(protocols=("coco",))
    model = Writes([[0, 3, 1], [0, 4, 1], [0, 5, 1], [0, 5, 1]])
    test.update_text(batch([7, 9], ["a", "x"]), model, *prompts(), Letters())
    test.update_text(batch([9, 7], ["x", "a"]), model, *prompts(), Letters())  # seen again, as after a broken file
    found = test.compute(torch.device("cpu"))
    assert found["exact_match"].item() == 0.5
    assert found["exact_match_shape"].item() == 1.0
    assert found["exact_match_color"].item() == 0.0
    assert found["distinct"].item() == 2
    assert "accuracy" not in found
    assert "meteor" not in found
    assert test.written[7] == Written("a", "a", ("a",), "what", "shape")


def test_withheld_answers_are_generated_and_not_judged() -> None:
    test = TextTest(protocols=("avsd_1ref", "avsd7"))
    hidden = batch([0, 1], ["", "b c"], references=[[], ["b c", "cd", "b"]])
    test.update_text(hidden, Writes([[0, 3, 1], [0, 4, 1]]), *prompts(), Letters())
    found = test.compute(torch.device("cpu"))
    assert found["exact_match"].item() == 0.0
    assert found["distinct"].item() == 2
    # Words of one letter are dropped everywhere against the one reference, so nothing is left of it here.
    assert "bleu_1" in found
    assert "avsd7/bleu_1" in found


def test_one_reference_is_not_scored_as_six() -> None:
    test = TextTest(protocols=("avsd_1ref", "avsd7", "avsd8"))
    test.update_text(batch([0, 1], ["bc", "cd"]), Writes([[0, 3, 1], [0, 4, 1]]), *prompts(), Letters())
    found = test.compute(torch.device("cpu"))
    assert "cider" in found
    assert not [name for name in found if name.startswith("avsd")]


def test_where_every_answer_is_withheld_nothing_is_judged() -> None:
    test = TextTest(protocols=("coco",))
    test.update_text(batch([0, 1], ["", ""]), Writes([[0, 3, 1], [0, 4, 1]]), *prompts(), Letters())
    assert set(test.compute(torch.device("cpu"))) == {"samples", "distinct"}


@pytest.mark.parametrize(("field", "message"), [("beams", "model.beams"), ("max_tokens", "model.max_answer_tokens")])
def test_what_would_fail_after_training_is_refused_before(field: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be at least 1, got 0"):
        TextTest(**{field: 0})  # type: ignore[arg-type]


def test_the_loss_is_per_word_piece() -> None:
    test = TextTest()
    logits = torch.zeros(2, 2, 4)
    logits[0, 0, 1] = 50.0
    labels = torch.tensor([[1, -100], [2, 3]])
    test.update_loss({"index": torch.tensor([0, 1]), "labels": labels}, logits)
    expected = 2 * torch.tensor(4.0, dtype=torch.float64).log() / 3
    torch.testing.assert_close(test.compute(torch.device("cpu"))["loss"], expected)


def test_options_are_counted_in_percent_and_withheld_ones_left_out() -> None:
    test, model = TextTest(), network()
    letters = torch.tensor([[3, 4, 5, 6, 7]]).expand(2, 5)
    embeddings, mask = prompts()
    picked, _ = pick_by_label(model, embeddings, mask, letters)
    options = [["one", "two", "three", "four", "five"]] * 2
    given = batch([0, 1], ["x", ""], answer_options=letters, options=options)
    given["correct"] = torch.stack([picked[0], torch.tensor(-1)])
    test.update_text(given, model, embeddings, mask, Letters())
    assert test.compute(torch.device("cpu"))["accuracy"].item() == 100.0
    assert test.written[0].text == options[0][picked[0]]


def test_token_precision_leaves_out_what_is_absent_or_unknown() -> None:
    test = TextTest()
    marks = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    chosen = torch.tensor([[0, 2], [0, 1], [0, 1]])
    found = {"video": (chosen, torch.zeros(3, 1, 3)), "audio": (torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3))}
    given = {"index": torch.arange(3), "video_words": marks, "video_present": torch.tensor([True, False, True])}
    test.update_tokens(given, found)
    result = test.compute(torch.device("cpu"))
    assert result["video_token_precision"].item() == 0.5
    assert "audio_token_precision" not in result


def test_an_unknown_protocol_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="protocol"):
        TextTest(protocols=("avsd9",))


def test_words_are_counted_among_as_many_as_are_true() -> None:
    test = WordsTest()
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    words = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    test.update(torch.tensor([0, 1]), logits, words)
    found = test.compute(torch.device("cpu"))
    assert found["precision"].item() == 0.75
    assert found["clips"].item() == 2
