"""True words of clips, which the data sets of the miniature list and real ones don't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class TrueWords:
    """Draws words that classifiers might choose for a clip, to pre-train the language model on text alone.

    `words` are the true words of every clip, for its video and its sound; a share `replaced` is drawn at random.

    Source: [14], step 2.
    """

    def __init__(self, words: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]], replaced: float) -> None:
        self.words = words
        self.replaced = replaced
        self.vocabularies = [sorted({word for true in words.values() for word in true[side]}) for side in (0, 1)]

    def draw(self, clip: str, counts: Sequence[int], rng: np.random.Generator) -> list[list[str]]:
        """Draw `counts` words for the video and for the sound of a clip."""
        true = self.words.get(clip, ((), ()))
        return [noisy_words(*column, self.replaced, rng) for column in zip(true, counts, self.vocabularies)]


def noisy_words(
    words: Sequence[str], count: int, vocabulary: Sequence[str], replaced: float, rng: np.random.Generator
) -> list[str]:
    """The true words in random order, of which random words replace a share, filled up to `count` with random words."""
    if not vocabulary:
        return []
    others = rng.integers(len(vocabulary), size=count)
    kept = rng.random(count) >= replaced
    order = rng.permutation(len(words))[:count].tolist()
    return [
        words[order[place]] if place < len(order) and kept[place] else vocabulary[int(others[place])]
        for place in range(count)
    ]
