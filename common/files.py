"""Files: strict YAML, writing whole or not at all, locks, the cache folder, stamps of change; terminal, environment.

Whatever is written goes to a temporary file beside its place and is renamed, so that a reader, a crash or a full disk
never meets half of it. What a killed process left behind is removed by the next one that writes into the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.errors import StageError

if TYPE_CHECKING:
    from rich.console import Console

#: Time stamps of file systems are this coarse, at most; what is younger may still change unseen.
SETTLED_SECONDS = 2.0
#: Temporary files have the number of their process in their names: `.last.0f3a8c11.4711.tmp.ckpt`.
_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp(\.\w+)?")
#: They are left alone for so long, since another machine's process may have this number.
_ABANDONED_SECONDS = 600.0
_OWN = secrets.token_hex(4)
#: What systems answer for a lock on a disk that has none, as network disks without a lock service.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class AtomicWriteError(OSError):
    """A file could not be written; what stood there before is untouched."""


# -- reading -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """While it lasts, errors of the system name the file: a disk that fails in the middle of a file does not.

    Raises:
        OSError: the path is a pipe or a device, which would be waited for, or what the system says.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


# -- writing -----------------------------------------------------------------------------------------------------------


def temporary_of(path: Path) -> Path:
    """The place beside a file or folder where its new content is made; `sweep` knows such names."""
    # Containers that share a disk have the same few process numbers.
    return path.with_name(f".{path.stem}.{_OWN}.{os.getpid()}.tmp{path.suffix}")


def write_whole(output: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file so that it appears whole or not at all.

    Args:
        output: the file; missing folders are made, an older file is replaced.
        write: writes to the path that it is given, whose suffix is that of the file.

    Returns:
        `output`.
    """
    output = Path(output)
    make_folder(output.parent)
    sweep(output.parent)
    temporary = temporary_of(output)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, output)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(output.parent)
    return output


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of a file in one step.

    Args:
        path: the file; missing folders are made.
        content: all of it; text is written as UTF-8.

    Raises:
        AtomicWriteError: when the disk is full or the folder not writable. The old file is intact and the
            temporary one gone.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        write_whole(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        raise AtomicWriteError(
            error.errno,
            f"could not write {path}: {error.strerror or error}. The file that was there before, if any, is "
            "unchanged; free space or fix the permissions, then run the same command again",
        ) from error


def require_writable(folder: Path, what: str) -> None:
    """Find out before the work whether files can be written into a folder, which need not exist yet.

    Args:
        folder: is not made.
        what: how the user names it, such as `--output`; begins the message.

    Raises:
        StageError: nothing can be written there.
    """
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise StageError(
            f"{what} {folder} cannot be written: {existing}: {error.strerror}; give another place"
        ) from None


def require_cache() -> None:
    """Find out before the work whether the cache folder can be written.

    Raises:
        StageError: it cannot; the message names the variable that moves it.
    """
    require_writable(cache_folder(), "the cache folder (ASSEMBLE_CACHE names it)")


def described(error: BaseException) -> str:
    """The text of an error; of one that the system gave for a file of the cache, with what moves the cache."""
    name = getattr(error, "filename", None)
    if isinstance(error, OSError) and error.errno is not None and isinstance(name, str):
        with contextlib.suppress(RuntimeError):  # there is no home
            if Path(name).is_relative_to(cache_folder()):
                return f"{name}: {error.strerror}. It lies in the cache folder; ASSEMBLE_CACHE names another one"
    return str(error)


@functools.cache
def sweep(folder: Path) -> None:
    """Remove the temporary files and folders of processes that were killed; of each folder once in a process."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        matches = [(entry, _TEMPORARY.fullmatch(entry.name)) for entry in entries]
        left = [entry for entry, match in matches if match is not None and not _runs(int(match[1]))]
        now = _clock_of(folder) if left else 0.0
        for entry in left:
            with contextlib.suppress(OSError):
                if now - entry.stat(follow_symlinks=False).st_mtime < _ABANDONED_SECONDS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


def _clock_of(folder: Path) -> float:
    """Time of the disk's own clock, which stamps files: that of a file server may be hours from this machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def make_folder(folder: Path) -> None:
    """Make a folder and those above it so that they, too, are there after a loss of power."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system can, and none needs it for consistency."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Hold a lock that the operating system releases when the process dies, also by SIGKILL.

    Gives whether it is held. Where there are no locks, two processes do the same work; what is renamed when complete is
    still whole.
    """
    with path.open("w") as stream:
        yield lock(stream)


def lock(stream: IO[Any], wait: bool = True) -> bool:
    """Take the lock of an open file, until it is closed.

    Args:
        stream: the file, open for writing.
        wait: for another process to release it.

    Returns:
        False where the system or the disk has no locks.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        OSError: the disk fails.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return False
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


# -- caches ------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Folder for files that can be made again: ``$ASSEMBLE_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("ASSEMBLE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "representation-assemble"


def stamp_of(path: Path) -> list[int]:
    """What changes when a folder gains or loses an entry or a file is rewritten; zeros when it is gone."""
    try:
        found = path.stat()
    except OSError:
        return [0, 0, 0]
    # The size of a folder says nothing on most file systems and changes oddly on some.
    return [found.st_mtime_ns, found.st_ctime_ns, 0 if path.is_dir() else found.st_size]


def settled(stamp: Sequence[int], read_at: float | None = None) -> bool:
    """Whether another change would show in the stamp: it is older than the resolution of time stamps.

    Args:
        stamp: What :func:`stamp_of` gave.
        read_at: Time (seconds since the epoch) before the reading began; None = now.
    """
    return max(stamp[:2]) <= ((time.time() if read_at is None else read_at) - SETTLED_SECONDS) * 1e9


# -- YAML --------------------------------------------------------------------------------------------------------------


def parse_yaml(text: str) -> Any:
    """Parse YAML: numbers such as `2e-4` are floats, as in YAML 1.2; a key that stands twice is an error.

    Raises:
        ValueError: it is not valid; the message says where.
    """
    import yaml

    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise ValueError("not valid YAML: lists or mappings lie too deep in each other") from None


def read_yaml(path: Path, wrong: type[Exception]) -> Any:
    """Read a YAML file; see `parse_yaml`.

    Args:
        path: the file.
        wrong: class of the error where it is missing, cannot be read or is not valid.
    """
    try:
        with named(path):
            text = path.read_text(encoding="utf-8")
        return parse_yaml(text)
    except FileNotFoundError:
        raise wrong(f"{path} does not exist") from None
    except OSError as error:
        raise wrong(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise wrong(f"{path} is not UTF-8: {error}") from None
    except ValueError as error:
        raise wrong(f"{path} is {error}") from None


@functools.cache
def _loader() -> Any:
    """The loader's class. PyYAML is imported with it, since most commands parse nothing but heads of files."""
    import yaml

    # In C where PyYAML has it, ten times as fast.
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    def mapping(loader: Any, node: Any) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, list | dict | set):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a text or a number", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands here twice; the first would be lost", key_node.start_mark
                )
            seen.add(key)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    number = (
        r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9_]+"
        r"(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(number), list("-+0123456789."))
    return Loader


# -- the environment and the terminal ----------------------------------------------------------------------------------


def usable_cores() -> int:
    """Cores that this process may run on; SLURM gives a task a part of the node."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """While it lasts, variables of the environment have these values; then those from before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def console(**options: Any) -> Console:
    """A console as wide as the terminal; in a pipe or a log wide enough that no table is squeezed.

    Args:
        options: as `rich.console.Console` takes them.
    """
    from rich.console import Console

    found = Console(**options)
    return found if found.is_terminal else Console(width=200, **options)
