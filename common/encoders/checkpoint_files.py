"""Reading and writing files of weights: safely, whole or not at all, with errors that name the file."""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message names the file and says why."""


def read_checkpoint(path: str | Path, needed: str = "'state_dict'") -> dict[str, Any]:
    """Contents of a checkpoint: a file of `torch.save`, old or new, or of safetensors.

    Only tensors and plain data are accepted, so a file from a stranger cannot run anything. The tensors are backed by
    the file where its format allows it: clone those that outlive it.

    Args:
        path: the file.
        needed: entries that are worth saving from a file that holds more than plain data, for the message.

    Returns:
        The named entries.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or holds more than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        if _is_safetensors(path):
            return load_file(path)
        # Mapped, so that a backbone is read without the gigabytes of queues, banks and optimiser beside it. Only the
        # archive format can be mapped; files of before PyTorch 1.6, as released ones may be, are read as a whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors and plain data, or is no checkpoint, and is not opened for safety. If "
            f"you trust it, save its {needed} alone into a new file."
        ) from error
    except Exception as error:  # A damaged file can make its reader raise whatever the parsing meets.
        raise CheckpointError(f"{path}: damaged or no checkpoint ({error or type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a checkpoint with named entries, found a {type(content).__name__}")
    return content


def require_intact(path: str | Path) -> None:
    """Compare the checksums that the archive format keeps of its parts, which a mapped file is read without.

    Raises:
        CheckpointError: a part is damaged; the message names it.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, the checksum of its part {damaged} is another")


def named_tensors(entries: Any) -> dict[str, Tensor]:
    """Tensors of a state dict, without what wrapping in data parallelism and compilation put into their names.

    Args:
        entries: the state dict; anything else has no tensors.
    """
    if not isinstance(entries, Mapping):
        return {}
    return {
        str(key).replace("_orig_mod.", "").removeprefix("module."): value
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Copies of the tensors whose name starts with a prefix, named without it."""
    return {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected, or of another shape; empty when all fits."""
    shapes = [
        f"{key} {list(found[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    parts = [
        ("missing", [key for key in expected if key not in found]),
        ("unexpected", [key for key in found if key not in expected]),
        ("other shape", shapes),
    ]
    return "; ".join(f"{len(names)} {what}: {first_of(names)}" for what, names in parts if names)


def first_of(names: Sequence[Any], limit: int = 6) -> str:
    """The first of some names, and how many more there are."""
    listed = ", ".join(str(name) for name in names[:limit]) or "nothing"
    return listed if len(names) <= limit else f"{listed}, and {len(names) - limit} more"


def _is_safetensors(path: Path) -> bool:
    # Eight bytes of length, then a JSON object; files of torch start with "PK" or the marks of a pickle.
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and not start.startswith((b"PK", b"\x80"))
