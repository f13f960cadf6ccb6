"""Made-up batches of MCT and of what its tables compare it with, for estimates and measurements without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.stages.synthetic import unknown_data
from common.training.examples import Draw, Example, batches_of_epoch
from papers.mct.data import BicaptioningData, ClassificationData, MultiLabelData, PretrainingData, SearchData
from papers.mct.detection import DetectionData
from papers.mct.evaluation import CrossModalSearch

#: The recipe that stands for the paper where one is measured.
RECIPE = "mct"
WITHOUT_FILES: dict[str, Any] = {"model.text_encoder.pretrained": None, "model.word_vectors": None}
_KNOWN = (PretrainingData, BicaptioningData, SearchData, ClassificationData, MultiLabelData, DetectionData)
# Ids of words that every vocabulary has.
_WORDS = (5, 40)


def synthetic(module: Any, data: Any, size: int, draw: Draw) -> Example:
    """Batches as those of a data module, captions of the greatest length; see `common.stages.synthetic`."""
    if not isinstance(data, _KNOWN):
        raise unknown_data("mct", data, _KNOWN)
    h: Any = module.hparams
    split = data.split if isinstance(data, PretrainingData | BicaptioningData | SearchData) else data.train_split
    items = data.dataset.published_count(split)
    batch: dict[str, Any] = {"index": torch.arange(size)}
    # Without a tokenizer, or where its vocabulary need not fit the model's, nothing is compared.
    facts: dict[str, Any] = {"vocabulary_size": 0, "num_classes": h.get("num_classes")}
    if isinstance(data, DetectionData):
        facts["num_classes"] = h.num_classes
        return Example(_detection(data, size, draw), batches_of_epoch(items, data.batch_size), facts)
    names = ("image_query", "image_key") if isinstance(data, PretrainingData) else ("image",)
    batch |= {name: draw.normal(size, 3, data.image.crop, data.image.crop) for name in names}
    if isinstance(data, PretrainingData):
        tags = module.loss.tag_count
        facts["tag_names"] = [str(number) for number in range(tags)]
        batch |= {"image_id": torch.arange(size), "tags": draw.integers(0, 40, size, tags) < 1}
        if data.tokenizer is not None:
            batch |= {f"tokens_{view}": _captions(data, size, draw) for view in ("query", "key")}
    elif isinstance(data, BicaptioningData):
        facts["tokenizer"] = None
        batch |= {name: _captions(data, size, draw) for name in ("tokens", "tokens_reversed")}
    elif isinstance(data, SearchData):
        tokens = _captions(data, size, draw)
        batch |= {"tokens": tokens, "lengths": torch.full((size,), tokens.shape[1]), "image_index": torch.arange(size)}
        items = None if items is None else items * data.captions_per_image
    elif isinstance(data, MultiLabelData):
        batch["labels"] = draw.integers(-1, 2, size, h.num_classes).to(torch.int8)
    else:
        batch["label"] = draw.integers(0, h.num_classes, size)
        items = None if items is None else round(items * (1 - data.held_out_share))
    return Example(batch, batches_of_epoch(items, data.batch_size), facts)


def _captions(data: Any, size: int, draw: Draw) -> Tensor:
    return draw.integers(*_WORDS, size, data.words.max_tokens)


def _detection(data: DetectionData, size: int, draw: Draw) -> dict[str, Any]:
    side: int = max(data.image.sizes)  # type: ignore[attr-defined]
    images = [draw.normal(3, side, min(side * 4 // 3, data.image.max_size)) for _ in range(size)]  # type: ignore[attr-defined]
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9]]) * side
    targets = [
        {"boxes": boxes, "labels": torch.tensor([1, 2]), "difficult": torch.zeros(2, dtype=torch.bool)}
        for _ in range(size)
    ]
    return {"images": images, "targets": targets, "index": torch.arange(size)}


def prepare(module: Any) -> None:
    """Let a stage start without files."""
    if isinstance(module, CrossModalSearch):
        module._judge = lambda log_at: None  # type: ignore[method-assign]
