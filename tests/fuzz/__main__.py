"""Read damaged files with every reader: `make fuzz`, or `python -m tests.fuzz --minutes 3 --seed 0`.

A case copies a target's good files, damages one file, and reads all files in a new process. A case is a finding if the
process dies, takes longer than `PATIENCE`, raises an error that no command puts into words, doesn't name the file or
its folder in the error, or changes a file that it should only read. The seed and the case's number determine the case,
so `--case` repeats a finding.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.targets import TARGETS, Target

#: Time limit of a case in seconds.
PATIENCE = 120.0
#: Errors that `assemble` prints in one line.
WORDED = (OSError, ValueError, RuntimeError)


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    found = bytearray(content)
    for place in rng.integers(0, max(len(found), 1), int(rng.integers(1, 9))):
        if found:
            found[place] ^= int(rng.integers(1, 256))
    return bytes(found)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: int(rng.integers(0, len(content) + 1))]


def change_lines(content: bytes, rng: np.random.Generator) -> bytes:
    """Remove some lines and repeat others."""
    return b"".join(line * int(rng.integers(0, 3)) for line in content.splitlines(keepends=True))


def insert(content: bytes, rng: np.random.Generator) -> bytes:
    """Insert something large, deep or of another type at a random place."""
    pieces = (
        b"\xff\xfe", b"\0", b"9" * 5000, b"x" * 200_000, b"[" * 5000, b"{" * 200, b'"', b"-1", b"NaN", b"1e999",
        b"null", b"\r\n", b",,,,", b"../../../etc/passwd", b"\x1b[2J", b"!!python/name:os.system",
    )  # fmt: skip
    place = int(rng.integers(0, len(content) + 1))
    return content[:place] + pieces[int(rng.integers(len(pieces)))] + content[place:]


def empty(content: bytes, rng: np.random.Generator) -> bytes:
    return b""


def other_encoding(content: bytes, rng: np.random.Generator) -> bytes:
    try:
        return content.decode("utf-8").encode("utf-16")
    except UnicodeDecodeError:
        return content[::-1]


CONTENTS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    flip, flip, cut, cut, change_lines, insert, insert, insert, empty, other_encoding,
)  # fmt: skip
PLACES = ("pipe", "folder", "loop", "gone", "unreadable link")


def damage(path: Path, rng: np.random.Generator) -> str:
    """Damage a file, and return a description of the damage."""
    kind = int(rng.integers(len(CONTENTS) + len(PLACES)))
    if kind < len(CONTENTS):
        path.write_bytes(CONTENTS[kind](path.read_bytes(), rng))
        return CONTENTS[kind].__name__
    how = PLACES[kind - len(CONTENTS)]
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path.name)
    elif how == "unreadable link":
        path.symlink_to("/proc/self/mem")
    return how


# -- one case ----------------------------------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, str]:
    """Return the hashes of all regular files."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def read(target: Target, folder: Path, sender: Any) -> None:
    """Read a target's files in a new process, and send the outcome."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            status = target.read(folder)
        sender.send(("status", status if isinstance(status, int) else 0, told.getvalue()))
    except WORDED as error:
        sender.send(("error", type(error).__name__, str(error)))
    except BaseException as error:
        sender.send(("unworded", type(error).__name__, "".join(traceback.format_exception(error)[-6:])))


def judge(target: Target, folder: Path, path: Path) -> tuple[str, str]:
    """Return the outcome of reading: `read`, `told` for an error that names the file, or a finding with its text."""
    before = state_of(folder)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=read, args=(target, folder, sender))
    process.start()
    sender.close()
    kind, what, text = "ended", None, ""
    if receiver.poll(PATIENCE):
        with contextlib.suppress(EOFError):
            kind, what, text = receiver.recv()
    else:
        process.kill()
        kind = "hang"
    process.join()
    receiver.close()
    if kind in ("ended", "hang", "unworded"):
        return "FOUND", text or f"{kind}: status {process.exitcode}"
    if state_of(folder) != before:
        return "FOUND", "a file that is only read was changed"
    failed = kind == "error" or what != 0
    if not failed and not (kind == "status" and "Traceback" in text):
        return "read", text
    above = [part.name for part in path.parents if part != folder and part.is_relative_to(folder)]
    if "Traceback" in text or not any(name in text for name in (path.name, path.stem, *above)):
        return "FOUND", f"the file is not named: {what}: {text[-600:]}"
    return "told", text


def main(minutes: float, seed: int, only: int | None = None, names: Sequence[str] = tuple(TARGETS)) -> int:
    """Run cases of some targets for some minutes, and return the number of findings."""
    end = time.monotonic() + 60 * minutes
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with tempfile.TemporaryDirectory() as base:
        own = {"ASSEMBLE_CACHE": f"{base}/cache", "ASSEMBLE_TESTS": f"{base}/trained"}
        os.environ.update(own, WANDB_MODE="disabled", OMP_NUM_THREADS="1")
        good = {name: Path(base) / "good" / str(number) for number, name in enumerate(names)}
        case = only or 0
        while time.monotonic() < end and (only is None or case == only):
            rng = np.random.default_rng((seed, case))
            name = names[int(rng.integers(len(names)))]
            if not good[name].exists():
                good[name].mkdir(parents=True)
                TARGETS[name].write(good[name])
            folder = Path(base) / f"case{case}" / "files"
            shutil.copytree(good[name], folder)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            path = files[int(rng.integers(len(files)))]
            how = damage(path, rng)
            came, text = judge(TARGETS[name], folder, path)
            counts[name, came] += 1
            if came == "FOUND" or only is not None:
                print(f"case {case}: {name}, {path.relative_to(folder)}, {how}: {came}: {text}", flush=True)
            shutil.rmtree(folder.parent, ignore_errors=True)
            case += 1
    print(f"\n{'target':<24}{'read':>8}{'told':>8}{'found':>8}")
    for name in names:
        print(f"{name:<24}" + "".join(f"{counts[name, came]:>8}" for came in ("read", "told", "FOUND")))
    findings = sum(counts[name, "FOUND"] for name in names)
    print(f"seed {seed}: {sum(counts.values())} cases, {findings} findings")
    return findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, with what came of it")
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), metavar="NAME", help="these alone; a case needs them, too"
    )
    chosen = parser.parse_args()
    sys.exit(bool(main(chosen.minutes, chosen.seed, chosen.case, chosen.target or tuple(TARGETS))))
