"""The tiny model of the golden files, and batches out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from papers.m3p.encoder import M3P, M3PEncoder
from papers.m3p.weights import released_name

GOLDEN = Path(__file__).parents[1] / "golden" / "m3p"


def arrays(name: str) -> dict[str, Tensor]:
    """Arrays of a golden file."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def values(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def tiny_sizes(**changes: Any) -> dict[str, Any]:
    sizes = {
        "vocabulary_size": 40, "width": 16, "layers": 2, "attention_heads": 4, "feed_forward_width": 64,
        "positions": 32, "languages": 6, "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    return sizes | changes


def tiny_model(**changes: Any) -> M3P:
    """The golden model, evaluating."""
    model = M3P(M3PEncoder(**tiny_sizes(**changes)))
    state = arrays("tiny_weights")
    model.load_state_dict({name: state[released_name(name)] for name in model.state_dict()})
    return model.eval()


def valid(lengths: Tensor, width: int) -> Tensor:
    """Mask [B, width] of the first positions."""
    return torch.arange(width)[None] < lengths[:, None]
