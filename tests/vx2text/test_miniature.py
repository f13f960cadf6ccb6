"""Where the true words are known: how many a classifier finds, and how many of the chosen tokens are true."""

from __future__ import annotations

import torch

from papers.vx2text.miniature import token_precision, words_found


def test_token_precision_leaves_out_what_is_absent_or_unknown() -> None:
    marks = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    present = torch.tensor([True, False, True])
    batch = {"index": torch.arange(3), "video_words": marks, "video_present": present, "audio_present": present}
    known, precision = token_precision(batch, "video", torch.tensor([[0, 2], [0, 1], [0, 1]]))
    assert known.tolist() == [0]
    assert precision.tolist() == [0.5]
    assert not len(token_precision(batch, "audio", torch.zeros(3, 2, dtype=torch.int64))[0])
    assert not len(token_precision(batch, "video", torch.zeros(3, 0, dtype=torch.int64))[0])


def test_words_are_counted_among_as_many_as_are_true() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    words = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    precision, loss = words_found(logits, words)
    assert precision.tolist() == [0.5, 1.0]
    log = logits.log_softmax(1)
    torch.testing.assert_close(loss, -torch.stack([(log[0, 0] + log[0, 2]) / 2, log[1, 3]]))
