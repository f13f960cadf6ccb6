"""Random steps of maximum size, for estimates without data; see `common.training.examples`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.training.examples import Example, RandomTensors, batches_of_epoch
from papers.m3p.encoder import M3P
from papers.m3p.masking import DEFAULT_MASKING
from papers.m3p.pairs import Groups

#: Range of random word ids, which every vocabulary has.
WORDS = (5, 900)


def example_step(data: Any, model: M3P, size: int, draw: RandomTensors) -> Example:
    """Make a step of a data module of `papers.m3p.data`, with `size` pairs of each caption set on this device."""
    schedule = data.schedule
    if schedule is None:
        # Pooled sets show the same images.
        counts = [captioned.dataset.published_count("train") for captioned in data.training_sets]
        shown = None if None in counts else max(counts) * data.captions_per_image
        batches, blocks, relations = batches_of_epoch(shown, data.batch_size), 0, 1
    else:
        batches, blocks = schedule.steps, min(schedule.xmlm_steps, len(data.languages))
        relations = min(schedule.relation_steps, len(data.training_sets))
    pairs = _pairs(data, model, size, draw)
    step = {
        "xmlm": [_text(data, size, draw)] * blocks if blocks else [],
        "relations": [pairs] * relations,
        "index": torch.arange(size),
    }
    return Example(step, batches)


def _text(data: Any, size: int, draw: RandomTensors) -> dict[str, Tensor]:
    rows = max(data.text_batch_size * size // data.batch_size, 1)
    masked = round(rows * data.bptt * (data.masking or DEFAULT_MASKING).words)
    return {
        "tokens": draw.integers(*WORDS, rows, data.bptt),
        "token_mask": torch.ones(rows, data.bptt, dtype=torch.bool),
        "languages": torch.zeros(rows, dtype=torch.int64),
        "word_places": draw.integers(0, rows * data.bptt, masked),
        "word_targets": draw.integers(*WORDS, masked),
    }


def _pairs(data: Any, model: M3P, size: int, draw: RandomTensors) -> dict[str, dict[str, Tensor]]:
    """Make a batch of pairs of maximum length, with the fields that `PairItems` makes."""
    length, count, masking = data.tokenizer.max_tokens, data.max_regions, data.masking
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
    number = torch.arange(size)
    if isinstance(data.candidates, Groups):
        first = number * data.candidates.count
        return dict.fromkeys(("t2i", "i2t"), batch | {"true": first, "false": first + 1})
    pairs = {"true": number * (size + 1), "false": number * size + number.roll(-1)}
    return {"in_batch": batch | {"group": number, **pairs}}
