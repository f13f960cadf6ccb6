"""A row of images for the first captions of a test; the report stacks the rows of all stages."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.files import write_atomically, write_whole
from common.monitoring.figures import Pixels
from common.monitoring.media import log_image, media_folder

if TYPE_CHECKING:
    import lightning.pytorch as pl

#: Captions in a row.
CAPTIONS = 8
#: Smallest displayed size of a picture, and the white gap between two, in pixels.
SHOWN_SIDE = 96
GAP = 4


def first_captions(module: pl.LightningModule) -> tuple[list[str], dict[str, Any]]:
    """The first captions of the test, as drawn in figures, and the batch that holds them, on the module's device."""
    loader: Any = module.trainer.test_dataloaders
    samples = [loader.dataset[number] for number in range(min(CAPTIONS, len(loader.dataset)))]
    batch = {name: value.to(module.device) for name, value in loader.collate_fn(samples).items()}
    return module.trainer.datamodule.texts("test", batch["caption"]), batch  # type: ignore[attr-defined]


def credit_of(module: pl.LightningModule) -> str:
    """Credit line for real or generated pictures; empty if the license of the data needs none."""
    return getattr(module.trainer.datamodule, "credit", "")  # type: ignore[attr-defined]


def draw_real_row(module: pl.LightningModule) -> None:
    """Write the row of the captions' real images, on rank 0 only."""
    if module.trainer.is_global_zero:
        texts, batch = first_captions(module)
        log_image(module, write_row(texts, pixels(batch["image"]), media_folder(module), credit_of(module)))


def pixels(images: Tensor) -> Pixels:
    """Images [B, 3, S, S] in [0, 1] as displayed, [B, S, S, 3]."""
    values = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).cpu().numpy()


def write_row(texts: Sequence[str], images: Pixels, folder: Path, credit: str = "") -> Path:
    """Write images [N, S, S, 3] as `captions.row.png` with their captions as JSON; returns the path."""
    path = folder / "captions.row.png"
    row = credited(side_by_side(images), credit) if credit else side_by_side(images)
    write_whole(path, lambda partial: Image.fromarray(row).save(partial, "PNG"))
    write_atomically(path.with_suffix(".json"), json.dumps(list(texts), ensure_ascii=False) + "\n")
    return path


def side_by_side(images: Pixels) -> Pixels:
    """Images [N, S, S, 3] as one, separated by white; small ones are enlarged to at least `SHOWN_SIDE`."""
    scale = -(-SHOWN_SIDE // images.shape[1])
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = np.full((large.shape[1], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([part for image in large for part in (image, gap)][:-1], axis=1)


def credited(picture: Pixels, credit: str) -> Pixels:
    """A picture [H, W, 3] with a line of text below it, wrapped if it is narrow."""
    lines = textwrap.wrap(credit, max(picture.shape[1] // 7, 1))
    strip = Image.new("RGB", (picture.shape[1], 14 * len(lines) + 2), "white")
    ImageDraw.Draw(strip).multiline_text((1, 1), "\n".join(lines), fill="black", spacing=4)
    return np.concatenate([picture, np.asarray(strip)])
