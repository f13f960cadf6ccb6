"""Read golden arrays of XMC-GAN by name, converted to our layout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papers.xmc_gan.networks import Discriminator, Generator
from papers.xmc_gan.weights import official_names

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "xmc_gan"


@cache
def arrays(name: str) -> dict[str, np.ndarray[Any, Any]]:
    """Read all arrays of a file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def below(name: str, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a file whose key starts with a prefix, and remove the prefix."""
    return {key.removeprefix(prefix): value for key, value in arrays(name).items() if key.startswith(prefix)}


def tensor(name: str, key: str) -> Tensor:
    """Return one array as a tensor, without changes."""
    return torch.from_numpy(np.array(arrays(name)[key]))


def channels_first(x: Tensor) -> Tensor:
    """Convert [B, H, W, C] to [B, C, H, W]."""
    return x.permute(0, 3, 1, 2).contiguous()


def from_official(network: nn.Module, arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make a network's state dict from the official code's arrays. This is the inverse of `to_official`."""

    def part(name: str, array: Any) -> Tensor:
        value = torch.from_numpy(np.array(array, dtype=np.float32))
        if name.endswith("weight"):
            return value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        return value.reshape(-1)

    return {
        name: torch.cat([part(name, arrays[key]) for key in official_names(name, isinstance(network, Discriminator))])
        for name in network.state_dict()
    }


def networks() -> tuple[Generator, Discriminator]:
    """Make the tiny networks at 128 pixels with their golden weights, in training mode."""
    generator = Generator(width=2, channels=(16, 16, 8, 4, 2, 1), z_dim=8, embedding_dim=12)
    discriminator = Discriminator(width=2, channels=(1, 2, 4, 8, 16, 16), embedding_dim=12)
    generator.load_state_dict(from_official(generator, below("net128", "G/")))
    discriminator.load_state_dict(from_official(discriminator, below("net128", "D/")))
    return generator, discriminator


def captions() -> dict[str, Tensor]:
    """Return words, sentence, length, noise and real images for the tiny networks."""
    return {
        "words": tensor("net128", "word"),
        "sentence": tensor("net128", "sentence"),
        "length": tensor("net128", "max_len")[:, 0].long(),
        "z": tensor("net128", "z"),
        "image": channels_first(tensor("net128", "image_u8").float() / 255),
    }
