"""Our diagnostics after pre-training: neighbors that share a tag, uniformity, and images retrieved for captions."""

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
    GridCell,
    GridRow,
    image_grid,
    save_figure,
)
from common.monitoring.media import media_folder

if TYPE_CHECKING:
    import lightning.pytorch as pl

# The cost of both metrics grows with the square of this number.
LARGEST_SEARCH = 20_000
LARGEST_UNIFORMITY = 2_000
#: Number of queries in a retrieval figure, and number of results for each.
QUERIES, FOUND = 6, 5


def tagged_neighbors(features: Tensor, tags: Tensor, neighbors: int = 10) -> Tensor:
    """Compute the percentage of an image's nearest images (by cosine) that share a tag with the image.

    NaN if no image has a tag.

    Shapes:
        features [N, d]; tags bool [N, T], where images without tags are ignored
    """
    features, tags = F.normalize(features.float(), dim=1)[:LARGEST_SEARCH], tags[:LARGEST_SEARCH].float()
    similarity = features @ features.T
    similarity.fill_diagonal_(-2.0)
    nearest = similarity.topk(min(neighbors, len(features) - 1)).indices
    shared = torch.einsum("nt,nkt->nk", tags, tags[nearest]) > 0
    return 100 * shared[tags.any(1)].double().mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Compute the log of the mean Gaussian potential between unit embeddings [N, d].

    It is 0 if all embeddings are equal, and lower if they are more uniform.

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
    """Draw the images retrieved for some captions, with correct ones in green.

    Embeddings image [N, d] and caption [M, d] are unit vectors; `caption_image` [M] is each caption's row in `image`.
    """
    # If two images have the same caption, both are correct for it.
    owners: dict[str, set[int]] = defaultdict(set)
    for words, row in zip(text, caption_image.tolist()):
        owners[words].add(row)

    queries = spread(len(caption), QUERIES)
    best = (caption[queries].float() @ image.float().T).topk(min(FOUND, len(image))).indices.tolist()
    lines = [
        GridRow(text[m], [GridCell(picture(row), color=RIGHT if row in owners[text[m]] else WRONG) for row in images])
        for m, images in zip(queries, best)
    ]
    figure = image_grid(lines, "Images found for a caption; green: its own, or one with the same words")
    save_figure(module, figure, media_folder(module) / "caption_to_images.png", credit)
