"""Data of XMC-GAN ([2] and [7]): images with captions, as tokens or BERT features. The miniature uses COCO's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, StackDataset

from common.data.annotations import ImageAnnotations
from common.data.datasets.coco import COCO
from common.data.datasets.folder import FolderOfImages
from common.data.datasets.localized_narratives import LocalizedNarratives
from common.data.image_transforms import SquashTransform
from common.data.images import ImageItems, require_captions
from common.data.item_dataset import Item, Sample
from common.data.listing import Listing
from common.data.sequences import Rows
from common.data.text import CaptionTokenizer
from common.data.text_features import (
    FeaturesError,
    FeatureStore,
    SentencePool,
    StoredFeatures,
    encode_texts,
)
from common.data.worlds.base import World
from common.data.worlds.two_sides import TwoSidesWorld
from common.errors import StageError
from common.protocols.captions import EXAMPLE_WORDS
from common.training.data_module import ShardedDataModule
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.types import Fraction, PositiveInt

Items = Literal["images", "captions"]
Role = Literal["train", "test", "reference"]


#: For each item: the row of its image in the annotations, the number of its first caption, and its number of captions.
ITEM = np.dtype([("image", "<i8"), ("first", "<i8"), ("count", "<i8")])
Table = npt.NDArray[np.void]


def item_table(captions: Rows[str], items: Items, captions_per_image: int) -> Table:
    """List a split's items: one per image or one per caption, as `items` says.

    Use an image's first `captions_per_image` captions.
    """
    count = np.minimum(np.diff(captions.starts), captions_per_image)
    table = np.zeros(len(captions), ITEM)
    table["image"], table["first"], table["count"] = np.arange(len(captions)), captions.starts[:-1], count
    if items == "captions":
        table = np.repeat(table, count)
        table["first"] += np.arange(len(table)) - np.repeat(np.cumsum(count) - count, count)
        table["count"] = 1
    return table


class TextToImageItems(ImageItems):
    """Items of an image and a caption: `image` float32 [3, S, S] in [0, 1], and `caption`, the caption's number, int64.

    Each visit draws the caption uniformly from (seed, epoch, item).

    Source: [2.5].
    """

    def __init__(self, listing: Listing, table: Table, transform: SquashTransform, **options: Any) -> None:
        super().__init__(listing, transform, **options)
        self.table = table

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        sample = super().read(item, rng)
        _, first, count = self.table[item.file].item()
        return {**sample, "caption": torch.tensor(first + int(rng.integers(count)))}


@dataclass(frozen=True)
class Collate:
    """Makes batches of images with features of their captions, or with tokens if there is no `store`."""

    captions: Rows[str]
    tokenizer: CaptionTokenizer
    store: FeatureStore | None
    pool: SentencePool

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        names = ("image", "index", "caption", "skipped")
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in names if name in samples[0]}
        numbers = batch["caption"].numpy()
        if self.store is None:
            texts = [self.captions.column[number] for number in numbers.tolist()]
            return batch | dict(zip(("tokens", "length"), encode_texts(texts, self.tokenizer)))
        return batch | dict(zip(("words", "sentence", "length"), self.store.read(numbers, self.pool)))


class TextToImageData(ShardedDataModule):
    """Images with captions, to train and measure XMC-GAN.

    Args:
        tokenizer: `max_tokens` is T. A tokenizer without a vocabulary learns one from the training captions.
        text_features: store of BERT features; None makes batches of tokens, for a text encoder in the model.
        sentence_pool: how to pool a stored sentence, see `common.data.text_features.pool_sentence`.
        image_size: S, side of the square to which images are resized, ignoring their aspect ratio.
        flip: probability of a horizontal flip; "left" and "right" in captions are not swapped.
        official_quirks: like the official code, also flip images in evaluation, and repeat images if there are fewer
            than `reference_samples`.
        minibatches: minibatches per training batch; each discriminator step uses one.
        items: an epoch shows each image once (`images`), or each caption once (`captions`, Localized Narratives).
        test_samples: number of (image, caption) pairs to generate from; None for each item once.
        reference_samples: number of real images to compare with; None for all. Items have a fixed shuffled order: first
            the reference, then the test samples. The order repeats, since Localized Narratives have fewer than 30,000.
        batch_size: images in a minibatch, over all devices.
        test_batch_size: images per test step, per device.
        dataset, world, kwargs: see ShardedDataModule; test data don't depend on `seed`.

    Batches:
        `image` float32 [n, 3, S, S] in [0, 1]. All int64 [n]: `index`, the item; `skipped`, above 0 if another item
        replaces a broken file; `caption`, the caption's number; `length`, its number of tokens. Captions are either
        `tokens` int64 [n, T], or `words` float32 [n, T, E] and `sentence` float32 [n, E]. In training, n is
        `minibatches` times this device's share of a minibatch.

    Source: [2], [6.1], [7] and [9.1].
    """

    def __init__(
        self,
        dataset: COCO | LocalizedNarratives | FolderOfImages,
        tokenizer: CaptionTokenizer,
        world: World | None = None,
        text_features: StoredFeatures | None = None,
        sentence_pool: SentencePool = "official",
        image_size: PositiveInt = 256,
        flip: Fraction = 0.5,
        official_quirks: bool = True,
        minibatches: PositiveInt = 2,
        items: Items = "images",
        captions_per_image: PositiveInt = 5,
        split: str = "train",
        test_split: str = "val",
        test_caption: Literal["random"] = "random",
        test_samples: PositiveInt | None = 30000,
        reference_samples: PositiveInt | None = 30000,
        batch_size: PositiveInt = 56,
        test_batch_size: PositiveInt = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, world, batch_size=batch_size, **kwargs)
        self.tokenizer = tokenizer
        self.text_features = text_features
        self.sentence_pool: SentencePool = sentence_pool
        self.image_size = image_size
        self.transform = SquashTransform(image_size, flip, flip if official_quirks else 0.0)
        self.official_quirks = official_quirks
        self.minibatches = minibatches
        self.items: Items = items
        self.captions_per_image = captions_per_image
        self.split = split
        self.test_split = test_split
        self.test_samples = test_samples
        self.reference_samples = reference_samples
        self.test_batch_size = test_batch_size

    def setup(self, stage: str) -> None:
        self.listings: dict[str, Listing] = {}
        self.annotations: dict[str, ImageAnnotations] = {}
        for split in (self.split, self.test_split):
            self.listings[split] = listing = self.dataset.listing(split)
            self.annotations[split] = self.dataset.annotations(split, listing)
            require_captions(listing, self.annotations[split])
        self.tokenizer.prepare(text for texts in self.annotations[self.split].captions for text in texts)
        # Open the stores of both splits now, so that a missing store fails before days of training.
        self.collate = {
            split: Collate(read.captions, self.tokenizer, self._store(split), self.sentence_pool)
            for split, read in self.annotations.items()
        }

    def _store(self, split: str) -> FeatureStore | None:
        if self.text_features is None:
            return None
        try:
            return self.text_features.open(self.dataset.name, split, self.annotations[split].captions, self.tokenizer)
        except FeaturesError as error:
            raise FeaturesError(
                f"data.text_features: {error}. Compute it once with `assemble data xmc_gan --text-features`, "
                "or set data.text_features to null and give the model a text_encoder"
            ) from None

    def split_of(self, role: Role) -> str:
        return self.split if role == "train" else self.test_split

    def items_of(self, role: Role) -> tuple[Listing, Table]:
        """Return the listing and the item table of a role. Call this after `setup`."""
        listing, captions = self.listings[self.split_of(role)], self.annotations[self.split_of(role)].captions
        table = item_table(captions, self.items, self.captions_per_image)
        if role == "train" and self.items == "images":
            return listing, table
        if role != "train":
            order = np.random.default_rng(0).permutation(len(table))
            first = 0 if role == "reference" else len(order[: self.reference_samples])
            count = (self.reference_samples if role == "reference" else self.test_samples) or len(order)
            if role == "reference" and not self.official_quirks:
                count = min(count, len(order))
            table = table[order[(first + np.arange(count)) % len(order)]]
        return listing.subset(table["image"]), table

    # -- loaders -------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        images = TextToImageItems(*self.items_of("train"), self.transform, training=True, **self.item_options)
        return self.training_loader(images, self.collate[self.split], batches_at_once=self.minibatches)

    def test_dataloader(self) -> DataLoader[Any]:
        options = {**self.item_options, "seed": 0}
        images = TextToImageItems(*self.items_of("test"), self.transform, training=False, **options)
        return self.evaluation_loader(images, self.test_batch_size, collate_fn=self.collate[self.test_split])

    def reference_loader(self) -> DataLoader[Any]:
        """Return a loader, over all ranks, of the real images to compare with: `image` and `index`."""
        options = {**self.item_options, "seed": 1}
        images = ImageItems(self.items_of("reference")[0], self.transform, training=False, **options)
        return self.evaluation_loader(images, self.test_batch_size, "reference")

    @property
    def caption_count(self) -> int:
        """Number of captions in the test split; `caption` in test batches is below it."""
        return len(self.annotations[self.test_split].captions.column)

    def caption_loader(self, numbers: Sequence[int]) -> DataLoader[Any]:
        """Return a loader of test batches without `image`, over all ranks. `index` is the position in `numbers`."""
        columns: dict[str, Any] = {"index": torch.arange(len(numbers)), "caption": torch.as_tensor(numbers)}
        collate = self.collate[self.test_split]
        return self.evaluation_loader(StackDataset(**columns), self.test_batch_size, "captions", collate_fn=collate)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        """Make random minibatches for one iteration, `size` per device, with captions of full length; see `Example`."""
        count, length = self.minibatches * size, self.tokenizer.max_tokens
        batch = {
            "image": draw.uniform(count, 3, self.image_size, self.image_size),
            "index": torch.arange(count),
            "length": torch.full((count,), length),
        }
        if self.text_features is None:
            batch["tokens"] = draw.integers(*EXAMPLE_WORDS, count, length)
        else:
            width = module.generator.sentence.in_features
            batch |= {"words": draw.normal(count, length, width), "sentence": draw.normal(count, width)}
        narratives = getattr(self.dataset, "published_narratives", {}) if self.items == "captions" else {}
        items = narratives.get(self.split, self.dataset.published_count(self.split))
        # The vocabulary has only the ids above, because there are no captions.
        facts = {"vocabulary_size": EXAMPLE_WORDS[1]}
        return Example(batch, batches_of_epoch(items, self.batch_size * self.minibatches), facts)

    # -- captions and what is known of them ----------------------------------------------------------------------------

    @property
    def vocabulary_size(self) -> int:
        return self.tokenizer.vocabulary_size

    def texts(self, role: Role, captions: Sequence[int] | Tensor) -> list[str]:
        column = self.annotations[self.split_of(role)].captions.column
        return [column[int(number)] for number in captions]

    def attributes(self, role: Role) -> Tensor:
        """Return attributes int64 [N, A] (left thing, right thing, ground) by `index`. Needs a two-sided world."""
        if not isinstance(self.world, TwoSidesWorld) or not hasattr(self, "annotations"):
            raise StageError("pictures have no attributes: set data.world to two_objects or emoji_scenes")
        every = self.world.attributes_of(self.annotations[self.split_of(role)])
        return torch.from_numpy(every[self.items_of(role)[1]["image"]])

    def describe(self) -> dict[str, dict[str, Any]]:
        described = super().describe()
        for name, entry in described.items():
            split = self.split if name.startswith("training") else self.test_split
            entry["annotations"] = self.annotations[split].fingerprint()[:16]
            if (store := self.collate[split].store) is not None:
                entry["text_features"] = str(store.about["bert"])[:16]
        return described
