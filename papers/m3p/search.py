"""Retrieval with a cross-encoder: scores all pairs of images and captions, and computes recalls.

The encoder reads every pair together, so 1,000 images and 5,000 captions need five million forward passes per language.
To save time, each image's regions are embedded once, captions of similar length share a batch, the last block computes
only the position that the match head reads, processes share the work, and an interrupted evaluation resumes.
"""

from __future__ import annotations

import hashlib
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

from common.data.media import MediaError, read_image
from common.encoders.checkpoint_files import read_checkpoint, write_torch
from common.errors import STOP
from common.memory.collective import rank, world_size
from common.metrics.gathering import RowsOncePerSample, gather_rows
from common.metrics.retrieval import owner_rows, score_retrieval
from papers.m3p.captions import CaptionPool, CaptionTokens, pad_captions
from papers.m3p.encoder import M3P, similar_lengths
from papers.m3p.images import RegionItems

#: Seconds between two saves of partial scores.
SAVE_EVERY = 60.0


class EvaluationSet:
    """Images and captions to search, in one language. Sets may share images.

    Args:
        each: number of captions per image to use, the first ones; None for all.
        max_pieces: longer captions are cut; None cuts none.

    Shapes:
        numbers int64 [M] of the captions in `texts`; owner int64 [M], positions of their images
        tokens int64 [M, W]; token_mask bool [M, W]
    """

    def __init__(
        self,
        name: str,
        images: RegionItems,
        captions: CaptionTokens,
        each: int | None = None,
        max_pieces: int | None = None,
    ) -> None:
        self.name = name
        self.images = images
        self.dataset, self.split = captions.dataset, captions.split
        self.language = captions.captions.language
        self.texts = captions.texts
        pool = CaptionPool([captions], images.keys)
        chosen = [(int(number), image) for image in range(len(pool)) for number in pool.of(image)[:each]]
        self.numbers, self.owner = torch.tensor(chosen).T.contiguous()
        pieces = [captions.pieces(number)[:max_pieces] for number, _ in chosen]
        self.tokens = pad_captions(pieces, captions.tokenizer)
        self.token_mask = self.tokens != captions.tokenizer.pad_id

    def picture(self, image: int) -> npt.NDArray[np.uint8] | None:
        """Read the picture of an image, uint8 [H, W, 3]. None if the set has regions but no pictures."""
        try:
            return np.asarray(read_image(self.dataset.image_path(self.images.keys[image], self.split)))
        except MediaError:
            return None


def score_pairs(
    model: M3P,
    image: Tensor,
    image_mask: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    tokens_per_batch: int,
    partial: Path | None = None,
    title: str = "",
) -> Tensor:
    """Score all pairs of N images and M captions: float32 [N, M] on the host of every process.

    Args:
        tokens_per_batch: regions and tokens of all pairs in a batch.
        partial: this process's file of partial scores, to resume an interrupted run.

    Shapes:
        image [N, R, D] of `start_regions`; image_mask bool [N, R]
        tokens int64 [M, W]; token_mask bool [M, W]; on the host
    """
    tiles = similar_lengths(token_mask)[rank() :: world_size()]
    # The digest covers all that the scores depend on.
    sums = [value.detach().double().sum().cpu() for value in (*model.parameters(), image)]
    parts = [torch.stack(sums), tokens, token_mask, *tiles]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
    stored = read_checkpoint(partial) if partial is not None and partial.is_file() else {}
    done = [tile.clone() for tile in stored["tiles"]] if stored.get("digest") == digest else []
    saved = time.monotonic()
    shown = bool(title) and rank() == 0
    for number in track(range(len(done), len(tiles)), title, transient=True, disable=not shown):
        captions = tokens[tiles[number]], token_mask[tiles[number]]
        done.append(model.score_tile(image, image_mask, *captions, tokens_per_batch).cpu())
        due = STOP.received is not None or time.monotonic() - saved > SAVE_EVERY or len(done) == len(tiles)
        if partial is not None and due:
            write_torch(partial, {"digest": digest, "tiles": done})
            saved = time.monotonic()
        STOP.check()
    # Gather captions as rows, because processes may have different numbers of captions.
    rows = torch.cat([torch.zeros(0, len(image)), *(tile.T for tile in done)])
    columns = torch.cat([torch.zeros(0, dtype=torch.int64), *tiles])
    rows, columns = gather_rows(rows), gather_rows(columns)
    return torch.empty_like(rows).index_copy_(0, columns, rows).T


def exactly(caption_image: Tensor, captions_per_image: int) -> Tensor:
    """Choose columns [N * k] of the scores, with exactly k captions per image: the first k, or all of them repeated.

    The released code chooses k at random. Copies of a caption count separately among the best K results.
    `caption_image` int64 [M] is the row of each caption's image. Every row must occur.

    Source: [8] and [10].
    """
    order = caption_image.argsort(stable=True)
    counts = caption_image.bincount()
    starts = counts.cumsum(0) - counts
    offset = torch.arange(captions_per_image)[None] % counts[:, None]
    return order[(starts[:, None] + offset).flatten()]


@dataclass
class SearchResult:
    """Scores [N, M]. `caption_image` [M] has each caption's row. `caption` [M] and `image` [N] have item numbers."""

    set: EvaluationSet
    scores: Tensor
    caption_image: Tensor
    caption: Tensor
    image: Tensor


class RetrievalTest:
    """Collects the images of all test sets, scores them with the captions, and computes the recalls.

    Args:
        tokens_per_batch: see `score_pairs`.
        captions_per_image: captions per image, repeated if there are fewer (see `exactly`); None uses all once.

    Source: [10].
    """

    def __init__(self, tokens_per_batch: int, captions_per_image: int | None) -> None:
        self.tokens_per_batch = tokens_per_batch
        self.captions_per_image = captions_per_image

    def reset(self, module: Any) -> None:
        """Begin a test of `module.model` on the test sets of its data module."""
        self.module = module
        self.sets: list[EvaluationSet] = module.trainer.datamodule.evaluation_sets
        self.rows = {test_set.images: RowsOncePerSample("start", "region_mask") for test_set in self.sets}
        self.results: list[SearchResult] = []

    def update(self, batch: Mapping[str, Tensor], loader: int) -> None:
        start = self.start(batch["regions"], batch["boxes"], batch["region_mask"])
        list(self.rows.values())[loader].update(batch["index"], start=start, region_mask=batch["region_mask"])

    def compute(self) -> dict[str, Tensor]:
        """Return recalls in percent: `<set>_mr`, `<set>_t2i_r1`, ..., `non_english_mr`. Call this on all processes."""
        device = self.module.device
        images = {items: rows.compute(device) for items, rows in self.rows.items()}
        folder = Path(self.module.trainer.default_root_dir) / "partial_scores"
        recalls: dict[str, Tensor] = {}
        for test_set in self.sets:
            index, rows = images[test_set.images]
            index = index.cpu()
            owner, readable = owner_rows(index, test_set.owner)  # an image may have broken features
            captions = test_set.tokens[readable], test_set.token_mask[readable]
            partial = folder / f"{test_set.name}.{rank()}.pt"
            scores = self.scores(rows["start"], rows["region_mask"], *captions, test_set.name, partial)
            self.results.append(SearchResult(test_set, scores, owner, test_set.numbers[readable], index))
            if self.captions_per_image is not None:
                columns = exactly(owner, self.captions_per_image)
                scores, owner = scores[:, columns], owner[columns]
            measured = score_retrieval(scores, owner)
            recalls |= {f"{test_set.name}_{name}": value for name, value in measured.items() if "mean" not in name}
        for path in folder.glob(f"*.{rank()}.pt"):
            path.unlink()
        others = [recalls[f"{test_set.name}_mr"] for test_set in self.sets if test_set.language != "en"]
        if others:
            recalls["non_english_mr"] = torch.stack(others).mean()
        return {name: value.float().to(device) for name, value in recalls.items()}

    def start(self, regions: Tensor, boxes: Tensor, region_mask: Tensor) -> Tensor:
        """Embed some images for scoring, [B, R, D]."""
        return self.module.model.encoder.start_regions(regions, boxes, region_mask)

    def scores(
        self, image: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, name: str, partial: Path
    ) -> Tensor:
        """Score images from `start` with captions: [N, M]."""
        trainer = self.module.trainer
        title = f"  scoring {name}" if trainer.progress_bar_callback is not None else ""
        inputs = self.module.model, image, image_mask, tokens, token_mask, self.tokens_per_batch
        with trainer.strategy.precision_plugin.forward_context():
            return score_pairs(*inputs, partial, title)
