"""What a run leaves for people beside its figures: tables as CSV and in Weights & Biases, and clips to see and hear."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_atomically

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import WandbLogger

#: Clips kept with a run, and the largest that is kept [bytes]: made ones take kilobytes, films take gigabytes.
KEPT_CLIPS, LARGEST_CLIP = 3, 2**20
#: Endings of the files that a browser plays.
PLAYABLE = (".mp4", ".webm")


def media_folder(module: pl.LightningModule) -> Path:
    """The folder of a run from which the report takes pictures, clips and tables."""
    return Path(module.trainer.default_root_dir) / "media"


def write_table(module: pl.LightningModule, path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table as CSV, whole or not at all, and log it to Weights & Biases as `<stem>_table`.

    Args:
        module: only its loggers are used.
        path: CSV file to write.
        columns: header.
        rows: cells of text or numbers.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    write_atomically(path, text.getvalue())
    log_table(module, f"{path.stem}_table", columns, rows)


def log_table(module: pl.LightningModule, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table to Weights & Biases, where it is used.

    Args:
        module: only its loggers are used.
        name: key of the table.
        columns: header.
        rows: cells; an array is shown as an image.
    """

    def log(logger: WandbLogger) -> None:
        import numpy as np
        import wandb

        shown = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
        logger.log_table(name, columns=list(columns), data=shown)

    for logger in wandb_loggers(module):
        # A stage's own never ends it; and pictures are files, for which a disk may be too full.
        attempt = getattr(logger, "attempt", None)
        log(logger) if attempt is None else attempt(partial(log, logger))


def log_image(module: pl.LightningModule, path: Path) -> None:
    """Log a picture to Weights & Biases under the name of its file, where it is used."""
    for logger in wandb_loggers(module):
        logger.log_image(path.stem, [str(path)])


def keep_clips(module: pl.LightningModule, clips: Iterable[tuple[Path, str]], folder: Path) -> list[Path]:
    """Copy some clips as `clip_<number>`, to be seen and heard, and log them to Weights & Biases with their captions.

    Args:
        module: only its loggers are used.
        clips: files and what is said about them.
        folder: where the copies go.

    Returns:
        The copies: of the first `KEPT_CLIPS` files that a browser plays and that are not larger than `LARGEST_CLIP`.
    """
    kept: dict[Path, tuple[Path, str]] = {}
    for source, caption in clips:
        playable = source.suffix.lower() in PLAYABLE and source.is_file()
        if len(kept) < KEPT_CLIPS and source not in kept and playable and source.stat().st_size <= LARGEST_CLIP:
            folder.mkdir(parents=True, exist_ok=True)
            copied = folder / f"clip_{len(kept) + 1}{source.suffix.lower()}"
            shutil.copyfile(source, copied)
            kept[source] = copied, caption
    for logger in wandb_loggers(module) if kept else ():
        paths, captions = zip(*kept.values())
        logger.log_video("clip", [str(path) for path in paths], caption=list(captions))
    return [path for path, _ in kept.values()]


def wandb_loggers(module: pl.LightningModule) -> list[WandbLogger]:
    """The loggers of a module that log to Weights & Biases."""
    from lightning.pytorch.loggers import WandbLogger

    return [logger for logger in module.loggers if isinstance(logger, WandbLogger)]
