"""Retrieval with a cross-encoder: scores of all pairs of images and captions, and their recalls.

There are no separate towers, so 1,000 images and 5,000 captions need five million forward passes per language. Regions
are embedded once per image, captions of similar length share a batch, the last block computes only the position that
the match head reads, processes share the work, and an interrupted evaluation resumes.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from common.data.media import MediaError, read_image
from common.encoders.checkpoint_files import read_checkpoint, write_torch
from common.errors import STOP
from common.memory.collective import rank, world_size
from common.metrics.gathering import RowsOncePerSample, gather_rows
from common.metrics.retrieval import owner_rows, score_retrieval
from papers.m3p.captions import CaptionTokens, pad_captions
from papers.m3p.encoder import M3P, similar_lengths
from papers.m3p.pairs import CaptionSet, RegionItems


class EvaluationSet:
    """Images and captions to search, in one language; sets may share images.

    Args:
        each: the first so many captions of each image; None for all.
        longest: longest caption with its boundary tokens; None for the longest of all.

    Shapes:
        numbers int64 [M] of the captions in `texts`; owner int64 [M], positions of their images
        tokens int64 [M, W]; token_mask bool [M, W]
    """

    def __init__(
        self,
        name: str,
        source: CaptionSet,
        split: str,
        images: RegionItems,
        captions: CaptionTokens,
        each: int | None = None,
        longest: int | None = None,
    ) -> None:
        self.name = name
        self.source = source
        self.split = split
        self.images = images
        self.texts = captions.texts
        image_of = {key: image for image, key in enumerate(images.pictures.keys)}
        starts = captions.captions.captions.starts.tolist()
        chosen = [
            (number, image_of[key])
            for row, key in enumerate(captions.captions.keys)
            if key in image_of
            for number in range(starts[row], starts[row + 1])[:each]
        ]
        self.numbers, self.owner = torch.tensor(chosen).T.contiguous()
        width = min(captions.longest() + 2, longest or sys.maxsize)
        pieces = [captions.pieces(number)[: width - 2] for number, _ in chosen]
        tokens, lengths = pad_captions(pieces, captions.tokenizer, width)
        self.tokens = torch.from_numpy(tokens)
        self.token_mask = torch.from_numpy(np.arange(width) < lengths[:, None] + 2)

    def picture(self, image: int) -> npt.NDArray[np.uint8] | None:
        """An image by its `index`, uint8 [H, W, 3]; None if only its regions exist."""
        try:
            return np.asarray(read_image(self.source.dataset.image_path(self.images.pictures.keys[image], self.split)))
        except MediaError:
            return None


# -- scores of all pairs -----------------------------------------------------------------------------------------------

#: Seconds between two saves of partial scores.
SAVE_EVERY = 60.0


@dataclass(frozen=True)
class Gallery:
    """N images and M captions to search, as inputs of the encoder's first block; the captions are on the host.

    Shapes:
        image [N, R, D]; image_mask bool [N, R]; tokens int64 [M, W]; token_mask bool [M, W]
    """

    image: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor


def score_pairs(
    model: M3P, gallery: Gallery, tokens_per_batch: int, partial: Path | None = None, title: str = ""
) -> Tensor:
    """Scores [N, M] float32 of all pairs, on the host of every process; all need the same gallery.

    Args:
        tokens_per_batch: regions and tokens per batch, over all its pairs.
        partial: file of this process for partial scores, to resume an interrupted run.
    """
    tiles = similar_lengths(gallery.token_mask)[rank() :: world_size()]
    # What the scores depend on.
    sums = [value.detach().double().sum().cpu() for value in (*model.parameters(), gallery.image)]
    parts = [torch.stack(sums), gallery.tokens, gallery.token_mask, *tiles]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    known = read_checkpoint(partial) if partial is not None and partial.is_file() else {}
    done = [tile.clone() for tile in known["tiles"]] if known.get("digest") == digest else []
    saved = time.monotonic()
    shown = bool(title) and rank() == 0
    for number in track(range(len(done), len(tiles)), title, transient=True, disable=not shown):
        captions = gallery.tokens[tiles[number]], gallery.token_mask[tiles[number]]
        done.append(model.score_tile(gallery.image, gallery.image_mask, *captions, tokens_per_batch).cpu())
        stopped = STOP.received is not None
        due = stopped or time.monotonic() - saved > SAVE_EVERY or len(done) == len(tiles)
        if partial is not None and due:
            write_torch(partial, {"digest": digest, "tiles": done})
            saved = time.monotonic()
        STOP.check()
    # Captions are rows, because processes may have different numbers of them.
    rows = torch.cat([torch.zeros(0, len(gallery.image)), *(tile.T for tile in done)])
    columns = torch.cat([torch.zeros(0, dtype=torch.int64), *tiles])
    rows, columns = gather_rows(rows), gather_rows(columns)
    return torch.empty_like(rows).index_copy_(0, columns, rows).T


def exactly(caption_image: Tensor, captions_per_image: int) -> Tensor:
    """Columns [N * k] with exactly k captions per image: the first k, or all of them repeated.

    The released code chooses k at random. The best K results count all copies of a caption. `caption_image` int64 [M]
    is the row of each caption's image and contains every row.

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
    """Scores [N, M]; `caption_image` [M] is the row of each caption's image, `caption` and `image` are numbers."""

    set: EvaluationSet
    scores: Tensor
    caption_image: Tensor
    caption: Tensor
    image: Tensor


class RetrievalTest:
    """Collects the images of all test sets, scores them with the captions and computes the recalls.

    Args:
        captions_per_image: captions counted per image, see `exactly`; None uses them unchanged.
        by_means: compare mean word and region embeddings, for a model that is only warm-started.

    Source: [10].
    """

    def __init__(self, tokens_per_batch: int, captions_per_image: int | None, by_means: bool = False) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.captions_per_image = captions_per_image
        self.by_means = by_means

    def reset(self, module: Any) -> None:
        """Begin a test of `module.model` on the sets of its data module."""
        self.module = module
        self.sets: list[EvaluationSet] = module.trainer.datamodule.searched
        self.rows = {one.images: RowsOncePerSample("start", "region_mask") for one in self.sets}
        self.found: list[Searched] = []

    def update(self, batch: Mapping[str, Tensor], loader: int) -> None:
        encoder, inputs = self.module.model.encoder, (batch["regions"], batch["boxes"], batch["region_mask"])
        start = encoder.mean_of_regions(*inputs)[:, None] if self.by_means else encoder.start_regions(*inputs)
        list(self.rows.values())[loader].update(batch["index"], start=start, region_mask=batch["region_mask"])

    def compute(self) -> dict[str, Tensor]:
        """Recalls in percent, `<set>_mr`, `<set>_t2i_r1` etc., and `non_english_mr`; all processes must call this."""
        device = self.module.device
        rows = {items: one.compute(device) for items, one in self.rows.items()}
        folder = Path(self.module.trainer.default_root_dir) / "partial_scores"
        results: dict[str, Tensor] = {}
        for one in self.sets:
            image, inputs = rows[one.images]
            image = image.cpu()
            owner, known = owner_rows(image, one.owner)  # the features of an image may be broken
            gallery = Gallery(inputs["start"], inputs["region_mask"], one.tokens[known], one.token_mask[known])
            scores = self._scores(gallery, one.name, folder / f"{one.name}.{rank()}.pt")
            self.found.append(Searched(one, scores, owner, one.numbers[known], image))
            if self.captions_per_image is not None:
                columns = exactly(owner, self.captions_per_image)
                scores, owner = scores[:, columns], owner[columns]
            recalls = score_retrieval(scores, owner)
            results |= {f"{one.name}_{key}": value for key, value in recalls.items() if "mean" not in key}
        for path in folder.glob(f"*.{rank()}.pt"):
            path.unlink()
        others = [results[f"{one.name}_mr"] for one in self.sets if one.source.language != "en"]
        if others:
            results["non_english_mr"] = torch.stack(others).mean()
        return {name: value.float().to(device) for name, value in results.items()}

    def _scores(self, gallery: Gallery, name: str, partial: Path) -> Tensor:
        model, trainer, device = self.module.model, self.module.trainer, self.module.device
        if self.by_means:
            text = model.encoder.mean_of_words(gallery.tokens.to(device), gallery.token_mask.to(device))
            return (F.normalize(gallery.image[:, 0], dim=1) @ F.normalize(text, dim=1).T).cpu()
        title = f"  scoring {name}" if trainer.progress_bar_callback is not None else ""
        with trainer.strategy.precision_plugin.forward_context():
            return score_pairs(model, gallery, self.tokens_per_batch, partial, title)
