"""Pack a paper's records, curves and verify result into an archive to send, and read archives as untrusted input."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import socket
import stat
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from assemble.reporting.draws import INSTRUCTION_SETS
from assemble.reporting.papers import SCALES, Paper, paper_named, project_root
from assemble.reporting.records import RECORD_FILE, Record, config_hash
from assemble.reporting.schema import parse_json
from assemble.reporting.tables import Tables, expand, load
from assemble.stages.request import Selection, StageRequest, requests_for
from common.errors import ReportingError
from common.files import MOST_BYTES, open_regular, parsing, read_bytes, read_text

#: GitHub takes attachments up to 25 MB.
MOST_PACKED, MOST_UNPACKED, MOST_FILES = 25_000_000, 4 * MOST_BYTES, 10_000
VERIFY, CURVES = "verify.json", "metrics.csv"
_NAME = re.compile(
    rf"verify\.json|\w+/({'|'.join(SCALES)})/seed\d+(-\w+)*/\w[\w@-]*/(record\.json|metrics\.csv)", re.ASCII
)
#: Fields of a record, besides its configuration, that may hold names and paths.
_CLEANED = ("data", "hardware", "metrics", "ours", "deviations", "code", "selection", "precision")
#: An absolute path, up to a character that can't be part of it. The slashes of a URL don't match.
_PATH = r"(?<![\w./])/(?!/)[^\n'\",;)\]}]+"


# -- writing -----------------------------------------------------------------------------------------------------------


def verified(paper: Paper, path: Path) -> dict[str, Any] | None:
    """Return the stored result of `assemble verify` for a paper, or None if there is none."""
    if not path.is_file():
        return None
    with parsing(path, ReportingError):
        content = parse_json(read_bytes(path))
        result = content["papers"].get(paper.name)
        return result and {**content, "papers": {paper.name: {**result, "agrees": bool(result["agrees"])}}}


def pack(paper: Paper, records: Sequence[Record], runs: Path) -> dict[str, bytes]:
    """Return a contribution's files by name, without paths, loggers, ids, media and names of machine and user."""
    files: dict[str, bytes] = {}
    for record in records:
        folder = record.folder(Path())
        files[(folder / RECORD_FILE).as_posix()] = _impersonal(record).to_json().encode()
        if (curves := record.folder(runs) / CURVES).is_file():
            files[(folder / CURVES).as_posix()] = _without_names(read_text(curves)).encode()
    if result := verified(paper, runs / "verify" / "result.json"):
        files[VERIFY] = json.dumps(_without_names(result), indent=1).encode()
    return files


def archive(files: dict[str, bytes]) -> bytes:
    """Make a ZIP archive. The same files give the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in sorted(files.items()):
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, 9)
    if stream.tell() > MOST_PACKED:
        raise ReportingError(
            f"the archive has {stream.tell():,} bytes, more than {MOST_PACKED:,}: send one per --scale"
        )
    return stream.getvalue()


def _impersonal(record: Record) -> Record:
    config = _without_names(record.config)
    if config_hash(config) != record.config_hash:
        raise ReportingError(
            f"{record.stage} ({record.draw}): its configuration contains a path or a name of this machine, and without "
            "it the configuration's hash would change; rerun the stage with a relative path"
        )
    cleaned = {name: _without_names(getattr(record, name)) for name in _CLEANED}
    return replace(record, config=config, **cleaned, wandb_run_id=None, media=[])


def _without_names(value: Any, private: str = "") -> Any:
    """Return plain data without loggers, absolute paths, keys, and the names of this machine and its user."""
    private = private or _private()
    if isinstance(value, str):
        return re.sub(private, "<private>", value, flags=re.IGNORECASE)
    if isinstance(value, list):
        return [_without_names(item, private) for item in value]
    if isinstance(value, dict):
        named = {_without_names(key, private): item for key, item in value.items() if key != "logger"}
        return {key: _without_names(item, private) for key, item in named.items()}
    return value


def _private() -> str:
    """Return a pattern of absolute paths, keys, and the names of this machine and its user."""
    host, keys = socket.gethostname(), (v for k, v in os.environ.items() if re.search("KEY|TOKEN|SECRET|PASSWORD", k))
    names = {host, host.partition(".")[0], Path.home().name, *map(os.environ.get, ("USER", "LOGNAME")), *keys}
    # Longest first, since a host's name may begin with the user's. `_` separates words, as in `ann_data`.
    words = sorted({name for name in names if name and name.lower() not in _public()}, key=len, reverse=True)
    return "|".join([_PATH, *(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])" for word in words)])


@functools.cache
def _public() -> frozenset[str]:
    """Return the words of the recipes, tables and formats, which say nothing about a user named like one of them."""
    root = project_root()
    texts = map(read_text, [*root.glob("configs/**/*.yaml"), *root.glob("papers/*/tables.yaml")])
    return frozenset(re.findall(r"[^\W_]+", " ".join([*texts, *INSTRUCTION_SETS, "root step"]).lower()))


# -- reading -----------------------------------------------------------------------------------------------------------


def unpack(path: Path, folder: Path) -> Paper:
    """Extract an untrusted archive to an empty folder, and return the paper of its records. Refuse unexpected files."""
    with parsing(path, ReportingError), open_regular(path, most=MOST_PACKED) as file, zipfile.ZipFile(file) as packed:
        entries = packed.infolist()
        names = {entry.filename for entry in entries}
        if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > MOST_UNPACKED:
            raise ValueError(f"holds more than {MOST_FILES:,} files or {MOST_UNPACKED:,} bytes")
        for entry in entries:
            regular = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)
            plain = entry.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others can't be read in parts
            if not (_NAME.fullmatch(entry.filename) and regular and plain and len(names) == len(entries)):
                raise ValueError(f"{entry.filename!r} is not a file of a contribution, or occurs twice")
            (folder / entry.filename).parent.mkdir(parents=True, exist_ok=True)
            with packed.open(entry) as part:
                (folder / entry.filename).write_bytes(part.read(entry.file_size))
        papers = {name.partition("/")[0] for name in names - {VERIFY}}
        if len(papers) != 1:
            raise ValueError("expected the records of one paper, as `assemble contribute` packs them")
        return paper_named(papers.pop())


def checker(paper: Paper, folder: Path) -> Callable[[Record], str]:
    """Return a function that says why a record doesn't match this checkout's recipes. Empty if the record matches."""
    source = load(paper.name)

    @functools.cache
    def planned(scale: str, seed: int) -> dict[str, StageRequest]:
        selection = Selection(scale, (seed,), runs=folder, data=folder)
        stages = expand(source, scale, everything=True)
        return {request.stage: request for request in requests_for(paper.name, stages, selection, seed)}

    def problem(record: Record) -> str:
        request = planned(record.scale, record.seed).get(record.stage)
        if (
            request is None
            or (request.recipe, request.job, request.row) != (record.recipe, record.job, record.row)
            or {record.config_hash, config_hash(record.config)} != {config_hash(request.configuration.config)}
        ):
            return "its configuration is not that of the recipe here, or was edited; update one of the two"
        parents = {name: (parent.stage, parent.lineage) for name, parent in request.parents.items()}
        stated = {name: (parent["stage"], parent["lineage_hash"]) for name, parent in record.parents.items()}
        if not record.given and (record.lineage_hash, stated) != (request.lineage, parents):
            return "it starts from stages of other configurations"
        wrong = [stage for stage in record.given if not _of_the_authors(record, stage, source)]
        return f"the file for {wrong[0]} is not the one that papers/{paper.name}/tables.yaml names" if wrong else ""

    return problem


def _of_the_authors(record: Record, stage: str, source: Tables) -> bool:
    """Check by name, source and checksum whether the authors' file replaces a stage."""
    file, released = record.given[stage], source.released.get(stage)
    if released is None or (file["file"], file.get("source")) != (released.file, released.source):
        return False
    kind, _, digest = released.checksum.partition(":")
    return kind != "sha256" or file["sha256"].startswith(digest)
