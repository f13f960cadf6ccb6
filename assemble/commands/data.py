"""Define `assemble data`, which lists a paper's data sets, downloads open ones and computes features."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from assemble.commands.parsing import Option, PaperName, existing_folder
from assemble.reporting.papers import Paper, existing_papers, paper_named, working_folder
from common.errors import StageError, optional_package

if TYPE_CHECKING:
    from common.data.fetch import OpenData


def data_root() -> Path:
    """Return the default data folder: `$ASSEMBLE_DATA` if set, else `data` next to `runs`."""
    return Path(os.environ.get("ASSEMBLE_DATA") or working_folder() / "data").expanduser()


def data(
    paper: PaperName,
    *,
    data: Annotated[Path | None, "folder of the data sets; default: $ASSEMBLE_DATA, else data"] = None,
    fetch: Annotated[
        str | None,
        "download an open data set or weights, such as esc50 (common/data/open_data.yaml), from its publisher; "
        "prints the terms first. An unknown name lists all options",
    ] = None,
    accept_license: Annotated[bool, "accept the terms of --fetch"] = False,
    mirror: Annotated[
        str | None, "with --fetch: get the files from this folder or URL instead of their publisher"
    ] = None,
    measure: Annotated[
        str | None,
        Option(
            "read training samples of a recipe (default: the main one) at paper scale for 20 s of CPU time, and print "
            "samples per second per core",
            const=lambda: "",
        ),
    ] = None,
    text_features: Annotated[bool, "compute the frozen text features that this paper's training reads"] = False,
    extract_regions: Annotated[
        Path | None,
        Option(
            "detect regions in all images under a folder and write them to one file; rerun to resume",
            parse=existing_folder,
        ),
    ] = None,
    detector: Annotated[Path | None, "the detector's weights (a file of yours; not downloaded)"] = None,
    output: Annotated[Path | None, "file to write, .h5 or .npz; must not exist"] = None,
    distribution: Annotated[bool, "also store each region's class probabilities"] = False,
) -> int:
    """List a paper's data sets and weights, whether each was found, and how to get the missing ones.

    Only --fetch downloads anything.
    """
    root = (data or data_root()).resolve()
    given: dict[str, object] = {"--fetch": fetch, "--measure": measure is not None}
    given |= {"--text-features": text_features, "--extract-regions": extract_regions}
    if len(several := [flag for flag, value in given.items() if value]) > 1:
        raise StageError(f"give only one of {', '.join(several)}")
    if (detector or output or distribution) and extract_regions is None:
        raise StageError("--detector, --output and --distribution need --extract-regions FOLDER")
    if (accept_license or mirror is not None) and fetch is None:
        raise StageError("--accept-license and --mirror need --fetch NAME")
    if fetch is not None:
        _fetch(paper_named(paper).short, root, fetch, accept_license, mirror)
    elif extract_regions is not None:
        if output is None or detector is None:
            raise StageError("--extract-regions needs --output FILE (.h5 or .npz) and --detector WEIGHTS")
        _extract(extract_regions, output, detector, distribution)
    elif text_features:
        _compute_text_features(paper_named(paper), root)
    elif measure is not None:
        _measure(paper_named(paper), measure, root)
    else:
        _list(paper_named(paper), root)
    return 0


def _list(paper: Paper, root: Path) -> None:
    from assemble.stages.paper_modules import optional_part
    from assemble.stages.recipe_data import data_sections, datasets_of, files_of
    from common.data.overview import report, report_files

    report(datasets_of(paper.name, root))
    report_files(files_of(paper.name, root))
    if (prepare := optional_part(paper.name, "prepare")) is not None:
        prepare.report(data_sections(paper.name, root))


def _compute_text_features(paper: Paper, root: Path) -> None:
    from assemble.stages.paper_modules import optional_part
    from assemble.stages.recipe_data import data_sections

    if (prepare := optional_part(paper.name, "prepare")) is None:
        able = ", ".join(other.short for other in existing_papers() if optional_part(other.name, "prepare"))
        raise StageError(f"--text-features: {paper.name} stores no text features; {able} does")
    for path in prepare.text_features(data_sections(paper.name, root)):
        print(f"written to {path}")


def _measure(paper: Paper, recipe: str, root: Path) -> None:
    from assemble.stages.configuration import resolve

    run = resolve(paper.name, recipe or paper.recipe, scale="paper")
    from assemble.stages.loading import measure_loading

    print(f"{run.recipe}: {measure_loading(run, root)}")


def _fetch(paper: str, root: Path, name: str, accepted: bool, mirror: str | None) -> None:
    from common.data.fetch import fetch, mirrored, open_data

    entries = _released(paper) if name == "released" else [open_data(name)]
    entries = [mirrored(entry, mirror) for entry in entries] if mirror else entries
    for entry in entries:
        print(entry.describe())
    if not accepted:
        raise StageError(f"nothing was fetched: read the terms, then add --accept-license to download to {root}")
    # All files at once, so that one error lists every file that is missing.
    fetch(replace(entries[0], files=tuple(file for entry in entries for file in entry.files)), root)
    for entry in entries:
        if entry.note:
            print(entry.note)
        print(f"{entry.title} is in {root}; `assemble data {paper} --data {root}` lists what was found")
    if name == "released":
        print(f"`make reproduce-{paper} SCALE=paper DATA={root} RELEASED={root / 'weights'}` fills tables from them")


def _released(paper: str) -> list[OpenData]:
    """Return the authors' weights that `--fetch` can download, and print where to get the other weights."""
    from assemble.reporting.tables import load
    from common.data import fetch as fetching

    entries: dict[str, OpenData] = {}
    if not (released := load(paper).released):
        raise StageError(f"--fetch released: {paper_named(paper).title} has no released weights")
    for file in released.values():
        entry = fetching.addressed(file.file)
        if entry is None and file.source.endswith(f"/{file.file}"):
            address = fetching.OpenFile(file.source, f"weights/{file.file}", file.checksum or None)
            entry = fetching.OpenData(file.file, file.license, file.source, "size unknown", (address,))
        if entry is None:
            print(f"{file.file}: get it from {file.origin}")
            continue
        # Files under the same terms are described together.
        earlier = entries[entry.title].files if entry.title in entries else ()
        entries[entry.title] = replace(entry, files=(*earlier, *entry.files))
    if not entries:
        raise StageError(f"--fetch released: no file of {paper} has an address that we know of")
    return [*entries.values()]


def _extract(images: Path, output: Path, weights: Path, distribution: bool) -> None:
    import torch

    from common.data.regions import REGION_SUFFIXES
    from common.files import digest

    if output.exists():
        raise StageError(f"--output {output} exists: name a new file, or delete it")
    if output.suffix.lower() not in REGION_SUFFIXES:
        raise StageError(f"--output {output}: the name must end with {', '.join(REGION_SUFFIXES)}")
    if output.suffix.lower() != ".npz":
        optional_package("h5py", "features")  # Fail here, not after hours of detection.
    from common.data.region_extraction import RegionExtractor, extract_regions, load_detector

    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = RegionExtractor(load_detector(weights), device=device, origin={"detector": digest(weights, "sha256")})
    written, skipped = extract_regions(images, output, extractor, distribution=distribution)
    print(f"{output}: regions of {written:,} images")
    if skipped:
        print(f"{len(skipped):,} images cannot be read (see {output}.skipped.txt), such as {skipped[0]}")
