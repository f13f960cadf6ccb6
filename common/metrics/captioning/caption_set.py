"""Tokenized captions of many items, and the n-grams that BLEU and CIDEr count."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
#: Longest n-grams of BLEU and CIDEr.
ORDERS = 4


class CaptionSet:
    """N candidates, each with at least one reference. Texts are tokenized: white space separates the tokens.

    Attributes:
        owner: position of each reference's candidate, [R].
        lengths: number of tokens of each candidate [N] and of each reference [R].
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
    def ngrams(self) -> list[tuple[csr_array, csr_array]]:
        """Count each n-gram of 1 to `ORDERS` tokens in each candidate [N, G] and in each reference [R, G]."""
        tokens = list(chain.from_iterable(self._sentences))
        number = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
        # The token at each position of all sentences joined, [P].
        token = np.fromiter(map(number.__getitem__, tokens), np.int64, len(tokens))
        sentence = np.repeat(np.arange(len(self._sentences)), self._sentence_lengths)
        gram, found = token, []
        for order in range(1, ORDERS + 1):
            if order > 1:
                # Pair the shorter n-gram at a position with the next token. Both numbers are below the number of
                # positions, so the pair fits an int64. Pairs that cross into the next sentence are dropped below.
                gram = np.unique(gram[: len(gram) - 1] * len(number) + token[order - 1 :], return_inverse=True)[1]
            begin = sentence[: len(gram)]
            inside = begin == sentence[order - 1 :]
            shape = len(self._sentences), int(gram.max(initial=-1)) + 1
            counts = csr_array((np.ones(inside.sum()), (begin[inside], gram[inside])), shape)
            found.append((counts[: len(self)], counts[len(self) :]))
        return found


def mean(items: Floats) -> float:
    return float(items.mean()) if len(items) else float("nan")
