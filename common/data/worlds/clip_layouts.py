"""Tiny data sets on disk in the layouts in which the real ones are distributed.

Every writer takes the root, a few sizes and, where a test decodes, a function that writes a media file; without one
the files hold a placeholder, which is enough for everything that lists.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

WriteMedia = Callable[[Path], object]

AUDIOSET_HEAD = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=3, num_segs=3, num_unique_labels=2, num_positive_labels=3\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
)


def placeholder(path: Path) -> None:
    """Write a file that only has a name."""
    path.write_bytes(b"placeholder")


def _put(path: Path, write: WriteMedia) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return path


def video_id(number: int, prefix: str = "v") -> str:
    """An identifier of eleven characters, as on YouTube."""
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
                rows.append((class_name, video, clip * 10, clip * 10 + 10, folder))
                _put(root / folder / name if flat else root / folder / class_name / name, write)
        if flat:
            path = root / "annotations" / f"{folder}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                writer.writerow(("label", "youtube_id", "time_start", "time_end", "split"))
                writer.writerows(rows)
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
    """AudioSet: one list of segments and its clips; `listed` above `clips` leaves the last ones missing."""
    path = root / list_name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(clips if listed is None else listed):
        video, start = video_id(number, prefix), number * 10
        labels = "/m/09x0r,/t/dd00088" if number % 2 == 0 else "/m/03k3r"
        lines.append(f'{video}, {start}.000, {start + 10}.000, "{labels}"\n')
        if number < clips:
            _put(root / folder / naming.format(video=video, start=start, end=start + 10), write)
    path.write_text(AUDIOSET_HEAD + "".join(lines), encoding="utf-8")
    return root


def write_ucf101(
    root: Path,
    classes: Sequence[str] = ("ApplyEyeMakeup", "YoYo"),
    groups: int = 3,
    clips_per_group: int = 2,
    write: WriteMedia = placeholder,
) -> Path:
    """UCF-101: in division k, group k is for testing, the others are for training."""
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\r\n" for i, name in enumerate(classes, 1)), newline="")
    train: dict[int, list[str]] = {fold: [] for fold in (1, 2, 3)}
    test: dict[int, list[str]] = {fold: [] for fold in (1, 2, 3)}
    for label, name in enumerate(classes, 1):
        for group in range(1, groups + 1):
            for clip in range(1, clips_per_group + 1):
                entry = f"{name}/v_{name}_g{group:02d}_c{clip:02d}.avi"
                _put(root / "UCF-101" / entry, write)
                for fold in (1, 2, 3):
                    if group == fold:
                        test[fold].append(f"{entry}\n")
                    else:
                        train[fold].append(f"{entry} {label}\n")
    for fold in (1, 2, 3):
        (lists / f"trainlist{fold:02d}.txt").write_text("".join(train[fold]))
        (lists / f"testlist{fold:02d}.txt").write_text("".join(test[fold]))
    return root


def write_hmdb51(
    root: Path,
    classes: Sequence[str] = ("brush_hair", "wave"),
    clips_per_class: int = 4,
    nested: bool = False,
    write: WriteMedia = placeholder,
) -> Path:
    """HMDB-51: per class and division one clip for testing, one unused, the rest for training."""
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True, exist_ok=True)
    videos = root / "hmdb51_org" if nested else root
    for name in classes:
        # Real names look like this, hash signs and brackets included.
        files = [f"#{n}_Rhythm_(clap)!_{name}_u_nm_np1_fr_goo_{n}.avi" for n in range(clips_per_class)]
        for file_name in files:
            _put(videos / name / file_name, write)
        for fold in (1, 2, 3):
            flags = ["1"] * clips_per_class
            flags[(fold - 1) % clips_per_class] = "2"
            flags[fold % clips_per_class] = "0"
            lines = [f"{file_name} {flag} \n" for file_name, flag in zip(files, flags)]
            (lists / f"{name}_test_split{fold}.txt").write_text("".join(lines))
    return root


def write_esc50(
    root: Path,
    categories: Sequence[str] = ("dog", "rooster", "rain"),
    clips_per_fold: int = 1,
    write: WriteMedia = placeholder,
) -> Path:
    """ESC-50: each category has the same number of clips in each of the five folds."""
    (root / "meta").mkdir(parents=True, exist_ok=True)
    with (root / "meta" / "esc50.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("filename", "fold", "target", "category", "esc10", "src_file", "take"))
        for fold in range(1, 6):
            for target, category in enumerate(categories):
                for clip in range(clips_per_fold):
                    source = 100000 + 1000 * fold + 10 * target + clip
                    name = f"{fold}-{source}-A-{target}.wav"
                    _put(root / "audio" / name, write)
                    writer.writerow((name, fold, target, category, target == 0, source, "A"))
    return root


def write_dcase(
    root: Path,
    scenes: Sequence[str] = ("bus", "park", "tube", "tubestation"),
    clips_per_scene: int = 2,
    lists: bool = False,
    write: WriteMedia = placeholder,
) -> Path:
    """DCASE scenes: the two folders of the two archives, or one folder with `train.txt` and `test.txt`."""
    for split, folder in (("train", "scenes_stereo"), ("test", "scenes_stereo_testset")):
        lines = []
        for scene in scenes:
            for number in range(1, clips_per_scene + 1):
                if lists:
                    name = f"audio/{split}_{scene}_{number}.wav"
                    lines.append(f"{name}\t{scene}\n")
                else:
                    name = f"{folder}/{scene}{number:02d}.wav"
                _put(root / name, write)
        if lists:
            path = root / "evaluation_setup" / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
    return root
