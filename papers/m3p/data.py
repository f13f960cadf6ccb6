"""Data modules of M3P for pre-training, fine-tuning and search."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch.utils.data import DataLoader, Subset

from common.data.datasets.captioned import LanguageCaptioned
from common.data.datasets.wikipedia import WikipediaText
from common.data.listing import spread
from common.data.text import XLMRTokenizer
from common.data.worlds.base import World
from common.training.data_module import ShardedDataModule
from common.training.examples import Example, RandomTensors
from common.types import NonNegativeFloat, NonNegativeInt, PositiveInt
from papers.m3p.captions import CaptionTokens, file_identity, stream_tokens
from papers.m3p.code_switching import CodeSwitcher
from papers.m3p.encoder import M3PEncoder
from papers.m3p.examples import example_step
from papers.m3p.images import RegionItems
from papers.m3p.masking import DEFAULT_MASKING, Masking
from papers.m3p.pairs import Candidates, Groups, InBatch, PairItems
from papers.m3p.regions import prepare_regions
from papers.m3p.search import EvaluationSet
from papers.m3p.streams import LanguageStream, MultitaskSteps, Schedule, language_probabilities

TRAIN, TEST = "train", "test"
#: Number of captions per set to measure dictionary coverage with.
COUNTED_CAPTIONS = 20_000
#: Largest fraction of test images that may lack regions, because missing images raise recall.
MOST_UNSEARCHED = 0.01


@dataclass(eq=False)
class LanguageSet:
    """Captioned images in one language; a pre-training epoch shows `captions_per_image` captions of each image."""

    dataset: LanguageCaptioned
    language: str = "en"
    captions_per_image: int = 1


class RegionTextData(ShardedDataModule):
    """Base of the data modules: the tokenizer, regions, and the sets to search.

    Args:
        tokenizer: the tokenizer; `max_tokens` cuts captions. A synthetic world replaces the vocabulary file.
        sets: captioned sets by name, for search and fine-tuning; null leaves a set out.
        languages: languages of the texts, numbered in sorted order; None takes the sets' languages.
        region_network: checkpoint of a `RegionNetwork` that computes the regions; None reads feature files.
        candidates, vlm_candidates: N, and whether `Groups` or `InBatch` chooses the candidates.
        exclude_siblings: always true; in the released code, a negative may be a caption of the same image.
        max_regions: regions per image, the first ones. A smaller number saves time, but a trained model fits only one.
        validation_split: split of the training sets on which to compare weights; None for no validation.
        validation_items: number of captions to use: first one caption of every image, then a second one of every image,
            and so on; None for all.
        test_images, test_captions: number of images to search per set, and of captions per image; None for all.
        cut_test_captions: also cut test captions by `max_tokens`; the released code only cuts training captions.
        batch_size: pairs, or groups of each direction, per step of one kind, over all devices.
        test_batch_size: images or captions per evaluation step, per device.
        kwargs: see ShardedDataModule. `cache_bytes` caches regions if the regions of the whole set fit. An image
            without regions counts as broken.
    """

    #: Captions per image in an epoch, for fine-tuning and for comparing weights.
    captions_per_image = 1
    #: Text for pre-training.
    text: WikipediaText | None = None
    masking: Masking | None = None
    schedule: Any = None

    def __init__(
        self,
        tokenizer: XLMRTokenizer,
        sets: Mapping[str, LanguageSet | None] | None = None,
        training_sets: Sequence[LanguageSet] = (),
        test_sets: Sequence[str] = (),
        languages: Sequence[str] | None = None,
        world: World | None = None,
        region_network: str | None = None,
        code_switching: CodeSwitcher | None = None,
        candidates: PositiveInt = 4,
        vlm_candidates: Literal["groups", "in_batch"] = "groups",
        exclude_siblings: Literal[True] = True,
        max_regions: PositiveInt = 100,
        distributions: bool = False,
        validation_split: str | None = None,
        validation_items: PositiveInt | None = None,
        test_images: PositiveInt | None = None,
        test_captions: PositiveInt | None = None,
        cut_test_captions: bool = False,
        batch_size: PositiveInt = 192,
        test_batch_size: PositiveInt = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(None, world, batch_size=batch_size, **kwargs)
        self.tokenizer = tokenizer
        self.sets = {name: captioned for name, captioned in (sets or {}).items() if captioned is not None}
        self.training_sets = list(training_sets)
        self.test_sets = dict(zip(test_sets, self.chosen_sets(test_sets, "test_sets")))
        self.stated_languages = None if languages is None else sorted(languages)
        self.region_network = region_network
        self.code_switching = code_switching
        self.candidates: Candidates = Groups(candidates) if vlm_candidates == "groups" else InBatch()
        self.max_regions = max_regions
        self.distributions = distributions
        self.validation_split = validation_split
        self.validation_items = validation_items
        self.test_batch_size = test_batch_size
        self.test_images, self.test_captions = test_images, test_captions
        self.cut_test_captions = cut_test_captions
        self.captions_of: Callable[[LanguageSet, str], CaptionTokens] = cache(self._captions_of)
        #: Pairs to train on, pairs to compare weights on, and sets to search; `setup` sets them.
        self.training_pairs: list[PairItems] = []
        self.validation: PairItems | None = None
        self.evaluation_sets: list[EvaluationSet] = []
        if world is not None:
            for captioned in [*self.sets.values(), *self.training_sets]:
                world.place(captioned.dataset)
            tokenizer.file = str(world.root_of("sentencepiece"))
            if code_switching is not None:
                code_switching.dictionaries = world.root_of("dictionaries")

    def chosen_sets(self, names: Sequence[str], field: str) -> list[LanguageSet]:
        unknown = [name for name in names if name not in self.sets]
        if unknown:
            available = ", ".join(self.sets) or "none"
            raise ValueError(f"data.{field}: no set {', '.join(unknown)}; data.sets has {available}")
        return [self.sets[name] for name in names]

    # -- files ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        self.tokenizer.prepare()
        if self.code_switching is not None:
            self.code_switching.prepare()
        if not self.evaluation_sets:  # before training, too, so that missing test data fail early
            self.evaluation_sets = self.sets_to_search()
        if stage == "fit" and not self.training_pairs:
            self.read_training()
            if self.validation_split is not None:
                self.validation = self.pairs_of(self.training_sets, self.captions_per_image, self.validation_split)

    @abstractmethod
    def read_training(self) -> None:
        """Read all that training needs, so that errors occur before it starts."""

    @property
    def languages(self) -> list[str]:
        """The sorted languages. A language's number is its position in this list."""
        of_sets = {captioned.language for captioned in self.sets.values()}
        return self.stated_languages or sorted(of_sets if self.text is None else self.text.languages)

    # -- pairs ---------------------------------------------------------------------------------------------------------

    def _captions_of(self, captioned: LanguageSet, split: str) -> CaptionTokens:
        """Read the captions of a split, and compute the regions of its images if there is a region network."""
        dataset = captioned.dataset
        if self.region_network is not None:
            dataset.regions_root = prepare_regions(dataset, split, self.region_network)
        return CaptionTokens(dataset, split, captioned.language, self.tokenizer)

    def pairs_of(self, sets: Sequence[LanguageSet], captions_per_image: int, split: str = TRAIN) -> PairItems:
        """Pool the pairs of `sets` by image. Mask and code-switch captions only in the training split."""
        training = split == TRAIN
        pairs = PairItems(
            [self.captions_of(captioned, split) for captioned in sets],
            self.candidates,
            captions_per_image,
            masking=self.masking if training else None,
            switcher=self.code_switching if training else None,
            max_regions=self.max_regions,
            distributions=self.distributions,
            **self.item_options,
        )
        self.candidates.check(pairs, self.trainer.world_size)
        return pairs

    def validation_loader(self) -> DataLoader[Any]:
        """Return a loader of the validation pairs as training steps. Over all processes, each pair occurs once."""
        if self.validation is None:
            raise ValueError("model.selection is best: set data.validation_split to the split to select by")
        count = min(len(self.validation), self.validation_items or len(self.validation))
        size = max(self.batch_size // self.trainer.world_size, 1)
        return self.evaluation_loader(Subset(self.validation, range(count)), size, "validation", self.validation.step)

    # -- search --------------------------------------------------------------------------------------------------------

    def sets_to_search(self) -> list[EvaluationSet]:
        """List the test sets. Sets with the same images share one `RegionItems`."""
        evaluation_sets: list[EvaluationSet] = []
        shared: dict[tuple[Any, ...], RegionItems] = {}
        limit = min(self.max_skipped_fraction, MOST_UNSEARCHED)
        options = {**self.item_options, "max_skipped_fraction": limit}
        max_pieces = self.tokenizer.max_tokens - 2 if self.cut_test_captions else None
        for name, captioned in self.test_sets.items():
            captions = self.captions_of(captioned, TEST)
            images = RegionItems([captions], self.max_regions, first=self.test_images, **options)
            key = (type(captioned.dataset), captioned.dataset.root, images.features.paths, tuple(images.keys))
            images = shared.setdefault(key, images)
            evaluation_sets.append(EvaluationSet(name, images, captions, self.test_captions, max_pieces))
        return evaluation_sets

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return loaders of the images. Images that sets share are read only once."""
        roles: dict[RegionItems, str] = {}
        for test_set in self.evaluation_sets:
            roles.setdefault(test_set.images, f"test {test_set.name}")
        return [
            self.evaluation_loader(images, self.test_batch_size, role, images.collate) for images, role in roles.items()
        ]

    # -- record --------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, dict[str, Any]]:
        described, switcher = super().describe(), self.code_switching
        if switcher is not None and self.training_pairs:
            sets = [captioned for captioned in self.training_sets if captioned.language == switcher.source]
            columns = [self.captions_of(captioned, TRAIN).texts for captioned in sets]
            texts = [texts[number] for texts in columns for number in spread(len(texts), COUNTED_CAPTIONS)]
            described["code-switching (dictionaries)"] = switcher.coverage(texts)
        return described

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        return example_step(self, module.model, size, draw)


class PretrainingData(RegionTextData):
    """Three streams for pre-training: multilingual text, captions with regions, and code-switched captions.

    An item of the training loader is a step of `MultitaskSteps`.

    Args:
        language_alpha: draw languages in proportion to (share of sentences)^alpha; 0 is uniform, which the released
            code writes as -1.
        xmlm_steps, relation_steps: numbers of languages and of caption sets to draw per step. `xmlm_steps: 0` disables
            text.
        text_batch_size, text_groups: rows of a text block over all devices, and groups with independent languages.
        kwargs: see RegionTextData and ShardedDataModule. `languages` selects languages of the text; None uses all.

    Source: [6].
    """

    def __init__(
        self,
        captions: Sequence[LanguageSet],
        tokenizer: XLMRTokenizer,
        text: WikipediaText | None = None,
        language_alpha: NonNegativeFloat = 0.3,
        xmlm_steps: NonNegativeInt = 3,
        relation_steps: PositiveInt = 3,
        text_batch_size: PositiveInt = 192,
        text_groups: PositiveInt = 8,
        bptt: PositiveInt = 128,
        steps_per_epoch: PositiveInt = 1000,
        masking: Masking | None = DEFAULT_MASKING,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, training_sets=captions, **kwargs)
        if xmlm_steps and text is None:
            raise ValueError("data.xmlm_steps is above 0, but data.text is null: set text, or set xmlm_steps to 0")
        if text_batch_size % text_groups:
            raise ValueError(
                f"data.text_batch_size ({text_batch_size}) must be divisible by data.text_groups ({text_groups})"
            )
        if text is not None and self.world is not None:
            self.world.place(text)
        #: None if no step uses text.
        self.text = text if xmlm_steps else None
        self.language_alpha = language_alpha
        self.text_batch_size = text_batch_size
        self.bptt = bptt
        self.schedule = Schedule(
            steps_per_epoch, self.batch_size, xmlm_steps, relation_steps, text_groups=text_groups, seed=self.seed
        )
        self.masking = masking
        #: Text and number of sentences of each language; `setup` reads them for training.
        self.streams: list[LanguageStream] = []
        self.sentences: dict[str, int] = {}

    def read_training(self) -> None:
        self.training_pairs = [
            self.pairs_of([captioned], captioned.captions_per_image) for captioned in self.training_sets
        ]
        for pairs in self.training_pairs:
            if len(pairs) < self.batch_size:
                raise ValueError(
                    f"data.batch_size ({self.batch_size}) is larger than the {len(pairs)} captions of "
                    f"{pairs.listing.name} that an epoch shows; lower it, or raise captions_per_image"
                )
        if self.text is not None:
            # Open all languages first, so that a missing one fails before hours of tokenizing.
            texts = {language: self.text.sentences(TRAIN, language) for language in self.languages}
            self.sentences = {language: len(lines) for language, lines in texts.items()}
            rows = self.text_batch_size // self.schedule.text_groups
            tokens = [stream_tokens(lines, self.tokenizer, file_identity(lines.path)) for lines in texts.values()]
            self.streams = [LanguageStream(stream, rows, self.bptt, self.tokenizer.end_id) for stream in tokens]

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        for name in ("batch_size", "text_batch_size"):
            if getattr(self, name) % trainer.world_size:
                raise ValueError(
                    f"data.{name} ({getattr(self, name)}) must be divisible by the number of processes "
                    f"({trainer.world_size})"
                )
        steps = MultitaskSteps(
            self.streams,
            language_probabilities(list(self.sentences.values()), self.language_alpha),
            self.training_pairs,
            self.schedule,
            self.tokenizer,
            self.masking,
            trainer.global_rank,
            trainer.world_size,
        )
        for number, pairs in enumerate(self.training_pairs):
            self.note_training_set(f"training {number}", pairs)
            if self.num_workers:
                pairs.fill_cache()
        return self.step_loader(steps)

    def describe(self) -> dict[str, dict[str, Any]]:
        described = super().describe()
        if self.streams:
            described["training text (wikipedia)"] = {
                "version": f"{TRAIN}; {','.join(self.sentences)}",
                "samples": sum(self.sentences.values()),
                "tokens": sum(len(stream.tokens) for stream in self.streams),
                "skipped": 0,
                "skipped_names": [],
            }
        return described


class RetrievalData(RegionTextData):
    """Captioned images for fine-tuning and search, in one language or several pooled languages. Masks nothing.

    Args:
        train_sets: sets to fine-tune on. An image's captions from several sets are pooled.
        captions_per_image: captions to draw per image in every epoch; see `PairItems`.
        kwargs: see RegionTextData and ShardedDataModule. To embed texts in a language later, set `languages` as in
            pre-training.

    Source: [8] and [9].
    """

    def __init__(
        self,
        tokenizer: XLMRTokenizer,
        sets: Mapping[str, LanguageSet | None],
        train_sets: Sequence[str] = (),
        captions_per_image: PositiveInt = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, sets, **kwargs)
        self.training_sets = self.chosen_sets(train_sets, "train_sets")
        self.captions_per_image = captions_per_image

    def read_training(self) -> None:
        if not self.training_sets:
            raise ValueError("data.train_sets: name at least one set to fine-tune on")
        self.training_pairs = [self.pairs_of(self.training_sets, self.captions_per_image)]

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self.training_pairs[0], collate_fn=self.training_pairs[0].step)


def check_sizes(encoder: M3PEncoder, data: RegionTextData) -> None:
    """Check that the encoder can read the data. Call this after `setup`."""
    longest = max([data.tokenizer.max_tokens, *(test_set.tokens.shape[1] for test_set in data.evaluation_sets)])
    for name, size, needed in (
        ("vocabulary_size", encoder.vocabulary_size, data.tokenizer.vocabulary_size),
        ("languages", encoder.languages, len(data.languages)),
        ("positions", encoder.positions, data.max_regions + longest),
    ):
        if needed > size:
            raise ValueError(f"model.model.encoder.{name} is {size}, but the data need {needed}: raise it")
    for items in (*data.training_pairs, *(test_set.images for test_set in data.evaluation_sets)):
        if items.features.feature_size != encoder.feature_dim:
            raise ValueError(
                f"region features of {items.listing.name} have {items.features.feature_size} dimensions, "
                f"but model.model.encoder.feature_dim is {encoder.feature_dim}: set it to the same number"
            )
