"""What a generator makes of the same captions in every stage, and how it gets there.

The paper shows generated images beside those of other models; these figures are our own. All are drawn by the measured
generator from the first captions of the test, with noise that is the same in every stage, so that stages can be
compared picture by picture: `captions.row.png` is one row of such a comparison, which the report puts together.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor

from common.monitoring.figures import Cell, Pixels, Row, chart, image_grid, save_figure
from common.monitoring.image_rows import Shown, credit_of, first_captions, pixels, write_row
from common.monitoring.media import log_image, log_table, media_folder
from papers.xmc_gan.networks import noise_of

if TYPE_CHECKING:
    import lightning.pytorch as pl

#: Noise vectors for each caption.
NOISES = 4
#: Captions whose images are followed along a path between two noise vectors, and the images on it.
PATHS = 4
STEPS = 8
#: Captions whose attention is shown.
ATTENDED = 3
#: Seed of the noise of all figures, whatever the stage's own.
SEED = 0


@torch.no_grad()
def draw(module: Any) -> None:
    """Write all figures into the folder `media` of the run; rank 0 alone draws.

    Args:
        module: an `XMCGANModule` at the end of its test, in evaluation mode.
    """
    if not module.trainer.is_global_zero:
        return
    folder = media_folder(module)
    shown = first_captions(module)
    captions = module.captions(shown.batch)
    count = len(shown.texts)
    images = [module.generate(captions, _noise(module, count, number)) for number in range(NOISES)]
    draw_grid(module, shown, [pixels(part) for part in images], folder)
    log_image(module, write_row(shown.texts, pixels(images[0]), folder, credit_of(module)))
    draw_interpolation(module, shown, captions, folder)
    draw_attention(module, shown, captions, pixels(images[0]), folder)
    draw_curves(module, Path(module.trainer.default_root_dir) / "metrics.csv", folder)


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Points [steps, Z] on the great circle between two noise vectors [Z], whose length changes evenly.

    On a straight line the middle would be shorter than any noise that the generator was trained with.
    """
    share = torch.linspace(0, 1, steps, device=start.device)[:, None]
    lengths = (1 - share) * start.norm() + share * end.norm()
    one, other = start / start.norm(), end / end.norm()
    angle = torch.arccos((one @ other).clamp(-1, 1))
    if angle < 1e-4:
        return lengths * one
    return lengths * (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)


def draw_grid(module: pl.LightningModule, shown: Shown, generated: Sequence[Pixels], folder: Path) -> None:
    """Write `caption_grid.png`: a line for each caption, its real image, then one image for each noise vector.

    Args:
        module: its loggers and its data's credit line are used.
        shown: the captions and their real images.
        generated: for each noise vector the images of all captions [N, S, S, 3].
        folder: where the file goes.
    """
    real = pixels(shown.batch["image"])
    rows = [
        Row(text, [Cell(real[n], "real"), *(Cell(part[n], f"noise {k + 1}") for k, part in enumerate(generated))])
        for n, text in enumerate(shown.texts)
    ]
    figure = image_grid(rows, "The real image of a caption, then generated ones")
    credit = credit_of(module)
    save_figure(module, figure, folder / "caption_grid.png", credit)
    table = [[text, real[n], *(part[n] for part in generated)] for n, text in enumerate(shown.texts)]
    caption = f"caption ({credit})" if credit else "caption"
    columns = [caption, "real", *(f"generated {number + 1}" for number in range(len(generated)))]
    log_table(module, "caption_grid_table", columns, table)


def draw_interpolation(module: Any, shown: Shown, captions: Any, folder: Path) -> None:
    """Write `interpolation.png`: the same caption with noise that turns from one vector to another.

    Args:
        module: generates the images, and its loggers are used.
        shown, captions: texts and vectors of the captions.
        folder: where the file goes.
    """
    lines = min(PATHS, len(shown.texts))
    start, end = (_noise(module, lines, number) for number in (0, 1))
    rows = []
    for line in range(lines):
        own = type(captions)(*(value[line : line + 1].expand(STEPS, *value.shape[1:]) for value in captions))
        images = pixels(module.generate(own, slerp(start[line], end[line], STEPS)))
        rows.append(Row(shown.texts[line], [Cell(image) for image in images]))
    figure = image_grid(rows, "Noise turns from one vector to another, the caption stays")
    save_figure(module, figure, folder / "interpolation.png", credit_of(module))


def draw_attention(module: Any, shown: Shown, captions: Any, images: Pixels, folder: Path) -> None:
    """Write `attention.png`: how much the regions of the generator's map attend to each word.

    Args:
        module: its measured generator attends, and its loggers are used.
        shown, captions: texts and vectors of the captions.
        images: generated with the first noise vector [N, S, S, 3].
        folder: where the file goes.
    """
    lines = min(ATTENDED, len(shown.texts))
    own = type(captions)(*(value[:lines] for value in captions))
    weights = module.measured.attention(_noise(module, len(shown.texts), 0)[:lines], *own).float().cpu().numpy()
    words = [words_of(text, module.trainer.datamodule.tokenizer) for text in shown.texts[:lines]]
    rows = []
    for text, image, maps, spoken in zip(shown.texts, images, weights, words):
        tops = maps.max(axis=(1, 2))
        shades = maps[: len(spoken)] / tops[: len(spoken), None, None].clip(min=1e-9)
        colored = (colormaps["viridis"](shades)[..., :3] * 255).astype(np.uint8)
        texts = (f"{word[:12]}\nup to {top:.2f}" for word, top in zip(spoken, tops))
        rows.append(Row(text, [Cell(image), *(Cell(shade, below) for shade, below in zip(colored, texts))]))
    figure = image_grid(rows, "Attention of regions over words: brighter regions attend more; scaled for each word")
    save_figure(module, figure, folder / "attention.png", credit_of(module))


def words_of(text: str, tokenizer: Any) -> list[str]:
    """What each token of a caption says; the boundary tokens, which say nothing, are named `[start]` and `[end]`."""
    tokens = tokenizer.encode(text)
    inner = [tokenizer.decode([token]).strip() or "?" for token in tokens[1:-1]]
    return ["[start]", *inner, "[end]"]


#: Panels of the curves: title and start of the metrics' names.
PANELS = {
    "hinge losses": ("discriminator_hinge", "generator_hinge"),
    "contrastive losses of real images": ("real_sentence_loss", "real_word_loss"),
    "contrastive losses of generated images": (
        "fake_sentence_loss",
        "fake_word_loss",
        "image_d_loss",
        "image_net_loss",
    ),
    "share of pairs that are matched": (
        "real_sentence_accuracy",
        "real_word_accuracy",
        "fake_sentence_accuracy",
        "fake_word_accuracy",
        "image_d_accuracy",
        "image_net_accuracy",
    ),
}


def draw_curves(module: pl.LightningModule, metrics: Path, folder: Path) -> None:
    """Write `curves.png`: losses and matched pairs of real and generated images over training; none without a file.

    Args:
        module: only its loggers are used.
        metrics: `metrics.csv` of the run, in rows of step, name and value.
        folder: where the file goes.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    if metrics.is_file():
        with metrics.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                curves.setdefault(row["name"].removeprefix("train/"), []).append(
                    (int(row["step"]), float(row["value"]))
                )
    panels = {title: [n for n in names if n in curves] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure, axes = chart(1, len(panels), size=(4 * len(panels), 3))
    for axis, (title, names) in zip(axes[0], panels.items()):
        for name in names:
            steps, values = zip(*curves[name])
            axis.plot(steps, values, linewidth=0.9, label=name.rpartition("_")[0].replace("_", " "))
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("step", fontsize=7)
        axis.legend(fontsize=6)
    save_figure(module, figure, folder / "curves.png")


def _noise(module: Any, count: int, number: int) -> Tensor:
    """The noise that all stages share: of the first captions [count, Z], the `number`-th vector of each."""
    index = torch.arange(count) * NOISES + number
    return noise_of(index, module.generator.z_dim, SEED).to(module.device)
