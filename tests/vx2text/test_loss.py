"""Test VX2TEXT's losses, and the metrics that need the true words."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from papers.vx2text.loss import per_answer, text_loss
from papers.vx2text.miniature import precision_and_loss, words_loss
from papers.vx2text.monitoring import TokenWords


def test_the_loss_is_the_mean_over_words_and_not_over_answers() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(text_loss(logits, labels), expected)
    nothing = text_loss(logits, torch.full((2, 3), -100))
    assert nothing.item() == 0
    nothing.backward()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]
    losses, numbers = per_answer(logits, labels)
    log = logits.log_softmax(2)
    torch.testing.assert_close(losses, torch.stack([-log[0, range(3), [1, 2, 3]].sum(), -log[1, 0, 4]]))
    assert numbers.tolist() == [3.0, 1.0]
    torch.testing.assert_close(text_loss(logits[1:], labels[1:]), losses[1])


def test_words_are_uniform_targets() -> None:
    logits = torch.randn(2, 4)
    words = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    log = logits.log_softmax(1)
    expected = (-(log[0, 0] + log[0, 1]) / 2 - log[1, 2]) / 2
    torch.testing.assert_close(words_loss(logits, words, 0.0), expected)
    smooth = 0.8 * expected - 0.2 * log.mean(1).mean()
    torch.testing.assert_close(words_loss(logits, words, 0.2), smooth)


def test_true_tokens_leave_out_what_is_absent_or_unknown() -> None:
    words = {"a": (("red", "dog"), ()), "b": (("red",), ()), "c": ((), ())}
    data = SimpleNamespace(
        dataset=SimpleNamespace(words=lambda: words),
        categories={"video": ["red", "dog", "cat"], "audio": ["beep"]},
    )
    frozen = SimpleNamespace(learns=False, projection=None, classifier=SimpleNamespace(names=["red", "dog", "cat"]))
    model = SimpleNamespace(tokens={"video": frozen, "audio": frozen})
    hparams = {"video_pretrained": None, "audio_pretrained": None}
    meter = TokenWords(SimpleNamespace(data=data, model=model, hparams=hparams))
    present = torch.tensor([True, False, True])
    batch = {"index": torch.arange(3), "clip": ["a", "b", "c"], "video_present": present, "audio_present": present}
    meter.update(batch, {"video": (torch.tensor([[0, 2], [0, 1], [0, 1]]), torch.zeros(0))})
    meter.update(batch, {"audio": (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(0))})
    meter.update(batch, {"video": (torch.zeros(3, 0, dtype=torch.int64), torch.zeros(0))})
    assert meter.compute(torch.device("cpu")) == {"video_token_precision": torch.tensor(0.5, dtype=torch.float64)}


def test_words_are_counted_among_as_many_as_are_true() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    words = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    precision, loss = precision_and_loss(logits, words)
    assert precision.tolist() == [0.5, 1.0]
    log = logits.log_softmax(1)
    torch.testing.assert_close(loss, -torch.stack([(log[0, 0] + log[0, 2]) / 2, log[1, 3]]))
