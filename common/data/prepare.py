"""Overview and preparation of a paper's data sets; downloads nothing, because most of them have terms to accept."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from common import files
from common.data import checksums
from common.data.datasets.base import DatasetStatus, MediaDataset
from common.data.datasets.captioned import CaptionedDataset, LanguageCaptioned
from common.data.listing import Clip, DatasetMissing, spread
from common.data.released_files import FileStatus
from common.errors import printable

# Long enough to find most kinds of damage.
CHECKED_SECONDS = 0.5
CHECKED_FRAME_RATE = 16.0
CHECKED_SAMPLE_RATE = 16_000

# Number of unreadable files to list.
NAMED_BROKEN = 10
_SILENT = "no sound"


@dataclass(frozen=True)
class SampleCheck:
    """Result of decoding a random sample; `broken` has reasons, `silent` counts video files without a sound track."""

    checked: int
    broken: tuple[str, ...]
    silent: int


def report(
    datasets: Sequence[MediaDataset],
    console: Console | None = None,
    prepare: bool = False,
    samples: int = 16,
) -> list[DatasetStatus]:
    """Print the status of data sets; with `prepare`, index them, decode `samples` files and compare checksums."""
    console = console or files.console()
    statuses = []
    for dataset in datasets:
        notes = _index(dataset, console) if prepare else []
        with console.status(f"Looking at {dataset.title}"):
            status = dataset.status()
        if prepare:
            with console.status(f"Comparing checksums of {dataset.title}"):
                verified, corrupt = check_checksums(dataset)
            status = replace(status, verified=verified, corrupt=corrupt)
        if prepare and status.counts:
            with console.status(f"Decoding {samples} files of {dataset.title}"):
                check = check_samples(dataset, samples)
            if check.silent:
                notes.append(f"{check.silent} of {check.checked} files tried have no sound; they are passed over")
            status = replace(status, broken=check.broken, checked=check.checked)
            if isinstance(dataset, LanguageCaptioned):
                with console.status(f"Reading region features of {dataset.title}"):
                    notes += dataset.check_regions(samples)
        statuses.append(replace(status, notes=(*status.notes, *notes)))
        _print(console, dataset.full_title, _state(statuses[-1]), _told(statuses[-1], prepare))
    if not prepare and any(status.counts for status in statuses):
        console.print(
            Text("Nothing was prepared; with --prepare files are indexed, a sample is decoded, checksums are compared.")
        )
    return statuses


def report_files(statuses: Sequence[FileStatus], console: Console | None = None) -> None:
    console = console or files.console()
    if statuses:
        console.print(Text("Weights and other files", style="italic"))
    for status in statuses:
        file, recipes = status.file, status.recipes
        state = Text("incomplete" if status.path.exists() else "missing", style="red")
        if status.problem:
            state = Text("damaged", style="red")
        elif status.present:
            state = Text("present, checksum right" if status.checked else "present", style="green")
        names = ", ".join(recipes[:2]) + (f" and {len(recipes) - 2} more" if len(recipes) > 2 else "")
        lines = [f"Path: {status.path}", f"Size: {file.size}", f"License: {file.license}", f"Read by: {names}"]
        lines += [f"Wrong: {status.problem}"] if status.problem else []
        lines += [f"Lacks: {', '.join(status.missing)}"] if status.missing else []
        if not status.present or status.problem:
            lines.append(f"Get it from: {file.source.replace('{path}', str(status.path))}")
        _print(console, file.title, state, lines)


def _print(console: Console, title: str, state: Text, lines: Sequence[str]) -> None:
    console.print(Text.assemble((title, "bold"), ": ", state))
    # Text, not markup, because paths may contain square brackets.
    console.print(Text(printable("\n".join(f"  {line}" for line in lines))), overflow="fold")


def _state(status: DatasetStatus) -> Text:
    if status.present:
        return Text("present", style="yellow" if status.notes or status.broken or status.corrupt else "green")
    return Text("incomplete" if status.counts else "missing", style="yellow" if status.counts else "red")


def _told(status: DatasetStatus, prepared: bool) -> list[str]:
    counts = ", ".join(f"{part} {count:,}" for part, count in status.counts.items())
    dataset = status.dataset
    lines = [f"Path: {dataset.root}"]
    lines += [f"{dataset.unit.capitalize()}: {counts}"] if counts else []
    lines += [f"Layout: {status.layout}"] if status.layout else []
    lines += [f"Size: {dataset.size}", f"License: {dataset.license}"]
    if not status.present:
        lines += status.problem.splitlines()[:1]
        lines += ["Expected:", *(f"  {line}" for line in dataset.expected_layout.splitlines())]
        lines += [f"  {dataset.further_layout}"] if dataset.further_layout else []
    lines.append(f"Get it from: {dataset.source}")
    if not (status.present and prepared):
        lines.append(f"To prepare: {dataset.prepares}")
    lines += [f"Note: {note}" for note in status.notes]
    if status.checked:
        lines.append(f"Decoded: {status.checked - len(status.broken)} of {status.checked} files tried")
    lines += [f"Broken: {reason}" for reason in status.broken]
    lines += [f"Checksum right: {', '.join(status.verified)}"] if status.verified else []
    return [*lines, *(f"Wrong: {reason}" for reason in status.corrupt)]


def check_checksums(dataset: MediaDataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files with the right checksum, and of the others with the reason."""
    verified, corrupt = [], []
    for name, published in dataset.checksums().items():
        path = dataset.root / name
        if path.is_file():
            problem = checksums.problem(path, published)
            if problem is None:
                verified.append(name)
            else:
                corrupt.append(f"{path}: {problem}")
    return tuple(verified), tuple(corrupt)


def check_samples(dataset: MediaDataset, samples: int = 16, seed: int = 0) -> SampleCheck:
    """Decode a little from the middle of random files of every available split."""
    from common.data.item_dataset import TooManyBrokenFiles  # avoid importing a decoder before this point

    chosen: dict[Path, Clip] = {}
    parts = []
    for split, fold in dataset.parts():
        try:
            parts.append(dataset.listing(split, fold))
        except (DatasetMissing, TooManyBrokenFiles, ValueError):
            continue
    generator = random.Random(seed)
    for number, listing in enumerate(parts):
        share = samples // len(parts) + (number < samples % len(parts))
        for row in generator.sample(range(len(listing)), min(share, len(listing))):
            chosen.setdefault(listing[row].path, listing[row])
    verdicts = [_verdict(chosen[path], dataset.streams) for path in sorted(chosen)]
    broken = tuple(verdict for verdict in verdicts if verdict not in ("", _SILENT))
    return SampleCheck(len(chosen), broken, verdicts.count(_SILENT))


def check_files(
    dataset: MediaDataset, allowed: float = 1.0, at_most: int = 1000, needs_sound: bool = True
) -> list[str]:
    """Check at most `at_most` files ahead of training, evenly spread, and report broken and silent ones.

    Unchanged files are checked once. The fraction of broken files may be `allowed`.
    """
    listing = dataset.listing("all")
    clips = [listing[row] for row in spread(len(listing), at_most)]
    kept = files.cache_folder() / "tried_files" / f"{dataset.index_name('all')}.json"
    try:
        known = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    verdicts: dict[str, str] = {}
    broken: dict[str, str] = {}
    bad = 0  # counts clips; several may share a file
    silent = []
    for clip in clips:
        key = json.dumps([str(clip.path), str(clip.sound), *(_stamp(path) for path in (clip.path, clip.sound))])
        verdicts[key] = known[key] if key in known else _verdict(clip, dataset.streams)
        if verdicts[key] == _SILENT and needs_sound:
            silent.append(clip.path)
        elif verdicts[key] not in ("", _SILENT):
            broken[str(clip.path)] = verdicts[key]
            bad += 1
    with contextlib.suppress(OSError):
        files.write_atomically(kept, json.dumps(verdicts))
    classes = len(listing.classes)
    of = f"of {classes} {'class' if classes == 1 else 'classes'}" if classes else "without classes"
    lines = [f"{dataset.root}: {len(listing):,} {dataset.unit} {of} ({listing.layout})"]
    lines += [f"  {note}" for note in listing.notes]
    lines += [f"  cannot be read: {reason}" for reason in list(broken.values())[:NAMED_BROKEN]]
    if len(broken) > NAMED_BROKEN:
        lines.append(f"  ... and {len(broken) - NAMED_BROKEN:,} more of {len(clips):,} files tried")
    if silent:
        lines.append(
            f"  {len(silent):,} of {len(clips):,} files tried have no sound, such as {silent[0]}: training passes "
            "over them"
        )
    if silent and bad + len(silent) == len(clips):
        raise ValueError("\n".join(lines) + "\nno clip that can be read has sound, which this recipe learns from")
    if bad > allowed * len(clips) or bad == len(clips):
        raise ValueError(
            "\n".join(lines) + f"\n{bad} of {len(clips)} files cannot be read, more than "
            f"max_skipped_fraction = {allowed:g} allows: repair or remove them, or raise --data.max_skipped_fraction"
        )
    return lines


def _stamp(path: Path | None) -> list[int]:
    return files.stamp_of(path) if path is not None and path.exists() else []


def _verdict(clip: Clip, streams: tuple[str, ...]) -> str:
    """What is wrong with the files of a clip; "" if nothing."""
    from common.data.media import MediaError

    try:
        silent = _decode(clip.path, streams if clip.sound is None else ("video",))
        if clip.sound is not None:
            _decode(clip.sound, ("audio",))
    except (MediaError, OSError, ValueError) as error:
        return str(error) if str(clip.path) in str(error) else f"{clip.path}: {error}"
    return _SILENT if silent else ""


def _decode(path: Path, streams: tuple[str, ...]) -> bool:
    """Decode a little of a file; returns whether it lacks a sound track that its set should have."""
    if streams == ("image",):
        from common.data.media import read_image

        read_image(path)
        return False
    from common.data.media import MediaError, open_media

    with open_media(path) as media:
        if "video" in streams:
            if media.video_limits is None:
                raise MediaError(f"{path}: no video stream")
            media.read_video(*_window(media.video_limits), CHECKED_FRAME_RATE)
        if "audio" in streams:
            if media.audio_limits is not None:
                media.read_audio(*_window(media.audio_limits), CHECKED_SAMPLE_RATE)
            elif "video" not in streams:
                raise MediaError(f"{path}: no audio stream")
            else:
                return True
    return False


def _window(limits: tuple[float, float]) -> tuple[float, float]:
    """Start and length to decode: from the middle, because a seek may fail there and not at the start."""
    start, end = limits
    if end - start >= 2 * CHECKED_SECONDS:
        return (start + end) / 2, CHECKED_SECONDS
    return start, max(min(CHECKED_SECONDS, end - start), 1 / CHECKED_FRAME_RATE)


def _index(dataset: MediaDataset, console: Console) -> list[str]:
    notes = []
    for split, fold in dataset.parts():
        part = split if fold is None else f"{split} {fold}"
        if isinstance(dataset, CaptionedDataset):
            break  # read as captions, whose status is the check
        try:
            with console.status(f"Indexing {dataset.title}, {part}"):
                _, kept = dataset.index(split, fold)
        except (DatasetMissing, ValueError):
            # The status reports the problem.
            continue
        if not kept:
            notes.append(
                f"{part}: the index was not kept, because the folder changed just now or the cache folder cannot be "
                "written; the files will be listed anew"
            )
    return notes
