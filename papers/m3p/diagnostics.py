"""What was found, for people: recall by language, pictures found for captions, and captions as they are fed.

Which figures the paper shows is not known; these are ours.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from papers.m3p.evaluation import RetrievalTest, Searched

#: Captions of each language for which pictures are shown, and pictures shown for each.
CAPTIONS_SHOWN, PICTURES_SHOWN = 3, 5
#: Captions shown as they are fed.
FED = 24
#: A mean recall over the number of images, where nothing is known.
CHANCE = "chance"


def draw(module: pl.LightningModule, test: RetrievalTest) -> None:
    """Write all figures and tables of a tested stage into the folder `media` of the run; the main process only."""
    if not module.trainer.is_global_zero or not test.found:
        return
    folder = Path(module.trainer.default_root_dir) / "media"
    folder.mkdir(parents=True, exist_ok=True)
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    draw_recalls(module, test.found, folder)
    draw_retrieved(module, data, test.found, folder)
    fed = data.switched_examples(FED)
    if fed:
        write_fed(module, fed, folder)


def chance_recall(scored: Searched) -> float:
    """Mean recall in percent of a model that knows nothing, on the same set (specification 12, P7)."""
    images, captions = scored.scores.shape
    each = captions / images
    to_images = sum(min(k / images, 1.0) for k in (1, 5, 10))
    to_captions = sum(1.0 - (1.0 - min(k / captions, 1.0)) ** each for k in (1, 5, 10))
    return 100.0 * (to_images + to_captions) / 6.0


def draw_recalls(module: pl.LightningModule, found: list[Searched], folder: Path) -> None:
    """`recall_by_language.png` and `.csv`: mean recall and the six recalls of every test set, beside chance."""
    plt = _pyplot()
    keys = ["mr", *(f"{direction}_r{k}" for direction in ("t2i", "i2t") for k in (1, 5, 10))]
    rows = [
        [one.name, one.language, *(round(float(one.metrics[key]), 3) for key in keys), round(chance_recall(one), 3)]
        for one in found
    ]
    columns = ["set", "language", *keys, CHANCE]
    with (folder / "recall_by_language.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    figure, axis = plt.subplots(figsize=(1.2 + 0.9 * len(found), 3), layout="constrained")
    axis.bar([one.name.replace("_", "\n") for one in found], [row[2] for row in rows], color="tab:blue")
    for place, row in enumerate(rows):
        axis.plot([place - 0.4, place + 0.4], [row[-1]] * 2, color="tab:red", label=CHANCE if place == 0 else None)
    axis.set_ylabel("mean recall (%)")
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
    path = folder / "recall_by_language.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    _log(module, "recall_by_language", path, columns, rows)


def draw_retrieved(module: pl.LightningModule, data: Any, found: list[Searched], folder: Path) -> None:
    """`retrieved.png` and `.csv`: the pictures that score highest for some captions of every language."""
    plt = _pyplot()
    columns = ["set", "caption", "rank of its picture", "found pictures"]
    rows: list[list[Any]] = []
    lines: list[tuple[str, list[tuple[Any, bool]]]] = []
    for one in found:
        count = one.scores.shape[1]
        for column in range(0, count, max(count // CAPTIONS_SHOWN, 1))[:CAPTIONS_SHOWN]:
            scores, own = one.scores[:, column], int(one.gallery.caption_image[column])
            best = scores.topk(min(PICTURES_SHOWN, len(scores))).indices.tolist()
            # As in the recalls: what ties with it, or is no number, is before it.
            rank = int((~(scores < scores[own])).sum())
            text = data.caption_text(one.position, int(one.gallery.caption[column]))
            numbers = [int(one.gallery.image_number[row]) for row in best]
            rows.append([one.name, text, rank, " ".join(map(str, numbers))])
            pictures = [(data.preview(one.position, number), row == own) for number, row in zip(numbers, best)]
            lines.append((f"{one.name}, own picture at {rank}: {text}", pictures))
    with (folder / "retrieved.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    if not any(picture is not None for _, pictures in lines for picture, _ in pictures):
        return
    figure, axes = plt.subplots(
        len(lines), PICTURES_SHOWN, figsize=(PICTURES_SHOWN * 1.1, len(lines) * 1.25), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    for line, (title, pictures) in zip(axes, lines):
        # Texts may hold the sign with which matplotlib begins a formula.
        text = line[0].set_title(title[:90].replace("$", r"\$"), fontsize=6, loc="left", fontfamily=_fonts())
        text.set_in_layout(False)  # it is wider than its picture, which must not make room for it
        for axis, (picture, own) in zip(line, pictures):
            if picture is not None:
                axis.imshow(picture)
            if own:
                axis.spines[:].set(visible=True, color="tab:green", linewidth=2)
    credit = getattr(data, "credit", None)
    if credit:
        figure.supxlabel(credit, fontsize=4)
    path = folder / "retrieved.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    _log(module, "retrieved", path, columns, rows)


def write_fed(module: pl.LightningModule, fed: list[tuple[str, str]], folder: Path) -> None:
    """`code_switched.csv`: captions and what is made of them for training."""
    columns, rows = ["caption", "as fed"], [list(pair) for pair in fed]
    with (folder / "code_switched.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    _log(module, "code_switched", None, columns, rows)


def _pyplot() -> Any:
    import logging
    import warnings

    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    # Machines without an Asian font draw boxes for Japanese and Chinese; the tables have the texts.
    warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return plt


def _fonts() -> list[str]:
    """Fonts with Japanese and Chinese that this machine has, and the usual one."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    asian = ("Noto Sans CJK JP", "Noto Sans CJK SC", "IPAGothic", "WenQuanYi Zen Hei", "Droid Sans Fallback")
    return ["DejaVu Sans", *(name for name in asian if name in there)]


def _log(module: pl.LightningModule, name: str, path: Path | None, columns: list[str], rows: list[list[Any]]) -> None:
    from lightning.pytorch.loggers import WandbLogger

    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            if path is not None:
                logger.log_image(name, [str(path)])
            logger.log_table(f"{name}_table", columns=columns, data=rows)
