"""Code-switching: replaces words of a caption with translations into other languages ([5])."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.data.datasets.captioned import read_text
from common.types import Fraction

logger = logging.getLogger(__name__)


class CodeSwitcher:
    """Replaces words of captions with random translations.

    Dictionaries are text files exported from MUSE or FreeDict: `<source>-<target>.txt`, one pair per line, separated by
    a tab or else by the first blank. A word may have several lines.

    Args:
        targets: languages to translate to; each needs a file. None or an empty list uses all available files.
        source: code-switch only captions in this language.
        mode: `every_word` replaces each word that has an entry with probability `word_ratio` (the paper); `one_word`
            replaces exactly one such word (the released pre-training code).
        sentence_ratio: probability of code-switching a caption at all.
        strip_punctuation: look up words without their punctuation; the released code doesn't, so "dog," has no entry.
        lower_case: also look up words in lower case; the released code doesn't.

    Source: [5]; `clag` and `dclag` of the released code.
    """

    def __init__(
        self,
        dictionaries: str,
        targets: Sequence[str] | None = None,
        source: str = "en",
        mode: Literal["every_word", "one_word"] = "every_word",
        sentence_ratio: Fraction = 0.8,
        word_ratio: Fraction = 0.8,
        strip_punctuation: bool = True,
        lower_case: bool = True,
    ) -> None:
        self.dictionaries = Path(dictionaries)
        self.targets = tuple(targets or ())
        self.source = source
        self.mode = mode
        self.sentence_ratio = sentence_ratio
        self.word_ratio = word_ratio
        self.strip_punctuation = strip_punctuation
        self.lower_case = lower_case
        #: Translations of each word in the dictionaries, by language.
        self._words: dict[str, dict[str, list[str]]] = {}
        #: Cached translations of the captions' words, with their punctuation.
        self._entries: dict[str, dict[str, list[str]]] = {}

    def prepare(self) -> None:
        """Read the dictionaries."""
        if self._words:
            return
        if not self.targets:
            names = [file.stem.partition("-")[2] for file in self.dictionaries.glob(f"{self.source}-*.txt")]
            # Skip files such as MUSE's en-de.0-5000.txt, which are subsets of en-de.txt for training and test.
            self.targets = tuple(sorted(name for name in names if "." not in name))
            if not self.targets:
                raise FileNotFoundError(
                    f"code_switching: {self.dictionaries} holds no dictionary {self.source}-<language>.txt. Put some "
                    'there, one "word<TAB>translation" a line, as MUSE and FreeDict export them, or set '
                    "data.code_switching to null"
                )
        for target in self.targets:
            for word, translation in read_dictionary(self.dictionaries / f"{self.source}-{target}.txt"):
                self._words.setdefault(word, {}).setdefault(target, []).append(translation)

    def switch(self, text: str, rng: np.random.Generator) -> str:
        """Replace some words of a caption. Words are separated by single spaces."""
        if rng.random() >= self.sentence_ratio:
            return text
        words = text.split(" ")
        if self.mode == "every_word":
            for position in np.flatnonzero(rng.random(len(words)) < self.word_ratio).tolist():
                self._replace(words, position, rng)
        else:
            for position in rng.permutation(len(words)).tolist():
                if self._replace(words, position, rng):
                    break
        return " ".join(words)

    def coverage(self, texts: Iterable[str]) -> dict[str, Any]:
        """Measure the share of words with an entry, for the record. Only words with letters or digits count."""
        counts = Counter(word for text in texts for word in text.split() if any(map(str.isalnum, word)))
        total, by_language = max(counts.total(), 1), Counter[str]()
        for word, count in counts.items():
            by_language.update(dict.fromkeys(self._entry(word), count))
        covered = sum(count for word, count in counts.items() if self._entry(word))
        return {
            "version": f"{self.source} to {','.join(self.targets)}",
            "samples": counts.total(),
            "covered": round(covered / total, 4),
            "covered_by_language": {target: round(by_language[target] / total, 4) for target in self.targets},
            "skipped": 0,
            "skipped_names": [],
        }

    def _replace(self, words: list[str], position: int, rng: np.random.Generator) -> bool:
        languages = list(self._entry(words[position]).values())
        if languages:
            # Choose the language first, so that languages with many translations aren't preferred.
            translations = languages[int(rng.random() * len(languages))]
            words[position] = translations[int(rng.random() * len(translations))]
        return bool(languages)

    def _entry(self, word: str) -> dict[str, list[str]]:
        """Return the translations of a word by language. Add the word's punctuation to each translation."""
        if word not in self._entries:
            core = word
            if self.strip_punctuation and word not in self._words:
                core = word.strip("".join(sign for sign in word if unicodedata.category(sign)[0] == "P"))
            languages = self._words.get(core) or (self._words.get(core.lower()) if self.lower_case else None) or {}
            first = word.index(core)
            before, after = word[:first], word[first + len(core) :]
            self._entries[word] = {
                language: [f"{before}{text}{after}" for text in texts] for language, texts in languages.items()
            }
        return self._entries[word]


def read_dictionary(path: Path) -> list[tuple[str, str]]:
    """Read the (word, translation) pairs of a dictionary, in file order. Skip and count lines without a translation."""
    pairs: list[tuple[str, str]] = []
    lacking = 0
    for line in filter(str.strip, read_text(path).split("\n")):
        # Don't strip the line first: a tab at its end marks a multi-word entry without a translation.
        word, _, translation = line.partition("\t") if "\t" in line else line.strip().partition(" ")
        word, translation = word.strip(), " ".join(translation.split())
        if word and translation:
            pairs.append((word, translation))
        else:
            lacking += 1
    if not pairs:
        raise ValueError(f'{path}: holds no pairs; write one "word<TAB>translation" per line')
    if lacking:
        logger.warning("%s: %d lines without a translation are left out", path, lacking)
    return pairs
