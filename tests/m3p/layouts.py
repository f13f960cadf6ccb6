"""Write tiny data sets for M3P in the published layouts: captions in four languages, text, dictionaries, regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from common.data.datasets.base import write_lines
from common.data.datasets.conceptual_captions import ConceptualCaptions, write_conceptual_captions
from common.data.datasets.multi30k import Multi30K, write_multi30k
from common.data.datasets.wikipedia import WikipediaText
from common.data.regions import Regions, write_regions
from common.data.text import XLMRTokenizer
from papers.m3p.code_switching import CodeSwitcher
from papers.m3p.data import LanguageSet, PretrainingData, RetrievalData
from papers.m3p.encoder import M3P, M3PEncoder
from tests.m3p.tiny import tiny_sizes
from tests.protocols.parts import attached, trainer

WIDTH = 6
WORDS = {
    "en": ("dog", "cat", "sun", "car", "red", "blue", "small", "big"),
    "de": ("Hund", "Katze", "Sonne", "Auto", "rot", "blau", "klein", "groß"),
    "fr": ("chien", "chat", "soleil", "voiture", "rouge", "bleu", "petit", "grand"),
    "cs": ("pes", "kočka", "slunce", "auto", "červený", "modrý", "malý", "velký"),
}
LANGUAGES = tuple(sorted(WORDS))


def sentence(language: str, number: int, length: int = 3) -> str:
    """Write a caption whose words encode its number as digits."""
    words = WORDS[language]
    return " ".join(words[number // len(words) ** place % len(words)] for place in range(length))


def regions_of(number: int) -> Regions:
    """Make the regions of a picture. The features encode the picture's number, and one region has class 0."""
    count = 1 + number % 4
    features = np.zeros((count, WIDTH), dtype=np.float32)
    features[:, 0], features[:, 1], features[:, 2] = 2, 2 * (number + 1), np.arange(count)
    boxes = np.array([[0, 0, 10 + place, 20] for place in range(count)], dtype=np.float32)
    classes = (number + np.arange(count)) % 9
    distribution = np.eye(9, dtype=np.float32)[classes] * 0.9 + 0.1 / 9
    return Regions(features, boxes, classes, 40, 50, distribution)


def write_features(folder: Path, split: str, keys: Sequence[str]) -> Path:
    path = folder / "regions" / f"{split}.npz"
    write_regions(path, ((key, regions_of(number)) for number, key in enumerate(keys)))
    return path


@dataclass(frozen=True)
class Layouts:
    """The folders of all data sets and files."""

    root: Path

    @classmethod
    def write(cls, root: Path, images: int = 12, test_images: int = 5) -> Layouts:
        """Write all data sets, and return their folder."""
        captions = root / "conceptual_captions"
        captions.mkdir(parents=True)
        write_conceptual_captions(captions, {"train": [sentence("en", number) for number in range(images)]})
        write_features(captions, "train", [str(number) for number in range(images)])
        multi30k = root / "multi30k"
        for split, count in (("train", images), ("val", test_images), ("test", test_images)):
            stems = [f"{split}_{number}" for number in range(count)]
            by_language = {
                language: [
                    [sentence(language, 8 * number + place) for place in range(5 if language in ("en", "de") else 1)]
                    for number in range(count)
                ]
                for language in WORDS
            }
            write_multi30k(multi30k, split, stems, by_language)
            write_features(multi30k, split, stems)
        text = root / "wikipedia"
        text.mkdir()
        for place, language in enumerate(LANGUAGES):
            write_lines(text / f"{language}.train.txt", [sentence(language, n, 5) for n in range(10 * (place + 1))])
        dictionaries = root / "dictionaries"
        dictionaries.mkdir()
        for target in ("de", "fr"):
            pairs = zip(WORDS["en"], WORDS[target])
            write_lines(dictionaries / f"en-{target}.txt", [f"{word}\t{other}" for word, other in pairs])
        tokenizer = XLMRTokenizer(vocabulary_size=140)
        tokenizer.prepare([sentence(one, number) for one in WORDS for number in range(200)])
        (root / "vocabulary").write_bytes(tokenizer.content)
        return cls(root)

    @property
    def tokenizer(self) -> XLMRTokenizer:
        """Make a tokenizer of all words, without preparing it."""
        return XLMRTokenizer(str(self.root / "vocabulary"), max_tokens=20)

    def sets(self) -> dict[str, LanguageSet]:
        return {f"multi30k_{one}": LanguageSet(Multi30K(self.root / "multi30k"), one) for one in WORDS}

    def switcher(self, **options: Any) -> CodeSwitcher:
        return CodeSwitcher(str(self.root / "dictionaries"), ["de", "fr"], **options)

    def shared(self) -> dict[str, Any]:
        """Return the options of both data modules."""
        return {
            "tokenizer": self.tokenizer,
            "sets": self.sets(),
            "test_sets": list(self.sets()),
            "batch_size": 4,
            "test_batch_size": 3,
            "num_workers": 0,
            "max_regions": 4,
        }

    def pretraining(self, stage: str = "fit", rank: int = 0, world_size: int = 1, **options: Any) -> PretrainingData:
        """Make a pre-training data module, set up as by a trainer."""
        chosen: dict[str, Any] = {
            "captions": [LanguageSet(ConceptualCaptions(self.root / "conceptual_captions"))],
            "text": WikipediaText(self.root / "wikipedia"),
            "text_batch_size": 4,
            "text_groups": 1,
            "bptt": 6,
            "steps_per_epoch": 5,
        }
        return attached(PretrainingData(**self.shared() | chosen | options), stage, rank, world_size)

    def retrieval(self, stage: str = "fit", **options: Any) -> RetrievalData:
        """Make a fine-tuning data module, set up as by a trainer."""
        return attached(RetrievalData(**self.shared() | {"train_sets": ["multi30k_en"]} | options), stage)


def small_model(**changes: Any) -> M3P:
    """Make a model whose sizes fit the data sets."""
    torch.manual_seed(0)
    sizes = {"vocabulary_size": 160, "feature_dim": WIDTH, "positions": 40, "languages": 4}
    return M3P(M3PEncoder(**tiny_sizes(**sizes | changes)), 12)


def quiet_trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    """Make a trainer of one epoch on the CPU."""
    return trainer(folder, max_epochs=1, callbacks=list(callbacks), **options)


def pictures_of(batch: Mapping[str, Any]) -> list[int]:
    """Return the picture in each row of a batch, decoded from the region features, or -1 if all regions are masked."""
    found = []
    for regions in batch["regions"].numpy():
        seen = regions[regions[:, 0] > 0]
        found.append(round(float(seen[0, 1] / seen[0, 0])) - 1 if len(seen) else -1)
    return found


def texts_of(batch: Mapping[str, Any], data: Any) -> list[str]:
    """Return the text of each row of a batch."""
    return [data.tokenizer.decode(row) for row in batch["tokens"].tolist()]
