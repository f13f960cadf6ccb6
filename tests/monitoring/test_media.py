"""Test tables as CSV files and in Weights & Biases, and the clips that a run keeps."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.monitoring import media
from common.monitoring.media import keep_clips, log_table, write_table
from tests.monitoring.loggers import Kept


def test_a_table_is_a_csv_and_a_table_of_weights_and_biases(tmp_path: Path) -> None:
    kept = Kept()
    module: Any = SimpleNamespace(loggers=[kept, object()])
    columns, rows = ["caption", "rank"], [['says "no", twice', 1], ["two\nlines", 2], ["红色的圆形", 3]]
    write_table(module, tmp_path / "new" / "found.csv", columns, rows)
    with (tmp_path / "new" / "found.csv").open(newline="", encoding="utf-8") as file:
        assert [*csv.reader(file)] == [columns, *([text, str(rank)] for text, rank in rows)]
    assert kept.tables == {"found_table": (columns, rows)}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["found.csv"]
    # An array is logged as an image.
    log_table(module, "grid_table", ("caption", "real"), [("a", np.zeros((4, 4, 3), dtype=np.uint8))])
    columns, rows = kept.tables["grid_table"]
    assert columns == ["caption", "real"]
    assert [type(cell).__name__ for cell in rows[0]] == ["str", "Image"]


def clip(path: Path, size: int = 10) -> Path:
    path.write_bytes(path.name.encode().ljust(size, b"."))
    return path


def test_the_first_small_clips_that_a_browser_plays_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "LARGEST_CLIP", 100)
    first, large, film = clip(tmp_path / "a.MP4"), clip(tmp_path / "b.mp4", 101), clip(tmp_path / "c.avi")
    second, third, fourth = (clip(tmp_path / name) for name in ("d.webm", "e.mp4", "f.mp4"))
    sources = [first, large, film, tmp_path / "missing.mp4", first, second, third, fourth]
    module: Any = SimpleNamespace(loggers=[kept := Kept()])
    keep_clips(module, ((path, path.stem) for path in sources), tmp_path / "media")
    copies = sorted((tmp_path / "media").iterdir())
    assert [path.name for path in copies] == ["clip_1.mp4", "clip_2.webm", "clip_3.mp4"]
    assert [path.read_bytes() for path in copies] == [path.read_bytes() for path in (first, second, third)]
    assert kept.videos == {"clip": ([str(path) for path in copies], ["a", "d", "e"])}
