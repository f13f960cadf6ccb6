"""Overview and preparation of a paper's data sets; downloads nothing, because most have terms to accept."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from common import files
from common.data import checksums
from common.data.datasets.base import DatasetStatus, MediaDataset
from common.data.datasets.captioned import LanguageCaptioned
from common.data.listing import Clip, DatasetMissing, spread
from common.data.released_files import FileStatus
from common.errors import printable

# Decode this much of a file, enough to find most kinds of damage.
CHECKED_SECONDS = 0.5
CHECKED_FRAME_RATE = 16.0
CHECKED_SAMPLE_RATE = 16_000

# Number of unreadable files to list.
NAMED_BROKEN = 10
_SILENT = "no sound"


def report(
    datasets: Sequence[MediaDataset], console: Console | None = None, prepare: bool = False, samples: int = 16
) -> list[DatasetStatus]:
    """Print the status of data sets; with `prepare`, decode `samples` files and compare checksums."""
    console = console or files.console()
    statuses = []
    for dataset in datasets:
        with console.status(f"Checking {dataset.title}"):
            status = _prepared(dataset, samples) if prepare else dataset.status()
        statuses.append(status)
        _print(console, dataset.full_title, _state(status), _details(status))
    if not prepare and any(status.counts for status in statuses):
        console.print(Text("Add --prepare to decode a sample of the files and compare checksums."))
    return statuses


def _prepared(dataset: MediaDataset, samples: int) -> DatasetStatus:
    status = dataset.status()
    verified, corrupt = [], []
    for name, published in dataset.checksums().items():
        path = dataset.root / name
        if path.is_file():
            problem = checksums.problem(path, published)
            if problem is None:
                verified.append(name)
            else:
                corrupt.append(f"{path}: {problem}")
    status = replace(status, verified=tuple(verified), corrupt=tuple(corrupt))
    if not status.counts:
        return status
    verdicts = check_samples(dataset, samples)
    notes = list(status.notes)
    silent = verdicts.count(_SILENT)
    if silent:
        notes.append(f"{silent} of {len(verdicts)} files tried have no sound; recipes that need it skip them")
    if isinstance(dataset, LanguageCaptioned):
        notes += dataset.check_regions(samples)
    broken = tuple(verdict for verdict in verdicts if verdict not in ("", _SILENT))
    return replace(status, broken=broken, checked=len(verdicts), notes=tuple(notes))


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
            state = Text("present, checksum OK" if status.checked else "present", style="green")
        names = ", ".join(recipes[:2]) + (f" and {len(recipes) - 2} more" if len(recipes) > 2 else "")
        lines = [f"Path: {status.path}", f"Size: {file.size}", f"License: {file.license}", f"Read by: {names}"]
        lines += [f"Problem: {status.problem}"] if status.problem else []
        lines += [f"Missing: {', '.join(status.missing)}"] if status.missing else []
        if not status.present or status.problem:
            lines.append(f"Get it from: {file.source.replace('{path}', str(status.path))}")
        _print(console, file.title, state, lines)


def _print(console: Console, title: str, state: Text, lines: Sequence[str]) -> None:
    console.print(Text.assemble((title, "bold"), ": ", state))
    # Text, not markup, because paths may contain square brackets.
    console.print(Text(printable("\n".join(f"  {line}" for line in lines))))


def _state(status: DatasetStatus) -> Text:
    if status.present:
        return Text("present", style="yellow" if status.notes or status.broken or status.corrupt else "green")
    return Text("incomplete" if status.counts else "missing", style="yellow" if status.counts else "red")


def _details(status: DatasetStatus) -> list[str]:
    counts = ", ".join(f"{part} {count:,}" for part, count in status.counts.items())
    dataset = status.dataset
    lines = [f"Path: {dataset.root}"]
    lines += [f"{dataset.unit.capitalize()}: {counts}"] if counts else []
    lines += [f"Layout: {status.layout}"] if status.layout else []
    lines += [f"Size: {dataset.size}", f"License: {dataset.license}"]
    if not status.present:
        lines += "".join(status.problems[:1]).splitlines()[:1]
        lines += ["Expected:", *(f"  {line}" for line in dataset.expected_layout.splitlines())]
        lines += [f"  {dataset.further_layout}"] if dataset.further_layout else []
    lines.append(f"Get it from: {dataset.source}")
    lines += [f"Note: {note}" for note in status.notes]
    if status.checked:
        lines.append(f"Decoded: {status.checked - len(status.broken)} of {status.checked} files tried")
    lines += [f"Broken: {reason}" for reason in status.broken]
    lines += [f"Checksum OK: {', '.join(status.verified)}"] if status.verified else []
    return [*lines, *(f"Problem: {reason}" for reason in status.corrupt)]


def check_samples(dataset: MediaDataset, samples: int = 16) -> list[str]:
    """Verdicts on files spread over all available splits, from decoding half a second from the middle of each.

    "" for an intact file, `_SILENT` for a video without a sound track, else the problem.
    """
    parts = []
    for split, fold in dataset.parts():
        with contextlib.suppress(DatasetMissing, RuntimeError, ValueError):  # the status reports it
            parts.append(dataset._all(split, fold))  # `listing` may open every file
    chosen: dict[Path, Clip] = {}
    for number, listing in enumerate(parts):
        share = samples // len(parts) + (number < samples % len(parts))
        for row in spread(len(listing), share):
            chosen.setdefault(listing[row].path, listing[row])
    return [_verdict(chosen[path], dataset.streams) for path in sorted(chosen)]


def check_files(dataset: MediaDataset, allowed: float = 1.0, needs_sound: bool = True) -> list[str]:
    """Check at most a thousand files before training, evenly spread, and report broken and silent ones.

    Unchanged files are checked once. Raises if more than the fraction `allowed` is broken.
    """
    listing = dataset.listing("all")
    clips = [listing[row] for row in spread(len(listing), 1000)]
    # A recipe of pictures alone can use files whose sound is damaged.
    streams = dataset.streams if needs_sound or "video" not in dataset.streams else ("video",)
    kept = files.cache_folder() / "tried_files" / f"{dataset.index_name('all')}.json"
    try:
        known = json.loads(kept.read_bytes())
    except (OSError, ValueError):
        known = {}
    verdicts: dict[str, str] = {}
    broken: dict[str, str] = {}
    bad = 0  # counts clips; several may share a file
    silent = []
    for clip in clips:
        key = json.dumps([streams, clip.stamps()])
        verdicts[key] = known[key] if key in known else _verdict(clip, streams)
        if verdicts[key] == _SILENT:
            silent.append(clip.path)
        elif verdicts[key]:
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
            f"  {len(silent):,} of {len(clips):,} files tried have no sound, such as {silent[0]}: training skips them"
        )
    if silent and bad + len(silent) == len(clips):
        raise ValueError("\n".join(lines) + "\nno readable clip has sound, which this recipe needs")
    if bad > allowed * len(clips) or bad == len(clips):
        raise ValueError(
            "\n".join(lines) + f"\n{bad} of {len(clips)} files cannot be read, more than "
            f"max_skipped_fraction = {allowed:g} allows: repair or remove them, or raise --data.max_skipped_fraction"
        )
    return lines


def _verdict(clip: Clip, streams: tuple[str, ...]) -> str:
    """Verdict on the files of a clip, from decoding a little of them; see `check_samples`."""
    from common.data.media import MediaError, open_media, read_image  # imports a decoder

    try:
        if streams == ("image",):
            read_image(clip.path)
            return ""
        with open_media(clip.path) as media:
            if "video" in streams:
                media.read_video(*_window(media.video_limits), CHECKED_FRAME_RATE)
            if "audio" in streams and clip.sound is None:
                if "video" in streams and media.audio_limits is None:
                    return _SILENT
                media.read_audio(*_window(media.audio_limits), CHECKED_SAMPLE_RATE)
        if "audio" in streams and clip.sound is not None:
            with open_media(clip.sound) as media:
                media.read_audio(*_window(media.audio_limits), CHECKED_SAMPLE_RATE)
    except MediaError as error:
        return str(error)
    return ""


def _window(limits: tuple[float, float] | None) -> tuple[float, float]:
    """Start and length to decode: in the middle, because a seek may fail there and not at the start."""
    start, end = limits or (0.0, 0.0)
    if end - start >= 2 * CHECKED_SECONDS:
        return (start + end) / 2, CHECKED_SECONDS
    return start, max(min(CHECKED_SECONDS, end - start), 1 / CHECKED_FRAME_RATE)
