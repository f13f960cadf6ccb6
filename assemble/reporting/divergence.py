"""Find where a run's training curves leave the band of the recorded runs, and the most likely cause.

A curve is cut into at most 32 windows. A window is outside if it is further from the recorded mean than Student's t
allows. The distance is on a log scale, the variance is pooled over neighboring windows, and Bonferroni's correction
covers all windows of a draw. `docs/comparing-runs.md` says how often valid runs leave the band.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from assemble.reporting import code
from assemble.reporting.aggregate import select
from assemble.reporting.curves import Curves, read_points
from assemble.reporting.draws import Draw
from assemble.reporting.papers import Paper
from assemble.reporting.records import IGNORED_KEYS, SEED_KEYS, Record, counted, find, instructions, short_name
from assemble.reporting.results import find_promoted, place_of, promoted_curves
from assemble.reporting.runs import flat, text_of

#: Fraction of valid runs that may leave the band.
CHANCE = 0.05
#: Number of recorded runs that a band needs.
LEAST = 3
WINDOWS = 32
#: Number of neighboring windows on each side whose variance is pooled with a window's.
NEIGHBORS = 3
#: Recorded curves have five digits.
ROUNDING = 1e-4
#: Kinds of causes, most likely first. The first two are reported even if the curves stay inside the band.
DATA, CONFIGURATION, CODE, VERSIONS, INSTRUCTIONS = KINDS = (
    "data", "configuration", "code", "library versions", "instruction set",
)  # fmt: skip
UNCOMMITTED = "uncommitted changes"

#: A record and its curves.
RunWithCurves = tuple[Record, Curves]
#: A user's record and its curves, the recorded runs of its stage, and the bands of their curves.
Compared = tuple[Record, Curves, list[Record], dict[str, "Band"]]


@dataclass(frozen=True)
class Divergence:
    """Compare a stage of one draw with the recorded runs.

    Attributes:
        step: the first step outside the band; None if the curves stay inside.
        last: the last recorded step.
        curve: the curve that leaves the band first.
        differences: what differs from the recorded runs, by kind, in the order of `KINDS`.
        parent: the parent stage, if a difference in the parent explains this one.
    """

    stage: str
    draw: Draw
    last: float
    step: float | None = None
    curve: str = ""
    differences: dict[str, str] = field(default_factory=dict)
    parent: str = ""

    @property
    def explained(self) -> bool:
        """Check whether the run measures something else by design, even if its curves stay inside the band."""
        return (
            DATA in self.differences
            or CONFIGURATION in self.differences
            or UNCOMMITTED in self.differences.get(CODE, "")
        )

    @property
    def reported(self) -> bool:
        return self.step is not None or self.explained

    @property
    def cause(self) -> str:
        """Return the most likely cause: one of `KINDS`, `parent` or `chance`."""
        if self.parent and not self.explained:
            return "parent"
        return next(iter(self.differences), "chance") if self.reported else "chance"

    @property
    def reason(self) -> str:
        """Return the cause and what differs: `configuration: model.learning_rate 0.0004, recorded 0.0002`."""
        detail = f"starts from {self.parent}" if self.cause == "parent" else self.differences.get(self.cause)
        return f"{self.cause}: {detail}" if detail else self.cause


def with_curves(records: Iterable[Record], folder: Path) -> list[RunWithCurves]:
    """Return the records of a folder of runs with their curves."""
    return [(record, read_points(record.folder(folder) / "metrics.csv")) for record in records]


def recorded(paper: Paper, scale: str, against: Path | None) -> list[RunWithCurves]:
    """Return the reference for a paper's runs: promoted records, or another folder of runs."""
    if against is not None:
        runs = with_curves(find(against, paper.name, scale), against)
    else:
        curves = promoted_curves(paper)
        runs = [(record, curves.get(place_of(record), {})) for record in find_promoted(paper.name, scale)]
    chosen = {id(run) for run in select((record for record, _ in runs), paper.name, scale).kept.values()}
    return [(record, curves) for record, curves in runs if id(record) in chosen and _judged(curves)]


def diverging(mine: Iterable[RunWithCurves], reference: Iterable[RunWithCurves]) -> list[Divergence]:
    """Compare each stage that has a band, in run order. Compare a stage with overrides (`+`) with the plain stage."""
    by_stage: dict[str, list[RunWithCurves]] = {}
    for run in reference:
        by_stage.setdefault(run[0].stage, []).append(run)
    by_draw: dict[Draw, list[Compared]] = {}
    for record, curves in sorted(mine, key=lambda run: run[0].started):
        # Exclude the run itself, which may have been promoted.
        base = by_stage.get(record.stage.partition("+")[0], ())
        others = [run for run in base if (run[0].seed, run[0].started) != (record.seed, record.started)]
        seeds = {peer.seed: theirs for peer, theirs in others}  # Roundings of one seed are not independent.
        if curves and (bands := _bands([*seeds.values()])):
            by_draw.setdefault(record.draw, []).append((record, curves, [peer for peer, _ in others], bands))
    return [divergence for compared in by_draw.values() for divergence in _of_draw(compared)]


def _of_draw(stages: Sequence[Compared]) -> list[Divergence]:
    cells = sum(band.values.shape[1] for *_, bands in stages for band in bands.values())
    divergences: dict[str, Divergence] = {}
    for record, curves, others, bands in stages:
        steps = {name: band.left_by(curves.get(name, []), cells) for name, band in bands.items()}
        left = {name: step for name, step in steps.items() if step is not None}
        curve = min(left, key=lambda name: left[name], default="")
        parents = [divergences.get(parent["stage"]) for parent in record.parents.values()]
        divergences[record.stage] = Divergence(
            record.stage,
            record.draw,
            max(band.steps[-1] for band in bands.values()),
            left.get(curve),
            curve,
            differences(record, others),
            next((parent.stage for parent in parents if parent and parent.reported), ""),
        )
    return [*divergences.values()]


def _judged(curves: Curves) -> Curves:
    """Select the curves to compare: the training loss and the gradient norms."""
    return {name: curves[name] for name in sorted(curves) if name == "train/loss" or name.startswith("gradient_norm")}


@dataclass(frozen=True)
class Band:
    """One curve of the recorded runs: its steps, and values of shape (draws, windows) with `size` steps each."""

    steps: list[float]
    values: np.ndarray[Any, Any]
    size: int

    def left_by(self, points: list[tuple[float, float]], cells: int) -> float | None:
        """Return the first step at which a curve is outside or missing. `cells` windows are tested (Bonferroni)."""
        recorded = dict(points)  # The curve may have more steps, since the logging interval doesn't affect training.
        lacking = min(set(self.steps) - recorded.keys(), default=None)
        before = [recorded[step] for step in self.steps if lacking is None or step < lacking]
        mine = _windows(np.array([before]), self.size)[0]
        values = self.values
        if mine.size and min(values.min(), mine.min()) > 0:
            values, mine = np.log(values), np.log(mine)
        draws, variance = len(values), values.var(0, ddof=1)
        pooled = np.array([variance[max(0, i - NEIGHBORS) : i + NEIGHBORS + 1].mean() for i in range(len(variance))])
        # Pooling at least doubles the degrees of freedom; neighboring windows are correlated.
        limit = stdtrit(2 * (draws - 1), 1 - CHANCE / 2 / cells)
        allowed = limit * np.sqrt((pooled + ROUNDING**2) * (1 + 1 / draws))
        outside = np.flatnonzero(abs(mine - values.mean(0)[: mine.size]) > allowed[: mine.size])
        return self.steps[int(outside[0]) * self.size] if outside.size else lacking


def _bands(runs: Sequence[Curves]) -> dict[str, Band]:
    """Return the bands of the curves for which enough runs have the same steps."""
    bands = {}
    for name in dict.fromkeys(name for curves in runs for name in _judged(curves)):
        curves = [curve[name] for curve in runs if name in curve]
        steps = Counter(tuple(step for step, _ in points) for points in curves).most_common(1)[0][0]
        values = [[value for _, value in points] for points in curves if tuple(step for step, _ in points) == steps]
        if len(values) >= LEAST:
            size = math.ceil(len(steps) / WINDOWS)
            bands[name] = Band(list(steps), _windows(np.array(values), size), size)
    return bands


def _windows(values: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Average each window of `size` values along the last axis. Drop an incomplete window at the end."""
    count = values.shape[1] // size
    return values[:, : count * size].reshape(len(values), count, size).mean(-1)


def differences(mine: Record, others: Sequence[Record]) -> dict[str, str]:
    """List what differs from all recorded runs, by kind of cause: `model.learning_rate 0.0004, recorded 0.0002`."""
    facts, recorded_facts = _facts(mine), [_facts(peer) for peer in others]
    # A miniature's data may depend on the seed. Compare with the same seed if it is recorded, else with all seeds.
    same_seed = [fact for peer, fact in zip(others, recorded_facts) if peer.seed == mine.seed]
    differing: dict[str, str] = {}
    for kind in KINDS:
        texts = _code_differences(mine, others) if kind == CODE else []
        reference = same_seed or recorded_facts if kind == DATA else recorded_facts
        for name in dict.fromkeys([*facts[kind], *(name for fact in reference for name in fact[kind])]):
            values = {text_of(fact[kind].get(name)): None for fact in reference}
            value = text_of(facts[kind].get(name))
            if value not in values and (kind != DATA or len(values) == 1):
                some = " or ".join([text or "unset" for text in values][:2]) + " or others" * (len(values) > 2)
                texts.append(f"{name} {value or 'unset'}, recorded {some}")
        if texts:
            differing[kind] = "; ".join(texts[:2]) + (f"; {len(texts) - 2} more" if len(texts) > 2 else "")
    return differing


def _code_differences(mine: Record, peers: Sequence[Record]) -> list[str]:
    """List the files whose code differs from every recorded run. If a fingerprint is unknown, report a dirty tree."""
    dirty = [UNCOMMITTED] if mine.git.get("dirty") and not any(peer.git.get("dirty") for peer in peers) else []
    hashes = [peer.code for peer in peers if mine.code and peer.code]
    files = code.nearest(mine.code, hashes)
    return [code.changed_text(files), *dirty] if files else [] if hashes else dirty


def _facts(record: Record) -> dict[str, dict[str, Any]]:
    """Return everything in a record that may explain a different curve, by kind of cause."""
    return {
        DATA: {
            f"{name}: {part}": held.get(part)
            for name, held in record.data.items()
            for part in dict.fromkeys(("samples", "skipped", *sorted(held)))
            if part != "skipped_names"
        },
        CONFIGURATION: flat(counted(record.config, IGNORED_KEYS | SEED_KEYS))
        | {short_name(name): parent["stage"] for name, parent in record.parents.items()},
        CODE: {},
        VERSIONS: {name: version for name, version in record.versions.items() if name != "representation-assemble"},
        INSTRUCTIONS: {
            "instructions": instructions(record),
            "accelerators": ", ".join(record.hardware.get("accelerators", ())),
        },
    }
