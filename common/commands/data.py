"""The command `assemble data`: what data sets there are, their preparation, and features ahead of training."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from common.errors import StageError
from common.reporting.papers import existing_papers, names_of_papers, paper_named, working_folder

if TYPE_CHECKING:
    from rich.console import Console


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
        "With --text-features, the frozen text features of a paper that stores them are computed.",
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
    given = {"prepare": arguments.prepare, "measure": arguments.measure, "text-features": arguments.text_features}
    asked = [f"--{name}" for name, value in given.items() if value is not None and value is not False]
    if len(asked) > 1:
        raise StageError(f"{' and '.join(asked)} are done one at a time: give one of them")
    from common.data.prepare import report, report_files
    from common.stages.paper_modules import has_part, optional_part
    from common.stages.recipe_data import datasets_of, files_of

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


def _say(console: Console, text: str) -> None:
    """Print a text as it is: paths are there to be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


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
