"""Getting the open data sets and weights of `open_data.yaml`, when their user asks for one and accepts its terms.

A download that was stopped goes on where it was (HTTP ranges), a file gets its name only when it is whole and its
checksum is right, and an archive is unpacked beside its place before anything is moved there.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from common.data import checksums
from common.errors import StageError, nearest
from common.files import exclusive, named, read_yaml, write_atomically

TABLE = Path(__file__).with_name("open_data.yaml")
#: What was fetched, with computed checksums; lies in the folder of the data sets.
FETCHED = "fetched.json"
_BLOCK_BYTES = 1 << 20
_SECONDS = 60.0
#: How often a connection that broke is made anew without a byte more.
_TRIES = 3
#: What a damaged archive raises, besides errors of the system without a number.
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, ValueError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class OpenFile:
    """A file that may be fetched.

    Args:
        address: Where it is.
        file: Where it goes, relative to the folder of the data sets.
        checksum: As published; None = none is known.
        unpack: Folder that the archive is unpacked into; None = it is none, or of a kind that cannot be unpacked here.
        strip: How many of the first folders of its names are left out.
    """

    address: str
    file: str
    checksum: str | None = None
    unpack: str | None = None
    strip: int = 0


@dataclass(frozen=True)
class OpenData:
    """A data set or weights that may be fetched.

    Args:
        name, title: Name in the table, and for people.
        license, terms: In a few words, and where all of it stands.
        size: Approximate.
        files: What there is.
        note: What its user must do afterwards.
    """

    name: str
    title: str
    license: str
    terms: str
    size: str
    files: tuple[OpenFile, ...]
    note: str = ""

    def describe(self) -> str:
        """What it is, under which terms, and where it comes from."""
        lines = [f"{self.title} ({self.size})", f"  license: {self.license}", f"  terms:   {self.terms}"]
        for file in self.files:
            known = f"checksum {file.checksum}" if file.checksum else "no checksum is published"
            lines.append(f"  {file.address}\n    -> {file.file}, {known}")
        return "\n".join(lines)


def open_data(name: str) -> OpenData:
    """An entry of the table.

    Raises:
        StageError: There is none of that name.
    """
    table = read_yaml(TABLE, StageError)
    if name not in table:
        raise StageError(f"--fetch {name}: nothing of that name may be fetched; {nearest(name, table)}")
    entry = dict(table[name])
    files = tuple(OpenFile(**file) for file in entry.pop("files"))
    return OpenData(name=name, files=files, **entry)


def fetch(data: OpenData, root: Path, tell: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Get all files of an entry and unpack them; what is there already is left alone.

    Args:
        data: The entry.
        root: Folder of the data sets.
        tell: Gets lines for people.
        progress: Gets bytes that are there and bytes in all, 0 = unknown.

    Raises:
        StageError: A file cannot be got, or is another than published, or than the one that came first.
    """
    root.mkdir(parents=True, exist_ok=True)
    with exclusive(root / f".{FETCHED}.lock"):
        for file in data.files:
            path = root / file.file
            known = _fetched(root).get(file.file, {})
            unpacked = file.unpack is not None and _is_unpacked(known, root / file.unpack)
            if unpacked and not path.is_file():
                tell(f"{file.file}: was fetched and unpacked before")
                continue
            if path.is_file():
                tell(f"{file.file}: is there already")
                known = _checked(file, path, known, tell)
            else:
                part = _download(file, path, progress)
                known = _checked(file, part, known, tell)
                os.replace(part, path)
            if file.unpack is not None and not unpacked:
                tell(f"{file.file}: unpacking into {file.unpack}/")
                known["unpacked"] = _unpack(path, root / file.unpack, file.strip, genuine=file.checksum is not None)
            write_atomically(
                root / FETCHED, json.dumps({**_fetched(root), file.file: known}, indent=1, sort_keys=True) + "\n"
            )


def _fetched(root: Path) -> dict[str, Any]:
    try:
        with named(root / FETCHED):
            found = json.loads((root / FETCHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StageError(f"{root / FETCHED} cannot be read ({error}): mend or delete it") from None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise StageError(f"{root / FETCHED} is no list of what was fetched: mend or delete it")
    return found


def _is_unpacked(known: dict[str, Any], folder: Path) -> bool:
    """Whether what came of an archive is still there, by the files and folders at its top."""
    entries = known.get("unpacked")
    if entries is True:  # as it was noted before these were
        return folder.is_dir() and any(folder.iterdir())
    return isinstance(entries, list) and all((folder / str(entry)).exists() for entry in entries)


def _checked(file: OpenFile, path: Path, known: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """What is known about a file that is there, its checksum compared."""
    expected, by = (file.checksum, "published") if file.checksum else (known.get("checksum"), "of the first fetch")
    problem = checksums.difference(path, expected) if expected else None
    if problem is not None:
        name = Path(file.file).name
        wrong = path.with_name(f"{name}.wrong")
        os.replace(path, wrong)
        raise StageError(
            f"{name} has another checksum than {by}: {problem}. It is kept as {wrong}; the same command gets it "
            "anew" + ("" if file.checksum else f", and without its entry in {FETCHED} takes it as it is")
        )
    digest = known.get("checksum") or f"sha256:{checksums.digest(path, 'sha256')}"
    if not file.checksum and "checksum" not in known:
        tell(f"{file.file}: {digest}, computed here and kept in {FETCHED}, since none is published")
    return {**known, "address": file.address, "checksum": digest, "bytes": path.stat().st_size}


# ---------------------------------------------------------------------------------------------------- downloading
def _download(file: OpenFile, path: Path, progress: Callable[[int, int], None]) -> Path:
    """Get a file whole under another name; what an earlier try left is gone on with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, version = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.version")
    tries = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            _go_on(file.address, part, version, progress)
            version.unlink(missing_ok=True)
            return part
        except urllib.error.HTTPError as error:
            raise StageError(f"{file.address}: the server answers {error.code} {error.reason}") from None
        except (OSError, HTTPException) as error:
            came = part.stat().st_size - before if part.is_file() else 0
            tries = 1 if came > 0 else tries + 1
            if tries >= _TRIES:
                reason = getattr(error, "reason", error)
                goes_on = version.is_file() and version.read_text(encoding="utf-8")
                raise StageError(
                    f"{file.address} cannot be got: {reason}; "
                    + (
                        f"{before + max(came, 0):,} bytes are kept, and the same command goes on from there"
                        if goes_on or not part.is_file()
                        else "give the command again; the server does not say what a part of it is a part of"
                    )
                ) from None
            time.sleep(tries)


def _go_on(address: str, part: Path, version: Path, progress: Callable[[int, int], None]) -> None:
    """Get the rest of a file.

    Raises:
        OSError: The connection broke, or less came than the server said.
    """
    have = part.stat().st_size if part.is_file() else 0
    had = version.read_text(encoding="utf-8") if have and version.is_file() else ""
    request = urllib.request.Request(
        address, headers={"User-Agent": "representation-assemble", "Accept-Encoding": "identity"}
    )
    if have and had:
        # A file that changed meanwhile comes whole.
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", had)
    try:
        response = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # Nothing lies behind what is there: either it is whole, or of another version.
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
            return
        part.unlink()
        raise ConnectionError("the file changed on the server") from None
    with response:
        goes_on = response.status == 206
        if goes_on and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent another part than was asked for")
        have = have if goes_on else 0
        length = int(response.headers.get("Content-Length") or 0)
        total = have + length if length else 0
        stamps = (response.headers.get(name) or "" for name in ("ETag", "Last-Modified"))
        # A weak one (W/) does not promise the same bytes.
        write_atomically(version, next((stamp for stamp in stamps if stamp and not stamp.startswith("W/")), ""))
        with part.open("ab" if goes_on else "wb") as stream:
            while block := response.read(_BLOCK_BYTES):
                stream.write(block)
                have += len(block)
                progress(have, total)
            stream.flush()
            os.fsync(stream.fileno())
    if total and have < total:
        raise ConnectionError(f"{have:,} of {total:,} bytes came")


# ---------------------------------------------------------------------------------------------------- unpacking
def _unpack(archive: Path, folder: Path, strip: int, genuine: bool) -> list[str]:
    """Unpack an archive beside its place, then move its files there.

    Args:
        archive: The file.
        folder: Where its content goes.
        strip: How many of the first folders of its names are left out.
        genuine: Its checksum is as published; another one that cannot be read is moved aside, since it came damaged.

    Returns:
        Names of the files and folders at the top.

    Raises:
        StageError: It is damaged, or the disk is full.
    """
    unpacking = folder / f".unpacking-{archive.name}"
    shutil.rmtree(unpacking, ignore_errors=True)
    unpacking.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(unpacking)
        else:
            if not hasattr(tarfile, "data_filter"):
                raise StageError(f"{archive} cannot be unpacked safely by Python {sys.version.split()[0]}: take 3.11.4")
            with tarfile.open(archive) as packed:
                packed.extractall(unpacking, filter="data")
    except (OSError, *_DAMAGED) as error:
        shutil.rmtree(unpacking, ignore_errors=True)
        if genuine or getattr(error, "errno", None) is not None:  # the disk's, not the archive's
            raise StageError(f"{archive} cannot be unpacked: {error}") from None
        wrong = archive.with_name(f"{archive.name}.wrong")
        os.replace(archive, wrong)
        raise StageError(
            f"{archive} cannot be unpacked: {error}. No checksum of it is published, so it may have come damaged: it "
            f"is kept as {wrong}, and the same command gets it anew"
        ) from None
    tops = set()
    for path in _files_below(unpacking):
        parts = path.relative_to(unpacking).parts[strip:]
        if parts:
            tops.add(parts[0])
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(unpacking)
    return sorted(tops)


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
