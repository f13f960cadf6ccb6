"""Diagnostics after pre-training: retrieval with the model's embeddings, neighbors, figures. None is published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.listing import spread
from common.monitoring.figures import (
    RIGHT,
    WRONG,
    Cell,
    Described,
    Row,
    described_images,
    embedding_map,
    image_grid,
    save_figure,
)
from common.monitoring.media import log_table, media_folder

if TYPE_CHECKING:
    import lightning.pytorch as pl

# The cost of both is quadratic in this.
LARGEST_SEARCH = 20_000
LARGEST_UNIFORMITY = 2_000
#: Queries in a figure of retrieval, and items found for each.
QUERIES, FOUND = 6, 5


def tagged_neighbors(features: Tensor, tags: Tensor, neighbors: int = 10) -> Tensor:
    """Percent of an image's nearest images, by angle, that share a tag with it; NaN if no image has a tag.

    Shapes:
        features [N, d]; tags bool [N, T], images without tags are ignored
    """
    features, tags = F.normalize(features.float(), dim=1)[:LARGEST_SEARCH], tags[:LARGEST_SEARCH].float()
    similarity = features @ features.T
    similarity.fill_diagonal_(-2.0)
    nearest = similarity.topk(min(neighbors, len(features) - 1)).indices
    shared = torch.einsum("nt,nkt->nk", tags, tags[nearest]) > 0
    return 100 * shared[tags.any(1)].double().mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Log of the mean Gaussian potential between unit embeddings [N, d]: 0 if all are equal, lower is more spread.

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity".
    """
    embeddings = embeddings[:LARGEST_UNIFORMITY].float()
    return torch.pdist(embeddings).pow(2).mul(-2).exp().mean().log()


def draw_retrieval(
    module: pl.LightningModule,
    image: Tensor,
    caption: Tensor,
    caption_image: Tensor,
    picture: Callable[[int], np.ndarray],
    text: Sequence[str],
    credit: str,
) -> None:
    """Draw the captions found for some images, and the images found for some captions; correct ones in green.

    Embeddings image [N, d] and caption [M, d] are unit vectors; `caption_image` [M] is each caption's row in `image`.
    """
    similarity = image.float() @ caption.float().T
    # Equal captions describe each other's images.
    owners: dict[str, set[int]] = defaultdict(set)
    for words, row in zip(text, caption_image.tolist()):
        owners[words].add(row)

    rows = spread(len(image), QUERIES)
    best = similarity[rows].topk(min(FOUND, len(caption))).indices.tolist()
    items = [
        Described(picture(row), [(text[m], RIGHT if row in owners[text[m]] else WRONG) for m in captions])
        for row, captions in zip(rows, best)
    ]
    figure = described_images(items, "Captions found for an image; green: its own, or the same words")
    save_figure(module, figure, media_folder(module) / "image_to_captions.png", credit)
    table = [[row, *(text[m] for m in captions)] for row, captions in zip(rows, best)]
    log_table(module, "image_to_captions_table", ["image", *_numbered("caption", best)], table)

    queries = spread(len(caption), QUERIES)
    best = similarity[:, queries].T.topk(min(FOUND, len(image))).indices.tolist()
    lines = [
        Row(text[m], [Cell(picture(row), color=RIGHT if row in owners[text[m]] else WRONG) for row in images])
        for m, images in zip(queries, best)
    ]
    figure = image_grid(lines, "Images found for a caption; green: its own, or one with the same words")
    save_figure(module, figure, media_folder(module) / "caption_to_images.png", credit)
    table = [[text[m], *images] for m, images in zip(queries, best)]
    log_table(module, "caption_to_images_table", ["caption", *_numbered("image", best)], table)


def draw_map(module: pl.LightningModule, features: Tensor, labels: Sequence[str], seed: int) -> None:
    """Draw `map.png`: features [N, d] in two dimensions, colored by class; nothing if there are too few."""
    title = "Held-out images by their backbone feature (t-SNE), colored by class"
    if (figure := embedding_map(features, labels, title, seed)) is not None:
        save_figure(module, figure, media_folder(module) / "map.png")


def _numbered(noun: str, rows: Sequence[Sequence[int]]) -> list[str]:
    return [f"{noun} {number + 1}" for number in range(len(rows[0]) if rows else 0)]
