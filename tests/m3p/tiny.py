"""Build the tiny model of the golden files, and batches from these files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.weights import RELEASED

#: Weights of the losses for masked words and regions.
MASKED = {"mlm": 1.0, "mrm_class": 1.0, "mrm_regression": 1.0}
GOLDEN = Path(__file__).parents[1] / "golden" / "m3p"


def arrays(name: str) -> dict[str, Tensor]:
    """Read the arrays of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def values(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def four_errors(rate: float, count: int) -> float:
    """Return four standard errors of a rate."""
    return 4 * math.sqrt(rate * (1 - rate) / count)


def tiny_sizes(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocabulary_size": 40, "width": 16, "layers": 2, "attention_heads": 4, "feed_forward_width": 64,
        "positions": 32, "languages": 6, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return sizes | changes


def tiny_model(**changes: Any) -> M3P:
    """Load the golden model in evaluation mode."""
    model = M3P(M3PEncoder(**tiny_sizes(**changes)))
    state = arrays("tiny_weights")
    model.load_state_dict({name: state[RELEASED[name]] for name in model.state_dict()})
    return model.eval()


def joint(
    model: M3P, tokens: Tensor, token_mask: Tensor, regions: Tensor, boxes: Tensor, region_mask: Tensor | None = None
) -> Tensor:
    """Return hidden states [B, R + L, D] of regions followed by text. Without `region_mask`, use all regions."""
    region_mask = torch.ones(regions.shape[:2], dtype=torch.bool) if region_mask is None else region_mask
    image = model.encoder.start_regions(regions, boxes, region_mask)
    text = model.encoder.start_text(tokens, token_mask, image.shape[1])
    return model.encoder.encode(torch.cat([image, text], 1), torch.cat([region_mask, token_mask], 1))


def placed(group: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert pairs from the released code's labels of all words and regions to the format of `PairItems`."""
    rows = torch.arange(len(group["tokens"]))
    if "positive" in group:
        count = len(rows) // len(group["positive"])
        positive = group["positive"]
        pairs = {"true": rows[::count] + positive, "false": rows[::count] + (positive + 1) % count}
        rows = pairs["true"]
    else:
        count = len(rows)
        pairs = {"group": rows, "true": rows * (count + 1), "false": rows * count + (rows + 1) % count}
    group = {**pairs, **{name: value for name, value in group.items() if name != "positive"}}
    words, regions = group["word_labels"][rows], group["region_labels"][rows]
    length = words.shape[1] + regions.shape[1]
    (row, word), (other, region) = ((labels >= 0).nonzero(as_tuple=True) for labels in (words, regions))
    found = {name: value for name, value in group.items() if not name.startswith(("word_l", "region_l", "region_t"))}
    found |= {"word_places": row * length + regions.shape[1] + word, "word_targets": words[row, word]}
    found |= {"region_places": other * length + region, "region_classes": regions[other, region]}
    if "region_distributions" in group:
        found["region_distributions"] = group["region_distributions"][rows[other], region]
    return found | {"region_features": group["region_targets"][rows[other], region]}


def valid(lengths: Tensor, width: int) -> Tensor:
    """Return a mask [B, width] of the first positions."""
    return torch.arange(width)[None] < lengths[:, None]
