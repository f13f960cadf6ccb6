"""Our figures: recall by language, images found for captions, and code-switched captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.monitoring.figures import RIGHT, WRONG, Cell, Row, chart, image_grid, save_figure
from common.monitoring.media import media_folder, write_table

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from papers.m3p.search import RetrievalTest, Searched

#: Captions shown per language, and pictures per caption.
CAPTIONS_SHOWN, PICTURES_SHOWN = 3, 5
#: Number of code-switched captions shown.
SWITCHED = 24
#: Mean recall of random scores.
CHANCE = "chance"


def draw(module: pl.LightningModule, test: RetrievalTest) -> None:
    """Write all figures and tables of a tested stage to the run's `media` folder, on the main process only."""
    if not module.trainer.is_global_zero or not test.found:
        return
    folder = media_folder(module)
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    draw_recalls(module, test.found, folder)
    draw_retrieved(module, data, test.found, folder)
    switched = data.switched_examples(SWITCHED)
    if switched:
        write_table(module, folder / "code_switched.csv", ["caption", "switched"], switched)


def chance_recall(scored: Searched) -> float:
    """Mean recall of random scores on the same set, in percent ([12], P7)."""
    images, captions = scored.scores.shape
    each = captions / images
    to_images = sum(min(k / images, 1.0) for k in (1, 5, 10))
    to_captions = sum(1.0 - (1.0 - min(k / captions, 1.0)) ** each for k in (1, 5, 10))
    return 100.0 * (to_images + to_captions) / 6.0


def draw_recalls(module: pl.LightningModule, found: list[Searched], folder: Path) -> None:
    """`recall_by_language.png` and `.csv`: mean recall, the six recalls and chance for every test set."""
    keys = ["mr", *(f"{direction}_r{k}" for direction in ("t2i", "i2t") for k in (1, 5, 10))]
    rows = [
        [
            one.set.name,
            one.set.language,
            *(round(float(one.metrics[key]), 3) for key in keys),
            round(chance_recall(one), 3),
        ]
        for one in found
    ]
    write_table(module, folder / "recall_by_language.csv", ["set", "language", *keys, CHANCE], rows)
    figure, axes = chart(size=(1.2 + 0.9 * len(found), 3))
    axis = axes[0, 0]
    axis.bar([one.set.name.replace("_", "\n") for one in found], [row[2] for row in rows], color="tab:blue")
    for place, row in enumerate(rows):
        axis.plot([place - 0.4, place + 0.4], [row[-1]] * 2, color=WRONG, label=CHANCE if place == 0 else None)
    axis.set_ylabel("mean recall (%)")
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
    save_figure(module, figure, folder / "recall_by_language.png")


def draw_retrieved(module: pl.LightningModule, data: Any, found: list[Searched], folder: Path) -> None:
    """`retrieved.png` and `.csv`: the highest-scoring images for some captions of every language."""
    rows: list[list[Any]] = []
    lines: list[Row] = []
    for one in found:
        count = one.scores.shape[1]
        for column in range(0, count, max(count // CAPTIONS_SHOWN, 1))[:CAPTIONS_SHOWN]:
            scores, own = one.scores[:, column], int(one.gallery.caption_image[column])
            best = scores.topk(min(PICTURES_SHOWN, len(scores))).indices.tolist()
            # As in the recalls, ties and NaN rank ahead of the caption's picture.
            rank = int((~(scores < scores[own])).sum())
            text = one.set.captions.text(int(one.gallery.caption[column]))
            numbers = [int(one.gallery.image_number[row]) for row in best]
            rows.append([one.set.name, text, rank, " ".join(map(str, numbers))])
            colors = [RIGHT if row == own else None for row in best]
            cells = [Cell(one.set.picture(n), color=color) for n, color in zip(numbers, colors)]
            lines.append(Row(f"{one.set.name}, own picture at {rank}: {text}", cells))
    write_table(module, folder / "retrieved.csv", ["set", "caption", "rank of its picture", "found pictures"], rows)
    # Some sets have regions but no images.
    if any(cell.image is not None for line in lines for cell in line.cells):
        save_figure(module, image_grid(lines), folder / "retrieved.png", getattr(data, "credit", ""))
