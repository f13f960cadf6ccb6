"""Image backbones out of our own and released checkpoints, and into the layouts of other libraries."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from common.encoders.checkpoint_files import (
    CheckpointError,
    below,
    differences,
    first_of,
    read_checkpoint,
    tensors_in,
    with_counters,
    write_torch,
)
from common.files import write_whole

Layout = Literal["torchvision", "timm", "detectron2"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
#: What the name of an exported file may end with; the first is the usual one. detectron2 tells its own layout from
#: foreign ones by the suffix alone.
SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".safetensors", ".pth", ".pt"),
    "detectron2": (".pkl",),
}
#: Where a backbone lies in a state dict: pre-trained by MCT, trained in any other way of ours, MoCo, VirTex, alone.
PREFIXES = ("model.image.backbone.", "encoder.", "image_encoder.", "encoder_q.", "visual.cnn.", "")
NEEDED = "'state_dict' or 'model'"


@dataclass(frozen=True)
class ImportedMoCo:
    """What a released checkpoint of MoCo holds.

    Attributes:
        query, key: the trained and the momentum backbone, under torchvision's names.
        query_head, key_head: their heads, named as in `ProjectionHead.projection`; the single layer of version 1 is
            named `weight`, `bias`.
        queue: the keys as rows [K, d].
        pointer: row that is written next.
        epoch: epochs trained.
    """

    query: dict[str, Tensor]
    key: dict[str, Tensor]
    query_head: dict[str, Tensor]
    key_head: dict[str, Tensor]
    queue: Tensor
    pointer: int
    epoch: int


@dataclass(frozen=True)
class ImportedVirTex:
    """What a released checkpoint of VirTex holds.

    Attributes:
        visual: the image backbone, under torchvision's names.
        textual: the captioning heads under the file's own names, `textual.*` and, of a bidirectional one,
            `backward_textual.*`.
        iteration: iterations trained.
    """

    visual: dict[str, Tensor]
    textual: dict[str, Tensor]
    iteration: int


def load_backbone(path: str | Path) -> dict[str, Tensor]:
    """Image backbone out of any checkpoint that holds one, recognized by the names of its tensors.

    Args:
        path: a Lightning checkpoint of pre-training or of a transfer protocol, a file of `export`, a checkpoint of MoCo
            or VirTex, or a state dict of torchvision or timm; made by `torch.save` or in the safetensors format.

    Returns:
        State dict under the names of torchvision's residual networks, without classifier or head.

    Source: [11].
    """
    content = read_checkpoint(path, NEEDED)
    state = tensors_in(content)
    for prefix in PREFIXES:
        if f"{prefix}conv1.weight" in state:
            return with_counters(_without_classifier(below(state, prefix)))
    places = ", ".join(f"{prefix}conv1.weight" for prefix in PREFIXES)
    raise CheckpointError(
        f"{path}: no image backbone: expected one of {places}, found {first_of(list(state) or list(content))}"
    )


def import_moco(path: str | Path) -> ImportedMoCo:
    """Read a checkpoint of the released MoCo code, with all that its training needs to go on.

    Args:
        path: the released file, with the query and the momentum encoder and the queue under `state_dict`.

    Source: [11].
    """
    content = read_checkpoint(path, NEEDED)
    state = tensors_in(content)
    queue, pointer = state.get("queue"), state.get("queue_ptr")
    query, key = (_without_classifier(below(state, f"encoder_{which}.")) for which in "qk")
    if not query or not key or queue is None or pointer is None:
        raise CheckpointError(
            f"{path}: not a checkpoint of MoCo: expected module.encoder_q.*, module.encoder_k.*, module.queue and "
            f"module.queue_ptr, found {first_of(list(state) or list(content))}"
        )
    problem = differences(query, key)
    if problem:
        raise CheckpointError(f"{path}: the momentum encoder differs from the query encoder: {problem}")
    if queue.ndim != 2 or pointer.numel() != 1 or not 0 <= int(pointer) < queue.shape[1]:
        raise CheckpointError(
            f"{path}: expected a queue [d, K] with a pointer below K, found shape {list(queue.shape)} and a pointer "
            f"of {pointer.tolist()}"
        )
    return ImportedMoCo(
        query=with_counters(query),
        key=with_counters(key),
        query_head=below(state, "encoder_q.fc."),
        key_head=below(state, "encoder_k.fc."),
        queue=queue.t().clone(memory_format=torch.contiguous_format),
        pointer=int(pointer),
        epoch=_count(content, "epoch"),
    )


def import_virtex(path: str | Path) -> ImportedVirTex:
    """Read a checkpoint of the released VirTex code with its captioning heads.

    Args:
        path: the released file of a whole model. The backbone alone, as their hub has it, is for `load_backbone`.

    Source: [11].
    """
    content = read_checkpoint(path, NEEDED)
    state = tensors_in(content)
    textual = {key: value.clone() for key, value in state.items() if key.startswith(("textual.", "backward_textual."))}
    visual = below(state, "visual.cnn.")
    if not textual or not visual:
        raise CheckpointError(
            f"{path}: not a whole model of VirTex: expected visual.cnn.* and textual.* under 'model', found "
            f"{first_of(list(state) or list(content))}"
        )
    return ImportedVirTex(
        visual=with_counters(_without_classifier(visual)), textual=textual, iteration=_count(content, "iteration")
    )


def export(checkpoint: str | Path, output: str | Path, layout: Layout = "torchvision") -> Path:
    """Write the image backbone of a checkpoint for another library: no head, no queue, no optimizer.

    A ResNet-50 of the layout `torchvision` loads into `torchvision.models.resnet50` but for the classifier `fc`, one of
    `timm` strictly into `timm.create_model("resnet50", num_classes=0)`, and one of `detectron2` is a value for
    `MODEL.WEIGHTS`. The first two can be read back with `load_backbone`.

    Args:
        checkpoint: see `load_backbone`.
        output: file to write; it appears whole or not at all. Its suffix, one of `SUFFIXES[layout]`, says which format.
        layout: whose names.

    Returns:
        `output`.

    Source: [11].
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    suffix = Path(output).suffix
    if suffix not in SUFFIXES[layout]:
        raise ValueError(
            f"output: a file of the layout {layout} ends in {' or '.join(SUFFIXES[layout])}, got {str(output)!r}"
        )
    backbone = {name: value.contiguous() for name, value in load_backbone(checkpoint).items()}
    if layout == "detectron2":
        # With an author the file counts as a foreign one, whose names are matched; without, loading fails or leaves
        # the statistics of batch normalization out.
        content = {"model": _arrays(backbone), "__author__": "MCT", "matching_heuristics": True}
        return write_whole(output, lambda path: _pickle(content, path))
    if suffix == ".safetensors":
        return write_whole(output, lambda path: save_file(backbone, path, metadata={"format": "pt"}))
    return write_torch(output, backbone)


def detectron2_name(name: str) -> str:
    """Name in detectron2's residual networks of a tensor in torchvision's.

    Examples:
        >>> detectron2_name("layer1.0.downsample.1.weight")
        'res2.0.shortcut.norm.weight'

    Source: [11].
    """
    parts = name.split(".")
    if parts[0].startswith("layer"):
        parts[0] = f"res{int(parts[0].removeprefix('layer')) + 1}"
    else:
        parts.insert(0, "stem")
    renamed: list[str] = []
    for part in parts:
        if part.startswith("bn"):
            renamed += [f"conv{part.removeprefix('bn')}", "norm"]
        elif renamed and renamed[-1] == "downsample":
            renamed[-1:] = ["shortcut"] if part == "0" else ["shortcut", "norm"]
        else:
            renamed.append(part)
    return ".".join(renamed)


def _without_classifier(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def _count(content: Mapping[str, Any], name: str) -> int:
    found = content.get(name)
    return found if isinstance(found, int) else 0


def _arrays(backbone: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {
        detectron2_name(name): (value.float() if value.is_floating_point() else value).numpy()
        for name, value in backbone.items()
    }


class _PortablePickler(pickle.Pickler):
    """Names nothing of numpy but its arrays: the usual pickles of numpy 2 cannot be read with versions before 1.26."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _pickle(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        _PortablePickler(file, protocol=4).dump(content)
