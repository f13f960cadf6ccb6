"""Tiny data sets in the layouts of the real ones, to test the published recipes quickly."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.data.datasets.audioset import write_audioset
from common.data.datasets.dcase import write_dcase
from common.data.datasets.esc50 import write_esc50
from common.data.datasets.hmdb51 import write_hmdb51
from common.data.datasets.kinetics import write_kinetics
from common.data.datasets.ucf101 import write_ucf101
from common.data.worlds.audiovisual import write_clip, write_sound
from common.data.worlds.clip_generator import ClipGenerator

#: Number of different clips and sounds of each kind; the many files of a data set are links to these.
CLIPS_PER_KIND = 12
#: Clip length in seconds; listings skip shorter clips.
SECONDS = 3.2
#: CMA needs more clips than the 128 positives of its ablations.
AUDIOSET_CLIPS = 160


def write_datasets(root: Path) -> None:
    """Write every data set that the recipes read from `$DATA`, with as many classes as the classifiers have."""
    generator = ClipGenerator(seed=0, size=32, fps=16, sample_rate=24000)
    pool = root / ".rendered"
    pool.mkdir()
    silent: list[Path] = []
    sounding: list[Path] = []
    sounds: list[Path] = []
    for number in range(CLIPS_PER_KIND):
        frames, samples = generator.video(0, number, SECONDS), generator.audio(0, number, SECONDS)
        for files, suffix in ((silent, ".avi"), (sounding, ".mp4"), (sounds, ".wav")):
            files.append(pool / f"{number}{suffix}")
        write_clip(silent[-1], frames, generator.fps)
        write_clip(sounding[-1], frames, generator.fps, samples, generator.sample_rate)
        write_sound(sounds[-1], generator.audio(1, number, 6.0), generator.sample_rate)

    write_kinetics(root / "kinetics400", _names(400), 1, write=_one_of(sounding))
    write_kinetics(root / "kinetics_sounds", _names(34), 4, write=_one_of(sounding))
    for part, prefix, clips in (("unbalanced_train", "u", AUDIOSET_CLIPS), ("eval", "e", CLIPS_PER_KIND)):
        write_audioset(
            root / "audioset", clips, folder=f"{part}_segments", list_name=f"{part}_segments.csv", prefix=prefix,
            write=_one_of(sounding),
        )  # fmt: skip
    names = sorted(path.name for path in (root / "audioset" / "unbalanced_train_segments").iterdir())
    (root / "audioset" / "unbalanced_train-100k.txt").write_text("".join(f"{name}\n" for name in names))
    write_ucf101(root / "ucf101", _names(101), groups=3, clips_per_group=1, write=_one_of(silent))
    write_hmdb51(root / "hmdb51", _names(51), clips_per_class=3, write=_one_of(silent))
    write_esc50(root / "esc50", _names(3), write=_one_of(sounds))
    write_dcase(root / "dcase2014", ("bus", "park", "tube"), clips_per_scene=2, write=_one_of(sounds))


def write_released(stage: str, module: Any, data: Any, path: Path) -> None:
    """Write a file with the authors' names and layout for a stage. Its banks have one row per clip of the data set."""
    clips, mined = data.dataset.published_count(data.split), module.loss.positives
    # A single stored number, expanded to the full size.
    criterion = {f"nce_average.view{view}_mem": torch.zeros(1, 1).expand(clips, 128) for view in (1, 2)}
    criterion["criterion.avg_exp_score"] = torch.tensor([2.25] if mined else 2.25)
    if mined:
        criterion["nce_average.positive_set"] = torch.zeros(1, 1, dtype=torch.int32).expand(clips, mined)
    weights = {f"module.{name}": value for name, value in module.model.state_dict().items()}
    optimizer = {"state": {0: {"step": 9, "exp_avg": torch.zeros(1)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    if "audioset" in stage:  # half precision also occurs
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    content = {"epoch": 30, "model": weights, "optimizer": optimizer, "train_criterion": criterion}
    torch.save(content, path, _use_new_zipfile_serialization=not mined)  # the old format also occurs
    np.savez(
        path.with_name("audio_norm_stats.npz"), mean=np.full(257, -30.0, np.float32), std=np.full(257, 20.0, np.float32)
    )


def _names(count: int) -> tuple[str, ...]:
    return tuple(f"class{number:03d}" for number in range(count))


def _one_of(files: list[Path]) -> Callable[[Path], None]:
    """Return a function that creates a file as a hard link to the next one of `files`, in turn."""
    turn = itertools.cycle(files)

    def write(path: Path) -> None:
        os.link(next(turn), path)

    return write
