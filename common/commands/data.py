"""The command `assemble data`: what data sets there are, their preparation, shards, and features ahead of training."""

from __future__ import annotations

import argparse
import functools
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from common.errors import StageError
from common.reporting.papers import existing_papers, names_of_papers, paper_named, working_folder

if TYPE_CHECKING:
    from rich.console import Console

    from common.data.datasets.base import MediaDataset
    from common.data.listing import Clip, Listing
    from common.data.shard_writing import ShardReport

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def data_root() -> Path:
    """Folder of the data sets where no command names one: `$ASSEMBLE_DATA`, else `data` beside `runs`."""
    return Path(os.environ.get("ASSEMBLE_DATA") or working_folder() / "data")


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a command line.

    Args:
        commands: what ``ArgumentParser.add_subparsers`` returned.
    """
    text = "what a paper's data sets and weights are, what is there, how to get the rest"
    command = commands.add_parser(
        "data", help=text, description=f"{text[0].upper()}{text[1:]}. Nothing is downloaded but by --fetch."
    )
    command.add_argument("paper", help=names_of_papers())
    command.add_argument("--data", type=Path, default=data_root(), help="folder of the data sets; default: data")
    command.add_argument(
        "--prepare", action="store_true", help="index what is there, decode a sample of files, compare checksums"
    )
    fetching = command.add_argument_group(
        "fetching",
        "With --fetch, an open data set or weights are downloaded from their publisher; first, the terms are shown. An "
        "unknown name lists all.",
    )
    fetching.add_argument("--fetch", metavar="NAME", help="what to get, such as esc50 (common/data/open_data.yaml)")
    fetching.add_argument("--accept-license", "--accept-licence", action="store_true", help="you accept its terms")
    shards = command.add_argument_group(
        "shards",
        "With --shards, all data sets that are there are written anew below another folder, their media files in tar "
        "shards of WebDataset, everything else as it is. Training with --data FOLDER reads the same items in the same "
        "order. A run that was stopped goes on; files that cannot be read are passed over and listed.",
    )
    shards.add_argument("--shards", type=Path, metavar="FOLDER", help="folder to write")
    shards.add_argument(
        "--shard-size", type=_size, metavar="SIZE", help="size of a shard, such as 500MB or 1GB; default: 1GB"
    )
    command.add_argument(
        "--measure",
        nargs="?",
        const="",
        metavar="RECIPE",
        help="read training samples of a recipe (default: the main one) at paper scale for 20 s of CPU time, and say "
        "how many a core makes; `assemble plan --estimate` then says how many cores the cards want",
    )
    features = command.add_argument_group(
        "text features",
        "With --text-features, the frozen text features of a paper that stores them are computed. A run that was "
        "stopped goes on.",
    )
    features.add_argument("--text-features", action="store_true", help="compute them")
    features.add_argument("--bert", type=Path, metavar="FOLDER", help="BERT's released weights")
    regions = command.add_argument_group(
        "region features",
        "With --extract-regions, the regions of all images below a folder are found by a detector and written into one "
        "file. A run that was stopped goes on; images that cannot be read are passed over and listed.",
    )
    regions.add_argument("--extract-regions", type=Path, metavar="FOLDER", help="folder of images")
    regions.add_argument(
        "--detector", type=Path, metavar="WEIGHTS", help="weights of the detector; none are downloaded"
    )
    regions.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write, .h5 or .npz; one made with the same options grows"
    )
    regions.add_argument(
        "--architecture", default="fasterrcnn_resnet50_fpn", help="torchvision's name; default: %(default)s"
    )
    regions.add_argument("--regions", type=int, default=100, help="regions per image, at most; default: 100")
    regions.add_argument("--min-score", type=float, default=0.0, help="least score of a region; default: 0")
    regions.add_argument("--half", action="store_true", help="keep features with 16 bits")
    regions.add_argument("--distribution", action="store_true", help="also keep the probabilities of all classes")
    both = command.add_argument_group("text and region features")
    both.add_argument(
        "--batch-size", type=int, metavar="N", help="captions or images at a time; default: 256 captions, 4 images"
    )
    both.add_argument("--device", default="auto", help="cpu, cuda or auto; default: auto")
    command.set_defaults(func=_data_command)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = round(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it like 500MB or 1GB")
    return size


def _data_command(arguments: argparse.Namespace) -> int:
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise StageError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    if arguments.accept_license and arguments.fetch is None:
        raise StageError("--accept-license goes with --fetch NAME")
    if arguments.fetch is not None:
        return _fetch_command(arguments)
    if arguments.extract_regions is not None:
        return _extract_command(arguments)
    for option in ("detector", "output"):
        if getattr(arguments, option) is not None:
            raise StageError(f"--{option} goes with --extract-regions FOLDER")
    if arguments.bert is not None and not arguments.text_features:
        raise StageError("--bert goes with --text-features")
    if arguments.shard_size is not None and arguments.shards is None:
        raise StageError("--shard-size goes with --shards FOLDER")
    given = {"prepare": arguments.prepare, "shards": arguments.shards, "measure": arguments.measure}
    given |= {"text-features": arguments.text_features}
    asked = [f"--{name}" for name, value in given.items() if value is not None and value is not False]
    if len(asked) > 1:
        raise StageError(f"{' and '.join(asked)} are done one at a time: give one of them")
    from common.data.prepare import report, report_files
    from common.stages.parts import has_part, optional_part
    from common.stages.single import datasets_of, files_of

    paper, data = paper_named(arguments.paper).name, arguments.data.resolve()
    own = optional_part(paper, "prepare")
    if arguments.text_features:
        if own is None:
            able = ", ".join(one.short for one in existing_papers() if has_part(one.name, "prepare"))
            raise StageError(f"--text-features: {paper} stores no text features; {able} does")
        device = None if arguments.device == "auto" else arguments.device
        for path in own.text_features(data, arguments.bert, device, arguments.batch_size or 256):
            print(f"written to {path}")
        return 0
    if arguments.shards is not None:
        return _shards_command(paper, data, arguments.shards.resolve(), arguments.shard_size or _UNITS["G"])
    if arguments.measure is not None:
        from common.stages.configuration import resolve
        from common.stages.loading import measure_loading

        recipe = arguments.measure or paper_named(paper).recipe
        print(f"{recipe}: {measure_loading(resolve(paper, recipe, scale='paper'), data).describe()}")
        return 0
    report(datasets_of(paper, data), prepare=arguments.prepare)
    report_files(files_of(paper, data, verify=arguments.prepare))
    if own is not None:
        own.report(data)
    return 0


def _fetch_command(arguments: argparse.Namespace) -> int:
    from common.data.fetch import fetch, open_data

    paper_named(arguments.paper)
    data, entry = arguments.data.resolve(), open_data(arguments.fetch)
    console = files.console()
    _say(console, entry.describe())
    if not arguments.accept_license:
        raise StageError(
            f"nothing was fetched: read the terms, and give --accept-license if you accept them; it goes to {data}"
        )
    fetch(entry, data, functools.partial(_say, console), progressbar=console.is_terminal)
    if entry.note:
        print(entry.note)
    print(f"{entry.title} is in {data}; `assemble data {arguments.paper} --data {data} --prepare` looks at it")
    return 0


def _shards_command(paper: str, data: Path, target: Path, shard_bytes: int) -> int:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from common.data.shard_writing import media_bytes, place, write_shards
    from common.stages.single import datasets_of, files_of

    datasets = datasets_of(paper, data)
    folders = _folders(datasets, data)
    present = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        if folder not in present:
            print(f"{folder}: nothing there; `assemble data {paper}` says how to get it")
    if not present:
        raise StageError(f"no data set of {paper} is in {data}; `assemble data {paper}` says how to get them")
    console = files.console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    for folder in present:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"Shards of {folder.name}", total=media_bytes(folder))
            advance = functools.partial(progress.advance, task)
            written = write_shards(folder, target / folder.relative_to(data), shard_bytes, advance)
        _say(console, _told(written))
    for status in files_of(paper, data):
        if status.path.exists() and not any(status.path.is_relative_to(folder) for folder in present):
            place(status.path, target / status.path.relative_to(data))
    _check_order(datasets, datasets_of(paper, target), data, target)
    _say(console, f"Items and order are those of {data}. Train with --data {target}")
    return 0


def _say(console: Console, text: str) -> None:
    """Print a text as it is: paths are there to be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _folders(datasets: list[MediaDataset], data: Path) -> list[Path]:
    """Folders of the data sets, without those inside of others; sets may share one."""
    folders = sorted({dataset.root for dataset in datasets})
    outside = [folder for folder in folders if not folder.is_relative_to(data)]
    if outside:
        raise StageError(f"{outside[0]} does not lie in --data {data}")
    return [folder for folder in folders if not any(other in folder.parents for other in folders)]


def _told(report: ShardReport) -> str:
    from rich.filesize import decimal

    from common.data.shard_writing import BROKEN_NAME
    from common.data.shards import SHARD_FOLDER

    total = report.written + report.kept
    lines = [
        f"{report.target}: {report.files:,} media files, {decimal(report.size)} in {total:,} shards "
        f"({report.written} written, {report.kept} from before), {report.beside:,} other files"
    ]
    if report.archives:
        lines.append(f"  left out: {', '.join(report.archives[:3])}{', ...' if len(report.archives) > 3 else ''}")
    if report.broken:
        name, reason = next(iter(report.broken.items()))
        listed = report.target / SHARD_FOLDER / BROKEN_NAME
        lines.append(
            f"  {len(report.broken):,} files cannot be read and are listed in {listed}; the first: {name}: {reason}"
        )
    return "\n".join(lines)


def _check_order(datasets: list[MediaDataset], sharded: list[MediaDataset], data: Path, target: Path) -> None:
    """Make sure that every listing is the same in both folders.

    Raises:
        StageError: one is not; a file may have been added or removed meanwhile.
    """
    from common.data.items import TooManyBrokenFiles
    from common.data.listing import DatasetMissing

    for own, other in zip(datasets, sharded):
        for split, fold in own.parts():
            try:
                expected = own.listing(split, fold)
            except (DatasetMissing, TooManyBrokenFiles, ValueError):
                continue  # not in the old folder, or of no use there
            found = other.listing(split, fold)
            if found.fingerprint() != expected.fingerprint() and not _alike(expected, data, found, target):
                raise StageError(
                    f"{own.full_title}, {split}: {other.root} lists other items than {own.root}, which changed while "
                    "its shards were written; give the command again"
                )


def _alike(expected: Listing, data: Path, found: Listing, target: Path) -> bool:
    """Whether two listings are alike but for where the data lie: sets that read another one's files name them whole."""

    def moved(clip: Clip) -> Clip:
        return replace(clip, path=target / clip.path.relative_to(data))

    return len(expected) == len(found) and all(moved(own) == other for own, other in zip(expected.clips, found.clips))


def _extract_command(arguments: argparse.Namespace) -> int:
    import torch

    from common.data.checksums import digest
    from common.data.region_extraction import RegionExtractor, extract_regions, load_detector, write_skipped

    if arguments.output is None:
        raise StageError("--extract-regions needs --output FILE, .h5 or .npz")
    if arguments.regions < 1:
        raise StageError(f"--regions must be at least 1, got {arguments.regions}")
    try:
        detector = load_detector(arguments.detector, arguments.architecture)
    except (FileNotFoundError, ValueError) as error:
        raise StageError(str(error)) from None
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = arguments.detector.expanduser()
    origin = {"detector": digest(weights, "sha256"), "architecture": arguments.architecture}
    extractor = RegionExtractor(detector, arguments.regions, arguments.min_score, device, origin)
    result = extract_regions(
        arguments.extract_regions,
        arguments.output,
        extractor,
        batch_size=arguments.batch_size or 4,
        half=arguments.half,
        distribution=arguments.distribution,
    )
    listed = arguments.output.with_name(f"{arguments.output.name}.skipped.txt")
    write_skipped(listed, result.skipped)
    print(f"{arguments.output}: regions of {result.written:,} images, {result.found_before:,} of them from before")
    if result.skipped:
        print(
            f"{len(result.skipped):,} images cannot be read and are listed in {listed}; the first: {result.skipped[0]}"
        )
    return 0
