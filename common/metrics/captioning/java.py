"""The original Java programs for caption scores, from the two jars of the optional package pycocoevalcap.

Its own wrappers write into the package's folder and misalign captions after one with a line separator.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.metrics.captioning.tokenizer import PUNCTUATION

METEOR_JAR = "meteor/meteor-1.5.jar"
PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"


class JavaUnavailable(RuntimeError):
    """Java or a jar is missing or does not run."""


def java_command(jar: str, memory: str) -> tuple[list[str], Path]:
    """Start of a command line that runs Java, and the jar; `memory` is the largest heap, such as `2G`."""
    java = shutil.which("java")
    if java is None:
        raise JavaUnavailable("no `java` on the PATH; install a Java runtime (8 or later)")
    package = importlib.util.find_spec("pycocoevalcap")
    places = list(package.submodule_search_locations or []) if package else []
    found = next((path for place in places if (path := Path(place) / jar).is_file()), None)
    if found is None:
        raise JavaUnavailable(
            f"{Path(jar).name} not found; `make extra-captioning` in a checkout, else pip install pycocoevalcap"
        )
    # The characters that Java assumes follow the locale up to version 17.
    return [java, f"-Xmx{memory}", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8"], found


def one_line(text: str) -> str:
    """White space as single spaces; the programs read one caption per line and know many line separators."""
    return " ".join(text.split())


def ptb_tokenize(texts: Sequence[str], timeout: float = 600) -> list[str]:
    """Captions through the original PTB tokenizer, in lower case without punctuation; the timeout is in seconds.

    Whether the original keeps the full stop of a last word such as `c.` can depend on the caption after it.
    """
    if not texts:
        return []
    command, jar = java_command(PTB_JAR, "1G")
    command += ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "\n".join(map(one_line, texts)).encode(errors="replace")
    try:
        done = subprocess.run(command, input=lines, capture_output=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JavaUnavailable(f"the PTB tokenizer does not run: {error}") from error
    if done.returncode:
        raise JavaUnavailable(f"the PTB tokenizer ended with code {done.returncode}: {last_line(done.stderr)}")
    answers = done.stdout.decode().split("\n")
    if len(answers) != len(texts):
        raise JavaUnavailable(f"the PTB tokenizer gave {len(answers)} lines for {len(texts)} captions")
    return [" ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION) for line in answers]


def last_line(output: bytes) -> str:
    """The last line of a program's output, for a message."""
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")
