"""Reads pre-training checkpoints (ours and the released ones) and exports single encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.encoders.checkpoint_files import (
    CheckpointError,
    below,
    differences,
    first_of,
    named_tensors,
    read_checkpoint,
    tensors_in,
    write_torch,
)
from common.encoders.video import R2Plus1D

Modality = Literal["video", "audio"]
#: What `assemble export` can write.
LAYOUTS: tuple[Modality, ...] = ("video", "audio")
BACKBONE_FORMAT = "avid_cma/backbone/1"
NEEDED = "'model' and 'train_criterion' (or 'state_dict')"


@dataclass(frozen=True)
class Pretraining:
    """A checkpoint's model, memory (banks and normalizer), and listing fingerprint (None in a released file, [13])."""

    model: dict[str, Tensor]
    memory: dict[str, Tensor]
    listing_fingerprint: str | None = None


def load_pretraining(path: str | Path, model: nn.Module) -> Pretraining:
    """Read an `AVIDModule` checkpoint, a released checkpoint or network weights, and check that they fit `model`.

    Source: [13].
    """
    try:
        content, state = _read(path)
        weights = _fitting(path, state, model)
    except CheckpointError as error:
        raise CheckpointError(f"model.warm_start: {error}") from error
    if below(state, "model."):
        return Pretraining(weights, below(state, "loss."), content.get("listing_fingerprint"))
    return Pretraining(weights, _released_memory(named_tensors(content.get("train_criterion"))))


def check(path: Path, module: Any, data: Any) -> None:
    """Check that a file fits the model. A released file must also fit the loss and the data set.

    Source: [13].
    """
    content, state = _read(path)
    _fitting(path, state, module.model)
    criterion = named_tensors(content.get("train_criterion"))
    bank = criterion.get("nce_average.view1_mem")
    if bank is None:
        return
    clips = None if data.world is not None else data.dataset.published_count(data.split)
    mined = criterion.get("nce_average.positive_set", torch.empty(0, 0)).shape[1]
    if mined != module.loss.positives:
        raise CheckpointError(
            f"{path}: nce_average.positive_set has {mined} mined positives per clip, expected {module.loss.positives}: "
            "the file belongs to AVID and the stage to AVID-CMA, or the other way round"
        )
    if clips is not None and not clips / 2 < len(bank) < clips * 2:
        raise CheckpointError(
            f"{path}: nce_average.view1_mem has {len(bank):,} rows, expected about {clips:,} for {data.dataset.title}: "
            "the file belongs to another data set"
        )


def _fitting(path: str | Path, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the network weights of a checkpoint (ours or released). Raise an error if they don't fit `model`."""
    weights = below(state, "model.")
    if not weights and any(name.startswith("video_model.") for name in state):
        weights = R2Plus1D.released_names(below(state, ""))
    if not weights:
        raise CheckpointError(
            f"{path}: no weights of an audio-visual model; its entries are {first_of(list(state))}. Give the "
            "checkpoint of a pre-training stage, such as avid"
        )
    if problem := differences(model.state_dict(), weights):
        raise CheckpointError(f"{path}: the weights do not fit the network: {problem}")
    return weights


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint. Return the content and the tensors in `state_dict` (ours), `model` (released) or itself."""
    content = read_checkpoint(path, NEEDED)
    if state := tensors_in(content):
        return content, state
    raise CheckpointError(
        f"{path}: not a checkpoint of AVID-CMA: expected the entries {NEEDED}, found {first_of(list(content))}"
    )


def _released_memory(criterion: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {"nce_average.view1_mem": "video_bank.vectors", "nce_average.view2_mem": "audio_bank.vectors"}
    memory = {ours: criterion[theirs].clone() for theirs, ours in names.items() if theirs in criterion}
    scores = [value.float().mean() for name, value in criterion.items() if name.endswith("avg_exp_score")]
    if scores:
        memory["normalizer"] = torch.stack(scores).mean()
    return memory


def load_backbone(path: str | Path, modality: Modality = "video") -> dict[str, Tensor]:
    """Read the state dict of one encoder from a pre-training checkpoint or a released file."""
    state = {key.removeprefix("model."): value for key, value in _read(path)[1].items()}
    if backbone := below(state, f"{modality}_model."):
        return R2Plus1D.released_names(backbone)
    raise CheckpointError(
        f"{path}: no {modality} encoder: no entry starts with '{modality}_model.' in {first_of(list(state))}"
    )


def export(checkpoint: str | Path, output: str | Path, layout: Modality = "video") -> Path:
    """Write one encoder of a checkpoint to a small file, without head, banks and optimizer."""
    backbone = load_backbone(checkpoint, layout)
    content = {"format": BACKBONE_FORMAT, "paper": "avid_cma", "modality": layout, "state_dict": backbone}
    return write_torch(output, content)
