"""Download the data sets and weights of `open_data.yaml`. The user must ask for a download and accept the terms."""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from common.errors import StageError, nearest
from common.files import exclusive, read_yaml, wrong_checksum

TABLE = Path(__file__).with_name("open_data.yaml")
_RETRIES = 2


@dataclass(frozen=True)
class OpenFile:
    """A file that can be downloaded.

    An archive is unpacked into the folder `unpack`. `file` and `unpack` are relative to the data folder.
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


def addressed(file: str) -> OpenData | None:
    """Return an entry that downloads only the file of this name, or None if no entry has the file."""
    for name in read_yaml(TABLE, StageError):
        entry = open_data(name)
        if matching := tuple(entry_file for entry_file in entry.files if Path(entry_file.file).name == file):
            return replace(entry, files=matching)
    return None


def mirrored(data: OpenData, mirror: str) -> OpenData:
    """Replace the addresses of an entry with ones in `mirror`, a local folder or another server."""
    base = mirror if "://" in mirror else Path(mirror).expanduser().resolve().as_uri()
    files = (replace(file, address=f"{base}/{quote(Path(file.file).name)}") for file in data.files)
    return replace(data, files=tuple(files))


def fetch(data: OpenData, root: Path) -> None:
    """Download, check and unpack all files of an entry. Keep existing files, and resume partial ones."""
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / ".fetch.lock"):
        problems = []
        for file in data.files:
            try:
                _fetch_file(file, root)
            except StageError as error:
                problems.append(str(error))
        if problems:
            raise StageError("\n".join(problems))


def _fetch_file(file: OpenFile, root: Path) -> None:
    path = root / file.file
    # The marker lets users delete the archive after unpacking.
    unpacked = path.with_name(f"{path.name}.unpacked")
    if unpacked.exists():
        print(f"{file.file}: already downloaded and unpacked; to redo it, delete {unpacked}")
        return
    if path.is_file():
        print(f"{file.file}: already exists")
    else:
        _download(file.address, path)
    problem = (wrong_checksum(path, file.checksum) if file.checksum else None) or _wrong_format(path)
    if problem:
        wrong = path.with_name(f"{path.name}.wrong")
        os.replace(path, wrong)
        raise StageError(f"{path}: {problem}. It is kept as {wrong}; rerun the command to download it again")
    if file.unpack is not None:
        print(f"{file.file}: unpacking into {file.unpack}/")
        # Zip files need no filter, because names that lead out of the folder are skipped.
        options: dict[str, Any] = {} if path.suffix == ".zip" else {"filter": "data"}
        try:
            shutil.unpack_archive(path, root / file.unpack, **options)
        except Exception as error:  # an untrusted archive can raise any error
            raise StageError(
                f"{path} cannot be unpacked: {error}. If it is damaged, delete it and rerun the command"
            ) from None
        unpacked.touch()


def _download(address: str, path: Path) -> None:
    """Download into `<path>.part`, and rename the file when complete. A retry or another call resumes the download."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, problem = path.with_name(f"{path.name}.part"), ""
    for _ in range(_RETRIES + 1):
        try:
            if not (problem := _receive(address, part)):
                os.replace(part, path)
                return
        except HTTPException as error:
            problem = str(error) or type(error).__name__
        except OSError as error:
            problem = str(error)
            if isinstance(error, HTTPError):
                error.close()
                if error.code == 416:  # the part is complete, or belongs to another file
                    if error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                        os.replace(part, path)
                        return
                    part.unlink(missing_ok=True)
                    continue
                break
    raise StageError(f"{address} cannot be downloaded: {problem}")


def _receive(address: str, part: Path) -> str:
    """Append the missing bytes to `part`, or restart if the server can't resume. Return an error, or "" if complete."""
    start = part.stat().st_size if part.is_file() else 0
    request = Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    with urlopen(request, timeout=60) as response:
        resumes = response.status == 206
        size = int(response.headers.get("Content-Length") or -1) + (start if resumes else 0)
        with part.open("ab" if resumes else "wb") as file:
            while block := response.read(2**20):
                file.write(block)
                if sys.stderr.isatty():
                    print(f"\r{part.stem}: {file.tell() / 1e6:,.0f} of {size / 1e6:,.0f} MB", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if size < 0 or part.stat().st_size == size:
        return ""
    rerun = "start over, since the server cannot resume" if start and not resumes else "resume"
    return f"the connection broke off after {part.stat().st_size:,} bytes; rerun the command to {rerun}"


def _wrong_format(path: Path) -> str:
    """Return what is wrong if a file's content doesn't fit the suffix of the name, else ""."""
    with path.open("rb") as file:
        start = file.read(9)
    if not path.name.endswith((".pth", ".pth.tar")) or start.startswith(b"\x80"):
        return ""
    if start.startswith(b"PK"):
        return "" if zipfile.is_zipfile(path) else "the end of the archive is missing"
    return f"not a checkpoint, since it starts with {start!r}; the publisher may have moved the file"
