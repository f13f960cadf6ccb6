"""All caption scores of a set of items under one protocol."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from common.metrics.captioning.bleu import bleu
from common.metrics.captioning.caption_set import CaptionSet, check_captions
from common.metrics.captioning.cider import cider
from common.metrics.captioning.java import PTB_JAR, JavaUnavailable, java_command, ptb_tokenize
from common.metrics.captioning.meteor import meteor
from common.metrics.captioning.protocols import Protocol, preparation
from common.metrics.captioning.rouge import rouge_l
from common.metrics.captioning.tokenizer import tokenize

logger = logging.getLogger(__name__)

Tokenizer = Literal["python", "java"]
METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider")


@dataclass(frozen=True)
class CaptionScores:
    """Scores as fractions; CIDEr times ten, as usual.

    Attributes:
        ids: the items, in the order of the scores per item.
        corpus: score of all items for each of `METRICS`; NaN without items, None if not measured.
        items: the same per item, [N].
        notes: why something was not measured, a line each.
    """

    ids: tuple[Hashable, ...]
    corpus: dict[str, float | None]
    items: dict[str, NDArray[np.float64] | None]
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> dict[str, float]:
        return {name: value for name, value in self.corpus.items() if value is not None}


def score_captions(
    candidates: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    protocol: Protocol = "coco",
    *,
    official_quirks: bool = True,
    tokenizer: Tokenizer = "python",
    with_meteor: bool = True,
) -> CaptionScores:
    """BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr-D of raw captions.

    Args:
        references: at least one per item of `candidates`.
        protocol, official_quirks: see `protocols.preparation`.
        tokenizer: `python` needs nothing; `java` is the original.
        with_meteor: whether to run METEOR. Without Java its score is None, and one line is logged.
    """
    check_options(protocol, tokenizer)
    check_same_items(candidates, references)
    ids = tuple(references)
    prepare_candidate, prepare_reference = preparation(protocol, official_quirks)
    check_captions(ids, [candidates[one] for one in ids], [references[one] for one in ids])
    texts = [prepare_candidate(candidates[one]) for one in ids]
    texts += [prepare_reference(text) for one in ids for text in references[one]]
    if tokenizer == "python":
        # Answers repeat; each distinct caption is tokenized once.
        tokenized = {text: tokenize(text) for text in set(texts)}
        words = [tokenized[text] for text in texts]
    else:
        words = ptb_tokenize(texts)
    rest = iter(words[len(ids) :])
    captions = CaptionSet(words[: len(ids)], [[next(rest) for _ in references[one]] for one in ids], ids)

    corpus: dict[str, float | None] = dict.fromkeys(METRICS)
    items: dict[str, NDArray[np.float64] | None] = dict.fromkeys(METRICS)
    bleus, bleu_items = bleu(captions)
    for order in range(4):
        corpus[f"bleu_{order + 1}"], items[f"bleu_{order + 1}"] = float(bleus[order]), bleu_items[:, order]
    corpus["rouge_l"], items["rouge_l"] = rouge_l(captions)
    corpus["cider"], items["cider"] = cider(captions)
    notes = []
    if with_meteor:
        try:
            corpus["meteor"], items["meteor"] = meteor(captions)
        except JavaUnavailable as problem:
            notes.append(f"METEOR is not measured: {problem}")
            logger.warning(notes[-1])
    return CaptionScores(ids, corpus, items, tuple(notes))


def check_options(protocol: Protocol, tokenizer: Tokenizer) -> None:
    preparation(protocol)
    if tokenizer not in get_args(Tokenizer):
        raise ValueError(f"tokenizer: {tokenizer!r} is none of {', '.join(get_args(Tokenizer))}")
    if tokenizer == "java":
        java_command(PTB_JAR, "1G")


def check_same_items(candidates: Mapping[Hashable, object], references: Mapping[Hashable, object]) -> None:
    for field, side in (("candidates", candidates), ("references", references)):
        if not isinstance(side, Mapping):
            raise TypeError(f"{field}: expected a mapping from item to captions, got {type(side).__name__}")
    problems = []
    for missing, side, other in (("candidate", references, candidates), ("reference", candidates, references)):
        alone = [one for one in side if one not in other]
        if alone:
            first = ", ".join(map(repr, alone[:5])) + (", ..." if len(alone) > 5 else "")
            problems.append(f"{len(alone)} item{'s' * (len(alone) > 1)} without a {missing}: {first}")
    if problems:
        raise ValueError("candidates and references are not of the same items; " + "; ".join(problems))
