"""Made-up batches of maximum length with a fixed mask, for reproducible estimates without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.training.examples import Draw
from papers.m3p.masking import NO_LABEL, Masking
from papers.m3p.pictures import unit_length

# Word ids that exist in every vocabulary.
_WORDS = (5, 900)


def text_example(rows: int, length: int, masking: Masking, draw: Draw) -> dict[str, Tensor]:
    tokens = draw.integers(*_WORDS, rows, length)
    return {
        "tokens": tokens,
        "token_mask": torch.ones(rows, length, dtype=torch.bool),
        "labels": torch.where(_every(masking.words, rows, length), tokens, NO_LABEL),
        "languages": torch.zeros(rows, dtype=torch.int64),
    }


def pairs_example(
    data: Any, model: Any, size: int, masking: Masking | None, draw: Draw
) -> dict[str, dict[str, Tensor]]:
    """A batch of pairs in the format of `PairCollator`; `size` counts pairs, or groups of each direction."""
    if data.vlm_candidates == "in_batch":
        return {"in_batch": _group(data, model, size, 1, masking, draw) | {"group": torch.arange(size)}}
    batch = {}
    for kind in ("t2i", "i2t"):
        batch[kind] = _group(data, model, size, data.candidates, masking, draw)
        batch[kind]["positive"] = draw.integers(0, data.candidates, size)
    return batch


def _group(
    data: Any, model: Any, groups: int, candidates: int, masking: Masking | None, draw: Draw
) -> dict[str, Tensor]:
    pairs, length, count = groups * candidates, data.tokenizer.max_tokens, data.max_regions
    width, classes = model.encoder.feature_dim, model.region_heads.classifier.out_features
    features = draw.normal(pairs, count, width)
    group = {
        "tokens": draw.integers(*_WORDS, pairs, length),
        "token_mask": torch.ones(pairs, length, dtype=torch.bool),
        "regions": features if draw.empty else torch.from_numpy(unit_length(features.numpy())),
        "boxes": draw.uniform(pairs, count, 5),
        "region_mask": torch.ones(pairs, count, dtype=torch.bool),
    }
    if masking is None:
        return group
    # Every other group masks words, the rest mask regions.
    masks_words = (torch.arange(pairs) // candidates % 2 == 0)[:, None]
    words = _every(masking.words, pairs, length) & masks_words
    regions = _every(masking.regions, pairs, count) & ~masks_words
    kind = draw.integers(1, classes, pairs, count)
    group |= {
        "word_labels": torch.where(words, group["tokens"], NO_LABEL),
        "region_labels": torch.where(regions, kind, NO_LABEL),
        "region_targets": draw.normal(pairs, count, width),
    }
    if data.distributions:
        group["region_distributions"] = draw.uniform(pairs, count, classes).softmax(-1)
    return group


def _every(share: float, *shape: int) -> Tensor:
    """A regular bool pattern that is true for this share of the places."""
    number = torch.arange(int(torch.Size(shape).numel()))
    return (((number + 1) * share).floor() > (number * share).floor()).reshape(shape)
