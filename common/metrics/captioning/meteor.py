"""METEOR 1.5 (Denkowski and Lavie, 2014) through its original Java program."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from common.metrics.captioning.caption_set import CaptionSet

METEOR_JAR = "meteor/meteor-1.5.jar"
_SEPARATOR = "|||"


class JavaUnavailable(RuntimeError):
    """Java or a jar is missing or does not run."""


def _command() -> list[str]:
    """The command line of METEOR, whose jar the optional package pycocoevalcap brings.

    The package's own wrapper writes into its folder and misaligns captions after one with a line separator.
    """
    java = shutil.which("java")
    if java is None:
        raise JavaUnavailable("no `java` on the PATH; install a Java runtime (8 or later)")
    package = importlib.util.find_spec("pycocoevalcap")
    places = list(package.submodule_search_locations or []) if package else []
    found = next((path for place in places if (path := Path(place) / METEOR_JAR).is_file()), None)
    if found is None:
        raise JavaUnavailable(
            f"{Path(METEOR_JAR).name} not found; `make extra-captioning` in a checkout, else pip install pycocoevalcap"
        )
    # Before Java 18, the default encoding depends on the locale.
    encoding = ["-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"]
    return [java, "-Xmx2G", *encoding, "-jar", str(found), "-", "-", "-stdio", "-l", "en", "-norm"]


def meteor(captions: CaptionSet, timeout: float = 600) -> tuple[float, NDArray[np.float64]]:
    """METEOR with the settings of coco-caption (English, normalized). Takes seconds to start and 1.5 GB of memory.

    Returns:
        Corpus score from the summed statistics of all items (NaN without any) and scores per item [N].

    Source: docs/papers/vx2text.md [11] (METEOR 1.5 -l en -norm, aggregated statistics).
    """
    if not len(captions):
        return float("nan"), np.zeros(0)
    command = _command()
    requests = [
        f" {_SEPARATOR} ".join(["SCORE", *map(_field, references), _field(candidate)])
        for candidate, references in zip(captions.candidates, captions.references)
    ]
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages)
        except OSError as error:
            raise JavaUnavailable(f"METEOR does not start: {error}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        watch = threading.Timer(timeout, process.kill)
        watch.start()
        try:
            statistics = _ask(process.stdin, process.stdout, requests, len(requests))
            total = f" {_SEPARATOR} ".join(["EVAL", *statistics])
            scores = _ask(process.stdin, process.stdout, [total], len(requests) + 1)
            values = np.array([float(score) for score in scores])
        except (OSError, EOFError, ValueError) as error:
            process.kill()
            process.wait()
            messages.seek(0)
            reason = str(error) or f"exit code {process.returncode}: {_last_line(messages.read())}"
            raise JavaUnavailable(f"METEOR gave no scores within {timeout:g} s ({reason})") from error
        finally:
            watch.cancel()
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):  # unsent requests cannot be flushed
                process.stdin.close()
            process.stdout.close()
    return float(values[-1]), values[:-1]


def _field(text: str) -> str:
    """White space as single spaces; the program reads one caption per line and knows many line separators."""
    return " ".join(text.replace(_SEPARATOR, "").split())


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


def _ask(stdin: IO[bytes], stdout: IO[bytes], requests: Iterable[str], answers: int) -> list[str]:
    """Write all requests while reading the answers; otherwise both pipes could fill up and deadlock."""

    def write() -> None:
        try:
            for request in requests:
                stdin.write(request.encode(errors="replace") + b"\n")
            stdin.flush()
        except OSError:
            pass  # the reader reports the missing answers

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    lines = []
    for _ in range(answers):
        line = stdout.readline()
        if not line:
            raise EOFError
        lines.append(line.decode().strip())
    writer.join()
    return lines
