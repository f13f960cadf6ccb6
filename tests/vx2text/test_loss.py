"""The losses of VX2TEXT: means over words and over rows, and batches without any."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from papers.vx2text.loss import per_answer, text_loss, words_loss


def test_the_loss_is_the_mean_over_words_and_not_over_answers() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(text_loss(logits, labels), expected)
    nothing = text_loss(logits, torch.full((2, 3), -100))
    assert nothing.item() == 0
    nothing.backward()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_answers_are_summed_one_by_one() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, 3], [4, -100, -100]])
    losses, numbers = per_answer(logits, labels)
    log = logits.log_softmax(2)
    torch.testing.assert_close(losses, torch.stack([-log[0, range(3), [1, 2, 3]].sum(), -log[1, 0, 4]]))
    assert numbers.tolist() == [3.0, 1.0]
    torch.testing.assert_close(text_loss(logits[1:], labels[1:]), losses[1])


def test_words_are_uniform_targets_and_rows_without_any_do_not_count() -> None:
    logits = torch.randn(3, 4)
    words = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    log = logits.log_softmax(1)
    expected = (-(log[0, 0] + log[0, 1]) / 2 - log[1, 2]) / 2
    torch.testing.assert_close(words_loss(logits, words), expected)
    torch.testing.assert_close(words_loss(logits[1:], words[1:]), -log[1, 2])
    smooth = 0.8 * expected - 0.2 * log[:2].mean(1).mean()
    torch.testing.assert_close(words_loss(logits, words, 0.2), smooth)
    with pytest.raises(ValueError, match="categories"):
        words_loss(logits, words[:, :3])
