"""Atomic writes, locks, untrusted files, the cache folder, strict YAML, the environment and the terminal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.errors import StageError

if TYPE_CHECKING:
    from rich.console import Console

#: Coarsest resolution of file time stamps. If a younger file changes again, its stamp may stay the same.
SETTLED_SECONDS = 2.0
#: Size limit of records, configurations and other small text files. The curves of a long run take a few megabytes.
MOST_BYTES = 2**26
#: Temporary names contain a token and the process id: `.last.0f3a8c11.4711.tmp.ckpt`.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.([1-9][0-9]{0,6})\.tmp(\.[^.]+)?")
#: `sweep` keeps younger files, because the process that writes them may run on another machine.
_ABANDONED_SECONDS = 600.0
_TOKEN = os.urandom(4).hex()
#: Errors that file systems without locks raise, such as some network disks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


# -- reading -----------------------------------------------------------------------------------------------------------


def open_regular(path: Path, mode: str = "rb", most: int | None = None, **options: Any) -> Any:
    """Open an untrusted file for reading. Refuse files over `most` bytes, and pipes and devices, which would block."""
    return open(path, mode, opener=lambda name, flags: _regular(name, flags, most), **options)


def open_inside(folder: Path, name: str, most: int | None = None) -> IO[bytes]:
    """Open a file in an untrusted folder; see `open_regular`. Refuse names and links that leave the folder."""
    *folders, file = Path(name).parts or [""]
    if Path(name).is_absolute() or ".." in folders:
        raise ValueError(f"{name!r} is not inside the folder")
    places = [os.open(folder, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in folders:
            places.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=places[-1]))
        return open(file, "rb", opener=lambda name, flags: _regular(name, flags | os.O_NOFOLLOW, most, places[-1]))
    finally:
        for place in places:
            os.close(place)


def _regular(name: str, flags: int, most: int | None, folder: int | None = None) -> int:
    # Check after opening: another process could replace the file between a check and the opening.
    descriptor = os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    status = os.fstat(descriptor)
    problem = "" if stat.S_ISREG(status.st_mode) else "is not a regular file"
    if most is not None and status.st_size > most:
        problem = problem or f"has {status.st_size:,} bytes, more than {most:,}"
    if problem and not stat.S_ISDIR(status.st_mode):  # `open` itself refuses folders
        os.close(descriptor)
        raise OSError(errno.EINVAL, problem, name)
    return descriptor


def read_bytes(path: Path, most: int | None = MOST_BYTES) -> bytes:
    """Read an untrusted file; see `open_regular`."""
    with open_regular(path, most=most) as file:
        return file.read()


def read_text(path: Path, most: int | None = MOST_BYTES, **options: Any) -> str:
    """Read an untrusted UTF-8 file; see `open_regular`."""
    with open_regular(path, "r", most, **{"encoding": "utf-8", **options}) as file:
        return file.read()


def digest(path: Path, kind: str) -> str:
    status = path.stat()
    return _digest(path, kind, (status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=64)
def _digest(path: Path, kind: str, stamp: tuple[int, ...]) -> str:
    """Hash a file. The result is cached until the file changes, because two data sets may share the file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def wrong_checksum(path: Path, published: str) -> str | None:
    """Compare a file with a checksum such as `md5:0123abcd`, or the start of one. Return an error, or None if equal."""
    kind, _, expected = published.partition(":")
    try:
        actual = digest(path, kind)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if actual.startswith(expected):
        return None
    return f"its {kind} is {actual[: max(len(expected), 8)]}, expected {expected}: damaged, or another version"


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Add the file's name to system errors without a file name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def parsing(path: Path, wrong: type[Exception]) -> Iterator[None]:
    """Turn any error from parsing an untrusted file into an exception of class `wrong` that names the file."""
    try:
        yield
    except wrong:
        raise
    except Exception as error:  # A parser can raise any error on damaged or hostile content.
        raise wrong(f"{path}: {message_of(error)}") from error


def message_of(error: Exception) -> str:
    """Return an error's message. If the message alone is unclear, add the class name (`KeyError: 'stage'`)."""
    text = getattr(error, "strerror", None) or f"{error!s:.500}"
    plain = isinstance(error, OSError | ValueError) or type(error).__module__ != "builtins"
    return text if plain and text else f"{type(error).__name__}: {text}"


# -- writing -----------------------------------------------------------------------------------------------------------


def temporary_of(path: Path) -> Path:
    """Return a temporary path in the same folder. `sweep` recognizes the name."""
    # The token is needed because containers that share a disk reuse the same process ids.
    return path.with_name(f".{path.stem}.{_TOKEN}.{os.getpid()}.tmp{path.suffix}")


def write_whole(output: str | Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a temporary path of the same suffix, then rename it to `output`. Create missing folders."""
    output = Path(output)
    make_folder(output.parent)
    temporary = temporary_of(output)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, output)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise  # of a file that `write` read
        raise OSError(error.errno, error.strerror, str(output)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    _sync_folder(output.parent)
    return output


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """Yield an empty temporary folder. On success, rename it to `output`, which must be missing or empty."""
    output = output.resolve()
    partial = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        partial.replace(output)
        _sync_folder(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content atomically. Encode text as UTF-8, and create missing folders."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def require_writable(folder: Path, what: str) -> None:
    """Fail early if a folder can't be created or written. `what` names the folder in the error, such as `--output`."""
    folder = folder.absolute()
    existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise StageError(
            f"{what} {folder} cannot be written: {existing}: {error.strerror}; give another folder"
        ) from None


def sweep(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder that we write (runs, results, cache)."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None or _runs(int(match[1])) or not entry.is_file(follow_symlinks=False):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _ABANDONED_SECONDS:
                    os.unlink(entry.path)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another user's process is running
    return True


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and sync them to disk."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    """Sync a folder so that a rename survives a power loss, if the file system supports this."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[bool]:
    """Wait for a lock and hold it. If the process dies, the system releases the lock. Yield False if unsupported."""
    with path.open("w") as stream:
        yield lock(stream)


def lock(stream: IO[Any], wait: bool = True) -> bool:
    """Lock an open file until it is closed. Return False if unsupported. If not `wait`, raise if the lock is held."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


# -- caches ------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the cache folder: ``$ASSEMBLE_CACHE``, or else a folder in the user's cache."""
    chosen = os.environ.get("ASSEMBLE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "representation-assemble"


def stamp_of(path: Path) -> list[int]:
    """Return a stamp that changes if a file is rewritten or a folder's entries change. A missing file gives zeros."""
    try:
        status = path.stat()
    except OSError:
        return [0, 0, 0]
    # The size of a folder is meaningless on most file systems.
    return [status.st_mtime_ns, status.st_ctime_ns, 0 if path.is_dir() else status.st_size]


def settled(stamp: Sequence[int], read_at: float | None = None) -> bool:
    """Return whether any change after `read_at` (epoch seconds, None is now) will alter the stamp."""
    return max(stamp[:2]) <= ((time.time() if read_at is None else read_at) - SETTLED_SECONDS) * 1e9


# -- YAML --------------------------------------------------------------------------------------------------------------


def parse_yaml(text: str) -> Any:
    """Parse YAML. `2e-4` is a float, as in YAML 1.2. Turn any error into a ValueError that names the position."""
    try:
        parsed = _loader()(text).get_single_data()
    except Exception as error:  # PyYAML can raise any error, such as IndexError for `!!int ''`.
        raise ValueError(f"not valid YAML: {message_of(error)}") from None
    try:
        json.dumps(parsed)  # records can hold no others, such as `!!binary` or a number of 10,000 digits
    except (TypeError, ValueError) as error:
        raise ValueError(f"values must be text, numbers, lists or mappings: {error}") from None
    return parsed


def read_yaml(path: Path, wrong: type[Exception]) -> Any:
    """Read a YAML file with `parse_yaml`. Turn any error into an exception of class `wrong` that names the file."""
    with parsing(path, wrong):
        return parse_yaml(read_text(path))


@functools.cache
def _loader() -> Any:
    import yaml

    # The C loader is ten times as fast.
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    def mapping(loader: Any, node: Any) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key is None or isinstance(key, list | dict | set | bool):
                problem = "a key must be text or a number; put on, off, yes, no and null in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} occurs twice; the first would be lost", key_node.start_mark
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
    """Count the cores that this process may use. Under SLURM, this can be a part of the node."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables temporarily."""
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


def console() -> Console:
    """Return the shared rich console. If the output is a pipe, the console is wide enough for tables."""
    from rich import get_console
    from rich.console import Console

    if sys.stdout.isatty():
        return get_console()
    piped = Console()
    return piped if piped.is_terminal and "COLUMNS" in os.environ else Console(width=200)
