"""Download the open data sets and weights of `open_data.yaml`, when the user asks and accepts the terms."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.data import checksums
from common.errors import StageError, nearest
from common.files import exclusive, named, read_yaml, write_atomically

TABLE = Path(__file__).with_name("open_data.yaml")
#: Record of downloads and their checksums, in the folder of the data sets.
FETCHED = "fetched.json"
_RETRIES = 2


@dataclass(frozen=True)
class OpenFile:
    """A file that can be downloaded.

    `file` is relative to the folder of the data sets, `unpack` is the folder for an archive's contents, and `strip` the
    number of leading folders to drop from its names.
    """

    address: str
    file: str
    checksum: str | None = None
    unpack: str | None = None
    strip: int = 0


@dataclass(frozen=True)
class OpenData:
    """A data set or weights that can be downloaded; `note` says what the user must do afterwards."""

    name: str
    title: str
    license: str
    terms: str
    size: str
    files: tuple[OpenFile, ...]
    note: str = ""

    def describe(self) -> str:
        lines = [f"{self.title} ({self.size})", f"  license: {self.license}", f"  terms:   {self.terms}"]
        for file in self.files:
            known = f"checksum {file.checksum}" if file.checksum else "no checksum is published"
            lines.append(f"  {file.address}\n    -> {file.file}, {known}")
        return "\n".join(lines)


def open_data(name: str) -> OpenData:
    table = read_yaml(TABLE, StageError)
    if name not in table:
        raise StageError(f"--fetch {name}: nothing of that name may be fetched; {nearest(name, table)}")
    entry = dict(table[name])
    files = tuple(OpenFile(**file) for file in entry.pop("files"))
    return OpenData(name=name, files=files, **entry)


def fetch(data: OpenData, root: Path, tell: Callable[[str], None], progressbar: bool = False) -> None:
    """Download all files of an entry with pooch and unpack them; keeps existing files."""
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{FETCHED}.lock"):
        for file in data.files:
            fetched = _fetched(root)
            known = fetched.get(file.file, {})
            path, unpacked = root / file.file, file.unpack is not None and _is_unpacked(known, root / file.unpack)
            if unpacked and not path.is_file():
                tell(f"{file.file}: was fetched and unpacked before")
                continue
            checksum = _download(file, path, known.get("checksum"), tell, progressbar)
            known = {**known, "address": file.address, "checksum": checksum}
            if file.unpack is not None and not unpacked:
                tell(f"{file.file}: unpacking into {file.unpack}/")
                known["unpacked"] = _unpack(path, root / file.unpack, file.strip)
            fetched[file.file] = known
            write_atomically(root / FETCHED, json.dumps(fetched, indent=1, sort_keys=True) + "\n")


def _fetched(root: Path) -> dict[str, Any]:
    path = root / FETCHED
    try:
        with named(path):
            found = json.loads(path.read_text(encoding="utf-8"))
        return {str(file): dict(entry) for file, entry in dict(found).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise StageError(f"{path} is no list of what was fetched ({error}): mend or delete it") from None


def _is_unpacked(known: dict[str, Any], folder: Path) -> bool:
    """Whether the top-level files and folders of an archive still exist."""
    entries = known.get("unpacked")
    return isinstance(entries, list) and all((folder / str(entry)).exists() for entry in entries)


def _download(file: OpenFile, path: Path, noted: str | None, tell: Callable[[str], None], progressbar: bool) -> str:
    """Download a file unless it exists; returns the published checksum or that of the first download."""
    import pooch

    expected = file.checksum or noted
    if path.is_file():
        tell(f"{file.file}: is there already")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        downloader = pooch.HTTPDownloader(progressbar=progressbar, timeout=60)
        # Without a checksum, because pooch does not support prefixes.
        getter = pooch.create(
            path.parent,
            base_url="",
            registry={path.name: None},
            urls={path.name: file.address},
            retry_if_failed=_RETRIES,
        )
        try:
            getter.fetch(path.name, downloader=downloader)
        except OSError as error:
            raise StageError(f"{file.address} cannot be got: {error}") from None
    problem = checksums.difference(path, expected) if expected else None
    if problem is not None:
        wrong = path.with_name(f"{path.name}.wrong")
        os.replace(path, wrong)
        raise StageError(f"{path}: {problem}. It is kept as {wrong}; the same command gets it anew")
    if expected is None:
        expected = f"sha256:{checksums.digest(path, 'sha256')}"
        tell(f"{file.file}: {expected}, computed here and kept in {FETCHED}, since none is published")
    return expected


def _unpack(archive: Path, folder: Path, strip: int) -> list[str]:
    """Unpack an archive next to its destination, then move its files there; returns the top-level names."""
    unpacking = folder / f".unpacking-{archive.name}"
    shutil.rmtree(unpacking, ignore_errors=True)
    unpacking.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(unpacking)
        else:
            with tarfile.open(archive) as packed:
                packed.extractall(unpacking, filter="data")
    except Exception as error:  # untrusted file: every format and compression raises other errors
        shutil.rmtree(unpacking, ignore_errors=True)
        raise StageError(
            f"{archive} cannot be unpacked: {error}. If it came damaged, delete it and give the command again"
        ) from None
    tops = set()
    for path in sorted(unpacking.rglob("*")):
        parts = path.relative_to(unpacking).parts[strip:]
        if parts and (path.is_symlink() or not path.is_dir()):
            tops.add(parts[0])
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(unpacking)
    return sorted(tops)
