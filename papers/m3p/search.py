"""Retrieval with a cross-encoder: scores of all pairs of images and captions, and their recalls.

There are no separate towers, so 1,000 images and 5,000 captions need five million forward passes per language. To save
time, regions are embedded once per image and words once per caption, captions of similar length share a batch, the last
block computes only the position that the match head reads, processes share the work, and an interrupted evaluation
resumes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from common.data.item_dataset import Sample
from common.data.media import MediaError, read_image
from common.data.text import XLMRTokenizer
from common.encoders.checkpoint_files import CheckpointError, read_checkpoint, write_torch
from common.memory.collective import rank, world_size
from common.metrics.gathering import RowsOncePerSample, gather_rows
from common.metrics.retrieval import owner_rows, score_retrieval
from papers.m3p.captions import CaptionReader, CaptionTokens, pad_captions
from papers.m3p.encoder import CAPTIONS_TOGETHER, M3P, similar_lengths
from papers.m3p.pairs import CaptionSet, Pictures, RegionItems, find_pictures

# -- what is searched --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SearchLimits:
    """The first so many images of a set, and captions of each image; None for all.

    `cut` limits captions to the tokenizer's `max_tokens`; the released code only cuts those of training.
    """

    images: int | None = None
    captions: int | None = None
    cut: bool = False


class CaptionItems(Dataset[Sample]):
    """Captions of some pictures, to find."""

    def __init__(
        self, tokens: CaptionTokens, pictures: Pictures, tokenizer: XLMRTokenizer, limits: SearchLimits
    ) -> None:
        self.tokens = tokens
        self.tokenizer = tokenizer
        longest = tokens.longest() + 2
        self.width = min(longest, tokenizer.max_tokens) if limits.cut else longest
        image_of = {key: image for image, key in enumerate(pictures.keys)}
        starts = tokens.captions.captions.starts.tolist()
        chosen = [
            (number, image_of[key])
            for row, key in enumerate(tokens.captions.keys)
            if key in image_of
            for number in range(starts[row], starts[row + 1])[: limits.captions]
        ]
        #: Caption numbers in their set, and positions of their images.
        self.numbers, self.images = np.array(chosen, dtype=np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: int) -> Sample:
        return {
            "pieces": self.tokens.pieces(int(self.numbers[item]))[: self.width - 2],
            "index": item,
            "image_index": int(self.images[item]),
        }

    def text(self, item: int) -> str:
        return self.tokens.texts[int(self.numbers[item])]

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Batch of captions: `tokens`, `token_mask` [B, W], `index` and `image_index` [B]; W is constant."""
        tokens, lengths = pad_captions([sample["pieces"] for sample in samples], self.tokenizer, self.width)
        return {
            "tokens": torch.from_numpy(tokens),
            "token_mask": torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None] + 2),
            "index": torch.tensor([sample["index"] for sample in samples]),
            "image_index": torch.tensor([sample["image_index"] for sample in samples]),
        }


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Images and captions to search, in one language; sets may share images."""

    name: str
    language: str
    images: RegionItems
    captions: CaptionItems
    path_of: Callable[[str], Path]

    def picture(self, image: int) -> npt.NDArray[np.uint8] | None:
        """An image by its `index`, uint8 [H, W, 3]; None if only its regions exist."""
        try:
            return np.asarray(read_image(self.path_of(self.images.pictures.keys[image])))
        except MediaError:
            return None


def evaluation_sets(
    sets: Mapping[str, CaptionSet],
    split: str,
    captions: CaptionReader,
    tokenizer: XLMRTokenizer,
    limits: SearchLimits,
    max_missing: float,
    **options: Any,
) -> list[EvaluationSet]:
    """Sets of captioned images to search; `max_missing` is the largest fraction of images without regions."""
    found: list[EvaluationSet] = []
    images_of: dict[tuple[Any, ...], RegionItems] = {}
    for name, one in sets.items():
        dataset: Any = one.dataset
        pictures = find_pictures([one], split, captions, max_missing, limits.images)
        key = (type(dataset), dataset.root, dataset.regions(split).paths, tuple(pictures.keys))
        if key not in images_of:
            images_of[key] = RegionItems(pictures, **options)
        items = CaptionItems(captions(dataset, split, one.language), pictures, tokenizer, limits)
        path_of = partial(dataset.image_path, split=split)
        found.append(EvaluationSet(name, one.language, images_of[key], items, path_of))
    return found


def loader_roles(sets: Sequence[EvaluationSet]) -> dict[RegionItems | CaptionItems, str]:
    """The items of each test loader, in order, and their role; equal images are read once."""
    roles: dict[RegionItems | CaptionItems, str] = {}
    for one in sets:
        roles.setdefault(one.images, f"test {one.name}")
        roles[one.captions] = f"test captions {one.name}"
    return roles


# -- scores of all pairs -----------------------------------------------------------------------------------------------

#: Seconds between two saves of partial scores.
SAVE_EVERY = 60.0


@dataclass(frozen=True)
class Gallery:
    """N images and M captions to search, as inputs of the encoder's first block.

    `caption_image` is the row of each caption's image; `caption` and `image_number` are the numbers in the data set.

    Shapes:
        image [N, R, D]; image_mask bool [N, R]; tokens int64 [M, W]; token_mask bool [M, W]
        caption_image, caption int64 [M]; image_number int64 [N]
    """

    image: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    caption_image: Tensor
    caption: Tensor
    image_number: Tensor


def score_pairs(
    model: M3P,
    gallery: Gallery,
    tokens_per_batch: int,
    partial: Path | None = None,
    title: str = "",
    captions_together: int = CAPTIONS_TOGETHER,
) -> Tensor:
    """Scores [N, M] float32 of all pairs, on the host of every process; all need the same gallery.

    Args:
        tokens_per_batch: regions and tokens per batch, over all its pairs.
        partial: file of this process for partial scores, to resume an interrupted run.
    """
    tiles = similar_lengths(gallery.token_mask, captions_together)[rank() :: world_size()]
    mark = _mark(model, gallery, captions_together)
    done = _noted(partial, mark) if partial is not None else {}
    saved = time.monotonic()
    shown = bool(title) and rank() == 0
    for number in track(range(len(tiles)), title, transient=True, disable=not shown):
        if number in done:
            continue
        columns = tiles[number]
        captions = gallery.tokens[columns], gallery.token_mask[columns]
        done[number] = model.score_tile(gallery.image, gallery.image_mask, *captions, tokens_per_batch).cpu()
        if partial is not None and time.monotonic() - saved > SAVE_EVERY:
            note(partial, mark, done)
            saved = time.monotonic()
    if partial is not None:
        note(partial, mark, done)
    # Captions are rows, because processes may have different numbers of them.
    device = gallery.image.device
    rows = torch.cat([torch.zeros(0, len(gallery.image)), *(done[number].T for number in range(len(tiles)))])
    columns = torch.cat([torch.zeros(0, dtype=torch.int64), *tiles])
    rows, columns = gather_rows(rows.to(device)).cpu(), gather_rows(columns.to(device)).cpu()
    return torch.empty_like(rows).index_copy_(0, columns, rows).T


def _mark(model: M3P, gallery: Gallery, captions_together: int) -> str:
    """Fingerprint of the model and the gallery that the scores depend on."""
    digest = hashlib.sha256(f"{rank()} {world_size()} {captions_together}".encode())
    sums = [parameter.double().sum() for parameter in model.parameters()]
    for tensor in (torch.stack(sums), gallery.image.double().sum(), gallery.tokens, gallery.token_mask):
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def note(path: Path, mark: str, done: Mapping[int, Tensor]) -> None:
    write_torch(path, {"mark": mark, "tiles": dict(done)})


def _noted(path: Path, mark: str) -> dict[int, Tensor]:
    """Tiles saved by an interrupted run with the same mark; a damaged file counts as empty."""
    if not path.is_file():
        return {}
    try:
        content = read_checkpoint(path)
    except CheckpointError as error:
        rank_zero_warn(f"{error}; its pairs are scored again")
        return {}
    if content.get("mark") != mark:
        return {}
    return {number: tile.clone() for number, tile in content["tiles"].items()}


def exactly(caption_image: Tensor, captions_per_image: int) -> Tensor:
    """Columns [N * k] with exactly k captions per image: the first k, or all of them repeated.

    The released code also makes exactly k, by random choice. A single French or Czech caption is in its gallery five
    times, and the best K results count all copies. `caption_image` int64 [M] is each caption's image row and contains
    every row.

    Source: [8] and [10].
    """
    order = caption_image.argsort(stable=True)
    counts = caption_image.bincount()
    starts = counts.cumsum(0) - counts
    described = counts.nonzero()[:, 0]
    offset = torch.arange(captions_per_image)[None] % counts[described, None]
    return order[(starts[described, None] + offset).flatten()]


@dataclass
class Searched:
    """Results of a test set: scores [N, M] of images by captions, recalls in percent, gallery without regions."""

    set: EvaluationSet
    scores: Tensor
    gallery: Gallery
    metrics: dict[str, Tensor]


class RetrievalTest:
    """Collects images and captions of all test sets, scores all pairs and computes the recalls.

    Args:
        captions_per_image: captions counted per image, see `exactly`; None uses them unchanged.
        by_means: compare mean word and region embeddings, for a model that is only warm-started.

    Source: [10].
    """

    def __init__(self, tokens_per_batch: int, captions_per_image: int | None, by_means: bool = False) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.captions_per_image = captions_per_image
        self.by_means = by_means
        self.found: list[Searched] = []

    def reset(self, module: Any) -> None:
        self.module = module
        self.sets: list[EvaluationSet] = module.trainer.datamodule.searched
        self.images = {one.images: RowsOncePerSample("start", "mask") for one in self.sets}
        self.captions = {one.captions: RowsOncePerSample("tokens", "mask", "image_index") for one in self.sets}
        self.loaders: list[Any] = list(loader_roles(self.sets))
        self.found = []

    def update(self, model: M3P, batch: Mapping[str, Tensor], loader: int) -> None:
        items = self.loaders[loader]
        if items in self.images:
            regions, boxes, mask = batch["regions"], batch["boxes"], batch["region_mask"]
            if self.by_means:
                start = model.encoder.mean_of_regions(regions, boxes, mask)[:, None]
            else:
                start = model.encoder.start_regions(regions, boxes, mask)
            self.images[items].update(batch["index"], start=start, mask=mask)
        else:
            self.captions[items].update(
                batch["index"], tokens=batch["tokens"], mask=batch["token_mask"], image_index=batch["image_index"]
            )

    def compute(self, model: M3P) -> dict[str, Tensor]:
        """Recalls in percent, `<set>_mr`, `<set>_t2i_r1` etc., and `non_english_mr`; all processes must call this."""
        images = {items: rows.compute(self.module.device) for items, rows in self.images.items()}
        folder = Path(self.module.trainer.default_root_dir) / "partial_scores"
        partials = [folder / f"{one.name}.{rank()}.pt" for one in self.sets]
        for one, noted in zip(self.sets, partials):
            gallery = self._gallery(images[one.images], self.captions[one.captions])
            scores = self._means(model, gallery) if self.by_means else self._score(model, gallery, one, noted)
            metrics = self._recalls(scores, gallery)
            without_images = replace(gallery, image=gallery.image[:0])
            self.found.append(Searched(one, scores, without_images, metrics))
        for noted in partials:
            noted.unlink(missing_ok=True)
        results = {f"{one.set.name}_{key}": value for one in self.found for key, value in one.metrics.items()}
        others = [one.metrics["mr"] for one in self.found if one.set.language != "en"]
        if others:
            results["non_english_mr"] = torch.stack(others).mean()
        return {name: value.float().to(self.module.device) for name, value in results.items()}

    def _score(self, model: M3P, gallery: Gallery, one: EvaluationSet, partial: Path) -> Tensor:
        trainer = self.module.trainer
        title = f"  scoring {one.name}" if trainer.progress_bar_callback is not None else ""
        with trainer.strategy.precision_plugin.forward_context():
            return score_pairs(model, gallery, self.tokens_per_batch, partial, title)

    def _means(self, model: M3P, gallery: Gallery) -> Tensor:
        device = self.module.device
        text = model.encoder.mean_of_words(gallery.tokens.to(device), gallery.token_mask.to(device))
        return (F.normalize(gallery.image[:, 0], dim=1) @ F.normalize(text, dim=1).T).cpu()

    def _gallery(self, images: tuple[Tensor, dict[str, Tensor]], captions: RowsOncePerSample) -> Gallery:
        number, image = images
        index, caption = captions.compute(self.module.device)
        number, index = number.cpu().long(), index.cpu().long()
        row, known = owner_rows(number, caption["image_index"].cpu().long())  # the features of an image may be broken
        return Gallery(
            image["start"], image["mask"], caption["tokens"].cpu()[known], caption["mask"].cpu()[known], row,
            index[known], number,
        )  # fmt: skip

    def _recalls(self, scores: Tensor, gallery: Gallery) -> dict[str, Tensor]:
        owner = gallery.caption_image
        if self.captions_per_image is not None:
            columns = exactly(owner, self.captions_per_image)
            scores, owner = scores[:, columns], owner[columns]
        return {name: value for name, value in score_retrieval(scores, owner).items() if "mean" not in name}
