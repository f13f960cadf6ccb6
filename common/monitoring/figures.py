"""Write figures and rows of images atomically, and log them to W&B; imports matplotlib lazily."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.files import write_atomically, write_whole
from common.monitoring.media import log_image, media_folder

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from matplotlib.figure import Figure
if TYPE_CHECKING:
    import lightning.pytorch as pl


Pixels = npt.NDArray[np.uint8]

RIGHT, WRONG = "tab:green", "tab:red"
#: Size of a grid's image in inches; height of a line of text, relative to an image.
INCHES, TEXT_LINE = 1.1, 0.15
#: Replaces characters that no font on this machine has.
NO_FONT = "[no font]"
#: Fonts for Japanese and Chinese on Linux, macOS and Windows.
ASIAN_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans JP", "Noto Sans SC", "Source Han Sans", "IPAGothic",
    "IPAexGothic", "TakaoGothic", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans",
    "PingFang SC", "Arial Unicode MS", "Yu Gothic", "MS Gothic", "Microsoft YaHei", "SimHei",
)  # fmt: skip


class GridCell(NamedTuple):
    """A cell of a grid: an image [H, W, 3] or nothing, the text below it, and the color of its frame."""

    image: Pixels | None
    text: str = ""
    color: str | None = None


class GridRow(NamedTuple):
    """A row of a grid and the text above it."""

    title: str
    cells: Sequence[GridCell]


def preview_of(dataset: Any, item: int) -> Pixels:
    """Return `dataset.preview(item)`, or a gray pixel for a clip without a readable frame."""
    from common.data.media import MediaError

    try:
        return dataset.preview(item)
    except MediaError:
        return np.full((1, 1, 3), 127, dtype=np.uint8)


def save_figure(module: pl.LightningModule, figure: Figure, path: Path, credit: str = "") -> None:
    """Write a figure as PNG and log it. If `credit` is given, add it as a line, as some picture licenses require."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    texts: list[Any] = figure.findobj(Text)
    if any(NO_FONT in text.get_text() for text in texts):
        credit = f"{credit}  {NO_FONT}: this machine has no font for these characters.".strip()
    if credit:
        texts.append(figure.supxlabel(credit, fontsize=4))
    for text in texts:
        text.set_fontfamily(_fonts())
    # `savefig` would draw the figure twice, the first time only for the layout.
    figure.set_dpi(110)
    write_whole(path, FigureCanvasAgg(figure).print_png)
    log_image(module, path)


def chart(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4, 3)) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def image_grid(rows: Sequence[GridRow], title: str = "") -> Figure:
    """Draw rows of images, with a title above each row and texts below the images."""
    # All images share one `Axes`, because one for each image would take seconds to lay out.
    columns = max(len(row.cells) for row in rows)
    below = max((cell.text.count("\n") + 1 for row in rows for cell in row.cells if cell.text), default=0)
    images = [cell.image for row in rows for cell in row.cells if cell.image is not None]
    tallest = max((image.shape[0] / max(image.shape[:2]) for image in images), default=1.0)
    height = tallest + TEXT_LINE * (1.5 + below)
    figure, axis = _canvas(columns, len(rows) * height, title)
    for number, row in enumerate(rows):
        top = number * height + 1.5 * TEXT_LINE
        name = axis.text(0.03, top - 0.04, plain(row.title, 20 * columns), fontsize=6.5, va="bottom")
        name.set_in_layout(False)
        for column, cell in enumerate(row.cells):
            if cell.image is not None:
                _place(axis, cell.image, column, top, tallest, cell.color)
            lines = "\n".join(plain(line, 24) for line in cell.text.split("\n"))
            axis.text(column + 0.5, top + tallest, lines, fontsize=5.5, ha="center", va="top")
    return figure


def plain(text: str, longest: int = 200) -> str:
    """Prepare text for a figure: one line, truncated, no formulas. `NO_FONT` replaces characters without a font."""
    text = " ".join(text.split())
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    drawn = "".join(character if ord(character) in _characters() else "\0" for character in text)
    return re.sub("\0( ?\0)*", NO_FONT, drawn).replace("$", r"\$")


def _canvas(width: float, height: float, title: str) -> tuple[Figure, Any]:
    """Make a figure with axes in units of images, x to the right and y down."""
    figure, axes = chart(size=(INCHES * width, INCHES * height + 0.3))
    axis = axes[0, 0]
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal", autoscale_on=False)
    axis.axis("off")
    figure.set_facecolor("gainsboro")  # images may be white
    figure.suptitle(title, fontsize=8)
    return figure, axis


def _place(axis: Any, image: Pixels, left: float, top: float, tallest: float, color: str | None = None) -> None:
    """Draw an image as large as fits into a cell of width 1. If `color` is given, draw a frame."""
    height, width = (0.46 * side / max(image.shape[:2]) for side in image.shape[:2])
    x, y = left + 0.5, top + tallest / 2
    axis.imshow(image, extent=(x - width, x + width, y + height, y - height))
    if color is not None:
        from matplotlib.patches import Rectangle

        box = Rectangle((x - width, y - height), 2 * width, 2 * height, fill=False, linewidth=2, edgecolor=color)
        axis.add_patch(box)


@cache
def _fonts() -> list[str]:
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in ASIAN_FONTS if name in installed)]


@cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    files = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in _fonts()]
    return frozenset(code for file in files for code in font_manager.get_font(file).get_charmap())


# -- a row of images ---------------------------------------------------------------------------------------------------

#: Captions in a row.
CAPTIONS = 8
#: Smallest displayed size of a picture, and the white gap between two pictures, in pixels.
SHOWN_SIDE = 96
GAP = 4


def draw_row(module: pl.LightningModule, images_of: Callable[[dict[str, Any]], Tensor]) -> None:
    """Write a row of images for the first captions, on rank 0 only. `images_of` returns [B, 3, S, S] in [0, 1].

    `captions.row.json` holds the captions. If the data require a credit, it is printed below the images.
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
    """Join images [N, S, S, 3] in a row with white gaps. Enlarge small images to at least `SHOWN_SIDE` pixels."""
    scale = -(-SHOWN_SIDE // images.shape[1])
    large = images.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = np.full((large.shape[1], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([part for image in large for part in (image, gap)][:-1], axis=1)


def credited(picture: Pixels, credit: str) -> Pixels:
    """Add a text below a picture [H, W, 3]. Wrap the text if the picture is narrow."""
    lines = textwrap.wrap(credit, max(picture.shape[1] // 7, 1))
    strip = Image.new("RGB", (picture.shape[1], 14 * len(lines) + 2), "white")
    ImageDraw.Draw(strip).multiline_text((1, 1), "\n".join(lines), fill="black", spacing=4)
    return np.concatenate([picture, np.asarray(strip)])
