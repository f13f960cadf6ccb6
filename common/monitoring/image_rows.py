"""A row of images for the first captions of a test; the report stacks the rows of all stages."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
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


def draw_row(module: pl.LightningModule, images_of: Callable[[dict[str, Any]], Tensor]) -> None:
    """Write a row of images [B, 3, S, S] in [0, 1], made from the batch of the first captions, on rank 0 only.

    `captions.row.json` holds the captions; a credit that the data need is below the images.
    """
    if not module.trainer.is_global_zero:
        return
    loader: Any = module.trainer.test_dataloaders
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    samples = [loader.dataset[number] for number in range(min(CAPTIONS, len(loader.dataset)))]
    batch = {name: value.to(module.device) for name, value in loader.collate_fn(samples).items()}
    values = (images_of(batch).detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    row = side_by_side(values.permute(0, 2, 3, 1).cpu().numpy())
    if credit := getattr(data, "credit", ""):
        row = credited(row, credit)
    path = media_folder(module) / "captions.row.png"
    write_whole(path, lambda partial: Image.fromarray(row).save(partial, "PNG"))
    texts = data.texts("test", batch["caption"])
    write_atomically(path.with_suffix(".json"), json.dumps(texts, ensure_ascii=False) + "\n")
    log_image(module, path)


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
