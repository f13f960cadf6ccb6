"""Made-up batches of M3P, for estimates and measurements without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.stages.synthetic import unknown_data
from common.training.examples import Draw, Example, batches_of_epoch
from papers.m3p.data import PretrainingData, RegionTextData, RetrievalData
from papers.m3p.pairs import unit_length

#: The recipe that stands for the paper where one is measured.
RECIPE = "m3p"
WITHOUT_FILES: dict[str, Any] = {"model.pretrained": None}
# Ids of words that every vocabulary has.
_WORDS = (5, 900)


def synthetic(module: Any, data: Any, size: int, draw: Draw) -> Example:
    """Batches as those of a data module, captions and pictures of the greatest length; see `common.stages.synthetic`.

    Which words and regions are masked follows no chance, so that every estimate is the same.
    """
    if not isinstance(data, PretrainingData | RetrievalData):
        raise unknown_data("m3p", data, (PretrainingData, RetrievalData))
    encoder = module.model.encoder
    facts = {
        "feature_dim": encoder.feature_dim,
        "vocabulary_size": encoder.vocabulary_size,
    }
    if isinstance(data, PretrainingData):
        rows = max(data.text_batch_size * size // data.batch_size, 1)
        blocks = min(data.xmlm_steps, len(data.languages))
        groups = min(data.relation_steps, len(data.captions))
        batches: int | None = data.steps_per_epoch
    else:
        rows, blocks, groups = 0, 0, 1
        images = images_of_an_epoch(data)
        items = None if images is None else images * data.captions_per_image
        batches = batches_of_epoch(items, data.batch_size)
    batch = {
        "xmlm": [_text(data, rows, draw) for _ in range(blocks)],
        "relations": [_relation(data, module, size, draw) for _ in range(groups)],
    }
    return Example(batch, batches, facts)


def images_of_an_epoch(data: RetrievalData) -> int | None:
    """Published number of images that an epoch of fine-tuning shows; None where that of a set is not known.

    Sets are pooled by image. Those of one name show the same images, and those with captions of COCO's images show a
    part of COCO's.
    """
    counts: dict[str, int] = {}
    for one in data._training_sets():
        dataset: Any = one.dataset
        count: int | None = dataset.published_count(data.train_split)
        if count is None:
            return None
        images = getattr(dataset, "coco", dataset).name
        counts[images] = max(counts.get(images, 0), count)
    return sum(counts.values())


def _every(share: float, *shape: int) -> Tensor:
    """A regular pattern bool of a shape, true in a share of its places."""
    places = torch.arange(int(torch.Size(shape).numel()))
    return (((places + 1) * share).floor() > (places * share).floor()).reshape(shape)


def _text(data: Any, rows: int, draw: Draw) -> dict[str, Tensor]:
    tokens = draw.integers(*_WORDS, rows, data.bptt)
    labels = torch.where(_every(_masking(data).words, rows, data.bptt), tokens, -1)
    mask = torch.ones(rows, data.bptt, dtype=torch.bool)
    languages = torch.zeros(rows, dtype=torch.int64)
    return {"tokens": tokens, "token_mask": mask, "labels": labels, "languages": languages}


def _masking(data: Any) -> Any:
    from papers.m3p.data import DEFAULT_MASKING

    return getattr(data, "masking", None) or DEFAULT_MASKING


def _relation(data: RegionTextData, module: Any, size: int, draw: Draw) -> dict[str, dict[str, Tensor]]:
    if data.vlm_candidates == "in_batch":
        return {"in_batch": _group(data, module, size, 1, draw) | {"group": torch.arange(size)}}
    return {
        kind: _group(data, module, size, data.candidates, draw)
        | {"positive": draw.integers(0, data.candidates, size)}
        for kind in ("t2i", "i2t")
    }  # fmt: skip


def _group(data: Any, module: Any, groups: int, candidates: int, draw: Draw) -> dict[str, Tensor]:
    pairs, length, count = groups * candidates, data.tokenizer.max_tokens, data.max_regions
    width, classes = module.model.encoder.feature_dim, module.model.regions.classifier.out_features
    features = draw.normal(pairs, count, width)
    if not draw.empty:
        features = torch.from_numpy(unit_length(features.numpy()))
    found = {
        "tokens": draw.integers(*_WORDS, pairs, length),
        "token_mask": torch.ones(pairs, length, dtype=torch.bool),
        "regions": features,
        "boxes": draw.uniform(pairs, count, 5),
        "region_mask": torch.ones(pairs, count, dtype=torch.bool),
    }
    if getattr(data, "masking", None) is None:
        return found
    masking = _masking(data)
    # In every other group words are masked, in the others regions.
    reads_text = (torch.arange(pairs) // candidates % 2 == 0)[:, None]
    words = _every(masking.words, pairs, length) & reads_text
    regions = _every(masking.regions, pairs, count) & ~reads_text
    kind = draw.integers(1, classes, pairs, count)
    found |= {
        "word_labels": torch.where(words, found["tokens"], -1),
        "region_labels": torch.where(regions, kind, -1),
        "region_targets": draw.normal(pairs, count, width),
    }
    if data.distributions:
        found["region_distributions"] = draw.uniform(pairs, count, classes).softmax(-1)
    return found


def prepare(module: Any) -> None:
    """Nothing else is read from files."""
