"""What is looked at after pre-training: numbers by hand, and pictures of few, equal and untagged images."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from papers.mct import diagnostics
from papers.mct.diagnostics import draw_map, draw_retrieval, tagged_neighbours, uniformity

QUIET: Any = SimpleNamespace(loggers=[])


def on_a_circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_neighbours_by_hand() -> None:
    features = on_a_circle(0, 10, 30, 90, 100) * torch.tensor([1.0, 5.0, 0.1, 3.0, 1.0])[:, None]
    tags = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [0, 1]]).bool()
    # Nearest by angle: 0 -> 1, 1 -> 0, 2 -> 1, 3 -> 4 (left out, no tag), 4 -> 3.
    assert float(tagged_neighbours(features, tags, 1)) == pytest.approx(100 * 3 / 4)
    # Two: 0 -> 1, 2; 1 -> 0, 2; 2 -> 1, 0; 4 -> 3, 2.
    assert float(tagged_neighbours(features, tags, 2)) == pytest.approx(100 * (1 + 2 + 1 + 1) / 8)
    # Never itself: with all as neighbours there are four others.
    assert float(tagged_neighbours(features, tags, 99)) == pytest.approx(100 * (1 + 3 + 2 + 2) / 16)


def test_neighbours_without_tags_are_nan() -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    assert tagged_neighbours(features, torch.zeros(6, 2, dtype=torch.bool)).isnan()
    assert tagged_neighbours(features, torch.zeros(6, 0, dtype=torch.bool)).isnan()
    # An image alone has no neighbour.
    assert tagged_neighbours(features[:1], torch.ones(1, 2, dtype=torch.bool)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_neighbours_of_other_types(dtype: torch.dtype) -> None:
    features = on_a_circle(0, 20, 90, 120).to(dtype)
    tags = torch.tensor([[1], [1], [0], [1]]).bool()
    assert float(tagged_neighbours(features, tags, 1)) == pytest.approx(200 / 3)


def test_large_sets_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "LARGEST_SEARCH", 3)
    monkeypatch.setattr(diagnostics, "LARGEST_MAP", 2)
    features = on_a_circle(0, 10, 90, 91)
    tags = torch.tensor([[1], [0], [1], [1]]).bool()
    assert float(tagged_neighbours(features, tags, 1)) == 0
    assert float(uniformity(features)) == pytest.approx(-2 * (2 - 2 * math.cos(math.pi / 18)), rel=1e-4)


def test_uniformity_by_hand() -> None:
    assert float(uniformity(on_a_circle(0, 0, 0))) == pytest.approx(0, abs=1e-6)
    assert float(uniformity(on_a_circle(0, 90))) == pytest.approx(-4)
    assert float(uniformity(on_a_circle(0, 180))) == pytest.approx(-8)
    # Squared distances 2, 4, 2.
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert float(uniformity(on_a_circle(0, 90, 180))) == pytest.approx(expected, rel=1e-5)
    assert float(uniformity(on_a_circle(0, 90).half())) == pytest.approx(-4, rel=1e-2)
    assert uniformity(on_a_circle(0)).isnan()


# -- pictures ----------------------------------------------------------------------------------------------------------


def picture(row: int) -> np.ndarray:
    return np.full((6, 8, 3), 20 * row % 256, dtype=np.uint8)


def embeddings(images: int, each: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    image = torch.nn.functional.normalize(torch.randn(images, 4, generator=draw), dim=1)
    return image, image.repeat_interleave(each, 0), torch.arange(images).repeat_interleave(each)


def draw(folder: Path, text: Sequence[str], images: int, each: int, module: Any = QUIET, **fields: Any) -> None:
    before = plt.get_fignums()
    draw_retrieval(module, *embeddings(images, each), picture, text, folder, **fields)
    for name in ("image_to_captions.png", "caption_to_images.png"):
        with Image.open(folder / name) as image:
            image.load()
            assert min(image.size) > 100
    assert plt.get_fignums() == before  # figures that stay open would add up


@pytest.mark.parametrize("images", range(1, 9))
def test_few_images(tmp_path: Path, images: int) -> None:
    draw(tmp_path, [f"caption {n}" for n in range(images)], images, 1, credit="Pictures: nobody")


def test_more_images_than_are_drawn(tmp_path: Path) -> None:
    draw(tmp_path / "new" / "folder", [f"caption {n} " * 30 for n in range(80)], 40, 2, queries=3, found=2)


def test_equal_captions_are_right_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours: list[list[str]] = []

    def keep(figure: Any, axes: Any, *args: Any) -> None:
        found = [[t.get_color() for t in axis.texts] for axis in axes.flat]
        found += [
            ["tab:green" if p.get_edgecolor()[1] > 0.5 else "tab:red" for p in axis.patches] for axis in axes.flat
        ]
        colours.append([colour for own in found for colour in own])

    monkeypatch.setattr(diagnostics, "_finish", keep)
    draw(tmp_path, ["a dog", "a dog", "a cat"], 3, 1, found=3)
    # An image of a dog finds both captions of dogs, one of a cat its own; the order does not matter.
    assert sorted(colours[0]) == ["tab:green"] * 5 + ["tab:red"] * 4
    assert sorted(colours[1]) == ["tab:green"] * 5 + ["tab:red"] * 4


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "text", ["costs $5_$ or less", "100 % {of} \\it", "", "红色的圆形 🙂", "a_b ^ c", "line\nbreak"]
)
def test_any_caption_can_be_drawn(tmp_path: Path, text: str) -> None:
    draw(tmp_path, [text, "a dog"], 2, 1)


class Kept(WandbLogger):
    """What a logger of Weights & Biases is given."""

    def __init__(self) -> None:
        self.images: list[str] = []
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert all(Path(image).is_file() for image in images)
        self.images.append(key)

    def log_table(self, key: str, columns: Any = None, data: Any = None, *args: Any, **kwargs: Any) -> None:
        self.tables[key] = (columns, data)


def test_pictures_and_tables_go_to_weights_and_biases(tmp_path: Path) -> None:
    logger = Kept()
    module = SimpleNamespace(loggers=[logger])
    draw(tmp_path, [f"caption {n}" for n in range(6)], 3, 2, module=module, queries=2, found=5)
    assert logger.images == ["image_to_captions", "caption_to_images"]
    columns, rows = logger.tables["image_to_captions_table"]
    assert columns == ["image", *(f"caption {n}" for n in range(1, 6))]
    assert [len(row) for row in rows] == [6, 6]
    assert set(rows[0][1:3]) == {"caption 0", "caption 1"}
    columns, rows = logger.tables["caption_to_images_table"]
    assert columns == ["caption", "image 1", "image 2", "image 3"]
    assert [row[:2] for row in rows] == [["caption 0", 0], ["caption 5", 2]]
    draw_map(module, torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), ["a"] * 9, tmp_path / "map.png")  # type: ignore[arg-type]
    assert logger.images[-1] == "map"


@pytest.mark.parametrize("images", range(1, 9))
def test_a_map_needs_eight_images(tmp_path: Path, images: int) -> None:
    features = torch.randn(images, 5, generator=torch.Generator().manual_seed(0))
    draw_map(QUIET, features, [str(n % 3) for n in range(images)], tmp_path / "map.png")
    assert (tmp_path / "map.png").is_file() == (images >= 8)


@pytest.mark.parametrize("dim", [4, 60])
def test_a_map_of_more_classes_than_colours(tmp_path: Path, dim: int) -> None:
    features = torch.randn(64, dim, generator=torch.Generator().manual_seed(0))
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path in paths:
        draw_map(QUIET, features.half(), [str(n % 30) for n in range(64)], path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("features", [torch.ones(12, 4), torch.full((12, 4), math.nan)], ids=["equal", "nan"])
def test_a_map_of_a_collapsed_encoder(tmp_path: Path, features: Tensor) -> None:
    """In a process of its own: some versions of t-SNE end the process when all points fall together."""
    process = multiprocessing.get_context("fork").Process(
        target=draw_map, args=(QUIET, features, ["no tag"] * 12, tmp_path / "map.png")
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_class_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    draw_map(QUIET, features, ["$a_$", "_hidden", "b"] * 3, tmp_path / "map.png")
    assert (tmp_path / "map.png").is_file()
