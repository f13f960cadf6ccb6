"""Download the open data sets and weights of `open_data.yaml`, when the user asks and accepts the terms."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import checksums
from common.errors import StageError, nearest
from common.files import exclusive, read_yaml

TABLE = Path(__file__).with_name("open_data.yaml")
_RETRIES = 2


@dataclass(frozen=True)
class OpenFile:
    """A file that can be downloaded.

    `file` and `unpack`, the folder for an archive's contents, are relative to the folder of the data sets.
    """

    address: str
    file: str
    checksum: str | None = None
    unpack: str | None = None


@dataclass(frozen=True)
class OpenData:
    """A data set or weights that can be downloaded; `note` says what the user must do afterwards."""

    title: str
    license: str
    terms: str
    size: str
    files: tuple[OpenFile, ...]
    note: str = ""

    def describe(self) -> str:
        lines = [f"{self.title} ({self.size})", f"  license: {self.license}", f"  terms:   {self.terms}"]
        for file in self.files:
            checksum = f"checksum {file.checksum}" if file.checksum else "no checksum is published"
            lines.append(f"  {file.address}\n    -> {file.file}, {checksum}")
        return "\n".join(lines)


def open_data(name: str) -> OpenData:
    table = read_yaml(TABLE, StageError)
    if name not in table:
        raise StageError(f"--fetch {name}: unknown name; {nearest(name, table)}")
    entry = dict(table[name])
    files = tuple(OpenFile(**file) for file in entry.pop("files"))
    return OpenData(files=files, **entry)


def fetch(data: OpenData, root: Path) -> None:
    """Download all files of an entry with pooch, compare checksums and unpack; keeps existing files."""
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / ".fetch.lock"):
        for file in data.files:
            _fetch_file(file, root)


def _fetch_file(file: OpenFile, root: Path) -> None:
    path = root / file.file
    # A marker file, so that the archive may be deleted.
    unpacked = path.with_name(f"{path.name}.unpacked")
    if unpacked.exists():
        print(f"{file.file}: already downloaded and unpacked; to redo it, delete {unpacked}")
        return
    if path.is_file():
        print(f"{file.file}: already exists")
    else:
        _download(file.address, path)
    problem = checksums.problem(path, file.checksum) if file.checksum else None
    if problem is not None:
        wrong = path.with_name(f"{path.name}.wrong")
        os.replace(path, wrong)
        raise StageError(f"{path}: {problem}. It is kept as {wrong}; rerun the command to download it again")
    if file.unpack is not None:
        print(f"{file.file}: unpacking into {file.unpack}/")
        # Zip files need no filter: names that lead out of the folder are skipped.
        options: dict[str, Any] = {} if path.suffix == ".zip" else {"filter": "data"}
        try:
            shutil.unpack_archive(path, root / file.unpack, **options)
        except Exception as error:  # untrusted file: formats and compressions raise different errors
            raise StageError(
                f"{path} cannot be unpacked: {error}. If it is damaged, delete it and rerun the command"
            ) from None
        unpacked.touch()


def _download(address: str, path: Path) -> None:
    import pooch

    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a checksum, because pooch does not support prefixes.
    getter = pooch.create(
        path.parent, base_url="", registry={path.name: None}, urls={path.name: address}, retry_if_failed=_RETRIES
    )
    try:
        getter.fetch(path.name, downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60))
    except OSError as error:
        raise StageError(f"{address} cannot be downloaded: {error}") from None
