"""Retrieval metrics."""

from itertools import pairwise

import torch
from torch import Tensor

from common.losses.info_nce import at_least_float32
from common.metrics.classification import label_ranks

# How many queries, and how many scores, to compare at a time; bounds the memory.
_BLOCK, _SCORES = 1024, 1 << 22


def match_ranks(query: Tensor, gallery: Tensor) -> Tensor:
    """Rank each query's match in the same gallery row: query [Q, d], gallery [N, d] -> int64 [Q], 0 is best.

    Ranks by inner product. Ties and NaN rank above the match, so a collapsed encoder retrieves nothing.

    Examples:
        >>> match_ranks(query=torch.eye(3), gallery=torch.eye(3))
        tensor([0, 0, 0])
    """
    blocks = torch.arange(len(query), device=query.device).split(_BLOCK)
    return torch.cat([label_ranks(query[rows] @ gallery.T, rows) for rows in blocks])


def caption_ranks(
    image: Tensor,
    captions: Tensor,
    caption_image: Tensor,
    equal_text: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank each image's best matching caption, and each caption's matching image, by inner product.

    Items with the same score as the best match rank above the match. If the match's score is NaN, all items rank above.
    Half precision is compared in float32.

    Args:
        image, captions: embeddings [N, d] and [M, d].
        caption_image: row of `image` that each caption describes, [M]; an image can have any number of captions.
        equal_text: a number per caption, int64 [M], the same for equal strings. Captions with the same text then match
            the same images, and vice versa. None: all texts differ.

    Returns:
        int64 ranks of the images with a caption, in order, and of the captions [M]. 0 is best. If all matches of a
        query have invalid scores, the rank is the size of the gallery.
    """
    own = _checked_owners(image, captions, caption_image)
    image, captions = at_least_float32(image), at_least_float32(captions).to(image.device)
    text = _numbered(equal_text, own)
    texts = int(text.max()) + 1

    of_images, of_captions = [text.new_zeros(0)], [text.new_zeros(0)]
    with torch.autocast(image.device.type, enabled=False):  # rounded to bfloat16, many scores would tie
        block = max(1, _SCORES // len(captions))
        for start in range(0, len(image), block):
            scores = image[start : start + block] @ captions.T
            here = (own >= start) & (own < start + len(scores))
            has_text = own.new_zeros(len(scores), texts, dtype=torch.bool)
            has_text[own[here] - start, text[here]] = True
            described = has_text.any(1)
            of_images.append(_ranks_of_relevant(scores[described], has_text[described][:, text]))
        block = max(1, _SCORES // len(image))
        for start in range(0, len(captions), block):
            scores = captions[start : start + block] @ image.T
            asked, row = torch.unique(text[start : start + block], return_inverse=True)
            row_of_text = own.new_full((texts,), -1)
            row_of_text[asked] = torch.arange(len(asked), device=image.device)
            here = row_of_text[text] >= 0
            shows_text = own.new_zeros(len(asked), len(image), dtype=torch.bool)
            shows_text[row_of_text[text[here]], own[here]] = True
            of_captions.append(_ranks_of_relevant(scores, shows_text[row]))
    return torch.cat(of_images), torch.cat(of_captions)


def _checked_owners(images: Tensor, captions: Tensor, caption_image: Tensor) -> Tensor:
    """Move `caption_image` to the device of `images`. Check the rows, because wrong rows silently give wrong ranks."""
    own = caption_image.to(images.device, torch.int64)
    if not len(own) or own.shape != captions.shape[:1]:
        raise ValueError(f"caption_image: expected a row for each of {len(captions)} captions, got {list(own.shape)}")
    if not 0 <= int(own.min()) <= int(own.max()) < len(images):
        raise ValueError(
            f"caption_image: rows {int(own.min())} to {int(own.max())}, but there are {len(images)} images"
        )
    return own


def _numbered(equal_text: Tensor | None, own: Tensor) -> Tensor:
    if equal_text is None:
        return torch.arange(len(own), device=own.device)
    return torch.unique(equal_text.to(own.device), return_inverse=True)[1]


def _ranks_of_relevant(scores: Tensor, relevant: Tensor) -> Tensor:
    """Count the irrelevant items of [B, N] that score at least as high as the best relevant one, [B]."""
    best = torch.where(relevant & ~scores.isnan(), scores, -torch.inf).amax(1, keepdim=True)
    ranks = (~(scores < best) & ~relevant).sum(1)
    return torch.where(best[:, 0] > -torch.inf, ranks, scores.shape[1])


def caption_retrieval(
    image: Tensor,
    captions: Tensor,
    caption_image: Tensor,
    fold_size: int | None = None,
    equal_text: Tensor | None = None,
) -> dict[str, Tensor]:
    """Evaluate image-text retrieval in both directions; see `caption_ranks`.

    With `fold_size`, images and their captions are divided into folds, which are searched separately, and results are
    averaged over folds. The "1K" protocol has five folds of 1,000 images.

    Args:
        fold_size: images per fold; None searches all at once. If the number of images isn't divisible, folds are as
            equal as possible and must differ from `fold_size` by at most 1 %.

    Returns:
        Float64 scalars. `i2t_r1`, `i2t_r5` and `i2t_r10` are the percentages of image queries with a matching caption
        among the 1, 5 and 10 nearest. `i2t_medr` and `i2t_meanr` are the median (rounded down) and mean rank of the
        best matching caption, from 1. `t2i_...` are the same for caption queries. Images without captions are not
        queries.

    Examples:
        >>> image, captions = torch.eye(4), torch.eye(4).repeat_interleave(5, dim=0)  # five captions per image
        >>> recalls = caption_retrieval(image, captions, caption_image=torch.arange(4).repeat_interleave(5))
        >>> recalls["t2i_r1"]
        tensor(100., dtype=torch.float64)

    Source: docs/papers/mct.md [9].
    """
    owners = _checked_owners(image, captions, caption_image)
    captions = captions.to(image.device)
    results = []
    for start, end in folds(len(image), fold_size):
        here = ((owners >= start) & (owners < end)).nonzero().flatten()
        text = None if equal_text is None else equal_text.to(image.device)[here]
        i2t, t2i = caption_ranks(image[start:end], captions[here], owners[here] - start, text)
        results.append(_summary("i2t", i2t, len(here)) | _summary("t2i", t2i, end - start))
    return {name: torch.stack([result[name] for result in results]).mean() for name in results[0]}


def folds(images: int, fold_size: int | None) -> list[tuple[int, int]]:
    """Return the limits (first row, last row + 1) of each fold, or raise if the images cannot be divided."""
    if fold_size is None:
        return [(0, images)]
    count = max(1, round(images / fold_size))
    # Broken files may make a fold a little smaller; a much smaller one would be an easier task.
    if abs(images / count - fold_size) > fold_size / 100:
        raise ValueError(f"fold_size: {images} images cannot be divided into folds of {fold_size}; null searches all")
    size, larger = divmod(images, count)
    ends = [size * fold + min(fold, larger) for fold in range(count + 1)]
    return list(pairwise(ends))


def _summary(direction: str, ranks: Tensor, gallery: int) -> dict[str, Tensor]:
    """Compute the recalls, median and mean of ranks [Q] in a gallery of a given size."""
    ranks = ranks.double()
    # If a query has no valid score, its rank is the size of the gallery, which is never a hit.
    summary = {f"{direction}_r{k}": 100 * (ranks < min(k, gallery)).double().mean() for k in (1, 5, 10)}
    return summary | {f"{direction}_medr": ranks.quantile(0.5).floor() + 1, f"{direction}_meanr": ranks.mean() + 1}


def owner_rows(index: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Find the image of each caption, `owner` [M], among the readable images, `index` [N] in ascending order.

    Returns:
        Positions in `index` of the images of m captions with a readable image, [m], and a mask of these captions, bool
        [M].
    """
    row = torch.searchsorted(index, owner).clamp(max=len(index) - 1)
    known = index[row] == owner
    return row[known], known


def score_retrieval(scores: Tensor, caption_image: Tensor, equal_text: Tensor | None = None) -> dict[str, Tensor]:
    """Evaluate retrieval from scores [N, M] of all pairs, for models that read image and caption together.

    Returns the entries of `caption_retrieval`, and `mr`, the mean of the six recalls; see `caption_ranks`.

    Examples:
        >>> score_retrieval(scores=torch.eye(4), caption_image=torch.arange(4))["mr"]
        tensor(100., dtype=torch.float64)

    Source: docs/papers/m3p.md [10].
    """
    own = _checked_owners(scores, scores.T, caption_image)
    scores = at_least_float32(scores)
    text = _numbered(equal_text, own)
    has_text = own.new_zeros(len(scores), int(text.max()) + 1, dtype=torch.bool)
    has_text[own, text] = True
    searched = has_text.any(1).nonzero()[:, 0]
    i2t = torch.cat([_ranks_of_relevant(scores[rows], has_text[rows][:, text]) for rows in searched.split(_BLOCK)])
    captions = torch.arange(len(own), device=scores.device)
    t2i = torch.cat([_ranks_of_relevant(scores.T[rows], has_text.T[text[rows]]) for rows in captions.split(_BLOCK)])
    found = _summary("i2t", i2t, len(own)) | _summary("t2i", t2i, len(scores))
    recalls = [found[f"{direction}_r{k}"] for direction in ("t2i", "i2t") for k in (1, 5, 10)]
    return found | {"mr": torch.stack(recalls).mean()}
