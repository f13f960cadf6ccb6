"""Read and write weight files safely and atomically."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.files import message_of, write_whole

#: Prefixes of the classifier in torchvision's and timm's networks; an encoder has none.
CLASSIFIERS = ("fc.", "classifier.", "head.")


#: Functions that pickles of NumPy data call, as in PANNs' files. NumPy 2 renamed `core` to `_core`.
_BUILDERS = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    *((build, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name, build in _BUILDERS.items()),
]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used. The message names the file and the reason."""


def read_checkpoint(path: str | Path, needed: str = "'state_dict'") -> dict[str, Any]:
    """Load a checkpoint written by `torch.save` (old or new format) or safetensors.

    Accepts only tensors and plain data, so an untrusted file cannot run code. Tensors may be mapped from the file:
    clone tensors that you need after the file is gone. `needed` describes the required content in error messages.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder: give the file in it" if path.is_dir() else "no such checkpoint file"
        raise CheckpointError(f"{path}: {problem}")
    try:
        if _is_safetensors(path):
            return load_file(path)
        # Memory-mapped, so that reading a backbone skips gigabytes of queues, banks and optimizer state. Files older
        # than PyTorch 1.6 cannot be mapped.
        with torch.serialization.safe_globals(_NUMPY):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint, or it holds more than tensors and plain data, so it was not opened. If you "
            f"trust it, save only its {needed} to a new file."
        ) from error
    except Exception as error:  # Reading a damaged file can raise anything.
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({message_of(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a checkpoint with named entries, found a {type(content).__name__}")
    return content


def require_intact(path: str | Path) -> None:
    """Check the checksums of a zip archive. Reading a memory-mapped file skips this check."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # A damaged archive can raise anything, too.
        raise CheckpointError(f"{path}: damaged ({message_of(error)})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, the checksum of its part {damaged} does not match")


def named_tensors(entries: Any) -> dict[str, Tensor]:
    """Return a state dict's tensors, with `module.` and `_orig_mod.` removed from names. Empty if not a state dict."""
    if not isinstance(entries, Mapping):
        return {}
    return {
        str(key).replace("_orig_mod.", "").removeprefix("module."): value
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def tensors_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors under `state_dict`, or else under `model`, or else at the top level."""
    return named_tensors(content.get("state_dict", content.get("model", content)))


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copy the tensors whose names start with a prefix, and remove the prefix."""
    return {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Describe missing, unexpected, wrongly shaped and non-finite tensors in `found`. Empty if all tensors fit."""
    shapes = [
        f"{key} {_form(found[key])} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and _form(found[key]) != str(list(value.shape))
    ]
    parts = [
        ("missing", [key for key in expected if key not in found]),
        ("unexpected", [key for key in found if key not in expected]),
        ("other shape", shapes),
        # A file of a few bytes can claim any shape, so values count only if all shapes fit.
        ("not finite", [] if shapes else [key for key in expected if key in found and not _finite(found[key])]),
    ]
    return "; ".join(f"{len(names)} {what}: {first_of(names)}" for what, names in parts if names)


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.float().isfinite().all())


def _form(value: Tensor) -> str:
    """Describe a tensor: shape, and any layout, quantization, type or missing content that prevents copying it."""
    kinds = {str(value.layout): value.layout != torch.strided, "quantized": value.is_quantized, "meta": value.is_meta}
    kinds["complex"] = value.is_complex()
    return " ".join([str(list(value.shape)), *(kind for kind, applies in kinds.items() if applies)])


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor], problem: str, advice: str = "") -> None:
    """Load the weights, or raise an error that says what doesn't fit and what to do."""
    weights = with_counters(dict(weights))
    if misfit := differences(module.state_dict(), weights):
        raise CheckpointError(f"{problem}: {misfit}{advice}")
    module.load_state_dict(weights)


def first_of(names: Sequence[Any], limit: int = 6) -> str:
    """List the first few names, and say how many more there are."""
    listed = ", ".join(str(name) for name in names[:limit]) or "nothing"
    return listed if len(names) <= limit else f"{listed}, and {len(names) - limit} more"


def with_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the step counters of batch normalization, which some old torchvision files lack."""
    for name in [name for name in state if name.endswith(".running_var")]:
        state.setdefault(f"{name.removesuffix('running_var')}num_batches_tracked", torch.tensor(0))
    return state


def load_encoder(encoder: nn.Module, path: str | Path, prefixes: Sequence[str]) -> None:
    """Load an encoder's weights from a checkpoint.

    Every tensor must fit, except the classifier's, which the encoder may lack. If the encoder has a method
    `released_names`, the tensors are renamed with it first.

    Args:
        encoder: changed in place, but only if every tensor fits.
        path: a Lightning checkpoint, a released checkpoint, or a state dict, written by `torch.save` or safetensors.
        prefixes: possible prefixes of the encoder's tensors in the file; `""` means no prefix. The first match is used.
    """
    try:
        content = read_checkpoint(path, "'state_dict' or 'model'")
    except CheckpointError as error:
        raise CheckpointError(f"model.pretrained: {error}") from error
    state = tensors_in(content)
    expected = encoder.state_dict()
    places = [prefix for prefix in prefixes if any(prefix + name in state for name in expected)]
    if not places:
        listed = ", ".join(f"{prefix}{next(iter(expected), '*')}" for prefix in prefixes)
        raise CheckpointError(
            f"model.pretrained: no encoder in {path}: expected names like one of {listed}; found "
            f"{first_of(list(state) or list(content))}. If it has another prefix, add that to encoder_prefixes."
        )
    prefix = places[0]
    # `below` would copy. A file of a few bytes can claim any shape, so shapes are compared before a copy.
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    found = {name: own[name] for name in own if name in expected or not name.startswith(CLASSIFIERS)}
    if callable(rename := getattr(encoder, "released_names", None)):
        found = rename(found)
    load_exactly(
        encoder,
        found,
        f"model.pretrained: the encoder in {path} (prefix {prefix!r}) does not match the configured "
        f"{type(encoder).__name__}",
        ". Configure the encoder with the sizes that it was pre-trained with.",
    )


def write_torch(output: str | Path, content: Mapping[str, Any]) -> Path:
    """Write tensors and plain data atomically with `torch.save`."""
    if Path(output).suffix in (".safetensors", ".npz", ".pkl"):
        raise ValueError(f"output: expected a file for torch.save, such as weights.pth, got {str(output)!r}")
    return write_whole(output, lambda path: torch.save(content, path))


def _is_safetensors(path: Path) -> bool:
    # Safetensors starts with eight bytes of length and a JSON object, torch with "PK" or a pickle opcode.
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and not start.startswith((b"PK", b"\x80"))
