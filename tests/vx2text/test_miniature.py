"""Where the true words are known: how many a classifier finds, and how many of the chosen tokens are true."""

from __future__ import annotations

import torch

from papers.vx2text.miniature import TokenPrecision, words_found


def test_token_precision_leaves_out_what_is_absent_or_unknown() -> None:
    precision = TokenPrecision()
    marks = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    chosen = {"video": torch.tensor([[0, 2], [0, 1], [0, 1]]), "audio": torch.zeros(3, 0, dtype=torch.int64)}
    given = {"index": torch.arange(3), "video_words": marks, "video_present": torch.tensor([True, False, True])}
    precision.update(given, chosen)
    result = precision.compute(torch.device("cpu"))
    assert result["video_token_precision"].item() == 0.5
    assert "audio_token_precision" not in result


def test_words_are_counted_among_as_many_as_are_true() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    words = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    precision, loss = words_found(logits, words)
    assert precision.tolist() == [0.5, 1.0]
    log = logits.log_softmax(1)
    torch.testing.assert_close(loss, -torch.stack([(log[0, 0] + log[0, 2]) / 2, log[1, 3]]))
