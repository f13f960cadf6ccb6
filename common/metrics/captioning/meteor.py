"""METEOR 1.5 (Denkowski and Lavie, 2014) through its original Java program."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import IO

import numpy as np

from common.metrics.captioning.caption_set import CaptionSet, Floats

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


def meteor(captions: CaptionSet, timeout: float = 600) -> tuple[float, Floats]:
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
            statistics = [_ask(process.stdin, process.stdout, request, 1)[0] for request in requests]
            total = f" {_SEPARATOR} ".join(["EVAL", *statistics])
            values = np.array(_ask(process.stdin, process.stdout, total, len(requests) + 1), dtype=np.float64)
        except (OSError, EOFError, ValueError) as error:
            process.kill()
            process.wait()
            messages.seek(0)
            said = messages.read().decode(errors="replace").strip().split("\n")[-1] or "no message"
            reason = str(error) or f"exit code {process.returncode}: {said}"
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


def _ask(stdin: IO[bytes], stdout: IO[bytes], request: str, answers: int) -> list[str]:
    with contextlib.suppress(OSError):  # the program has ended, so answers are missing
        stdin.write(request.encode(errors="replace") + b"\n")
        stdin.flush()
    lines = [stdout.readline().decode().strip() for _ in range(answers)]
    if not all(lines):
        raise EOFError
    return lines
