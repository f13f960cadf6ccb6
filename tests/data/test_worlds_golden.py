"""The small worlds hold what they held when their records were made.

Files of text are compared byte by byte, pictures, films and sounds roughly, because encoders and processors round.
`python -m tests.data.test_worlds_golden` writes the values anew, for a world with a higher `version`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.data.datasets.captioned import read_text
from common.data.listing import spread
from common.data.media import MediaFile
from common.data.worlds.base import World
from tests.data.worlds import MEDIA, TINY, tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "worlds.npz"
#: Files of a data set that are looked into.
LOOKED_INTO = 12


def described(world: World, name: str) -> dict[str, Any]:
    """Digest of names and texts of a data set, and what some of its pictures and sounds are like."""
    root = world.root_of(name)
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    # SentencePiece rounds as the processor does.
    texts = ["" if path.suffix in {*MEDIA, ".model"} else read_text(path) for path in files]
    content = json.dumps([(path.relative_to(root).as_posix(), text) for path, text in zip(files, texts)])
    media = [path for path in files if path.suffix in MEDIA]
    chosen = [media[row] for row in spread(len(media), LOOKED_INTO)] if media else []
    return {"texts": hashlib.sha256(content.encode()).hexdigest(), "media": np.array([alike(one) for one in chosen])}


def alike(path: Path) -> list[float]:
    """Colors of 4 x 4 fields of a picture, or of the first and last of a film; decibels by frequency and by time."""
    if path.suffix in (".jpg", ".JPEG", ".png"):
        return small(np.asarray(Image.open(path).convert("RGB")))
    found: list[float] = []
    with MediaFile(path) as media:
        if media.video_limits is not None:
            frames, _ = media.read_video(*media.video_limits, media.video_fps)
            found += [*small(frames[0].numpy()), *small(frames[-1].numpy())]
        if media.audio_limits is not None:
            samples = media.read_audio(0.0, 1.0, 8000).double().numpy()
            power = np.abs(np.fft.rfft(samples)[1:4001]).reshape(16, -1) ** 2
            loud = np.square(samples[: len(samples) // 8 * 8]).reshape(8, -1)
            found += (10 * np.log10(np.concatenate([power.mean(1), loud.mean(1)]) + 1e-6)).tolist()
    return found


def small(pixels: np.ndarray) -> list[float]:
    return np.asarray(Image.fromarray(pixels).resize((4, 4), Image.Resampling.BOX), np.float64).ravel().tolist()


@pytest.mark.parametrize("kind", TINY)
def test_a_world_holds_what_it_held(kind: type[World], rendered: Callable[[type[World]], Any]) -> None:
    world, golden = rendered(kind), np.load(GOLDEN)
    assert world.folder.name == str(golden[kind.kind])
    for name in world.names:
        found = described(world, name)
        assert found["texts"] == str(golden[f"{kind.kind}/{name}"]), name
        np.testing.assert_allclose(found["media"], golden[f"{kind.kind}/{name}/media"], atol=1.5, err_msg=name)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        held: dict[str, Any] = {}
        for kind in TINY:
            world = tiny(kind, Path(folder))
            world.prepare()
            held[kind.kind] = world.folder.name
            for name in world.names:
                found = described(world, name)
                held[f"{kind.kind}/{name}"] = found["texts"]
                held[f"{kind.kind}/{name}/media"] = found["media"].astype(np.float32)
        np.savez_compressed(GOLDEN, **held)


if __name__ == "__main__":
    main()
