"""Exports XMC-GAN's weights with our names or the official code's. The authors published no weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from common.encoders.checkpoint_files import CheckpointError, below, named_tensors, read_checkpoint, write_torch
from common.files import write_whole

Layout = Literal["generator", "official", "discriminator"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Arrays = dict[str, np.ndarray[Any, Any]]


def _block(ours: str, theirs: str, norm: str, layer: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (
        (rf"{ours}\.(\d+)\.conv(\d)", (rf"{theirs}_\1/Conv_<\2>",)),
        (rf"{ours}\.(\d+)\.shortcut", (rf"{theirs}_\1/Conv_2",)),
        (rf"{ours}\.(\d+)\.norm(\d)\.norm", (rf"{theirs}_\1/{norm}_<\2>/BatchNorm_0",)),
        (
            rf"{ours}\.(\d+)\.norm(\d)\.modulation",
            (rf"{theirs}_\1/{norm}_<\2>/{layer}_0", rf"{theirs}_\1/{norm}_<\2>/{layer}_1"),
        ),
    )


#: Maps our module names to the official ones, two if our layer combines two. Numbers in <> count from one.
_GENERATOR = (
    (r"sentence", ("Dense_0",)),
    (r"start", ("Dense_1",)),
    (r"query", ("Conv_0",)),
    (r"image", ("Conv_1",)),
    (r"norm\.norm", ("LocalConditionalBatchNorm_0/BatchNorm_0",)),
    (r"norm\.modulation", ("LocalConditionalBatchNorm_0/Conv_0", "LocalConditionalBatchNorm_0/Conv_1")),
    *_block("blocks", "GenBlock", "ConditionalBatchNorm", "Dense"),
    *_block("spatial_blocks", "GenSpatialBlock", "LocalConditionalBatchNorm", "Conv"),
)
_DISCRIMINATOR = (
    (r"regions", ("SpectralConv_0",)),
    (r"logit", ("SpectralDense_0",)),
    (r"sentence", ("SpectralDense_1",)),
    (r"blocks\.0\.conv(\d)", (r"DiscOptimizedBlock_0/SpectralConv_<\1>",)),
    (r"blocks\.0\.shortcut", ("DiscOptimizedBlock_0/SpectralConv_2",)),
    (r"blocks\.(\d+)\.conv(\d)", (r"DiscBlock_<\1>/SpectralConv_<\2>",)),
    (r"blocks\.(\d+)\.shortcut", (r"DiscBlock_<\1>/SpectralConv_2",)),
)
_LEAVES = {
    "weight": "params/{}/kernel",
    "bias": "params/{}/bias",
    "running_mean": "batch_stats/{}/mean",
    "running_variance": "batch_stats/{}/var",
    "u": "spectral_norm_stats/{}/u0",
}


def official_names(name: str, discriminator: bool) -> list[str]:
    """Return the official arrays' names for one of our tensors, which joins the arrays along the first dimension."""
    module, _, leaf = name.rpartition(".")
    for pattern, targets in _DISCRIMINATOR if discriminator else _GENERATOR:
        match = re.fullmatch(pattern, module)
        if match:
            names = [re.sub(r"<(\d+)>", lambda m: str(int(m[1]) - 1), match.expand(target)) for target in targets]
            return [_LEAVES[leaf].format(official) for official in names]
    raise KeyError(name)


def to_official(state: Mapping[str, Tensor], discriminator: bool) -> Arrays:
    """Convert the weights of a generator or discriminator to arrays of the official code.

    Names are `params/...`, `batch_stats/...` and `spectral_norm_stats/...` with slashes between the levels. Kernels are
    (height, width, in, out) or (in, out); a spectral vector is (1, out).

    Source: layout rules of the golden vectors; [13].
    """
    arrays: Arrays = {}
    for name, tensor in state.items():
        names = official_names(name, discriminator)
        for official, part in zip(names, tensor.chunk(len(names))):
            if name.endswith("weight"):
                part = part.permute(2, 3, 1, 0) if part.ndim == 4 else part.T
            arrays[official] = part.reshape(1, -1).numpy() if name.endswith(".u") else part.contiguous().numpy()
    return arrays


def export(checkpoint: str | Path, output: str | Path, layout: Layout = "generator") -> Path:
    """Write one network of a stage's checkpoint for other code, atomically.

    Layout `generator` writes the averaged generator with the names of `networks.Generator`. `official` writes the
    averaged generator as a `.npz` with the official names. `discriminator` writes the encoder of images and regions.
    """
    state = named_tensors(read_checkpoint(checkpoint).get("state_dict"))
    weights = below(state, "discriminator." if layout == "discriminator" else "generators.key.")
    if not weights:
        raise CheckpointError(f"--checkpoint: {checkpoint} holds no {layout}; give one of a stage that trains XMC-GAN")
    if layout == "official":
        return write_whole(output, lambda path: _save_arrays(path, to_official(weights, discriminator=False)))
    return write_torch(output, weights)


def _save_arrays(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:  # given a name, NumPy would append `.npz`
        np.savez(file, **arrays)  # type: ignore[arg-type]
