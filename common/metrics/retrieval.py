"""Quality of retrieval and of neighbourhoods."""

import torch
from torch import Tensor


def match_ranks(query: Tensor, gallery: Tensor, target: Tensor | None = None, block: int = 1024) -> Tensor:
    """Rank of every query's own gallery item by inner product.

    Other items that tie with it are counted as better, and so is everything when a score is NaN: a collapsed encoder
    retrieves nothing.

    Args:
        query: [Q, d].
        gallery: [N, d].
        target: Row of the gallery that belongs to every query, [Q]; by default the same row.
        block: Queries compared at a time; bounds the memory to ``block * N`` scores.

    Returns:
        [Q] int64; 0 is best.
    """
    if target is None:
        if len(query) > len(gallery):
            raise ValueError(
                f"target: {len(query)} queries have no row of their own among {len(gallery)} in the gallery"
            )
        target = torch.arange(len(query), device=query.device)
    ranks = []
    for start in range(0, len(query), block):
        scores = query[start : start + block] @ gallery.T
        own = scores.gather(1, target[start : start + block, None])
        ranks.append((~(scores < own)).sum(1) - 1)
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64, device=query.device)


def recall_at(query: Tensor, gallery: Tensor, k: int, target: Tensor | None = None, block: int = 1024) -> Tensor:
    """Share of queries whose own gallery item is among the ``k`` nearest, in percent; exact, ties never rewarded.

    Args:
        query: [Q, d].
        gallery: [N, d].
        k: How many items are looked at.
        target: See ``match_ranks``.
        block: See ``match_ranks``.

    Returns:
        Scalar.
    """
    return 100 * (match_ranks(query, gallery, target, block) < k).double().mean()


def neighbour_precision(neighbours: Tensor, labels: Tensor) -> Tensor:
    """Share of neighbours with the class of their anchor, in percent.

    Args:
        neighbours: For every item the items near to it, [N, k].
        labels: [N].

    Returns:
        Scalar.
    """
    return 100 * (labels[neighbours.long()] == labels[:, None]).double().mean()
