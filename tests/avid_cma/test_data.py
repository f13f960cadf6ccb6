"""The data module of pre-training on files, some of them without a sound track."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.clip_inputs import AudioInput, VideoInput
from common.data.datasets.kinetics import Kinetics400
from papers.avid_cma.data import PretrainingData
from tests.data.media_factory import write_video


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / "cache"))
    for split in ("train", "val"):
        folder = tmp_path / "kinetics400" / split / "juggling"
        folder.mkdir(parents=True)
        for number in range(3):
            write_video(
                folder / f"video{number:06d}_000000_000002.mp4",
                seconds=2.0,
                fps=8.0,
                size=(20, 24),
                audio_rate=8_000,
                with_audio=number != 1,
            )
    return tmp_path / "kinetics400"


def data_of(root: Path, **options: Any) -> PretrainingData:
    data = PretrainingData(
        Kinetics400(root, 1.0),
        clips_per_video=1,
        batch_size=2,
        num_workers=0,
        video=VideoInput(fps=8.0, duration=0.5, crop=16, resize=16),
        audio=AudioInput(sample_rate=8_000, duration=1.0, fft=256, frames_per_second=40),
        **{"max_skipped_fraction": 0.4, **options},
    )
    data.prepare_data()
    data.setup("fit")
    return data


def test_statistics_do_not_depend_on_which_seed_was_computed_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def means(cache: str, *seeds: int) -> dict[int, np.ndarray]:
        monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / cache))
        return {seed: data_of(root, seed=seed).statistics_of_bins["mean"] for seed in seeds}

    one, other = means("one", 0, 1), means("other", 1, 0)
    for seed in (0, 1):
        np.testing.assert_array_equal(one[seed], other[seed])
    assert not np.array_equal(one[0], one[1])
