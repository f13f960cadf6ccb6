"""Test the data module that pre-trains on video files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.datasets.kinetics import Kinetics400
from common.data.transforms import AudioInput, VideoInput
from papers.avid_cma.data import PretrainingData
from tests.data.media_factory import write_video

AUDIO = AudioInput(sample_rate=8_000, duration=1.0, fft=256, frames_per_second=40)


@pytest.mark.parametrize("jitter", [(0.0, 0.0, 0.0, 0.0), (0.4, 0.4, 0.4, 0.2)])
def test_training_clips_are_cropped_and_jittered_and_others_are_not(jitter: Any, tmp_path: Path) -> None:
    # To test jitter, use clips of one color, which differ only by jitter. To test crops, use two colors.
    still = np.full((16, 20, 24, 3), (90, 130, 60), np.uint8)
    if not any(jitter):
        still[:, :, 12:] = 0
    for split in ("train", "val"):
        path = tmp_path / f"kinetics400/{split}/juggling/video000000_000000_000002.mp4"
        write_video(path, frames=still, fps=8.0, audio_rate=8_000)
    video = VideoInput(fps=8.0, duration=0.5, crop=16, resize=16, jitter=jitter)
    dataset = Kinetics400(tmp_path / "kinetics400")
    data = PretrainingData(dataset, batch_size=2, num_workers=0, clips_per_video=8, video=video, audio=AUDIO)
    data.prepare_data()
    data.setup("fit")
    means = torch.stack([data.training_clips[item]["video"].mean((1, 2, 3)) for item in range(8)])
    assert means.std(0).max() > 0.1
    held_out = torch.stack([data.held_out_clips[(epoch, 0)]["video"].mean((1, 2, 3)) for epoch in range(8)])
    assert held_out.std(0).max() < 0.01


def test_statistics_do_not_depend_on_which_seed_was_computed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "kinetics400"
    for name in [f"{split}/juggling/video{number:06d}" for split in ("train", "val") for number in range(2)]:
        write_video(root / f"{name}_000000_000002.mp4", fps=8.0, size=(20, 24), audio_rate=8_000)
    inputs: dict[str, Any] = {
        "video": VideoInput(fps=8.0, duration=0.5, crop=16, resize=16),
        "audio": AUDIO,
    }

    def means(cache: str, *seeds: int) -> dict[int, np.ndarray]:
        monkeypatch.setenv("ASSEMBLE_CACHE", str(tmp_path / cache))
        found = {}
        for seed in seeds:
            data = PretrainingData(Kinetics400(root), batch_size=2, num_workers=0, seed=seed, **inputs)
            data.prepare_data()
            data.setup("fit")
            found[seed] = data.statistics_of_bins["mean"]
        return found

    one, other = means("one", 0, 1), means("other", 1, 0)
    for seed in (0, 1):
        np.testing.assert_array_equal(one[seed], other[seed])
    assert not np.array_equal(one[0], one[1])
