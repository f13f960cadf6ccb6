"""Check that figures of any rows, texts and fonts are saved and logged, and never show boxes for characters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from common.data.media import MediaError
from common.monitoring import figures
from common.monitoring.figures import (
    NO_FONT,
    RIGHT,
    GridCell,
    GridRow,
    chart,
    image_grid,
    plain,
    save_figure,
)
from tests.monitoring.loggers import Kept

QUIET: Any = SimpleNamespace(loggers=[])


def picture(height: int = 6, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), 20, dtype=np.uint8)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]  # type: ignore[attr-defined]


def saved(figure: Figure, path: Path, credit: str = "") -> tuple[int, int]:
    save_figure(QUIET, figure, path, credit)
    with Image.open(path) as image:
        image.load()
        return image.size


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_figure_is_written_and_logged_under_its_name(tmp_path: Path) -> None:
    kept = Kept()
    module: Any = SimpleNamespace(loggers=[object(), kept])
    before = plt.get_fignums()
    figure, axes = chart(2, 3, size=(6, 4))
    assert axes.shape == (2, 3)
    save_figure(module, figure, tmp_path / "new" / "curves.png", "Pictures: nobody")
    assert kept.images == ["curves"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["curves.png"]
    assert "Pictures: nobody" in texts(figure)
    assert plt.get_fignums() == before


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("costs $5_$ or less", r"costs \$5_\$ or less"),
        ("two\nlines\tand  tabs ", "two lines and tabs"),
        ("ünï çödé – “ok”", "ünï çödé – “ok”"),
        ("a" * 30, "a" * 17 + "..."),
        ("", ""),
    ],
)
def test_text_is_drawn_as_it_is(text: str, shown: str) -> None:
    assert plain(text, 20) == shown


@pytest.fixture
def no_asian_font(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(figures, "ASIAN_FONTS", ())
    figures._fonts.cache_clear()
    figures._characters.cache_clear()
    yield
    figures._fonts.cache_clear()
    figures._characters.cache_clear()


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.usefixtures("no_asian_font")
def test_without_a_font_the_figure_says_so_once(tmp_path: Path) -> None:
    assert plain("ein 红色的 圆形 und 犬") == f"ein {NO_FONT} und {NO_FONT}"
    figure = image_grid(
        [GridRow("赤い丸", [GridCell(picture(), "犬")]), GridRow("a red circle", [GridCell(picture())])], "Found"
    )
    saved(figure, tmp_path / "found.png", "Pictures: nobody")
    assert texts(figure).count(NO_FONT) == 2
    assert sum("this machine has no font" in text for text in texts(figure)) == 1
    assert any(text.startswith("Pictures: nobody") for text in texts(figure))


# -- images ------------------------------------------------------------------------------------------------------------


def test_a_grid_has_titles_texts_and_frames(tmp_path: Path) -> None:
    rows = [
        GridRow(
            "a query", [GridCell(picture(), "cat", RIGHT), GridCell(None), GridCell(picture(90, 30), "dog\nup to 0.3")]
        ),
        GridRow("another", [GridCell(picture())]),
    ]
    figure = image_grid(rows, "Nearest")
    assert {"Nearest", "a query", "another", "cat", "dog\nup to 0.3"} <= set(texts(figure))
    axis = figure.axes[0]
    assert len(axis.images) == 3
    boxes = np.array([image.get_extent() for image in axis.images])
    # No image is distorted: the aspect ratio on the page equals that of the pixels.
    np.testing.assert_allclose((boxes[:, 2] - boxes[:, 3]) / (boxes[:, 1] - boxes[:, 0]), [6 / 8, 3, 6 / 8])
    assert len([patch for patch in axis.patches if isinstance(patch, Rectangle)]) == 1
    width, height = saved(figure, tmp_path / "grid.png")
    assert width > 300
    assert height > 200


# -- maps --------------------------------------------------------------------------------------------------------------


def test_a_clip_without_a_frame_is_shown_in_gray() -> None:
    def preview(item: int) -> np.ndarray:
        if item == 1:
            raise MediaError("sound.mp4: has no video stream")
        return picture()

    clips = SimpleNamespace(preview=preview)
    assert np.array_equal(figures.preview_of(clips, 0), picture())
    assert figures.preview_of(clips, 1).tolist() == [[[127, 127, 127]]]
