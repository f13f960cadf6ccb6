"""Write a run's tables, pictures and clips, and log them to Weights & Biases."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.files import write_atomically

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import WandbLogger

#: How many clips to keep with a run, and their maximum size in bytes: generated clips take kilobytes, movies gigabytes.
KEPT_CLIPS, LARGEST_CLIP = 3, 2**20
#: Suffixes of files that a browser plays.
PLAYABLE = (".mp4", ".webm")


def media_folder(module: pl.LightningModule) -> Path:
    """Return the folder of a run's pictures, clips and tables, which the report reads."""
    return Path(module.trainer.default_root_dir) / "media"


def write_table(module: pl.LightningModule, path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Write a table of texts and numbers as CSV, and log it to Weights & Biases as `<stem>_table`."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    write_atomically(path, text.getvalue())
    log_table(module, f"{path.stem}_table", columns, rows)


def log_table(module: pl.LightningModule, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Log a table to Weights & Biases, if the run uses it; array cells become images."""

    def log(logger: WandbLogger) -> None:
        import numpy as np
        import wandb

        shown = [[wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
        logger.log_table(name, columns=list(columns), data=shown)

    _log(module, log)


def log_image(module: pl.LightningModule, path: Path) -> None:
    """Log a picture under its file name to Weights & Biases, if the run uses it."""
    _log(module, lambda logger: logger.log_image(path.stem, [str(path)]))


def keep_clips(module: pl.LightningModule, clips: Iterable[tuple[Path, str]], folder: Path) -> None:
    """Copy the first `KEPT_CLIPS` playable clips of up to `LARGEST_CLIP` bytes as `clip_<number>`, and log them."""
    kept: dict[Path, tuple[Path, str]] = {}
    for source, caption in clips:
        playable = source.suffix.lower() in PLAYABLE and source.is_file()
        if len(kept) < KEPT_CLIPS and source not in kept and playable and source.stat().st_size <= LARGEST_CLIP:
            folder.mkdir(parents=True, exist_ok=True)
            copied = folder / f"clip_{len(kept) + 1}{source.suffix.lower()}"
            shutil.copyfile(source, copied)
            kept[source] = copied, caption
    if kept:
        paths, captions = zip(*kept.values())
        _log(module, lambda logger: logger.log_video("clip", [str(path) for path in paths], caption=list(captions)))


def _log(module: pl.LightningModule, log: Callable[[WandbLogger], None]) -> None:
    """Call `log` with each Weights & Biases logger of a module. A failure does not stop the stage."""
    from lightning.pytorch.loggers import WandbLogger

    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            attempt = getattr(logger, "attempt", lambda action: action())
            attempt(partial(log, logger))
