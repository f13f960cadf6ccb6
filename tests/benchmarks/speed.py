"""Time two implementations in one process, alternating between them, and collect the results in a table.

`make bench` prints the table and writes it into docs/speed.md, with machine, versions and date.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest

from assemble.reporting import records
from assemble.reporting.papers import checkout

Step = Callable[[], Any]
HEADS = ("what", "compared with", "ours", "the other", "ours / the other", "noise")


class Line(NamedTuple):
    """A row of the table.

    Attributes:
        what, peer: our implementation, and the other implementation.
        ours, theirs: the results of the two implementations, with units.
        ratio: our result divided by the other result; below 1, we need less.
        noise: standard error of the ratio over the rounds, or None.
    """

    what: str
    peer: str
    ours: str
    theirs: str
    ratio: float | None = None
    noise: float | None = None

    def stays_below(self, most: float) -> None:
        """Fail if the ratio is above `most` by more than three times the noise."""
        assert self.ratio is not None
        told = f"{self.what}: {self.ratio:.3f} of {self.peer}, at most {most}"
        assert self.ratio - 3 * (self.noise or 0.0) < most, told


#: The rows of this run.
LINES: list[Line] = []


def peer(module: str) -> Any:
    """Import another implementation, or skip the comparison with a one-line reason."""
    reason = f"{module.partition('.')[0]} is not installed; `make bench` installs it where it can"
    return pytest.importorskip(module, reason=reason, exc_type=ImportError)


def in_turns(
    steps: Mapping[str, Step], rounds: int, warm_up: int = 1, timer: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Run the steps alternately, so that other load slows all alike. Return the seconds of each step in each round.

    The environment variable `BENCH_ROUNDS` limits the rounds, for a quick look.
    """
    rounds = min(rounds, int(os.environ.get("BENCH_ROUNDS", rounds)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm_up + rounds):
        for name, step in steps.items():
            start = timer()
            step()
            if number >= warm_up:
                seconds[name].append(timer() - start)
    return seconds


def compare(what: str, peer: str, ours: Sequence[float], theirs: Sequence[float]) -> Line:
    """Add a row that compares the times of two steps, round by round. See `Line` for `what` and `peer`."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    # Estimate the error of the median from the median deviation, which a single slow round does not change.
    spread = 1.4826 * statistics.median(abs(one - ratio) for one in ratios)
    noise = 1.2533 * spread / math.sqrt(len(ratios)) if len(ratios) > 2 else None
    mine, other = (amount(statistics.median(values)) for values in (ours, theirs))
    return add(Line(what, peer, mine, other, ratio, noise))


def add(line: Line) -> Line:
    """Add a row to the table, and print the row."""
    LINES.append(line)
    print("\n" + "  ".join(cells(line)), flush=True)
    return line


def amount(seconds: float) -> str:
    """Format seconds: `12.3 ms` for 0.0123, `2.77 s` for 2.77."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def cells(line: Line) -> list[str]:
    """Format a row as texts, in the order of `HEADS`."""
    ratio = "" if line.ratio is None else f"{line.ratio:.2f}"
    return [line.what, line.peer, line.ours, line.theirs, ratio, "" if line.noise is None else f"± {line.noise:.2f}"]


def about_machine() -> str:
    """Return the date, machine, versions and revision."""
    machine, versions, git = records.hardware(), records.versions(), records.git_state(checkout())
    revision = str(git.get("revision") or "unknown")[:12] + (", with changes" if git.get("dirty") else "")
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, "
        f"torch {versions.get('torch', 'unknown')}, PyAV {versions.get('av', 'unknown')}, revision {revision}"
    )


def markdown(lines: Sequence[Line]) -> str:
    """Return the table, below a line with machine, versions and date."""
    rows = [f"| {' | '.join(cells(line))} |" for line in lines]
    return "\n".join([about_machine(), "", f"| {' | '.join(HEADS)} |", "|---|---|---:|---:|---:|---:|", *rows])
