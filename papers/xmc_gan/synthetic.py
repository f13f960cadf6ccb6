"""Made-up batches of XMC-GAN, for estimates and measurements without data."""

from __future__ import annotations

from typing import Any

import torch

from common.stages.synthetic import unknown_data
from common.training.examples import Draw, Example, batches_of_epoch
from papers.xmc_gan.data import TextToImageData

#: The recipe that stands for the paper where one is measured.
RECIPE = "xmc_gan"
WITHOUT_FILES: dict[str, Any] = {"model.image_network.pretrained": None, "model.evaluation": None}
# Ids of words that every vocabulary has.
_WORDS = (5, 40)


def synthetic(module: Any, data: Any, size: int, draw: Draw) -> Example:
    """Batches as those of a data module, captions of the greatest length; see `common.stages.synthetic`."""
    if not isinstance(data, TextToImageData):
        raise unknown_data("xmc_gan", data, (TextToImageData,))
    count, length = data.minibatches * size, data.tokenizer.max_tokens
    batch = {
        "image": draw.uniform(count, 3, data.image_size, data.image_size),
        "index": torch.arange(count),
        "caption": torch.arange(count),
        "skipped": torch.zeros(count, dtype=torch.int64),
        "length": torch.full((count,), length),
    }
    if data.text_features is None:
        batch["tokens"] = draw.integers(*_WORDS, count, length)
    else:
        width = module.generator.sentence.in_features
        batch |= {"words": draw.normal(count, length, width), "sentence": draw.normal(count, width)}
    narratives = getattr(data.dataset, "published_narratives", {}) if data.items == "captions" else {}
    items = narratives.get(data.split, data.dataset.published_count(data.split))
    # Of a vocabulary that no caption was read for, the ids above are all.
    facts = {"vocabulary_size": _WORDS[1]}
    return Example(batch, batches_of_epoch(items, data.batch_size * data.minibatches), facts)


def prepare(module: Any) -> None:
    """Nothing else is read from files."""
