"""Reads image backbones from our checkpoints and released ones, and exports them for other libraries."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from safetensors.torch import save_file
from torch import Tensor, nn

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
from common.encoders.image import ImageResNet
from common.files import write_whole

Layout = Literal["torchvision", "timm", "detectron2"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
#: Allowed suffixes of an exported file; the first is the default. detectron2 recognizes its own layout by the suffix.
SUFFIXES: dict[Layout, tuple[str, ...]] = {
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".safetensors", ".pth", ".pt"),
    "detectron2": (".pkl",),
}
#: Prefix of the backbone in a state dict of: MCT's pre-training, our other stages, MoCo, VirTex, the backbone alone.
PREFIXES = ("model.image.backbone.", "encoder.", "image_encoder.", "encoder_q.", "visual.cnn.", "")
NEEDED = "'state_dict' or 'model'"


def load_backbone(path: str | Path) -> dict[str, Tensor]:
    """Read the image backbone of a checkpoint, with torchvision's names and without head.

    Accepts files of our stages, `export`, MoCo, VirTex, torchvision and timm, from `torch.save` or in safetensors.

    Source: [11].
    """
    content = read_checkpoint(path, NEEDED)
    state = tensors_in(content)
    for prefix in PREFIXES:
        if f"{prefix}conv1.weight" in state:
            return with_counters({name: x for name, x in below(state, prefix).items() if not name.startswith("fc.")})
    places = ", ".join(f"{prefix}conv1.weight" for prefix in PREFIXES)
    raise CheckpointError(
        f"{path}: no image backbone: expected one of {places}, found {first_of(list(state) or list(content))}"
    )


def check(path: Path, module: nn.Module, data: object) -> None:
    """Check that a file has an image backbone that fits the pre-training network."""
    encoder = next(part for part in module.modules() if isinstance(part, ImageResNet))
    if problem := differences(encoder.state_dict(), load_backbone(path)):
        raise CheckpointError(f"{path}: the backbone does not fit the network: {problem}")


def export(checkpoint: str | Path, output: str | Path, layout: Layout = "torchvision") -> Path:
    """Write the image backbone of a checkpoint for another library. The suffix of `output` selects the format.

    A ResNet-50 in layout `torchvision` loads into `torchvision.models.resnet50`, which also needs a classifier `fc`. In
    layout `timm`, it loads into `timm.create_model("resnet50", num_classes=0)`. For `detectron2`, set `MODEL.WEIGHTS`
    to the file.

    Source: [11].
    """
    suffix = Path(output).suffix
    if suffix not in SUFFIXES[layout]:
        raise ValueError(
            f"output: a file in layout {layout} must end in {' or '.join(SUFFIXES[layout])}, got {str(output)!r}"
        )
    backbone = {name: value.contiguous() for name, value in load_backbone(checkpoint).items()}
    if layout == "detectron2":
        arrays = {
            detectron2_name(name): (value.float() if value.is_floating_point() else value).numpy()
            for name, value in backbone.items()
        }
        # With an author, detectron2 matches the names of a foreign file. Otherwise, loading fails or skips the
        # statistics of batch normalization.
        content = {"model": arrays, "__author__": "MCT", "matching_heuristics": True}
        return write_whole(output, lambda path: _pickle(content, path))
    if suffix == ".safetensors":
        return write_whole(output, lambda path: save_file(backbone, path, metadata={"format": "pt"}))
    return write_torch(output, backbone)


def detectron2_name(name: str) -> str:
    """Translate a tensor name of torchvision's residual networks to detectron2's.

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


class _PortablePickler(pickle.Pickler):
    """Pickles numpy arrays so that numpy before 1.26 can read the file. It can't read numpy 2's default pickles."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _pickle(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        _PortablePickler(file, protocol=4).dump(content)
