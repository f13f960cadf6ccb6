"""METEOR 1.5 (Denkowski and Lavie, 2014), computed by the original Java program."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.metrics.captioning.caption_set import CaptionSet, Floats

METEOR_JAR = "meteor/meteor-1.5.jar"
_SEPARATOR = "|||"


class JavaUnavailable(RuntimeError):
    """Java or METEOR's jar is missing, or Java doesn't run."""


def _command() -> list[str]:
    """Return METEOR's command line. The jar is part of the optional package pycocoevalcap.

    We don't use the package's wrapper, because it writes into the package folder and misaligns captions after a line
    separator.
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
    """Compute METEOR like coco-caption (English, normalized). Runs Java twice, which takes 10 s and 1.5 GB of memory.

    Returns:
        Corpus score, computed from the summed statistics (NaN without items), and scores per item [N].

    Source: docs/papers/vx2text.md [11] (METEOR 1.5 -l en -norm, aggregated statistics).
    """
    if not len(captions):
        return float("nan"), np.zeros(0)
    requests = [
        f" {_SEPARATOR} ".join(["SCORE", *map(_field, references), _field(candidate)])
        for candidate, references in zip(captions.candidates, captions.references)
    ]
    statistics = _ask(requests, len(requests), timeout)
    total = f" {_SEPARATOR} ".join(["EVAL", *statistics])
    values = np.array(_ask([total], len(requests) + 1, timeout), dtype=np.float64)
    return float(values[-1]), values[:-1]


def _field(text: str) -> str:
    """Replace white space with single spaces: METEOR reads a caption per line, and splits at many separators."""
    return " ".join(text.replace(_SEPARATOR, "").split())


def _ask(requests: Sequence[str], answers: int, timeout: float) -> list[str]:
    lines = "".join(f"{request}\n" for request in requests).encode(errors="replace")
    try:
        program = subprocess.run(_command(), input=lines, capture_output=True, timeout=timeout, check=False)
    except OSError as error:
        raise JavaUnavailable(f"METEOR does not start: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise JavaUnavailable(f"METEOR gave no scores within {timeout:g} s") from error
    answered = program.stdout.decode().split("\n")[:-1]
    if len(answered) != answers or not all(answered):
        message = program.stderr.decode(errors="replace").strip().split("\n")[-1] or "no message"
        raise JavaUnavailable(f"METEOR gave {len(answered)} answers, not {answers}, and exited: {message}")
    return [answer.strip() for answer in answered]
