"""Tokenized captions of many items, with the n-grams that BLEU and CIDEr count, found for all sentences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
#: Longest n-grams of BLEU and CIDEr.
ORDERS = 4


@dataclass(frozen=True)
class NGrams:
    """Counts of the n-grams of one order.

    An entry is one distinct n-gram of one sentence. Candidate entries are sorted by (item, gram).

    Attributes:
        candidate_item, candidate_gram, candidate_count: entries of the candidates, [C].
        reference_row, reference_gram, reference_count: entries of the references, [E]; a row is a reference's index.
        partner: candidate entry of the same item and n-gram for each reference entry, -1 if none, [E].
        document_frequency: number of items with each distinct n-gram in some reference, [G].
    """

    candidate_item: Ints
    candidate_gram: Ints
    candidate_count: Ints
    reference_row: Ints
    reference_gram: Ints
    reference_count: Ints
    partner: Ints
    document_frequency: Ints


class CaptionSet:
    """N tokenized candidates, each with at least one reference; white space separates tokens.

    Attributes:
        owner: item of every reference, [R].
        lengths: tokens of every candidate [N] and of every reference [R].
    """

    def __init__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        if len(candidates) != len(references):
            raise ValueError(f"references: {len(references)} items for {len(candidates)} candidates")
        if not all(references):
            raise ValueError("every item needs at least one reference")
        self.candidates = list(candidates)
        self.references = [list(one) for one in references]
        self.owner: Ints = np.repeat(np.arange(len(self)), [len(one) for one in references])
        self._sentences = [text.split() for text in chain(candidates, *references)]
        self._sentence_lengths = np.array([len(tokens) for tokens in self._sentences], dtype=np.int64)
        self.lengths = self._sentence_lengths[: len(self)], self._sentence_lengths[len(self) :]

    def __len__(self) -> int:
        return len(self.candidates)

    @cached_property
    def ngrams(self) -> dict[int, NGrams]:
        """The n-grams of 1 to `ORDERS` tokens, by their number of tokens."""
        tokens = list(chain.from_iterable(self._sentences))
        number = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        # Of every position of all sentences joined, [P].
        token = np.fromiter(map(number.__getitem__, tokens), np.int64, len(tokens))
        sentence = np.repeat(np.arange(len(self._sentences)), self._sentence_lengths)
        gram, found = token, {}
        for order in range(1, ORDERS + 1):
            if order > 1:
                # An n-gram is the shorter one at the same position and one more token. Both numbers are below the
                # number of positions, so their pair fits an int64. Pairs that cross into the next sentence are counted
                # too and dropped below.
                gram = np.unique(gram[: len(gram) - 1] * len(number) + token[order - 1 :], return_inverse=True)[1]
            begin = sentence[: len(gram)]
            inside = begin == sentence[order - 1 :]
            found[order] = self._counts(begin[inside], gram[inside], int(gram.max(initial=-1)) + 1)
        return found

    def _counts(self, sentence: Ints, gram: Ints, distinct: int) -> NGrams:
        """From the sentence and the number, below `distinct`, of every n-gram."""
        key, count = _counted(sentence * distinct + gram)
        first_reference = np.searchsorted(key, len(self) * distinct)
        row, gram = np.divmod(key, distinct)
        candidate_key, reference_row = key[:first_reference], row[first_reference:] - len(self)
        reference_key = self.owner[reference_row] * distinct + gram[first_reference:]
        partner = np.searchsorted(candidate_key, reference_key)
        found = partner < len(candidate_key)
        found[found] = candidate_key[partner[found]] == reference_key[found]
        return NGrams(
            candidate_item=row[:first_reference],
            candidate_gram=gram[:first_reference],
            candidate_count=count[:first_reference],
            reference_row=reference_row,
            reference_gram=gram[first_reference:],
            reference_count=count[first_reference:],
            partner=np.where(found, partner, -1),
            document_frequency=np.bincount(_counted(reference_key)[0] % distinct, minlength=distinct),
        )


def _counted(values: Ints) -> tuple[Ints, Ints]:
    """Distinct values, ascending, and their counts; by sorting, since `np.unique` no longer sorts."""
    ordered = np.sort(values)
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)])
    return ordered[first], np.diff(first, append=len(ordered))


def mean(items: Floats) -> float:
    return float(items.mean()) if len(items) else float("nan")
