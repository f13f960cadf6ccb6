"""True words of clips, which only the miniature's data sets list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from common.data.item_dataset import Sample
from common.data.listing import Clip


class TrueWords:
    """Draws words that classifiers might choose for a clip, instead of reading the clip, to pre-train on text alone.

    Args:
        words: clip name to the true words of its video and of its sound.
        places: number of words to draw for the video and for the sound.
        replaced: probability that a random word replaces a true word.

    Source: [14], step 2.
    """

    def __init__(
        self, words: Mapping[str, tuple[Sequence[str], Sequence[str]]], places: tuple[int, int], replaced: float
    ) -> None:
        self.words = words
        self.places = places
        self.replaced = replaced
        self.vocabularies = [sorted({word for true in words.values() for word in true[side]}) for side in (0, 1)]

    def read(self, clip: Clip, rng: np.random.Generator) -> Sample:
        columns = zip(self.words.get(clip.path.stem, ((), ())), self.places, self.vocabularies)
        return {"words": [noisy_words(*column, self.replaced, rng) for column in columns]}

    def transform(self, batch: Sequence[Sample]) -> None:
        """Do nothing, since words need no transform."""


def noisy_words(
    words: Sequence[str], count: int, vocabulary: Sequence[str], replaced: float, rng: np.random.Generator
) -> list[str]:
    """Shuffle the true words, replace a share of them with random words, and add random words up to `count`."""
    if not vocabulary:
        return []
    others = rng.integers(len(vocabulary), size=count)
    kept = rng.random(count) >= replaced
    order = rng.permutation(len(words))[:count].tolist()
    return [
        words[order[place]] if place < len(order) and kept[place] else vocabulary[int(others[place])]
        for place in range(count)
    ]
