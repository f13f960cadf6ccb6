"""Writing a data set's folder anew with its media files in tar shards, in the convention of WebDataset.

The new folder has the same subfolders, and everything that is no media file, so that it can be used in place of the old
one: items, order and samples are the same. See :mod:`common.data.shards` for its layout and for reading it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from common.data.datasets.base import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, entries, walk
from common.data.shards import (
    INDEX_NAME,
    PASSED_OVER,
    SHARD_FOLDER,
    Member,
    ShardError,
    index_columns,
    index_file,
)
from common.files import exclusive, write_atomically, write_whole

MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES
# What was unpacked is not taken along a second time.
ARCHIVE_SUFFIXES = frozenset({".tar", ".tgz", ".zip", ".rar", ".7z"})
_PACKED_TAR = (".tar.gz", ".tar.bz2", ".tar.xz")
BROKEN_NAME = "broken.txt"

#: Told the bytes that are done.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ShardReport:
    """What became of a folder.

    Args:
        root: Folder that was read.
        target: Folder that was written.
        files: Media files in the shards.
        size: Their bytes.
        written, kept: Shards written now, and shards from an earlier run that are still right.
        broken: Media files that cannot be read, with the reason; they are in no shard.
        beside: Other files, which lie in the new folder as they are.
        archives: Archives that were left out.
    """

    root: Path
    target: Path
    files: int
    size: int
    written: int
    kept: int
    broken: dict[str, str]
    beside: int
    archives: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    size: int
    seconds: int  # time of its last change


@dataclass
class _Contents:
    """What a folder holds: subfolders, links between them, media files by name, other files and archives."""

    folders: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    media: list[_File] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)


def write_shards(root: Path, target: Path, shard_bytes: int, progress: Progress | None = None) -> ShardReport:
    """Write a folder anew with its media files in shards. A run that was stopped goes on.

    A shard appears when it is complete. One that is there already is kept if it holds the files that it should, with
    the same sizes and times. The index comes last: a folder without it is not used. A file that cannot be opened by its
    decoder is passed over; the index knows it, so that the order of the others stays, and training meets it as it would
    meet it in the old folder.

    Args:
        root: Folder of the data set.
        target: Folder to write; may be one that an earlier run began.
        shard_bytes: Size of the files of a shard that is not exceeded, unless by a single one; the archive's own words
            come on top, up to a kilobyte for a long name.
        progress: Told the bytes of media files that are done.

    Raises:
        ValueError: `root` is sharded itself, or holds `target` or lies in it.
        FileNotFoundError: There is no such folder.
        OSError: The disk has no room, or cannot be written.
    """
    root, target = Path(os.path.abspath(root)), Path(os.path.abspath(target))
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise ValueError(f"--shards: {target} and {root} must not lie in each other")
    if index_file(root) is not None:
        raise ValueError(f"{root}: its files are in shards already; copy the folder instead")
    content = _look_through(root)
    media = content.media
    plan = list(_shards_of(media, shard_bytes))
    home = target / SHARD_FOLDER
    reasons: dict[str, str] = {}
    written = 0
    target.mkdir(parents=True, exist_ok=True)
    _check_room(home, plan)
    _write_beside(root, target, content)
    if media:
        home.mkdir(exist_ok=True)
        with exclusive(home / ".lock"):
            members: list[Member] = []
            for number, files in enumerate(plan):
                path = home / _name(number)
                broken = _broken_if_kept(root, path, files)
                if broken is None:
                    broken = _write_shard(root, path, files)
                    written += 1
                members += [Member(name, number, *bounds) for name, (*bounds, _) in _contents(path).items()]
                reasons.update(broken)
                if progress is not None:
                    progress(sum(file.size for file in files))
            members += [Member(name, PASSED_OVER, 0, 0) for name in reasons]
            _finish(home, members, len(plan), reasons)
    return ShardReport(
        root=root,
        target=target,
        files=len(media) - len(reasons),
        size=sum(file.size for file in media if file.name not in reasons),
        written=written,
        kept=len(plan) - written,
        broken=reasons,
        beside=len(content.beside),
        archives=tuple(content.archives),
    )


def media_bytes(root: Path) -> int:
    """Size of the media files of a folder, which is what :func:`write_shards` tells the progress of."""
    return sum(file.size for file in _look_through(root).media)


# ---------------------------------------------------------------------------------------------------- names
def member_name(name: str) -> str:
    """Name of a file in its shard: readers take all after the first dot for its kind, so that its own are replaced."""
    path = PurePosixPath(name)
    stem = path.stem.replace("%", "%25").replace(".", "%2E")
    return path.with_name(stem + path.suffix).as_posix()


def file_name(name: str) -> str:
    """The inverse of :func:`member_name`."""
    path = PurePosixPath(name)
    return path.with_name(path.stem.replace("%2E", ".").replace("%25", "%") + path.suffix).as_posix()


def _name(number: int) -> str:
    return f"{number:06d}.tar"


# ---------------------------------------------------------------------------------------------------- planning
def _look_through(root: Path) -> _Contents:
    content = _Contents()
    for folder, names in _folders(root, content.links):
        content.folders.append(folder)
        for name in names:
            path = root / folder / name
            own = f"{folder}/{name}" if folder else name
            suffix = path.suffix.lower()
            if suffix in MEDIA_SUFFIXES:
                try:
                    status = path.stat()
                except OSError:  # such as a link to nothing: listed with the files that cannot be read
                    content.media.append(_File(own, 0, 0))
                else:
                    content.media.append(_File(own, status.st_size, int(status.st_mtime)))
            elif suffix in ARCHIVE_SUFFIXES or name.lower().endswith(_PACKED_TAR):
                content.archives.append(own)
            elif path.is_file():
                content.beside.append(own)
    content.media.sort(key=lambda file: file.name)
    return content


def _folders(root: Path, links: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Every folder, relative to the root, with the names of its files; links to other ones of them are noted."""
    real = root.resolve()
    seen: set[Path] = set()
    pending = [""]
    while pending:
        folder = pending.pop()
        place = (root / folder).resolve()
        if place in seen:  # a link from outside leads back
            continue
        seen.add(place)
        folders, files = entries(root / folder)
        yield folder, files
        for name in reversed(folders):
            path = root / folder / name
            own = f"{folder}/{name}" if folder else name
            if path.is_symlink() and path.resolve().is_relative_to(real):
                links[own] = os.path.relpath(path.resolve(), (root / own).parent.resolve())
            else:
                pending.append(own)


def _shards_of(media: Sequence[_File], shard_bytes: int) -> Iterator[list[_File]]:
    files: list[_File] = []
    held = 0
    for file in media:
        size = tarfile.BLOCKSIZE * (1 + -(-file.size // tarfile.BLOCKSIZE))  # with its header
        if files and held + size > shard_bytes:
            yield files
            files, held = [], 0
        files.append(file)
        held += size
    if files:
        yield files


def _check_room(home: Path, plan: Sequence[Sequence[_File]]) -> None:
    needed = sum(
        file.size for number, files in enumerate(plan) if not (home / _name(number)).is_file() for file in files
    )
    free = shutil.disk_usage(home.parent).free
    if needed > free:
        raise OSError(f"{home.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room")


# ---------------------------------------------------------------------------------------------------- writing
def _write_beside(root: Path, target: Path, content: _Contents) -> None:
    """Make the new folder like the old one but for its media files."""
    for folder in content.folders:
        (target / folder).mkdir(parents=True, exist_ok=True)
    for name, aim in content.links.items():
        if not (target / name).is_symlink():
            (target / name).symlink_to(aim, target_is_directory=True)
    for name in content.beside:
        place(root / name, target / name)


def place(path: Path, target: Path) -> None:
    """Have a file, or all files of a folder, at another place too: linked on the same disk, else copied."""
    if path.is_dir():
        for name, _ in walk(path, None, []):
            place(path / name, target / name)
        return
    status = path.stat()
    with contextlib.suppress(OSError):
        found = target.stat()
        if (found.st_size, found.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
            return

    def write(temporary: Path) -> None:
        try:
            os.link(path.resolve(), temporary)
        except OSError:
            shutil.copy2(path, temporary)

    write_whole(target, write)


def _write_shard(root: Path, path: Path, files: Sequence[_File]) -> dict[str, str]:
    """Write a shard.

    Returns:
        The files that cannot be read, and why.
    """
    from webdataset.writer import TarWriter

    # While a shard is exchanged, the index that is there belongs to other ones.
    (path.parent / INDEX_NAME).unlink(missing_ok=True)
    broken: dict[str, str] = {}

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb") as stream,
            TarWriter(stream, encoder=False, user="", group="", mode=0o644) as writer,
        ):
            for file in files:
                data = _read(root / file.name)
                if isinstance(data, str):
                    broken[file.name] = data
                    continue
                key, suffix = os.path.splitext(member_name(file.name))
                writer.mtime = file.seconds
                writer.write({"__key__": key, suffix.removeprefix("."): data})

    write_whole(path, write)
    return broken


def _broken_if_kept(root: Path, path: Path, files: Sequence[_File]) -> dict[str, str] | None:
    """Files that cannot be read and are not in a shard of an earlier run, and why; None = it has to be written anew."""
    try:
        found = _contents(path)
    except (OSError, tarfile.TarError, ShardError):
        return None
    broken: dict[str, str] = {}
    for file in files:
        place = found.pop(file.name, None)
        if place is not None and place[1:] == (file.size, file.seconds):
            continue
        data = _read(root / file.name)
        if not isinstance(data, str):  # new, changed or repaired
            return None
        broken[file.name] = data
    return None if found else broken


def _contents(path: Path) -> dict[str, tuple[int, int, int]]:
    """First byte, size and time of the files of a shard.

    Raises:
        ShardError: It ends too early.
        OSError, tarfile.TarError: It cannot be read.
    """
    with tarfile.open(path, "r:") as content:
        found = {file_name(info.name): (info.offset_data, info.size, int(info.mtime)) for info in content}
    end = max((offset + size for offset, size, _ in found.values()), default=0)
    length = path.stat().st_size
    if length < end + 2 * tarfile.BLOCKSIZE or length % tarfile.RECORDSIZE:  # what a writer closes an archive with
        raise ShardError(f"{path}: ends too early")
    return found


def _read(path: Path) -> bytes | str:
    """The content of a media file; text = why it cannot be used."""
    from PIL import Image, UnidentifiedImageError

    from common.data.media import MediaError, probe

    try:
        data = path.read_bytes()
        if path.suffix.lower() in IMAGE_SUFFIXES:
            with Image.open(io.BytesIO(data)):
                return data
        probe(path)
    except UnidentifiedImageError:
        return "not a picture in a known format, or an empty file"
    except MediaError as error:
        return str(error).removeprefix(f"{path}: ").removeprefix("cannot be read: ")
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # A damaged file can make a decoder raise whatever its parsing meets.
        return str(error) or type(error).__name__
    return data


def _finish(home: Path, members: Sequence[Member], count: int, reasons: dict[str, str]) -> None:
    """Write the index and the list of what cannot be read; remove shards of an earlier run with smaller ones."""
    names = [_name(number) for number in range(count)]
    columns = index_columns(members, names, [(home / name).stat().st_size for name in names], reasons)
    stream = io.BytesIO()
    np.savez(stream, **columns)  # type: ignore[arg-type]
    if reasons:
        listed = "".join(f"{name}\t{reason}\n" for name, reason in sorted(reasons.items()))
        write_atomically(home / BROKEN_NAME, listed.encode("utf-8", "surrogateescape"))
    else:
        (home / BROKEN_NAME).unlink(missing_ok=True)
    if not _holds(home / INDEX_NAME, stream.getvalue()):
        write_atomically(home / INDEX_NAME, stream.getvalue())
    for path in home.glob("*.tar"):
        if path.name not in names:
            path.unlink()


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has this content; the time of one that has stays, and with it what was listed before."""
    try:
        return path.read_bytes() == content
    except OSError:
        return False
