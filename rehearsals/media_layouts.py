"""Layouts of data sets of clips and sounds, with placeholders for files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.data.datasets.base import WriteMedia, placeholder, put, write_lines


def video_id(number: int, prefix: str = "v") -> str:
    """An ID of eleven characters, as on YouTube."""
    return f"{prefix}{number:0{11 - len(prefix)}d}"


def write_kinetics(
    root: Path,
    classes: Sequence[str] = ("abseiling", "tai chi"),
    clips_per_class: int = 2,
    flat: bool = False,
    folders: Sequence[str] = ("train", "val"),
    write: WriteMedia = placeholder,
) -> Path:
    """Write class folders, or flat folders with `annotations/*.csv` as in the CVDF copy."""
    for folder in folders:
        rows = []
        for class_number, class_name in enumerate(classes):
            for clip in range(clips_per_class):
                video = video_id(class_number * 100 + clip, prefix=f"{folder[0]}-")
                name = f"{video}_{clip * 10:06d}_{clip * 10 + 10:06d}.mp4"
                rows.append(f"{class_name},{video},{clip * 10},{clip * 10 + 10},{folder}")
                put(root / folder / name if flat else root / folder / class_name / name, write)
        if flat:
            heading = "label,youtube_id,time_start,time_end,split"
            write_lines(root / "annotations" / f"{folder}.csv", [heading, *rows], "\r\n")
    return root


def write_audioset(
    root: Path,
    clips: int = 3,
    listed: int | None = None,
    naming: str = "{video}_{start}_{end}.mp4",
    folder: str = "unbalanced_train_segments",
    list_name: str = "unbalanced_train_segments.csv",
    prefix: str = "u",
    write: WriteMedia = placeholder,
) -> Path:
    """Write a list of segments and its clips; if `listed` exceeds `clips`, the last clips are missing."""
    lines = ["# YTID, start_seconds, end_seconds, positive_labels"]
    for number in range(clips if listed is None else listed):
        video, start = video_id(number, prefix), number * 10
        labels = "/m/09x0r,/t/dd00088" if number % 2 == 0 else "/m/03k3r"
        lines.append(f'{video}, {start}.000, {start + 10}.000, "{labels}"')
        if number < clips:
            put(root / folder / naming.format(video=video, start=start, end=start + 10), write)
    write_lines(root / list_name, lines)
    return root


def write_dcase(
    root: Path,
    scenes: Sequence[str] = ("bus", "park", "tube", "tubestation"),
    clips_per_scene: int = 2,
    write: WriteMedia = placeholder,
) -> Path:
    """Write the two folders of the published archives."""
    for folder in ("scenes_stereo", "scenes_stereo_testset"):
        for scene in scenes:
            for number in range(1, clips_per_scene + 1):
                put(root / folder / f"{scene}{number:02d}.wav", write)
    return root
