"""Scenes of real drawings for text-to-image generation: one of twelve things in each half, drawn by four designers."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.worlds.emoji import CREDIT, STYLES, read_concepts, read_drawings
from common.data.worlds.two_sides import SIDE, Floats, Things, TwoSidesWorld

# Things whose drawings are similar across designers but distinct at this size. A network trained on three designers
# names 94, 77, 95 and 95 % of the fourth's things (Noto, OpenMoji, Fluent, Twemoji), and each thing in at least 78 %.
# No name begins with a vowel, because captions say "a".
THINGS = (
    "heart suit", "star", "droplet", "basketball", "fox", "watermelon",
    "panda", "rice ball", "pig face", "doughnut", "deciduous tree", "cheese wedge",
)  # fmt: skip

# Range of the longer side of a drawing, in pixels of a picture of 32.
_SIDES = (12.0, 15.0)
_OPAQUE = 26  # least alpha, of 255, of the pixels in a drawing's box


class EmojiScenesWorld(TwoSidesWorld):
    """Puts a drawing in each half of a picture, both by the same designer. Drawings and ground make 432 combinations.

    Training and test have all four designers. Otherwise, comparing generated pictures with real ones would penalize
    generated pictures for a style that training lacks. For the arguments see ``TwoSidesWorld``.
    """

    kind = "emoji_scenes"
    title = "world of emoji scenes"
    version = 2
    credit = CREDIT
    description = f"Drawings side by side. {CREDIT}"
    licences = tuple(STYLES.values())
    things = tuple((thing, "emoji") for thing in THINGS)
    thing_sizes = (len(THINGS),)
    _numbers = 7

    def _things(self, attributes: npt.NDArray[np.int64], spread: Floats) -> Things:
        chosen = attributes[:, :2]
        style = np.floor((spread[:, 0] + 1) / 2 * len(STYLES)).astype(np.int64)
        side = _SIDES[0] + (_SIDES[1] - _SIDES[0]) * (spread[:, 1:3] + 1) / 2
        side = np.rint(side * self.size / SIDE).astype(np.int64)
        across, down = self._centers(spread[:, 3:])
        colours = np.zeros((len(chosen), 2, self.size, self.size, 3))
        coverage = np.zeros((len(chosen), 2, self.size, self.size))
        boxes = np.zeros((len(chosen), 2, 4))
        for row in range(len(chosen)):
            for half in range(2):
                tile = _tile(int(style[row]), int(chosen[row, half]), int(side[row, half]))
                height, width = tile.shape[:2]
                # Whole pixels avoid resampling, and the drawing stays in its half.
                first = half * (self.size - self.size // 2)
                left = int(np.clip(round(across[row, half] - width / 2), first, first + self.size // 2 - width))
                top = int(np.clip(round(down[row, half] - height / 2), 0, self.size - height))
                place = (row, half, slice(top, top + height), slice(left, left + width))
                colours[place], coverage[place] = tile[..., :3], tile[..., 3]
                boxes[row, half] = left, top, left + width, top + height
        return Things(colours, coverage, boxes, style.tolist())


@cache
def _drawings(style: int) -> npt.NDArray[np.uint8]:
    """Return a designer's drawings of ``THINGS``, uint8 [12, 64, 64, 4]."""
    numbers = {concept.name["en"]: concept.index for concept in read_concepts() if concept.core}
    return read_drawings(tuple(STYLES)[style], [numbers[thing] for thing in THINGS])


@cache
def _tile(style: int, thing: int, side: int) -> Floats:
    """Crop a drawing and scale its longer side to `side` pixels. Return color and opacity in [0, 1], [H, W, 4]."""
    drawing = _drawings(style)[thing]
    rows, columns = np.nonzero(drawing[..., 3] >= _OPAQUE)
    cut = drawing[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    shape = np.maximum(np.rint(np.array(cut.shape[1::-1]) * side / max(cut.shape[:2])).astype(int), 1)
    resized = Image.fromarray(cut).resize((int(shape[0]), int(shape[1])), Image.Resampling.LANCZOS)
    return np.asarray(resized) / 255
