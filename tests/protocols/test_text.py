"""Test the counting of chosen options and of generated texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.protocols.text import GeneratedText, TextTest
from tests.distributed.harness import run_distributed

CPU = torch.device("cpu")


def update(test: TextTest, index: list[int], texts: list[str], answers: list[str], **more: Any) -> None:
    """Add samples. By default, the answer is the only reference, and the first two samples have a kind."""
    columns = {
        "answers": answers,
        "references": [[answer] if answer else [] for answer in answers],
        "questions": ["what"] * len(index),
        "kinds": ["shape", "color"][: len(index)],
        **more,
    }
    test.update_texts(torch.tensor(index), map(GeneratedText, texts, *columns.values()))


def test_every_sample_counts_once_and_kinds_apart() -> None:
    test = TextTest(("coco",))
    update(test, [7, 9], ["a", "b"], ["a", "x"])
    update(test, [9, 7], ["c", "c"], ["x", "a"])  # repeated, as after a broken file
    update(test, [11], ["b"], ["a"])
    found = test.compute(CPU)
    assert found["exact_match"].item() == pytest.approx(1 / 3, rel=1e-12)
    assert found["exact_match_shape"].item() == 0.5
    assert found["exact_match_color"].item() == 0.0
    assert found["distinct"].item() == 2
    assert "accuracy" not in found
    assert test.texts[7] == GeneratedText("a", "a", ["a"], "what", "shape")


def test_spaces_and_case_do_not_count() -> None:
    assert GeneratedText(" A  Red\tcircle", "a red circle", ()).matches
    assert not GeneratedText("a redcircle", "a red circle", ()).matches


def test_withheld_answers_are_generated_and_not_judged() -> None:
    test = TextTest(("avsd_1ref", "avsd7"))
    update(test, [0, 1], ["a", "b"], ["", "b c"], references=[[], ["b c", "cd"]])
    found = test.compute(CPU)
    assert found["exact_match"].item() == 0.0
    assert found["distinct"].item() == 2
    # The score with one reference drops words of one letter, so the only reference becomes empty here.
    assert "bleu_1" in found
    assert "avsd7/bleu_1" in found


def test_one_reference_is_not_scored_as_six() -> None:
    test = TextTest(("avsd_1ref", "avsd7", "avsd8"))
    update(test, [0, 1], ["a", "b"], ["bc", "cd"])
    found = test.compute(CPU)
    assert "cider" in found
    assert not [name for name in found if name.startswith("avsd")]


def test_the_loss_is_per_word_piece() -> None:
    test = TextTest()
    test.update_loss(torch.tensor([0, 1]), torch.tensor([0.5, 3.5]), torch.tensor([1.0, 3.0]))
    test.update_loss(torch.tensor([1]), torch.tensor([3.5]), torch.tensor([3.0]))  # a repeated sample
    assert test.compute(CPU) == {"samples": 2, "loss": 1.0}
    test = TextTest()  # no sample has any word pieces
    test.update_loss(torch.tensor([0, 1]), torch.zeros(2), torch.zeros(2))
    assert set(test.compute(CPU)) == {"samples"}


def test_options_are_counted_in_percent_and_withheld_ones_left_out() -> None:
    test = TextTest()
    test.update_choices(torch.tensor([4]), torch.tensor([0]), torch.tensor([0]))
    assert test.compute(CPU)["accuracy"].item() == 100.0
    test = TextTest()
    test.update_choices(torch.tensor([0, 1, 2]), torch.tensor([3, 0, 1]), torch.tensor([3, -1, 2]))
    update(test, [0], ["one"], ["x"])
    assert test.compute(CPU) == {"samples": 0, "accuracy": 50.0}
    assert test.texts[0].text == "one"


@pytest.mark.parametrize(("processes", "count"), [(2, 7), (3, 2)])
def test_processes_count_every_sample_once(processes: int, count: int) -> None:
    words = ["a", "man", "and", "two", "dogs", "open", "the", "blue", "door"]
    answers = [" ".join(words[: 2 + n]) for n in range(count)]
    texts = [" ".join(words[n % 3 : 4 + n]) for n in range(count)]

    def measured(own: list[int]) -> dict[str, float]:
        test = TextTest(("coco", "avsd_1ref"), meteor=False)
        update(test, own, [texts[n] for n in own], [answers[n] for n in own], kinds=[""] * len(own))
        return {name: value.item() for name, value in test.compute(CPU).items()}

    expected = measured(list(range(count)))
    assert {"cider", "avsd_1ref/bleu_4"} <= set(expected)
    own = [list(range(rank, count, processes)) or [0] for rank in range(processes)]  # filled up like a sampler's parts
    assert run_distributed(lambda rank: measured(own[rank]), processes) == [expected] * processes
