"""Data modules of M3P: text in many languages and captioned images to pre-train on, to fine-tune on and to search in.

The miniature uses the very same classes: its world writes files in the layouts of the real data sets, and the data sets
are pointed there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from common.data.annotations import LanguageCaptions, Texts
from common.data.datasets.captioned import LanguageCaptioned
from common.data.datasets.wikipedia import WikipediaText
from common.data.items import Sample, TooManyBrokenFiles
from common.data.text import XLMRTokenizer
from common.data.worlds.emoji_languages import EmojiLanguagesWorld
from common.training.data_module import ShardedDataModule
from papers.m3p.code_switching import CodeSwitcher, Coverage
from papers.m3p.masking import DEFAULT_MASKING, WORD_NOISE, Masking, mask_stream
from papers.m3p.pairs import (
    Candidates,
    CaptionItems,
    CaptionPool,
    CaptionTokens,
    FlatTexts,
    PairCollator,
    PairItems,
    Pictures,
    RegionItems,
    SwitchedCaptions,
    collate_regions,
    read_picture,
)
from papers.m3p.streams import LanguageStream, MultitaskSchedule, file_identity, language_probabilities, stream_tokens

#: Captions of a set that are looked through to see how many of their words the dictionaries hold.
COUNTED_CAPTIONS = 20_000
#: Independent random streams of an epoch.
_TEXT_ORDER, _PAIR_ORDER, _TEXT_NOISE = range(3)
#: Batch of a training step: `xmlm`, a list of blocks of text, and `relations`, a list of batches of `PairCollator`.
Step = dict[str, list[Any]]


@dataclass
class CaptionSet:
    """Captioned images in one language.

    Args:
        dataset: the data set; `root` is where its files lie.
        language: of the captions.
        captions_per_image: how often an epoch of pre-training shows an image, each time with another of its captions.
    """

    dataset: LanguageCaptioned
    language: str = "en"
    captions_per_image: int = 1


@dataclass(frozen=True)
class EvaluationSet:
    """A language of a test set: every image is searched by its captions, and every caption by its image.

    Args:
        name: of the set, as the configuration has it.
        language: of its captions.
        image_loader, caption_loader: positions in the list of test loaders; sets may share the images.
    """

    name: str
    language: str
    image_loader: int
    caption_loader: int


class RegionTextData(ShardedDataModule):
    """What the data modules share: the tokenizer, regions, and the sets to search in.

    Args:
        tokenizer: makes tokens of all text; its `max_tokens` cuts captions. The world's own where there is a world.
        sets: captioned sets by name, to search in and to fine-tune on.
        test_sets: names of those to search in.
        world: miniature whose files stand in for those of the data sets and of the tokenizer; None for real data.
        region_network: checkpoint of the miniature's region network; None reads region features from files.
        code_switching: replaces words of captions in training; None leaves them alone.
        candidates: N, candidates for each image and each caption in training.
        vlm_candidates: `groups`, N drawn from the whole set; `in_batch`, the other pairs of a batch.
        exclude_siblings: no other caption of an image is a negative of it.
        max_regions: regions of an image that are used, the first ones. Text stands behind this many everywhere, also
            where images have fewer; a smaller number saves time, and is part of what a model has learned.
        distributions: also read the detector's distributions over classes.
        test_split: of the sets.
        test_images: the first so many images of a set are searched; None for all.
        test_captions: the first so many captions of each image; None for all.
        batch_size: pairs, or groups of each direction, per step of one kind, over all devices.
        test_batch_size: images or captions per evaluation step, per device.
        kwargs: see ShardedDataModule; `cache_bytes` keeps the regions of a set that fits in, and an image without
            regions counts as broken.

    Raises:
        ValueError: a set is not there, or a number is out of its range.
    """

    def __init__(
        self,
        tokenizer: XLMRTokenizer,
        sets: Mapping[str, CaptionSet] | None = None,
        test_sets: Sequence[str] = (),
        world: EmojiLanguagesWorld | None = None,
        region_network: str | None = None,
        code_switching: CodeSwitcher | None = None,
        candidates: int = 4,
        vlm_candidates: Candidates = "groups",
        exclude_siblings: bool = True,
        max_regions: int = 100,
        distributions: bool = False,
        test_split: str = "test",
        test_images: int | None = None,
        test_captions: int | None = None,
        batch_size: int = 192,
        test_batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(None, world, batch_size=batch_size, **kwargs)
        self.tokenizer = tokenizer
        self.sets = dict(sets or {})
        self.test_sets = self._known(test_sets, "test_sets")
        self.world: EmojiLanguagesWorld | None = world
        self.region_network = region_network
        self.code_switching = code_switching
        self.candidates = candidates
        self.vlm_candidates: Candidates = vlm_candidates
        self.exclude_siblings = exclude_siblings
        for name, number in (
            ("max_regions", max_regions),
            ("test_images", test_images),
            ("test_captions", test_captions),
        ):
            if number is not None and number < 1:
                raise ValueError(f"data.{name} must be at least 1, got {number}")
        self.max_regions = max_regions
        self.distributions = distributions
        self.test_split = test_split
        self.test_images = test_images
        self.test_captions = test_captions
        self.test_batch_size = test_batch_size
        self._tokens: dict[tuple[int, str, str], tuple[LanguageCaptions, CaptionTokens]] = {}
        if world is not None:
            for dataset in self._datasets():
                world.place(dataset)
            self.tokenizer.file = str(world.tokenizer_file)
            if code_switching is not None:
                code_switching.dictionaries = world.dictionary_folder

    # -- what is used --------------------------------------------------------------------------------------------------

    def _known(self, names: Sequence[str], field: str) -> list[str]:
        unknown = [name for name in names if name not in self.sets]
        if unknown:
            raise ValueError(
                f"data.{field}: no set {', '.join(unknown)}; data.sets has {', '.join(self.sets) or 'none'}"
            )
        return list(names)

    def _training_sets(self) -> list[CaptionSet]:
        """Captioned sets that training reads."""
        raise NotImplementedError

    def _training_split(self) -> str:
        raise NotImplementedError

    def _datasets(self) -> list[Any]:
        """Every data set of the configuration, also one that is not used."""
        return [one.dataset for one in self.sets.values()]

    def _used_splits(self) -> list[tuple[Any, str]]:
        """Captioned data sets and splits that are read."""
        tested = [(self.sets[name].dataset, self.test_split) for name in self.test_sets]
        return [*((one.dataset, self._training_split()) for one in self._training_sets()), *tested]

    def _parts(self, world: EmojiLanguagesWorld) -> list[str]:
        """What must be rendered of the world."""
        switched = ["dictionaries"] if self.code_switching is not None else []
        names = [name for dataset, _ in self._used_splits() for name in world.needed_for(dataset)]
        return ["sentencepiece", *switched, *dict.fromkeys(names)]

    # -- life of the module --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        if self.world is not None:
            self.world.prepare(self._parts(self.world))
        self._find_regions()

    def _find_regions(self) -> None:
        if self.region_network is None:
            return
        from papers.m3p.regions import prepare_regions

        splits: dict[int, tuple[Any, list[str]]] = {}
        for dataset, split in self._used_splits():
            found = splits.setdefault(id(dataset), (dataset, []))[1]
            if split not in found:
                found.append(split)
        for dataset, names in splits.values():
            dataset.regions_root = prepare_regions(dataset, names, self.region_network)

    def prepare_tokenizer(self) -> None:
        """Make the tokenizer ready, of the files that it needs alone."""
        if self.world is not None:
            self.world.prepare(["sentencepiece"])
        self.tokenizer.prepare(self._texts())

    def setup(self, stage: str) -> None:
        self._find_regions()
        self.prepare_tokenizer()
        if self.code_switching is not None:
            self.code_switching.prepare()
        # Also before training: what the test lacks should not be found out at its end.
        _ = self.feature_dim, self._searched
        if stage == "fit":
            self._prepare_training()
            if (coverage := self.coverage) is not None:
                if not coverage.tokens:
                    raise ValueError(
                        "data.code_switching switches no caption: no set to train on is in its source language; "
                        "set it to null"
                    )
                parts = ", ".join(f"{name} {share:.0%}" for name, share in coverage.by_language.items())
                rank_zero_info(f"  code-switching: dictionaries hold {coverage.token_share:.0%} of the words ({parts})")

    def _prepare_training(self) -> None:
        """Read what training needs, so that an error comes before it."""
        raise NotImplementedError

    def _all_pairs(self) -> list[PairItems]:
        """Pairs that training reads."""
        raise NotImplementedError

    def _texts(self) -> Iterable[str]:
        """Text of training, to learn a tokenizer from where none is given."""
        for one in self._training_sets():
            for own in one.dataset.captions(self._training_split(), one.language).captions:
                yield from own

    # -- sizes ---------------------------------------------------------------------------------------------------------

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens; known after setup."""
        return self.tokenizer.vocabulary_size

    @cached_property
    def feature_dim(self) -> int:
        """Width of region features.

        Raises:
            ValueError: those of two sets differ.
        """
        widths = {dataset.regions(split).feature_size for dataset, split in self._used_splits()}
        if len(widths) != 1:
            raise ValueError(f"the region features of the data sets must be of one width, found {sorted(widths)}")
        return widths.pop()

    @property
    def languages(self) -> list[str]:
        """Languages with numbers, sorted; a language's number is its position."""
        return sorted({one.language for one in self.sets.values()})

    def numbers_languages(self, embeddings: int) -> bool:
        """Whether a language's number here is that of its embedding in an encoder that has so many."""
        return len(self.languages) == embeddings

    def check_languages(self, embeddings: int) -> None:
        """Refuse captions whose language has no number, for an encoder that adds language embeddings beside regions.

        Args:
            embeddings: how many it has.

        Raises:
            ValueError: there is such a caption, or the numbers are not those of the encoder.
        """
        if not self.numbers_languages(embeddings):
            raise ValueError(
                f"model.model.encoder.joint_language_embedding: the encoder has {embeddings} languages and the sets "
                f"have {len(self.languages)}; name those of pre-training in data.languages, in any order"
            )
        read = [*self._training_sets(), *(self.sets[name] for name in self.test_sets)]
        unknown = sorted({one.language for one in read} - set(self.languages))
        if unknown:
            raise ValueError(
                "model.model.encoder.joint_language_embedding adds the embedding of each caption's language, and "
                f"data.languages lacks {', '.join(unknown)}"
            )

    # -- reading -------------------------------------------------------------------------------------------------------

    def _captions(self, dataset: Any, split: str, language: str) -> tuple[LanguageCaptions, CaptionTokens]:
        """Captions of a split in a language, and their tokens."""
        key = (id(dataset), split, language)
        if key not in self._tokens:
            captions = dataset.captions(split, language)
            if not len(captions):
                raise ValueError(f"{dataset.root}: split {split!r} has no captions in {language!r}")
            self._tokens[key] = (captions, CaptionTokens(captions, self.tokenizer))
        return self._tokens[key]

    def _pictures(self, sets: Sequence[CaptionSet], split: str, first: int | None = None) -> Pictures:
        """Images of some sets that have captions and regions, each once.

        Raises:
            TooManyBrokenFiles: too many have no regions.
        """
        features = [one.dataset.regions(split) for one in sets]
        keys: Sequence[str] = self._captions(sets[0].dataset, split, sets[0].language)[0].keys
        if len(sets) > 1:
            found = [self._captions(one.dataset, split, one.language)[0].keys for one in sets]
            keys = list(dict.fromkeys(key for own in found for key in own))
        keys = keys[:first] if first is not None and first < len(keys) else keys
        chosen = len(keys)
        source = np.zeros(chosen, dtype=np.int16)
        missing: list[str] = features[0].missing(keys)
        if missing:
            without = set(missing)
            rows = {key: row for row, key in enumerate(keys) if key in without}
            for number, other in enumerate(features[1:], 1):
                for key in [key for key in rows if key in other]:
                    source[rows.pop(key)] = number
            missing = list(rows)
            if missing:
                source = np.delete(source, list(rows.values()))
                keys = Texts(key for key in keys if key not in rows)
        dataset: Any = sets[0].dataset
        name = "+".join(dict.fromkeys(one.dataset.name for one in sets))  # type: ignore[attr-defined]
        if len(missing) > self.max_skipped_share * chosen or not len(keys):
            raise TooManyBrokenFiles(
                f"{name}, {split}: {len(missing)} of {chosen} images have no region features in "
                f"{', '.join(str(path) for path in features[0].paths)}, more than max_skipped_share = "
                f"{self.max_skipped_share:g} allows; first {', '.join(missing[:5])}. Extract them, or raise "
                "data.max_skipped_share"
            )
        languages = ",".join(dict.fromkeys(one.language for one in sets))
        return Pictures(name, f"{split}; {languages}", keys, features, source, dataset.root, missing)

    def _region_options(self) -> dict[str, Any]:
        return {"max_regions": self.max_regions, **self.item_options}

    def _pairs(self, sets: Sequence[CaptionSet], captions_per_image: int, masked: bool) -> PairItems:
        split = self._training_split()
        pictures = self._pictures(sets, split)
        pool = CaptionPool([self._captions(one.dataset, split, one.language) for one in sets], pictures.keys)
        switcher = self.code_switching
        return PairItems(
            pictures,
            pool,
            self.tokenizer,
            self.languages,
            captions_per_image=captions_per_image,
            candidates=self.candidates,
            vlm_candidates=self.vlm_candidates,
            exclude_siblings=self.exclude_siblings,
            switched=None if switcher is None else SwitchedCaptions(switcher, self.tokenizer),
            masked=masked,
            distributions=self.distributions,
            **self._region_options(),
        )

    # -- test ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _searched(self) -> tuple[list[EvaluationSet], list[RegionItems | CaptionItems]]:
        """Sets to search in, and what each test loader reads."""
        sets: list[EvaluationSet] = []
        loaded: list[RegionItems | CaptionItems] = []
        shared: dict[tuple[Any, ...], int] = {}
        for name in self.test_sets:
            one = self.sets[name]
            dataset: Any = one.dataset
            captions, tokens = self._captions(dataset, self.test_split, one.language)
            pictures = self._pictures([one], self.test_split, self.test_images)
            key = (type(dataset), dataset.root, dataset.regions(self.test_split).paths, tuple(pictures.keys))
            if key not in shared:
                shared[key] = len(loaded)
                loaded.append(RegionItems(pictures, **self._region_options()))
            place = {key: image for image, key in enumerate(pictures.keys)}
            starts = captions.captions.starts.tolist()
            chosen = [
                (number, place[key])
                for row, key in enumerate(captions.keys)
                if key in place
                for number in range(starts[row], starts[row + 1])[: self.test_captions]
            ]
            numbers, images = np.array(chosen, dtype=np.int64).reshape(-1, 2).T
            sets.append(EvaluationSet(name, one.language, shared[key], len(loaded)))
            loaded.append(CaptionItems(tokens, numbers, images, self.tokenizer))
        return sets, loaded

    @property
    def evaluation_sets(self) -> list[EvaluationSet]:
        """Sets that are searched in; known after setup."""
        return self._searched[0]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        sets, loaded = self._searched
        roles = {one.image_loader: f"test {one.name}" for one in reversed(sets)}
        roles |= {one.caption_loader: f"test captions {one.name}" for one in sets}
        return [
            self.evaluation_loader(
                items,
                self.test_batch_size,
                roles[number],
                collate_fn=items.collate
                if isinstance(items, CaptionItems)
                else partial(collate_regions, max_regions=items.max_regions),
            )
            for number, items in enumerate(loaded)
        ]

    def caption_text(self, position: int, caption: int) -> str:
        """A caption of an evaluation set, by its `index`."""
        items = self._searched[1][self.evaluation_sets[position].caption_loader]
        assert isinstance(items, CaptionItems)
        return items.text(caption)

    def preview(self, position: int, image: int) -> npt.NDArray[np.uint8] | None:
        """An image of an evaluation set, by its `index`, uint8 [H, W, 3]; None where only its regions are there."""
        one = self.evaluation_sets[position]
        items = self._searched[1][one.image_loader]
        assert isinstance(items, RegionItems)
        dataset = self.sets[one.name].dataset
        return read_picture(dataset.image_path(items.pictures.keys[image], self.test_split))

    # -- code-switching ------------------------------------------------------------------------------------------------

    def switched_examples(self, count: int) -> list[tuple[str, str]]:
        """Captions as they are and as the first epoch reads them, from all over each set; none without switching."""
        if self.code_switching is None:
            return []
        examples = []
        for pairs in self._all_pairs():
            for item in np.linspace(0, len(pairs) - 1, min(count, len(pairs)), dtype=np.int64).tolist():
                language, text, pieces = pairs.read((0, item))
                if language == self.code_switching.source:
                    examples.append((text, self.tokenizer.decode(pieces.tolist())))
        return examples[:count]

    @cached_property
    def coverage(self) -> Coverage | None:
        """How many words of the training captions the dictionaries hold; None where nothing is switched.

        Of a large set, captions from all over it are counted.
        """
        switcher = self.code_switching
        if switcher is None:
            return None
        texts: list[str] = []
        for one in self._training_sets():
            if one.language == switcher.source:
                found = FlatTexts(self._captions(one.dataset, self._training_split(), one.language)[0])
                places = np.linspace(0, len(found) - 1, min(COUNTED_CAPTIONS, len(found)), dtype=np.int64)
                texts += [found[place] for place in places.tolist()]
        return switcher.coverage(texts)

    def describe(self) -> dict[str, dict[str, Any]]:
        described = super().describe()
        if self.code_switching is not None and (coverage := self.coverage) is not None:
            described["code-switching (dictionaries)"] = {
                "version": f"{self.code_switching.source} to {','.join(self.code_switching.targets)}",
                "samples": coverage.tokens,
                "covered": round(coverage.token_share, 4),
                "covered_by_language": {name: round(share, 4) for name, share in coverage.by_language.items()},
                "skipped": 0,
                "skipped_names": [],
            }
        return described


# -- pre-training ------------------------------------------------------------------------------------------------------


@dataclass
class MultitaskSteps(Dataset[Step]):
    """The steps of an epoch: a few blocks of text in some languages, and a few batches of pairs (specification 6.3).

    A step is a function of (seed, epoch, step). All ranks read the same languages and sets; of a batch, rank r of W
    reads rows r, r + W, ..., so that the batches of W ranks joined are that of one.

    Args:
        schedule: what each step reads.
        streams: text of each language, in the order of the schedule.
        language_numbers: number of each language.
        pairs: pairs of each set of captions.
        collator: makes batches of pairs.
        batch_size: pairs or groups of a batch over all ranks.
        tokenizer: of the text.
        masking: of the text.
        multiple_of: see `mask_stream`.
        seed: seed of everything random.
        rank, world_size: this process and the number of processes.
    """

    schedule: MultitaskSchedule
    streams: Sequence[LanguageStream]
    language_numbers: Sequence[int]
    pairs: Sequence[PairItems]
    collator: PairCollator
    batch_size: int
    tokenizer: XLMRTokenizer
    masking: Masking
    multiple_of: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    _orders: dict[tuple[int, int], tuple[tuple[int, int], npt.NDArray[np.int64]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, key: tuple[int, int]) -> Step:
        epoch, step = key
        languages, relations = self.schedule.of(epoch)
        return {
            "xmlm": [
                self._block(epoch, step, place, int(number), int(languages.turn[step, place]))
                for place, number in enumerate(languages.chosen[step])
            ],
            "relations": [
                self._relation(epoch, int(number), int(relations.turn[step, place]))
                for place, number in enumerate(relations.chosen[step])
            ],
        }

    def _order(self, kind: int, number: int, count: int, epoch: int, again: int) -> npt.NDArray[np.int64]:
        """Order of the blocks or pairs of a source in its n-th pass of an epoch; the last one is kept."""
        found = self._orders.get((kind, number))
        if found is None or found[0] != (epoch, again):
            rng = np.random.default_rng((self.seed, epoch, again, number, kind))
            found = self._orders[kind, number] = ((epoch, again), rng.permutation(count))
        return found[1]

    def _block(self, epoch: int, step: int, place: int, number: int, turn: int) -> dict[str, torch.Tensor]:
        stream = self.streams[number]
        again, block = divmod(turn, len(stream))
        tokens = stream.block(int(self._order(_TEXT_ORDER, number, len(stream), epoch, again)[block]))
        # Drawn for the rows of all ranks, so that what is masked does not depend on their number.
        noise = np.random.default_rng((self.seed, epoch, step, place, _TEXT_NOISE)).random((*tokens.shape, WORD_NOISE))
        masked, labels = mask_stream(
            tokens,
            noise,
            self.tokenizer.mask_id,
            self.tokenizer.pad_id,
            self.tokenizer.vocabulary_size,
            self.masking,
            self.multiple_of,
        )
        own = slice(self.rank, None, self.world_size)
        return {
            "tokens": torch.from_numpy(masked[own]),
            "token_mask": torch.from_numpy(tokens[own] != self.tokenizer.pad_id),
            "labels": torch.from_numpy(labels[own]),
            "languages": torch.full((len(tokens[own]),), self.language_numbers[number]),
        }

    def _relation(self, epoch: int, number: int, turn: int) -> dict[str, Any]:
        pairs = self.pairs[number]
        again, batch = divmod(turn, len(pairs) // self.batch_size)
        order = self._order(_PAIR_ORDER, number, len(pairs), epoch, again)
        first = batch * self.batch_size
        rows = order[first + self.rank : first + self.batch_size : self.world_size]
        # What an item draws depends on the pass, too: a small set is gone through many times in an epoch.
        return self.collator([pairs[(epoch << 16) + again, int(row)] for row in rows])


class PretrainingData(RegionTextData):
    """Three streams to pre-train M3P on: text in many languages, captions with regions, and code-switched captions.

    An item of the training loader is one step: `xmlm`, up to `xmlm_steps` blocks of text, each in a language that is
    drawn anew, and `relations`, up to `relation_steps` batches of pairs, each of a set of captions drawn anew (with
    replacement, and never more draws than there are languages or sets).

    Args:
        captions: sets of captioned images.
        text: text without images; None for none.
        languages: of the text; None for all that `text` has. Their numbers are their positions in sorted order.
        language_alpha: languages are drawn in proportion to (share of sentences)^alpha; -1 for all alike.
        xmlm_steps: draws of languages per step; 0 leaves text out.
        relation_steps: draws of sets of captions per step.
        text_batch_size: rows of a block of text, over all devices.
        bptt: tokens of such a row.
        steps_per_epoch: steps of an epoch.
        masking: what is masked; null masks nothing.
        predicted_multiple: the number of words to guess in a block of text is cut to a multiple of this; 8 is what the
            released code does in half precision.
        train_split: of the captioned sets and of the text.
        kwargs: see RegionTextData and ShardedDataModule.

    Raises:
        ValueError: a number is out of its range, or there is neither text nor captions.

    Source: specification 6.
    """

    def __init__(
        self,
        captions: Sequence[CaptionSet],
        tokenizer: XLMRTokenizer,
        text: WikipediaText | None = None,
        languages: Sequence[str] | None = None,
        language_alpha: float = 0.3,
        xmlm_steps: int = 3,
        relation_steps: int = 3,
        text_batch_size: int = 192,
        bptt: int = 128,
        steps_per_epoch: int = 1000,
        masking: Masking | None = DEFAULT_MASKING,
        predicted_multiple: int = 1,
        train_split: str = "train",
        **kwargs: Any,
    ) -> None:
        self.captions = list(captions)
        self.text = text
        super().__init__(tokenizer, **kwargs)
        for name, number, least in (
            ("xmlm_steps", xmlm_steps, 0),
            ("relation_steps", relation_steps, 0),
            ("text_batch_size", text_batch_size, 1),
            ("bptt", bptt, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("predicted_multiple", predicted_multiple, 1),
        ):
            if number < least:
                raise ValueError(f"data.{name} must be at least {least}, got {number}")
        if xmlm_steps and text is None:
            raise ValueError("data.text is null, but data.xmlm_steps is above 0: give it a class, or set that to 0")
        if not xmlm_steps and not (relation_steps and captions):
            raise ValueError("data.xmlm_steps and data.relation_steps are both 0: a step would read nothing")
        self._languages = None if languages is None else sorted(languages)
        self.language_alpha = language_alpha
        self.xmlm_steps = xmlm_steps
        self.relation_steps = relation_steps
        self.text_batch_size = text_batch_size
        self.bptt = bptt
        self.steps_per_epoch = steps_per_epoch
        self.masking = masking
        self.predicted_multiple = predicted_multiple
        self.train_split = train_split

    def _training_sets(self) -> list[CaptionSet]:
        return self.captions

    def _training_split(self) -> str:
        return self.train_split

    def _datasets(self) -> list[Any]:
        text = [] if self.text is None else [self.text]
        return [*super()._datasets(), *(one.dataset for one in self.captions), *text]

    def _parts(self, world: EmojiLanguagesWorld) -> list[str]:
        parts = super()._parts(world)
        return [*parts, self.text.name] if self.xmlm_steps and self.text is not None else parts

    @property
    def languages(self) -> list[str]:
        if self._languages is None:
            reads_text = self.text is not None and self.xmlm_steps
            self._languages = sorted(self.text.languages) if reads_text else super().languages  # type: ignore[union-attr]
        return self._languages

    def numbers_languages(self, embeddings: int) -> bool:
        return True  # this training gives the embeddings their meaning

    def _texts(self) -> Iterable[str]:
        yield from super()._texts()
        if self.xmlm_steps and self.text is not None:
            for language in self.languages:
                yield from self.text.sentences(self.train_split, language)

    def _prepare_training(self) -> None:
        _ = self._streams, self._relations

    def _all_pairs(self) -> list[PairItems]:
        return self._relations

    @cached_property
    def _streams(self) -> tuple[dict[str, float], list[LanguageStream], dict[str, Any]]:
        """Probabilities of the languages, their text, and what the record says about it."""
        if not self.xmlm_steps or self.text is None:
            return {}, [], {}
        counts, streams = {}, []
        for language in self.languages:
            lines = self.text.sentences(self.train_split, language)
            counts[language] = len(lines)
            tokens = stream_tokens(lines, self.tokenizer, file_identity(lines.path))
            streams.append(LanguageStream(tokens, self.text_batch_size, self.bptt, self.tokenizer.end_id))
        record = {
            "version": f"{self.train_split}; {','.join(counts)}",
            "samples": sum(counts.values()),
            "tokens": sum(len(stream.tokens) for stream in streams),
            "skipped": 0,
            "skipped_names": [],
        }
        return language_probabilities(counts, self.language_alpha), streams, record

    @cached_property
    def _relations(self) -> list[PairItems]:
        if not self.relation_steps:
            return []
        masked = self.masking is not None
        found = [self._pairs([one], one.captions_per_image, masked) for one in self.captions]
        for pairs in found:
            if len(pairs) < self.batch_size:
                raise ValueError(
                    f"data.batch_size ({self.batch_size}) is larger than the {len(pairs)} captions of "
                    f"{pairs.pictures.name} that an epoch shows; lower it, or raise captions_per_image"
                )
        return found

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        for name in ("batch_size", "text_batch_size"):
            if getattr(self, name) % trainer.world_size:
                raise ValueError(
                    f"data.{name} ({getattr(self, name)}) is that of all processes and must be divisible by their "
                    f"number, {trainer.world_size}"
                )
        probabilities, streams, _ = self._streams
        languages = self.languages
        steps = MultitaskSteps(
            MultitaskSchedule(
                list(probabilities.values()),
                len(self._relations),
                self.xmlm_steps,
                self.relation_steps,
                self.steps_per_epoch,
                self.seed,
            ),
            streams,
            [languages.index(language) for language in probabilities],
            self._relations,
            PairCollator(self.tokenizer, self.masking, self.max_regions),
            self.batch_size,
            self.tokenizer,
            self.masking or DEFAULT_MASKING,
            self.predicted_multiple,
            self.seed,
            trainer.global_rank,
            trainer.world_size,
        )
        for number, pairs in enumerate(self._relations):
            self._used[f"training {number}"] = pairs
            if self.num_workers:
                pairs.fill_cache()
        return self.step_loader(steps)

    def describe(self) -> dict[str, dict[str, Any]]:
        described = super().describe()
        if "_streams" in vars(self) and self._streams[2]:
            described["training text (wikipedia)"] = self._streams[2]
        return described


# -- fine-tuning -------------------------------------------------------------------------------------------------------


class RetrievalData(RegionTextData):
    """Captioned images in one language, or in several pooled, to fine-tune on and to search in.

    An item of the training loader is one step, as that of `PretrainingData`, with `xmlm` empty and one batch of pairs
    in `relations`; nothing is masked.

    Args:
        train_sets: names of the sets to fine-tune on: one for the settings "en" and "each", all for "all". The captions
            of an image that several of them hold are pooled.
        captions_per_image: captions of an image that an epoch shows; drawn anew every epoch where it has more, some of
            them several times where it has fewer.
        languages: languages that the model was pre-trained with, in any order, where it adds language embeddings beside
            regions or texts are to be embedded in a language; their numbers are their positions in sorted order. None
            for those of the sets.
        train_split: of the sets.
        kwargs: see RegionTextData and ShardedDataModule.

    Source: specification 8 and 9.
    """

    def __init__(
        self,
        tokenizer: XLMRTokenizer,
        sets: Mapping[str, CaptionSet],
        train_sets: Sequence[str] = (),
        captions_per_image: int = 5,
        train_split: str = "train",
        languages: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._languages = None if languages is None else sorted(languages)
        super().__init__(tokenizer, sets, **kwargs)
        if captions_per_image < 1:
            raise ValueError(f"data.captions_per_image must be at least 1, got {captions_per_image}")
        self.train_sets = self._known(train_sets, "train_sets")
        self.captions_per_image = captions_per_image
        self.train_split = train_split

    @property
    def languages(self) -> list[str]:
        return super().languages if self._languages is None else self._languages

    def numbers_languages(self, embeddings: int) -> bool:
        return self._languages is not None or super().numbers_languages(embeddings)

    def _training_sets(self) -> list[CaptionSet]:
        return [self.sets[name] for name in self.train_sets]

    def _training_split(self) -> str:
        return self.train_split

    def _prepare_training(self) -> None:
        if not self.train_sets:
            raise ValueError("data.train_sets: name at least one set to fine-tune on")
        _ = self._training_pairs

    def _all_pairs(self) -> list[PairItems]:
        return [self._training_pairs] if self.train_sets else []

    @cached_property
    def _training_pairs(self) -> PairItems:
        return self._pairs(self._training_sets(), self.captions_per_image, masked=False)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self._training_pairs, collate_fn=_RelationStep(self.tokenizer, self.max_regions))


@dataclass
class _RelationStep:
    """Makes the step of a batch of pairs."""

    tokenizer: XLMRTokenizer
    max_regions: int

    def __call__(self, samples: list[Sample]) -> Step:
        return {"xmlm": [], "relations": [PairCollator(self.tokenizer, None, self.max_regions)(samples)]}
