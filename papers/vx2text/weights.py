"""Loads weights of VX2TEXT's parts from released files or our stages, and exports single parts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from common.encoders.checkpoint_files import (
    CheckpointError,
    below,
    first_of,
    load_exactly,
    read_checkpoint,
    tensors_in,
    write_torch,
)
from papers.vx2text.language_model import LanguageModel
from papers.vx2text.prompt import Modality
from papers.vx2text.tokens import ModalityClassifier

Layout = Literal["kinetics", "panns", "t5"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
#: The part of the model in each layout.
_PART_OF: dict[str, str] = {"kinetics": "video", "panns": "audio", "t5": "language_model"}
#: Prefix of the last layer in released files: R(2+1)D of IG-65M and Kinetics, CNN14 of PANNs.
_HEADS = {"video": "fc.", "audio": "fc_audioset."}
#: Entries of released audio networks that aren't weights: spectrogram filters, which our data module computes.
_NOT_WEIGHTS = ("spectrogram_extractor.", "logmel_extractor.")


def load_classifier(classifier: ModalityClassifier, path: str | Path, modality: Modality, field: str) -> None:
    """Load the weights of a checkpoint into a classifier in place.

    The checkpoint is from a stage with a classifier of this modality, or it is a released file: R(2+1)D with
    torchvision's names and a head `fc` for video, or PANNs' CNN14 with a head `fc_audioset` for audio.

    Source: [3].
    """
    state = _named(path, field)
    load_exactly(
        classifier,
        _trained(state, modality) or _released(state, modality),
        f"{field}: the weights in {path} do not fit model.model.{modality}_classifier",
        ". Give its encoder the layers and widths, and its list of categories, that they were trained with.",
    )


def load_language_model(language_model: LanguageModel, path: str | Path, field: str = "text_pretrained") -> None:
    """Load the weights of one of our stages, or a T5 folder from `save_pretrained`, into a language model in place.

    Source: [6].
    """
    path = Path(path)
    files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
    if path.is_dir() and not files:
        raise CheckpointError(f"{field}: {path} holds neither model.safetensors nor pytorch_model.bin")
    state = _named(files[0] if files else path, field)
    weights = _trained(state, "language_model") or state
    expected = language_model.t5.state_dict()
    # T5 has a single embedding matrix with several names; a file contains at least one of them.
    tied = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    shared = [weights[name] for name in tied if name in weights][:1]
    weights |= {name: value for name in tied if name not in weights for value in shared}
    parts = {name.partition(".")[0] for name in expected}  # an option classifier has no decoder
    unused = "relative_attention_bias.weight"  # T5 uses only the first layer's; old files have one per layer
    load_exactly(
        language_model.t5,
        {
            name: value
            for name, value in weights.items()
            if name in expected or (name.partition(".")[0] in parts and not name.endswith(unused))
        },
        f"{field}: the weights in {path} do not fit model.model.language_model",
        ". Its vocabulary_size, width, layers, attention_heads, key_width and feed_forward_width must be those of the "
        "weights; T5 v1.1 has another feed-forward network and does not fit.",
    )


def export(checkpoint: str | Path, output: str | Path, layout: Layout = "kinetics") -> Path:
    """Write one part of a stage's checkpoint for other code, atomically.

    Layout `kinetics` writes the video classifier with torchvision's names, `panns` writes the audio classifier in
    PANNs' released layout, and `t5` writes the language model as `pytorch_model.bin`.
    """
    state = _named(checkpoint, "--checkpoint")
    part = _PART_OF[layout]
    weights = _trained(state, part)
    if part in _HEADS:
        # A stage that trains one classifier doesn't name its modality; only audio networks start with this layer.
        if weights and ("encoder.bn0.weight" in weights) != (part == "audio"):
            raise CheckpointError(f"--checkpoint: {checkpoint} holds a classifier, but not for {part}")
        weights = {
            name.replace("fc.", _HEADS[part], 1) if name.startswith("fc.") else name.removeprefix("encoder."): value
            for name, value in weights.items()
        }
    if not weights:
        raise CheckpointError(f"--checkpoint: {checkpoint} holds no {part}; its entries are {first_of(list(state))}")
    content = {"model": weights} if layout == "panns" else weights
    return write_torch(output, content)


def _named(path: str | Path, field: str) -> dict[str, Tensor]:
    try:
        content = read_checkpoint(path, "'state_dict' or 'model'")
    except CheckpointError as error:
        raise CheckpointError(f"{field}: {error}") from error
    return tensors_in(content)


def _trained(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    name = "language_model.t5." if part == "language_model" else "classifier."
    whole = f"model.{name}" if part == "language_model" else f"model.tokens.{part}.{name}"
    return below(state, whole) or below(state, name)


def _released(state: dict[str, Tensor], modality: Modality) -> dict[str, Tensor]:
    """Rename a released classifier's weights: the head's start with `fc.`, and all others with `encoder.`."""
    head = _HEADS[modality]
    return {
        f"fc.{name.removeprefix(head)}" if name.startswith(head) else f"encoder.{name}": value.clone()
        for name, value in state.items()
        if not name.startswith(_NOT_WEIGHTS)
    }
