"""Tiny data sets on disk in the layouts in which the real ones are distributed.

Without a `write` function, media files hold a placeholder, which is enough for listing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from common.data.worlds.layouts import write_lines

WriteMedia = Callable[[Path], object]

AUDIOSET_HEAD = (
    "# Segments csv created Sun Mar  5 10:54:31 2017",
    "# num_ytids=3, num_segs=3, num_unique_labels=2, num_positive_labels=3",
    "# YTID, start_seconds, end_seconds, positive_labels",
)


def placeholder(path: Path) -> None:
    path.write_bytes(b"placeholder")


def _put(path: Path, write: WriteMedia) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return path


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
    """Kinetics-400: class folders, or flat folders with `annotations/*.csv` as in the CVDF copy."""
    for folder in folders:
        rows = []
        for class_number, class_name in enumerate(classes):
            for clip in range(clips_per_class):
                video = video_id(class_number * 100 + clip, prefix=f"{folder[0]}-")
                name = f"{video}_{clip * 10:06d}_{clip * 10 + 10:06d}.mp4"
                rows.append(f"{class_name},{video},{clip * 10},{clip * 10 + 10},{folder}")
                _put(root / folder / name if flat else root / folder / class_name / name, write)
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
    """AudioSet: one list of segments and its clips; with `listed` above `clips`, the last ones are missing."""
    lines = [*AUDIOSET_HEAD]
    for number in range(clips if listed is None else listed):
        video, start = video_id(number, prefix), number * 10
        labels = "/m/09x0r,/t/dd00088" if number % 2 == 0 else "/m/03k3r"
        lines.append(f'{video}, {start}.000, {start + 10}.000, "{labels}"')
        if number < clips:
            _put(root / folder / naming.format(video=video, start=start, end=start + 10), write)
    write_lines(root / list_name, lines)
    return root


def write_ucf101(
    root: Path,
    classes: Sequence[str] = ("ApplyEyeMakeup", "YoYo"),
    groups: int = 3,
    clips_per_group: int = 2,
    tested: int = 1,
    newline: str = "\r\n",
    write: WriteMedia = placeholder,
) -> Path:
    """UCF-101: division k tests on the k-th `tested` groups and trains on the others."""
    lists: dict[str, list[str]] = {}
    for group in range(groups):
        for clip in range(clips_per_group):
            for label, name in enumerate(classes, 1):
                entry = f"{name}/v_{name}_g{group + 1:02d}_c{clip + 1:02d}.avi"
                _put(root / "UCF-101" / entry, write)
                for fold in range(3):
                    kind, line = ("test", entry) if group // tested == fold else ("train", f"{entry} {label}")
                    lists.setdefault(f"{kind}list{fold + 1:02d}.txt", []).append(line)
    folder = root / "ucfTrainTestlist"
    write_lines(folder / "classInd.txt", [f"{label} {name}" for label, name in enumerate(classes, 1)], newline)
    for list_name, lines in lists.items():
        write_lines(folder / list_name, sorted(lines))
    return root


def write_hmdb51(
    root: Path,
    classes: Sequence[str] = ("brush_hair", "wave"),
    clips_per_class: int = 4,
    train: int = 2,
    test: int = 1,
    # Real names include hash signs and brackets.
    clip_name: str = "#{number}_Rhythm_(clap)!_{name}_u_nm_np1_fr_goo_{number}.avi",
    nested: bool = False,
    write: WriteMedia = placeholder,
) -> Path:
    """HMDB-51: division k tests on the k-th block of `test` clips of a class and trains on the clips after it."""
    clips = {name: [clip_name.format(name=name, number=n) for n in range(clips_per_class)] for name in classes}
    for number in range(clips_per_class):
        for name in classes:
            _put((root / "hmdb51_org" if nested else root) / name / clips[name][number], write)
    for name, own in clips.items():
        for fold in range(3):
            flags = ["0"] * clips_per_class
            for offset in range(test + train):
                flags[(fold * test + offset) % clips_per_class] = "2" if offset < test else "1"
            lines = [f"{clip} {flag} " for clip, flag in zip(own, flags)]
            write_lines(root / "testTrainMulti_7030_splits" / f"{name}_test_split{fold + 1}.txt", lines)
    return root


def write_esc50(
    root: Path,
    categories: Sequence[str] = ("dog", "rooster", "rain"),
    clips_per_fold: int = 1,
    newline: str = "\r\n",
    write: WriteMedia = placeholder,
) -> Path:
    """ESC-50: each category has the same number of clips in each of the five folds."""
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold, _, target in itertools.product(range(1, 6), range(clips_per_fold), range(len(categories))):
        source = 100_000 + len(lines) - 1
        name = f"{fold}-{source}-A-{target}.wav"
        _put(root / "audio" / name, write)
        lines.append(f"{name},{fold},{target},{categories[target].replace(' ', '_')},False,{source},A")
    write_lines(root / "meta" / "esc50.csv", lines, newline)
    return root


def write_dcase(
    root: Path,
    scenes: Sequence[str] = ("bus", "park", "tube", "tubestation"),
    clips_per_scene: int = 2,
    lists: bool = False,
    write: WriteMedia = placeholder,
) -> Path:
    """DCASE scenes: the two folders of the published archives, or one folder with `train.txt` and `test.txt`."""
    for split, folder in (("train", "scenes_stereo"), ("test", "scenes_stereo_testset")):
        lines = []
        for scene in scenes:
            for number in range(1, clips_per_scene + 1):
                if lists:
                    name = f"audio/{split}_{scene}_{number}.wav"
                    lines.append(f"{name}\t{scene}")
                else:
                    name = f"{folder}/{scene}{number:02d}.wav"
                _put(root / name, write)
        if lists:
            write_lines(root / "evaluation_setup" / f"{split}.txt", lines)
    return root
