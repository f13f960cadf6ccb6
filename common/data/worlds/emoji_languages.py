"""A miniature of real drawings with captions in six languages, which replaces every data set that M3P reads.

Concepts are split into testing, fine-tuning and pre-training. The designer of the test pictures is not in training.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from common.data.datasets.base import write_json, write_lines
from common.data.datasets.coco import Annotated
from common.data.datasets.coco_cn import write_coco_cn
from common.data.datasets.coco_karpathy import karpathy_folder, karpathy_name, write_karpathy
from common.data.datasets.conceptual_captions import ConceptualCaptions, write_conceptual_captions
from common.data.datasets.imagenet import imagenet_path, write_class_names
from common.data.datasets.multi30k import write_multi30k
from common.data.datasets.stair_captions import OnCOCO, write_stair_captions
from common.data.text import learn_pieces
from common.data.worlds.base import World, Write, arguments_of, write_jpeg
from common.data.worlds.emoji import (
    CELL,
    CREDIT,
    DESIGNERS,
    LANGUAGES,
    LIGHT,
    STYLE_NUMBERS,
    TEST_STYLE,
    TRAIN_STYLES,
    Concept,
    compose,
    picture_number,
    read_concepts,
    read_drawings,
)
from common.types import NonNegativeInt, PictureSide, PositiveFraction, PositiveInt

#: Number of captions per image in each language, as in the real data sets.
CAPTIONS_PER_IMAGE = {"en": 5, "de": 5, "fr": 1, "cs": 1, "ja": 5, "zh": 1}
#: Thresholds of the dictionaries and translations per word, docs/papers/m3p.md [13.1].
LEAST_DICE, LEAST_SHARED, TRANSLATIONS = 0.5, 2, 3
#: Concepts whose English words have this Jaccard index look alike: moons, books, banknotes.
ALIKE = 0.4

_CJK = re.compile(r"([\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_MARKS = re.compile(r"[,:、，：()（）\u201c\u201d\u201e\u2018\"«»「」]")
_SENTENCES = 3  # number per concept and language, for text without pictures
_HELD_OUT_SENTENCES = 20  # one in 20 is for validation
_HELD_OUT_IMAGES = 40  # most pictures for validation
_IMAGE, _WORDS, _TEXT, _CHINESE = range(4)  # independent random streams
_SMALLEST = 0.7  # smallest scale of a drawing in a training picture


def plain(text: str) -> str:
    """Normalize text: lower case, no commas, colons, quotes or brackets, and spaces around CJK characters.

    Code-switched text has spaces around words. So ordinary Japanese and Chinese text needs spaces, too, to look the
    same to a tokenizer. Adjacent kana form one word, as in BERT's tokenizer.

    Source: docs/papers/m3p.md [13.1] and pitfall 15.
    """
    return " ".join(_CJK.sub(r" \1 ", _MARKS.sub(" ", text.lower())).split())


def induced_dictionary(concepts: Iterable[Concept], language: str) -> dict[str, list[str]]:
    """Derive a dictionary from English to `language` from the names and keywords of concepts in both languages.

    A word and a translation share at least two concepts, and the Dice coefficient of their concepts is at least 0.5.
    Returns up to three translations for each word, best first. Words are sorted.

    Source: docs/papers/m3p.md [13.1].
    """
    sources: defaultdict[str, set[int]] = defaultdict(set)
    targets: defaultdict[str, set[int]] = defaultdict(set)
    terms_of: defaultdict[int, list[str]] = defaultdict(list)
    for concept in concepts:
        for word in _english(concept):
            sources[word].add(concept.index)
        terms = {plain(text) for text in (concept.name[language], *concept.keywords[language])} - {""}
        for term in sorted(terms):
            targets[term].add(concept.index)
            terms_of[concept.index].append(term)
    dictionary = {}
    for word, ids in sorted(sources.items()):
        shared = Counter(term for index in ids for term in terms_of[index])
        scores = {
            term: 2 * count / (len(ids) + len(targets[term])) for term, count in shared.items() if count >= LEAST_SHARED
        }
        best = sorted((term for term in scores if scores[term] >= LEAST_DICE), key=lambda term: (-scores[term], term))
        if best:
            dictionary[word] = best[:TRANSLATIONS]
    return dictionary


class EmojiLanguagesWorld(World):
    """Replaces Conceptual Captions, Multi30K, COCO, STAIR Captions, COCO-CN and Wikipedia. Adds dictionaries.

    A caption is a name and up to `keywords` keywords in random order. The first caption of a test image is fixed: the
    first keywords in the order of the concept's list. Pictures show the 818 concepts with `Concept.core`, split in the
    same way for all seeds: `test` concepts (no two share `ALIKE` or more of their English words), `fine_tune` concepts,
    and pre-training concepts. Text without pictures is only about pre-training concepts.

    Dictionaries (`en-<language>.txt`) come from the annotations of all 1,572 concepts. So a dictionary includes a word
    of a test concept only if another concept has the word, too. `sentencepiece` is a tokenizer trained on the
    pre-training text and all names and keywords. `imagenet` has drawings labeled by concept, to train the network that
    makes region features.

    Args:
        concepts: number of concepts with pictures, evenly spaced among the 818; None for all.
        unseen: what is new in a test. With `concepts`, training has no drawing or caption of test concepts. With
            `drawings`, training has drawings of test concepts by other designers, but without the fixed caption.
        pictures_per_drawing: number of pictures of each drawing in Conceptual Captions, on different grounds.
        chinese: share of the training concepts with Chinese captions; COCO-CN covers a sixth of COCO's pictures.

    Source: docs/papers/m3p.md [13.1] and [13.3].
    """

    kind = "emoji_languages"
    title = "emoji world in six languages"
    names = (
        "conceptual_captions",
        "multi30k",
        "coco_karpathy",
        "stair_captions",
        "coco_cn",
        "wikipedia",
        "dictionaries",
        "sentencepiece",
        "imagenet",
    )
    version = 3
    credit = CREDIT

    def __init__(
        self,
        seed: NonNegativeInt = 0,
        size: PictureSide = 64,
        concepts: NonNegativeInt | None = None,
        test: NonNegativeInt = 300,
        fine_tune: NonNegativeInt = 400,
        unseen: Literal["concepts", "drawings"] = "concepts",
        keywords: PositiveInt = 3,
        pictures_per_drawing: PositiveInt = 3,
        vocabulary_size: PositiveInt = 8000,
        chinese: PositiveFraction = 1.0,
        root: str | None = None,
    ) -> None:
        parameters = arguments_of(locals())
        if chinese == 1:
            del parameters["chinese"]  # keeps the folder name of a world with all Chinese captions
        named = tuple(concept for concept in read_concepts() if concept.group != "Flags")
        every = tuple(concept for concept in named if concept.core)
        count = len(every) if concepts is None else concepts
        if count > len(every):
            raise ValueError(f"concepts: at most {len(every)}, got {concepts}")
        rest = count - test - fine_tune
        if test < 1 or fine_tune < 1 or rest < 6:
            raise ValueError(
                f"concepts: {count} minus {test} for testing and {fine_tune} for fine-tuning leave {rest}; needs at "
                "least one for each and six more"
            )
        super().__init__({**parameters, "concepts": count} | DESIGNERS, root)
        self.seed = seed
        self.size = size
        self.keywords = keywords
        self.pictures_per_drawing = pictures_per_drawing
        self.vocabulary_size = vocabulary_size
        self.chinese = chinese
        spread = [every[row * len(every) // count] for row in range(count)]
        # The split doesn't use the seed, so that all seeds have the same test pictures.
        order = [spread[row] for row in np.random.default_rng(0).permutation(count)]
        apart = dissimilar(order, test)
        if len(apart) < test:
            raise ValueError(f"test: only {len(apart)} of {count} concepts are dissimilar, fewer than {test}")
        tested = {concept.index for concept in apart}
        others = [concept for concept in order if concept.index not in tested]
        self.concepts = _ordered(order)
        self.test_concepts = _ordered(apart)
        self.fine_tune_concepts = _ordered(others[:fine_tune])
        #: Concepts for text without pictures.
        self.text_concepts = _ordered(others[fine_tune:])
        again = self.test_concepts if unseen == "drawings" else ()
        self.pretraining_concepts = _ordered((*self.text_concepts, *again))
        self.tuned_concepts = _ordered((*self.fine_tune_concepts, *again))
        #: Concepts for the dictionaries, with or without pictures.
        self.named_concepts = named
        self._sheets: dict[str, dict[int, np.ndarray]] = {}
        # Concepts of the validation pictures, which the test designer drew.
        self.held_out_concepts = self.text_concepts[:_HELD_OUT_IMAGES]

    def prepare(self, names: Sequence[str] | None = None) -> None:
        try:
            super().prepare(names)
        finally:
            self._sheets.clear()

    # -- where things are ----------------------------------------------------------------------------------------------

    def place(self, dataset: Any) -> None:
        super().place(dataset)
        if isinstance(dataset, OnCOCO):
            dataset.coco_root = self.root_of("coco_karpathy")

    # -- text ----------------------------------------------------------------------------------------------------------

    def captions_of(
        self, concept: Concept, language: str, count: int, rng: np.random.Generator, first: bool = False
    ) -> tuple[str, ...]:
        """Draw captions of a concept.

        With `first`, the first caption is fixed: the name and the first keywords. The other captions differ from the
        fixed one, unless the concept has no keywords.
        """
        name = plain(concept.name[language])
        terms = dict.fromkeys(plain(word) for word in concept.keywords[language])
        others = [term for term in terms if term and term != name]
        fixed = " ".join([name, *others[: self.keywords]])
        texts = [fixed] if first else []
        while len(texts) < count:
            number = int(rng.integers(min(len(others), self.keywords) + 1))
            text = " ".join([name, *(others[place] for place in rng.permutation(len(others))[:number])])
            if text != fixed or not others:
                texts.append(text)
        return tuple(texts[:count])

    @cached_property
    def dictionaries(self) -> Mapping[str, Mapping[str, list[str]]]:
        """Return translations of the English words in this world's captions, by language."""
        used = {word for concept in self.concepts for word in _english(concept)}
        return {
            language: {
                word: terms for word, terms in induced_dictionary(self.named_concepts, language).items() if word in used
            }
            for language in LANGUAGES[1:]
        }

    def _sentences(self, language: str) -> list[str]:
        """Return the sentences of the text without pictures, in random order: names and keywords of `text_concepts`."""
        number = LANGUAGES.index(language)
        rng = np.random.default_rng([1 + self.seed, _TEXT, number])
        concepts = sorted(self.text_concepts, key=lambda concept: concept.code_points)
        sentences = [text for concept in concepts for text in self.captions_of(concept, language, _SENTENCES, rng)]
        return [sentences[row] for row in rng.permutation(len(sentences))]

    # -- pictures ------------------------------------------------------------------------------------------------------

    def _rng(self, style: str, concept: Concept, stream: int, copy: int, seeded: bool) -> np.random.Generator:
        return np.random.default_rng(
            [1 + self.seed if seeded else 0, STYLE_NUMBERS[style], concept.index, 10 * copy + stream]
        )

    def _image(self, style: str, concept: Concept, drawing: np.ndarray, copy: int, trained: bool) -> np.ndarray:
        """Put a drawing on a light ground. In training pictures, the drawing is also shrunk and moved."""
        rng = self._rng(style, concept, _IMAGE, copy, trained)
        ground = rng.uniform(*LIGHT, size=3)
        if trained:
            side = round(CELL * rng.uniform(_SMALLEST, 1.0))
            left, top = (int(rng.integers(CELL - side + 1)) for _ in range(2))
            placed = np.zeros_like(drawing)
            small = Image.fromarray(drawing).resize((side, side), Image.Resampling.LANCZOS)
            placed[top : top + side, left : left + side] = np.asarray(small)
            drawing = placed
        return compose(drawing, ground, self.size)

    def _pictures(
        self, styles: Sequence[str], concepts: Sequence[Concept], copies: int, trained: bool
    ) -> Iterable[tuple[str, Concept, int, np.ndarray]]:
        for style in styles:
            if style not in self._sheets:
                # Decode each sheet once, because this takes as long as writing three hundred pictures.
                used = [concept.index for concept in self.concepts]
                self._sheets[style] = dict(zip(used, read_drawings(style, used)))
            for concept in concepts:
                if style in concept.styles:
                    drawing = self._sheets[style][concept.index]
                    for copy in range(copies):
                        yield style, concept, copy, self._image(style, concept, drawing, copy, trained)

    def _split(self, split: str) -> tuple[Sequence[str], Sequence[Concept]]:
        """Return the designers and concepts of a split, except for Conceptual Captions."""
        return {
            "train": (TRAIN_STYLES, self.tuned_concepts),
            "val": ((TEST_STYLE,), self.held_out_concepts),
            "test": ((TEST_STYLE,), self.test_concepts),
        }[split]

    def _captioned(self, split: str, languages: Sequence[str]) -> list[tuple[int, Concept, dict[str, tuple[str, ...]]]]:
        """Return number, concept and captions by language of each image of a split, sorted by number."""
        styles, concepts = self._split(split)
        rows = []
        for style in styles:
            for concept in concepts:
                if style not in concept.styles:
                    continue
                captions = {
                    language: self.captions_of(
                        concept,
                        language,
                        CAPTIONS_PER_IMAGE[language],
                        self._rng(style, concept, _WORDS, 1 + LANGUAGES.index(language), split == "train"),
                        first=split != "train",
                    )
                    for language in languages
                }
                rows.append((picture_number(style, concept), concept, captions))
        return rows

    # -- layouts -------------------------------------------------------------------------------------------------------

    def _fill_conceptual_captions(self, root: Path, write: Write) -> None:
        captions: dict[str, list[str]] = {}
        groups: dict[str, dict[str, int]] = {}
        for split, styles, concepts, copies in (
            ("train", TRAIN_STYLES, self.pretraining_concepts, self.pictures_per_drawing),
            ("val", (TEST_STYLE,), self.held_out_concepts, 1),
        ):
            captions[split], groups[split] = [], {}
            for style, concept, copy, pixels in self._pictures(styles, concepts, copies, split == "train"):
                path = root / ConceptualCaptions.image_folders[split][0] / f"{len(captions[split])}.jpg"
                write(path, partial(write_jpeg, path, pixels))
                groups[split][str(len(captions[split]))] = concept.index
                rng = self._rng(style, concept, _WORDS, copy, split == "train")
                captions[split] += self.captions_of(concept, "en", 1, rng)
        write_conceptual_captions(root, captions)
        write_json(root / "groups.json", groups)

    def _fill_multi30k(self, root: Path, write: Write) -> None:
        groups: dict[str, dict[str, int]] = {}
        for split in ("train", "val", "test"):
            styles, concepts = self._split(split)
            for style, concept, _, pixels in self._pictures(styles, concepts, 1, split == "train"):
                path = root / "flickr30k-images" / f"{picture_number(style, concept)}.jpg"
                write(path, partial(write_jpeg, path, pixels))
            rows = self._captioned(split, ("en", "de", "fr", "cs"))
            captions = {language: [texts[language] for _, _, texts in rows] for language in ("en", "de", "fr", "cs")}
            write_multi30k(root, split, [str(number) for number, _, _ in rows], captions)
            groups[split] = {str(number): concept.index for number, concept, _ in rows}
        write_json(root / "groups.json", groups)

    def _fill_coco_karpathy(self, root: Path, write: Write) -> None:
        for split in ("train", "val", "test"):
            styles, concepts = self._split(split)
            for style, concept, _, pixels in self._pictures(styles, concepts, 1, split == "train"):
                path = root / karpathy_folder(split) / karpathy_name(picture_number(style, concept), split)
                write(path, partial(write_jpeg, path, pixels))
        write_karpathy(root, {split: self._annotated(split, "en") for split in ("train", "val", "test")})

    def _annotated(self, split: str, language: str) -> list[Annotated]:
        return [
            Annotated(number, karpathy_name(number, split), self.size, self.size, texts[language], group=concept.index)
            for number, concept, texts in self._captioned(split, (language,))
        ]

    def _fill_stair_captions(self, root: Path, write: Write) -> None:
        parts = {
            "train2014": self._annotated("train", "ja"),
            "val2014": [*self._annotated("val", "ja"), *self._annotated("test", "ja")],
        }
        write_stair_captions(root, parts, f"Emoji world. {CREDIT}")

    def _fill_coco_cn(self, root: Path, write: Write) -> None:
        rng = np.random.default_rng([1 + self.seed, _CHINESE])
        order = rng.permutation([concept.index for concept in self.tuned_concepts]).tolist()
        captioned = set(order[: math.ceil(self.chinese * len(order))])
        parts = {
            split: [
                (Path(image.file_name).stem, image.captions)
                for image in self._annotated(split, "zh")
                if image.group in captioned or split != "train"
            ]
            for split in ("train", "val", "test")
        }
        write_coco_cn(root, parts)

    def _fill_wikipedia(self, root: Path, write: Write) -> None:
        for language in LANGUAGES:
            sentences = self._sentences(language)
            held_out = max(len(sentences) // _HELD_OUT_SENTENCES, 1)
            write_lines(root / f"{language}.train.txt", sentences[held_out:])
            write_lines(root / f"{language}.valid.txt", sentences[:held_out])

    def _fill_dictionaries(self, root: Path, write: Write) -> None:
        for language, entries in self.dictionaries.items():
            lines = [f"{word}\t{translation}" for word, translations in entries.items() for translation in translations]
            write_lines(root / f"en-{language}.txt", lines)

    def _fill_sentencepiece(self, root: Path, write: Write) -> None:
        texts = [text for language in LANGUAGES for text in self._sentences(language)]
        texts += [
            text for entries in self.dictionaries.values() for word, terms in entries.items() for text in (word, *terms)
        ]
        # Include the words of all captions, like the text that XLM-R's tokenizer was trained on.
        texts += [
            plain(text)
            for concept in self.concepts
            for language in LANGUAGES
            for text in (concept.name[language], *concept.keywords[language])
        ]
        # Otherwise a CJK character would become two pieces: a space and the character.
        signs = [f"\u2581{sign}" for sign in sorted(set("".join(texts))) if _CJK.match(sign)]
        model = learn_pieces(texts, model_type="unigram", vocab_size=self.vocabulary_size, user_defined_symbols=signs)
        (root / "sentencepiece.bpe.model").write_bytes(model)

    @cached_property
    def _shown(self) -> tuple[Concept, ...]:
        return _ordered((*self.pretraining_concepts, *self.fine_tune_concepts))

    def _fill_imagenet(self, root: Path, write: Write) -> None:
        label_of = {concept.index: label for label, concept in enumerate(self._shown)}
        for split, styles, concepts in (
            ("train", TRAIN_STYLES, self._shown),
            # Validate on drawings by the test designer that show no test concept.
            ("val", (TEST_STYLE,), self.text_concepts),
        ):
            # Write plain pictures, because the network's training augments them.
            for style, concept, _, pixels in self._pictures(styles, concepts, 1, False):
                path = imagenet_path(root, split, label_of[concept.index], picture_number(style, concept))
                write(path, partial(write_jpeg, path, pixels))
        write_class_names(root, [concept.name["en"] for concept in self._shown])


def dissimilar(concepts: Iterable[Concept], count: int) -> list[Concept]:
    """Choose up to `count` concepts. Any two of the chosen concepts share few English words."""
    chosen: list[Concept] = []
    said: list[set[str]] = []
    for concept in concepts:
        words = _english(concept)
        if len(chosen) < count and all(len(words & other) < ALIKE * len(words | other) for other in said):
            chosen.append(concept)
            said.append(words)
    return chosen


def _english(concept: Concept) -> set[str]:
    return {word for text in (concept.name["en"], *concept.keywords["en"]) for word in plain(text).split()}


def _ordered(concepts: Iterable[Concept]) -> tuple[Concept, ...]:
    return tuple(sorted(concepts, key=lambda concept: concept.index))
