"""The audio-visual world on disk: real files in real layouts, read by the classes of the real data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.data.datasets.kinetics import Kinetics400
from common.data.media import MediaFile
from common.data.worlds.audiovisual import AudioVisualWorld
from common.data.worlds.base import World
from common.data.worlds.clip_generator import VIDEO_CLASSES, ClipGenerator


@pytest.fixture(scope="module")
def world(rendered: Callable[[type[World]], Any]) -> AudioVisualWorld:
    return rendered(AudioVisualWorld)


def test_labels_name_what_the_generator_drew(world: AudioVisualWorld) -> None:
    """The class folder of a file is the class of the clip in it, in picture and sound."""
    listing = Kinetics400(world.root_of("kinetics400")).listing("train")
    generator = ClipGenerator(5)
    rendered = np.stack([generator.video(1, index, 2.0) for index in range(40)]).astype(float)
    for clip in listing:
        with MediaFile(clip.path) as media:
            frames = media.read_video(*media.video_limits, 8.0)[0].numpy()  # type: ignore[misc]
        index = int(np.abs(rendered - frames).mean(axis=(1, 2, 3, 4)).argmin())
        assert VIDEO_CLASSES[generator.label(index)] == clip.path.parent.name == listing.classes[clip.label]
