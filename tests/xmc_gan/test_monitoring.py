"""The figures that a stage leaves behind, and the page that puts stages side by side."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from papers.xmc_gan.monitoring import slerp
from tests.xmc_gan.stages import finished


def test_a_stage_leaves_its_figures() -> None:
    stages = finished()
    media = stages.folder("xmc_gan") / "media"
    names = {"attention.png", "caption_grid.png", "captions.row.json", "captions.row.png", "interpolation.png"}
    assert {path.name for path in media.iterdir()} == names
    assert {Path(name).name for name in stages.records["xmc_gan"].media} == names
    for path in media.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 50
            assert len(picture.convert("RGB").getcolors(1 << 22)) > 20
    assert {path.name for path in (stages.folder("real_images") / "media").iterdir()} == {
        "captions.row.json", "captions.row.png",
    }  # fmt: skip


def test_all_stages_show_the_same_captions() -> None:
    rows = [finished().folder(name) / "media" / "captions.row" for name in ("real_images", "baseline", "xmc_gan")]
    captions = [json.loads(path.with_suffix(".row.json").read_text(encoding="utf-8")) for path in rows]
    assert captions[0] == captions[1] == captions[2]
    assert len(captions[0]) == 8
    pictures = [np.asarray(Image.open(path.with_suffix(".row.png"))) for path in rows]
    assert {picture.shape for picture in pictures} == {(96, 8 * 96 + 7 * 4, 3)}
    assert not np.array_equal(pictures[1], pictures[2])


def test_the_path_between_noise_vectors_keeps_their_length() -> None:
    start, end = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    path = slerp(start, end, 5)
    torch.testing.assert_close(path[[0, -1]], torch.stack([start, end]))
    torch.testing.assert_close(path.norm(dim=1), torch.tensor([3.0, 3.5, 4.0, 4.5, 5.0]))
    angles = torch.atan2(path[:, 1], path[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 5))
    torch.testing.assert_close(slerp(start, start, 3), start.expand(3, 2))
