"""Synthetic steps of maximum size, for estimates without data; see `common.training.examples`.

`data` is a data module of `papers.m3p.data`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.training.examples import Draw, Example, batches_of_epoch
from papers.m3p.candidates import Groups
from papers.m3p.encoder import M3P
from papers.m3p.masking import DEFAULT_MASKING, Masking
from papers.m3p.pairs import shown_images

#: Ids of made-up words, which exist in every vocabulary.
WORDS = (5, 900)


def pretraining_step(data: Any, model: M3P, size: int, draw: Draw) -> Example:
    """A step with `size` pairs of each caption set on this device."""
    schedule, masking = data.schedule, data.masking
    pairs = _pairs(data, model, size, draw, masking)
    rows = max(data.text_batch_size * size // schedule.batch_size, 1)
    masked = round(rows * data.bptt * (masking or DEFAULT_MASKING).words)
    block = {
        "tokens": draw.integers(*WORDS, rows, data.bptt),
        "token_mask": torch.ones(rows, data.bptt, dtype=torch.bool),
        "languages": torch.zeros(rows, dtype=torch.int64),
        "word_places": draw.integers(0, rows * data.bptt, masked),
        "word_targets": draw.integers(*WORDS, masked),
    }
    step = {
        "xmlm": [block] * min(schedule.xmlm_steps, len(data.languages)),
        "relations": [pairs] * min(schedule.relation_steps, len(data.training_sets)),
        "index": torch.arange(size),
    }
    return Example(step, schedule.steps, _facts(model))


def fine_tuning_step(data: Any, model: M3P, size: int, draw: Draw) -> Example:
    """A step with `size` pairs on this device."""
    images = images_of_an_epoch(data)
    shown = None if images is None else images * data.captions_per_image
    step = {"xmlm": [], "relations": [_pairs(data, model, size, draw)], "index": torch.arange(size)}
    return Example(step, batches_of_epoch(shown, data.batch_size), _facts(model))


def images_of_an_epoch(data: Any) -> int | None:
    """Published images per fine-tuning epoch, pooled as in `find_pictures`; None if unknown for a set."""
    counts: dict[str, int] = {}
    for captioned in data.training_sets:
        count = captioned.dataset.published_count(data.train_split)
        if count is None:
            return None
        images = shown_images(captioned.dataset)
        counts[images] = max(counts.get(images, 0), count)
    return sum(counts.values())


def _facts(model: M3P) -> dict[str, Any]:
    return {"feature_dims": {model.encoder.feature_dim}, "vocabulary_size": model.encoder.vocabulary_size}


def _pairs(
    data: Any, model: M3P, size: int, draw: Draw, masking: Masking | None = None
) -> dict[str, dict[str, Tensor]]:
    """A batch of pairs of maximum length, as `PairCollator` makes it."""
    length, count = data.tokenizer.max_tokens, data.max_regions
    width, classes = model.encoder.feature_dim, model.region_heads.classifier.out_features
    rows = size * data.candidates.count if isinstance(data.candidates, Groups) else size
    batch = {
        "tokens": draw.integers(*WORDS, rows, length),
        "token_mask": torch.ones(rows, length, dtype=torch.bool),
        "regions": draw.normal(rows, count, width),
        "boxes": draw.uniform(rows, count, 5),
        "region_mask": torch.ones(rows, count, dtype=torch.bool),
    }
    if masking is not None:
        words = round(size * length * masking.text_fraction * masking.words)
        regions = round(size * count * (1 - masking.text_fraction) * masking.regions)
        batch |= {
            "word_places": draw.integers(0, size * (count + length), words),
            "word_targets": draw.integers(*WORDS, words),
            "region_places": draw.integers(0, size * (count + length), regions),
            "region_classes": draw.integers(0, classes, regions),
            "region_features": draw.normal(regions, width),
        }
        if data.distributions:
            batch["region_distributions"] = draw.uniform(regions, classes).softmax(-1)
    if isinstance(data.candidates, Groups):
        batch["positive"] = torch.zeros(size, dtype=torch.int64)
        return {"t2i": batch, "i2t": batch}
    return {"in_batch": batch | {"group": torch.arange(size)}}
