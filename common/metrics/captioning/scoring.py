"""All caption scores of a set of items. A protocol defines how a benchmark changes captions before tokenizing.

Source: docs/papers/vx2text.md [11] (protocols, traps).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from common.metrics.captioning.caption_set import CaptionSet, Floats
from common.metrics.captioning.meteor import JavaUnavailable, meteor
from common.metrics.captioning.scores import bleu, cider, rouge_l
from common.metrics.captioning.tokenizer import tokenize

logger = logging.getLogger(__name__)

METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")


@dataclass(frozen=True)
class CaptionScores:
    """Caption scores from 0 to 1; as usual, CIDEr is from 0 to 10.

    Attributes:
        corpus: score of all items for each of `METRICS`. NaN without items, None if not measured.
        items: scores per item [N] for each of `METRICS`.
    """

    ids: tuple[Any, ...]
    corpus: dict[str, float | None]
    items: dict[str, Floats | None]

    @property
    def measured(self) -> dict[str, float]:
        return {name: value for name, value in self.corpus.items() if value is not None}


def score_captions(
    candidates: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    protocol: Protocol = "coco",
    *,
    with_meteor: bool = True,
) -> CaptionScores:
    """Compute BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr-D of raw captions.

    Args:
        references: at least one reference for each item of `candidates`.
        protocol: see `preparation`.
        with_meteor: run METEOR. Without Java, log a line and return None as the METEOR score.

    Examples:
        >>> candidates, references = {1: "A red bus.", 2: "Two cats"}, {1: ["a red bus"], 2: ["two dogs", "2 dogs"]}
        >>> scores = score_captions(candidates, references, with_meteor=False)
        >>> round(scores.corpus["bleu_1"], 3)
        0.8

    Source: docs/papers/vx2text.md [11].
    """
    ids = tuple(references)
    prepare_candidate, prepare_reference = preparation(protocol)
    texts = [prepare_candidate(candidates[one]) for one in ids]
    texts += [prepare_reference(text) for one in ids for text in references[one]]
    # Captions repeat, so each distinct one is tokenized once.
    tokenized = {text: tokenize(text) for text in set(texts)}
    words = [tokenized[text] for text in texts]
    rest = iter(words[len(ids) :])
    captions = CaptionSet(words[: len(ids)], [[next(rest) for _ in references[one]] for one in ids])

    corpus: dict[str, float | None] = dict.fromkeys(METRICS)
    items: dict[str, Floats | None] = dict.fromkeys(METRICS)
    bleus, bleu_items = bleu(captions)
    for order in range(4):
        corpus[f"bleu_{order + 1}"], items[f"bleu_{order + 1}"] = float(bleus[order]), bleu_items[:, order]
    corpus["rouge_l"], items["rouge_l"] = rouge_l(captions)
    corpus["cider"], items["cider"] = cider(captions)
    if with_meteor:
        try:
            corpus["meteor"], items["meteor"] = meteor(captions)
        except JavaUnavailable as problem:
            _warn_once(f"METEOR is not measured: {problem}")
    return CaptionScores(ids, corpus, items)


@cache
def _warn_once(text: str) -> None:
    # A stage scores the same captions by several protocols.
    logger.warning(text)


Protocol = Literal["coco", "tvc", "avsd_1ref", "avsd7", "avsd8"]


def ascii_only(text: str) -> str:
    """Replace every non-ASCII character by a space, and strip the ends."""
    return re.sub(r"[^\x00-\x7f]", " ", text).strip()


def without_short_words(text: str) -> str:
    """Drop words of a single character, such as `a`, `i` and `2`.

    The official DSTC7 script uses stop words as regular expressions. One stop word is a full stop, which matches any
    character. The published numbers have this defect.
    """
    return " ".join(word for word in text.split() if len(word) != 1)


def without_stops(text: str) -> str:
    """Drop the words `,` and `.`, as the stop-word list intends. DSTC8 does the same."""
    return " ".join(word for word in text.split() if word not in (",", "."))


def preparation(protocol: Protocol) -> tuple[Callable[[str], str], ...]:
    """Return two functions of a protocol: the first prepares candidates, the second references."""
    prepared: dict[Protocol, tuple[Callable[[str], str], ...]] = {
        "coco": (str, str),
        "tvc": (ascii_only, ascii_only),
        "avsd_1ref": (without_short_words, without_short_words),  # the original answer is the only reference
        "avsd7": (without_short_words, str),  # six references
        "avsd8": (without_stops, str),
    }
    return prepared[protocol]
