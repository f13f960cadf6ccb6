"""Reading and writing checkpoints: the released ones, those of our own training, and bare backbones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from common.encoders.audio import AudioConvNet
from common.encoders.checkpoint_files import (
    CheckpointError,
    below,
    differences,
    first_of,
    named_tensors,
    read_checkpoint,
)
from common.encoders.heads import ProjectionHead
from common.encoders.video import R2Plus1D
from common.files import write_whole
from papers.avid_cma.model import AudioVisualModel

Modality = Literal["video", "audio"]
TOWERS: dict[str, str] = {"video": "video_model.", "audio": "audio_model."}
#: What `assemble export` can write.
LAYOUTS: tuple[Modality, ...] = ("video", "audio")
BACKBONE_FORMAT = "avid_cma/backbone/1"
NEEDED = "'model' and 'train_criterion' (or 'state_dict')"


@dataclass(frozen=True)
class ImportedCheckpoint:
    """What a pre-training checkpoint holds, under our names.

    Attributes:
        model: State dict of ``AudioVisualModel``.
        video_bank: Memory of the video embeddings [N, d], or None.
        audio_bank: Memory of the audio embeddings [N, d], or None.
        normaliser: The constant of the NCE objective, scalar; -1 when it was never set.
        positive_set: Mined positives [N, k] int32, each row ascending; None for AVID.
        epoch: Epochs trained.
        listing_fingerprint: Which data set listing the rows of the banks belong to; None when the file does not say
            (a released checkpoint: its listing was never published).
    """

    model: dict[str, Tensor]
    video_bank: Tensor | None
    audio_bank: Tensor | None
    normaliser: Tensor
    positive_set: Tensor | None
    epoch: int
    listing_fingerprint: str | None = None

    @property
    def objective(self) -> dict[str, Tensor]:
        """Banks and normaliser under the names of our objective's state dict; what the file lacks is left out."""
        named = {
            "video_bank.vectors": self.video_bank,
            "audio_bank.vectors": self.audio_bank,
            "normaliser": self.normaliser,
        }
        return {name: value for name, value in named.items() if value is not None}


def import_official(path: str | Path, model: nn.Module | None = None) -> ImportedCheckpoint:
    """Read a checkpoint of the released code (AVID or AVID-CMA).

    Args:
        path: The released file, with ``model`` and ``train_criterion``.
        model: The network that the weights are for; by default the one of the paper.

    Returns:
        Weights under our names, memory banks, normaliser and positives.

    Raises:
        CheckpointError: The file is missing, unreadable, of another kind, or its names or shapes do not fit ``model``;
            all differences are listed.

    Source: specification 13.
    """
    content = read_checkpoint(path, NEEDED)
    if "model" not in content or "state_dict" in content:
        raise CheckpointError(
            f"{path}: not a released AVID-CMA checkpoint: expected the entries 'model' and 'train_criterion', "
            f"found {first_of(list(content))}"
        )
    state = named_tensors(content["model"])
    expected = (_paper_model_on_meta() if model is None else model).state_dict()
    problem = differences(expected, state)
    if problem:
        raise CheckpointError(f"{path}: the weights do not fit the network: {problem}")
    criterion = content.get("train_criterion", {})
    scores = [value.float().mean() for key, value in criterion.items() if key.endswith("avg_exp_score")]
    return ImportedCheckpoint(
        model={key: state[key].clone() for key in expected},
        video_bank=_clone(criterion.get("nce_average.view1_mem")),
        audio_bank=_clone(criterion.get("nce_average.view2_mem")),
        normaliser=torch.stack(scores).mean() if scores else torch.tensor(-1.0),
        positive_set=_clone(criterion.get("nce_average.positive_set")),
        epoch=int(content.get("epoch", 0)),
    )


def load_pretraining(
    path: str | Path, model: nn.Module | None = None, field: str = "model.warm_start"
) -> ImportedCheckpoint:
    """Read a pre-training checkpoint, ours or a released one, as the start of a further stage.

    Args:
        path: A Lightning checkpoint of ``AVID`` or ``CMA``, or a released file.
        model: The network that the weights are for; checked when given (always for a released file).
        field: Name of the setting that gave ``path``, for the message.

    Raises:
        CheckpointError: The file is missing, unreadable, of another kind, or does not fit ``model``.
    """
    try:
        return _read_pretraining(path, model)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error


def _read_pretraining(path: str | Path, model: nn.Module | None) -> ImportedCheckpoint:
    content = read_checkpoint(path, NEEDED)
    if "state_dict" not in content:
        return import_official(path, model)
    state = named_tensors(content["state_dict"])
    weights = below(state, "model.")
    if not weights:
        raise CheckpointError(
            f"{path}: no weights of an audio-visual model; its entries are {first_of(list(state))}. Give the "
            "checkpoint of a pre-training, such as avid"
        )
    if model is not None:
        problem = differences(model.state_dict(), weights)
        if problem:
            raise CheckpointError(f"{path}: the weights do not fit the network: {problem}")
    return ImportedCheckpoint(
        model=weights,
        video_bank=_clone(state.get("criterion.video_bank.vectors")),
        audio_bank=_clone(state.get("criterion.audio_bank.vectors")),
        normaliser=state.get("criterion.normaliser", torch.tensor(-1.0)).float().mean(),
        positive_set=_clone(state.get("criterion.positive_set")),
        epoch=int(content.get("epoch", 0)),
        listing_fingerprint=content.get("listing_fingerprint"),
    )


def load_backbone(path: str | Path, modality: Modality = "video") -> dict[str, Tensor]:
    """State dict of one encoder out of any checkpoint that holds it.

    Args:
        path: A Lightning checkpoint of pre-training, a backbone written by ``export``, or a released file.
        modality: Which encoder.

    Returns:
        Names and tensors as the encoder's own ``state_dict``.

    Raises:
        CheckpointError: The file is missing, unreadable, or holds no such encoder.
    """
    if modality not in TOWERS:
        raise ValueError(f"modality: expected 'video' or 'audio', got {modality!r}")
    content = read_checkpoint(path, NEEDED)
    if content.get("format") == BACKBONE_FORMAT:
        if content["modality"] != modality:
            raise CheckpointError(f"{path}: holds the {content['modality']} backbone, but the {modality} one is needed")
        return below(content["state_dict"], "")
    entries = content.get("state_dict", content.get("model"))
    if not isinstance(entries, Mapping):
        raise CheckpointError(
            f"{path}: not a checkpoint with an encoder: expected an entry 'state_dict' or 'model', "
            f"found {first_of(list(content))}"
        )
    tower = TOWERS[modality]
    state = {key.removeprefix("model."): value for key, value in named_tensors(entries).items()}
    backbone = below(state, tower)
    if not backbone:
        raise CheckpointError(
            f"{path}: no {modality} encoder: no entry starts with '{tower}' in {first_of(list(state))}"
        )
    return backbone


def load_into_encoder(
    encoder: nn.Module, path: str | Path, modality: Modality, field: str = "model.pretrained"
) -> None:
    """Give an encoder the weights of a checkpoint, or say which setting does not fit.

    Args:
        encoder: The encoder, changed in place.
        path: See ``load_backbone``.
        modality: Which encoder of the checkpoint.
        field: Name of the setting that gave ``path``, for the message.

    Raises:
        CheckpointError: As ``load_backbone``, or names or shapes differ from the encoder's.
    """
    try:
        backbone = load_backbone(path, modality)
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error
    problem = differences(encoder.state_dict(), backbone)
    if problem:
        raise CheckpointError(
            f"{field}: the {modality} encoder in {path} has another architecture than {modality}_encoder: {problem}. "
            f"Give {modality}_encoder the depth, width and stem it was pre-trained with."
        )
    encoder.load_state_dict(backbone)


def export(checkpoint: str | Path, output: str | Path, layout: Modality = "video") -> Path:
    """Write one encoder of a checkpoint as a small file of its own: no head, no bank, no optimiser.

    Args:
        checkpoint: See ``load_backbone``.
        output: File to write; it appears whole or not at all.
        layout: Which encoder; it is always written with our own names.

    Returns:
        ``output``.
    """
    backbone = load_backbone(checkpoint, layout)
    content = {"format": BACKBONE_FORMAT, "paper": "avid_cma", "modality": layout, "state_dict": backbone}
    return write_whole(output, lambda path: torch.save(content, path))


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _paper_model_on_meta() -> nn.Module:
    with torch.device("meta"):
        return AudioVisualModel(R2Plus1D(), AudioConvNet(), ProjectionHead(), ProjectionHead())
