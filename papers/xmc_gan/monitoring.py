"""Figures of generated images for the same captions in every stage.

The paper compares with other models; these figures are ours. The measured generator renders the first test captions
with the same noise in every stage, so stages can be compared image by image: `captions.row.png` is one row of the
comparison in the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor

from common.monitoring.figures import Cell, Pixels, Row, image_grid, save_figure
from common.monitoring.image_rows import credit_of, first_captions, pixels, write_row
from common.monitoring.media import log_image, log_table, media_folder
from papers.xmc_gan.networks import noise_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

#: Noise vectors per caption.
NOISES = 4
#: Captions to interpolate between two noise vectors, and images per path.
PATHS = 4
STEPS = 8
#: Captions with attention maps.
ATTENDED = 3
#: Noise seed of all figures, independent of the stage's seed.
SEED = 0


@torch.no_grad()
def draw(module: Any) -> None:
    """Write all figures to the run's `media` folder, on rank 0 only, at the end of an `XMCGANModule`'s test."""
    if not module.trainer.is_global_zero:
        return
    folder = media_folder(module)
    texts, batch = first_captions(module)
    captions = module.captions(batch)
    images = [module.measured(_noise(module, len(texts), number), *captions) for number in range(NOISES)]
    draw_grid(module, texts, pixels(batch["image"]), [pixels(part) for part in images], folder)
    log_image(module, write_row(texts, pixels(images[0]), folder, credit_of(module)))
    draw_interpolation(module, texts, captions, folder)
    draw_attention(module, texts, captions, pixels(images[0]), folder)


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Points [steps, Z] on the great circle between noise vectors [Z]; linear ones would be too short in the middle."""
    share = torch.linspace(0, 1, steps, device=start.device)[:, None]
    lengths = (1 - share) * start.norm() + share * end.norm()
    one, other = start / start.norm(), end / end.norm()
    angle = torch.arccos((one @ other).clamp(-1, 1))
    if angle < 1e-4:
        return lengths * one
    return lengths * (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)


def draw_grid(
    module: pl.LightningModule, texts: Sequence[str], real: Pixels, generated: Sequence[Pixels], folder: Path
) -> None:
    """Write `caption_grid.png`: a row per caption with its real image and, per noise vector, one of [N, S, S, 3]."""
    rows = [
        Row(text, [Cell(real[n], "real"), *(Cell(part[n], f"noise {k + 1}") for k, part in enumerate(generated))])
        for n, text in enumerate(texts)
    ]
    figure = image_grid(rows, "The real image of a caption, then generated ones")
    credit = credit_of(module)
    save_figure(module, figure, folder / "caption_grid.png", credit)
    table = [[text, real[n], *(part[n] for part in generated)] for n, text in enumerate(texts)]
    caption = f"caption ({credit})" if credit else "caption"
    columns = [caption, "real", *(f"generated {number + 1}" for number in range(len(generated)))]
    log_table(module, "caption_grid_table", columns, table)


def draw_interpolation(module: Any, texts: Sequence[str], captions: Any, folder: Path) -> None:
    """Write `interpolation.png`: each caption with noise interpolated between two vectors."""
    lines = min(PATHS, len(texts))
    start, end = (_noise(module, lines, number) for number in (0, 1))
    rows = []
    for line in range(lines):
        own = type(captions)(*(value[line : line + 1].expand(STEPS, *value.shape[1:]) for value in captions))
        images = pixels(module.measured(slerp(start[line], end[line], STEPS), *own))
        rows.append(Row(texts[line], [Cell(image) for image in images]))
    figure = image_grid(rows, "Noise turns from one vector to another, the caption stays")
    save_figure(module, figure, folder / "interpolation.png", credit_of(module))


def draw_attention(module: Any, texts: Sequence[str], captions: Any, images: Pixels, folder: Path) -> None:
    """Write `attention.png`: attention of the generator's regions to each word, for images [N, S, S, 3]."""
    lines = min(ATTENDED, len(texts))
    own = type(captions)(*(value[:lines] for value in captions))
    weights = module.measured.attention(_noise(module, len(texts), 0)[:lines], *own).float().cpu().numpy()
    tokenizer = module.trainer.datamodule.tokenizer
    rows = []
    for text, image, maps in zip(texts, images, weights):
        inner = [tokenizer.decode([token]).strip() or "?" for token in tokenizer.encode(text)[1:-1]]
        spoken = ["[start]", *inner, "[end]"]
        tops = maps.max(axis=(1, 2))
        shades = maps[: len(spoken)] / tops[: len(spoken), None, None].clip(min=1e-9)
        colored = (colormaps["viridis"](shades)[..., :3] * 255).astype(np.uint8)
        notes = (f"{word[:12]}\nup to {top:.2f}" for word, top in zip(spoken, tops))
        rows.append(Row(text, [Cell(image), *(Cell(shade, note) for shade, note in zip(colored, notes))]))
    figure = image_grid(rows, "Attention of regions over words: brighter regions attend more; scaled for each word")
    save_figure(module, figure, folder / "attention.png", credit_of(module))


def _noise(module: Any, count: int, number: int) -> Tensor:
    """Noise shared by all stages: the `number`-th vector of each of the first captions [count, Z]."""
    index = torch.arange(count) * NOISES + number
    return noise_of(index, module.generator.z_dim, SEED).to(module.device)
