"""Diagnostics: the images retrieved for captions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.monitoring.figures import RIGHT, GridCell, GridRow, image_grid, save_figure
from common.monitoring.media import media_folder, write_table

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from papers.m3p.search import RetrievalTest

#: Captions to show per language, and pictures per caption.
CAPTIONS_SHOWN, PICTURES_SHOWN = 3, 5


def draw(module: pl.LightningModule, test: RetrievalTest) -> None:
    """Write the best images for some captions of each set to `retrieved.png` and `.csv`.

    The files go into the `media` folder of a tested stage. Only the main process writes files.
    """
    if not module.trainer.is_global_zero or not test.results:
        return
    folder = media_folder(module)
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    rows: list[list[Any]] = []
    lines: list[GridRow] = []
    for result in test.results:
        name, count = result.set.name, result.scores.shape[1]
        for column in range(0, count, max(count // CAPTIONS_SHOWN, 1))[:CAPTIONS_SHOWN]:
            scores, true = result.scores[:, column], int(result.caption_image[column])
            best = scores.topk(min(PICTURES_SHOWN, len(scores))).indices.tolist()
            # Like the recalls, rank ties and NaN ahead of the caption's picture.
            rank = int((~(scores < scores[true])).sum())
            text = result.set.texts[int(result.caption[column])]
            numbers = [int(result.image[row]) for row in best]
            rows.append([name, text, rank, " ".join(map(str, numbers))])
            colors = [RIGHT if row == true else None for row in best]
            cells = [GridCell(result.set.picture(number), color=color) for number, color in zip(numbers, colors)]
            lines.append(GridRow(f"{name}, own picture at {rank}: {text}", cells))
    write_table(module, folder / "retrieved.csv", ["set", "caption", "rank of its picture", "found pictures"], rows)
    # Some sets have only regions, no images.
    if any(cell.image is not None for line in lines for cell in line.cells):
        save_figure(module, image_grid(lines), folder / "retrieved.png", data.credit)
