"""Draw what the miniatures of clips look like: `python .ci/strips.py` writes docs/images/clips_*.webp, animated.

The clips are rendered anew, a few of each kind with seed 0 and the sizes of the miniature, and put side by side.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import av
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.data.worlds.audiovisual import AudioVisualWorld  # noqa: E402
from common.data.worlds.base import World  # noqa: E402
from common.data.worlds.narrated import NarratedWorld  # noqa: E402

CLIPS, ENLARGED, GAP = 8, 4, 4
GROUND = (128, 128, 128)


def frames_of(path: Path) -> list[Image.Image]:
    """All pictures of a clip."""
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def strip(clips: list[Path], output: Path, milliseconds: int) -> None:
    """Write clips side by side as one animated picture, for ever; each goes round by itself."""
    films = [frames_of(path) for path in clips]
    width, height = (side * ENLARGED for side in films[0][0].size)
    size = (len(films) * (width + GAP) + GAP, height + 2 * GAP)
    pictures = []
    for number in range(max(map(len, films))):
        picture = Image.new("RGB", size, GROUND)
        for place, film in enumerate(films):
            shown = film[number % len(film)].resize((width, height), Image.Resampling.NEAREST)
            picture.paste(shown, (GAP + place * (width + GAP), GAP))
        pictures.append(picture)
    first, *others = pictures
    first.save(output, save_all=True, append_images=others, duration=milliseconds, loop=0, quality=60, method=6)
    print(
        f"{output.relative_to(ROOT)}: {output.stat().st_size} bytes, {len(pictures)} pictures of {size[0]} x {size[1]}"
    )


def drawn(world: World, dataset: str, folder: str, name: str, fps: int) -> None:
    """Write the strip of a world: the first clip of as many folders as there are clips, or the first clips of one."""
    world.prepare([dataset])
    found: dict[Path, list[Path]] = {}
    for path in sorted((world.root_of(dataset) / folder).rglob("*.mp4")):
        found.setdefault(path.parent, []).append(path)
    chosen = (
        [paths[0] for paths in found.values()]
        if len(found) >= CLIPS
        else [path for paths in found.values() for path in paths]
    )
    step = max(len(chosen) // CLIPS, 1)
    strip(chosen[::step][:CLIPS], ROOT / "docs" / "images" / f"clips_{name}.webp", round(1000 / fps))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        drawn(AudioVisualWorld(pretrain=40, root=scratch), "kinetics400", "train", "avid_cma", 8)
        drawn(NarratedWorld(dialogs=8, dialogs_validation=1, dialogs_test=1, root=scratch), "avsd", ".", "vx2text", 6)
