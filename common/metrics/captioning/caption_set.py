"""Tokenized captions of many items, with the n-grams that BLEU and CIDEr count, found for all sentences at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
#: Longest n-grams of BLEU and CIDEr.
ORDERS = 4


@dataclass(frozen=True)
class NGrams:
    """Counts of the n-grams of one order.

    An entry is one distinct n-gram of one sentence. Candidate entries are sorted by (item, gram).

    Attributes:
        distinct: number of distinct n-grams in all sentences, G.
        candidate_item, candidate_gram, candidate_count: entries of the candidates, [C].
        reference_row, reference_gram, reference_count: entries of the references, [E]; a row is a reference's index.
        partner: candidate entry of the same item and n-gram for each reference entry, -1 if none, [E].
        document_frequency: number of items with the n-gram in some reference, [G].
    """

    distinct: int
    candidate_item: Ints
    candidate_gram: Ints
    candidate_count: Ints
    reference_row: Ints
    reference_gram: Ints
    reference_count: Ints
    partner: Ints
    document_frequency: Ints


class CaptionSet:
    """N tokenized candidates, each with at least one reference; white space separates tokens."""

    def __init__(
        self,
        candidates: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> None:
        if len(candidates) != len(references):
            raise ValueError(f"references: {len(references)} items for {len(candidates)} candidates")
        if not all(references):
            raise ValueError("every item needs at least one reference")
        self.candidates = list(candidates)
        self.references = [list(one) for one in references]
        self._ngrams: dict[int, NGrams] = {}

    def __len__(self) -> int:
        return len(self.candidates)

    @cached_property
    def owner(self) -> Ints:
        """Item of every reference, [R]."""
        return np.repeat(np.arange(len(self)), [len(one) for one in self.references])

    @cached_property
    def lengths(self) -> tuple[Ints, Ints]:
        """Tokens of every candidate [N] and of every reference [R]."""
        return self._sentence_lengths[: len(self)], self._sentence_lengths[len(self) :]

    @cached_property
    def _sentences(self) -> list[list[str]]:
        return [text.split() for text in (*self.candidates, *(text for one in self.references for text in one))]

    @cached_property
    def _sentence_lengths(self) -> Ints:
        return np.array([len(tokens) for tokens in self._sentences], dtype=np.int64)

    @cached_property
    def _positions(self) -> tuple[Ints, Ints]:
        """Sentence and token number of every position of all sentences joined, each [P]."""
        tokens = list(chain.from_iterable(self._sentences))
        number = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        numbers = np.fromiter(map(number.__getitem__, tokens), np.int64, len(tokens))
        return np.repeat(np.arange(len(self._sentences)), self._sentence_lengths), numbers

    @cached_property
    def _gram_numbers(self) -> list[Ints]:
        """Per order from 1, the number of the n-gram starting at every position; grows on demand."""
        return [self._positions[1]]

    def ngrams(self, order: int) -> NGrams:
        """The n-grams of `order` tokens (1 or more); cached."""
        if order not in self._ngrams:
            self._ngrams[order] = self._find(order)
        return self._ngrams[order]

    def _find(self, order: int) -> NGrams:
        sentence, token = self._positions
        vocabulary = int(token.max(initial=-1)) + 1
        while len(self._gram_numbers) < order:
            # An n-gram is the shorter one at the same position and one more token. Both numbers are below the number of
            # positions, so their pair fits an int64. Pairs that cross into the next sentence are counted too and
            # dropped below.
            shorter = self._gram_numbers[-1]
            pair = shorter[: len(shorter) - 1] * vocabulary + token[len(self._gram_numbers) :]
            self._gram_numbers.append(np.unique(pair, return_inverse=True)[1])
        gram = self._gram_numbers[order - 1]
        distinct = int(gram.max(initial=-1)) + 1
        inside = sentence[: len(gram)] == sentence[order - 1 :]
        key, count = _counted(sentence[: len(gram)][inside] * distinct + gram[inside])
        first_reference = np.searchsorted(key, len(self) * distinct)
        row, gram = np.divmod(key, distinct)
        candidate_key, reference_row = key[:first_reference], row[first_reference:] - len(self)
        reference_key = self.owner[reference_row] * distinct + gram[first_reference:]
        partner = np.searchsorted(candidate_key, reference_key)
        found = partner < len(candidate_key)
        found[found] = candidate_key[partner[found]] == reference_key[found]
        return NGrams(
            distinct=distinct,
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


def mean(items: NDArray[np.float64]) -> float:
    return float(items.mean()) if len(items) else float("nan")
