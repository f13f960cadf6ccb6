"""Promotion: copying records of clean revisions, and their curves, from runs into the committed results."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import ReportingError
from common.files import named, sweep, write_whole
from common.reporting.draws import INSTRUCTION_SETS, NATIVE, Draw
from common.reporting.papers import PROMOTED_SCALES, check_scale, paper_named, project_root, runs_root
from common.reporting.records import (
    Record,
    find,
    find_promoted,
    portable,
    promoted_curves,
    promoted_file,
    read,
    write,
)
from common.reporting.tables import load

PROMOTED = "promoted"
UPDATED = "updated"
UNCHANGED = "unchanged"
KEPT = "kept"
#: Why the record of a trial, with overrides or of one's own data, stays where it is.
NO_STAGE = "not promoted, since it is no stage of the paper's tables"
REFUSED = "refused"


@dataclass(frozen=True)
class Promotion:
    """What happened to one record.

    Args:
        record: the record.
        action: `promoted`, `updated`, `unchanged`, `kept` or `refused`.
        path: the promoted file.
        reason: why it was kept or refused.
    """

    record: Record
    action: str
    path: Path
    reason: str = ""


def promote(
    paper: str, scales: Sequence[str] = PROMOTED_SCALES, runs: Path | None = None, stages: Sequence[str] | None = None
) -> list[Promotion]:
    """Copy the records of a paper from clean revisions into its results.

    A record from a changed tree, or from a tree whose revision is unknown, cannot be reproduced from what is
    committed and is refused: commit, run the stage again. So is one of a rehearsal, which measured nothing.

    A seed on a processor with other instructions is another draw: where a native draw of the seed is there already, one
    of another kind of machine is kept beside it under the name of its instruction set, as with `--isa`.

    Args:
        paper: package or short name.
        scales: the scales to promote; smoke numbers mean nothing, so they are not unless asked for.
        runs: folder of runs.
        stages: keep these stages (names, or instance ids).

    Returns:
        One entry per record found, in order.

    Raises:
        ReportingError: for an unknown paper or scale, a malformed record, or a stage without a record.
        AtomicWriteError: when a file cannot be written.
    """
    entry = paper_named(paper)
    for scale in scales:
        check_scale(scale)
    found = [r for r in find(runs or runs_root(), entry.name) if r.scale in scales]
    if stages is not None:
        known = {name for r in found for name in (r.stage, r.stage.split("@")[0])}
        missing = [name for name in stages if name not in known]
        if missing:
            raise ReportingError(f"no record of stage(s) {', '.join(missing)} at {', '.join(scales)} scale to promote")
        found = [r for r in found if r.stage in stages or r.stage.split("@")[0] in stages]
    kinds = machines(find_promoted(entry.name))
    stages_of_paper = load(entry.name).stages
    done = [
        _promote(record, kept := as_kept(record, kinds), promoted_file(entry, kept.scale, kept.draw, kept.stage))
        if "+" not in record.stage and record.stage.partition("@")[0] in stages_of_paper
        else Promotion(record, KEPT, promoted_file(entry, record.scale, record.draw, record.stage), NO_STAGE)
        for record in found
    ]
    for folder in {promotion.path.parent for promotion in done}:
        sweep(folder)
    for promotion in done:
        if promotion.action in (PROMOTED, UPDATED, UNCHANGED):
            r = promotion.record
            _promote_curves(
                r.folder(runs or runs_root()) / "metrics.csv",
                promoted_curves(promotion.path),
            )
    return done


def _promote_curves(source: Path, target: Path) -> None:
    """Keep the curves beside their record; those of a record that it replaces go, whatever the new one has."""
    if not source.is_file():
        target.unlink(missing_ok=True)
        return
    # Without a time in it, so that the same curves are the same file.
    with named(source):
        content = gzip.compress(source.read_bytes(), mtime=0)
    with named(target):
        there = target.read_bytes() if target.is_file() else None
    if there != content:
        write_whole(target, lambda partial: partial.write_bytes(content))


def machines(promoted: Sequence[Record]) -> dict[tuple[str, Draw], set[str]]:
    """Per scale and native draw, the instruction sets of the machines that its records are from."""
    kinds: dict[tuple[str, Draw], set[str]] = {}
    for record in promoted:
        machine = record.hardware.get("isa", {}).get("machine")
        if record.draw.isa == NATIVE and machine:
            kinds.setdefault((record.scale, record.draw), set()).add(machine)
    return kinds


def as_kept(record: Record, kinds: dict[tuple[str, Draw], set[str]]) -> Record:
    """The record as it is kept: a native one says its instruction set where another machine has the seed already."""
    machine = record.hardware.get("isa", {}).get("machine")
    others = kinds.get((record.scale, record.draw), set())
    if record.draw.isa != NATIVE or machine not in INSTRUCTION_SETS or not others or machine in others:
        return record
    isa = {**record.hardware["isa"], "requested": machine}
    return dataclasses.replace(record, hardware={**record.hardware, "isa": isa})


def _promote(record: Record, kept: Record, path: Path) -> Promotion:
    if record.rehearsal:
        reason = "it is a rehearsal on tiny data and measured nothing; run the stage with `assemble reproduce`"
        return Promotion(record, REFUSED, path, reason)
    if not record.clean:
        if not record.git.get("revision"):
            reason = "its revision is unknown (no git, or no repository); run the stage in a clone"
        else:
            reason = "it was measured on uncommitted changes; commit them, then run the stage again"
        return Promotion(record, REFUSED, path, reason)
    portable_record = dataclasses.replace(kept, config=portable(kept.config, _replacements()))
    action = PROMOTED
    if path.exists():
        present = read(path)
        if present == portable_record:
            return Promotion(record, UNCHANGED, path)
        if present.started > record.started:
            return Promotion(record, KEPT, path, f"the promoted record is newer ({present.started})")
        action = UPDATED
    write(path, portable_record)
    return Promotion(record, action, path)


def _replacements() -> list[tuple[str, str]]:
    """Folders of this machine that have no place in a committed file."""
    return [(str(project_root()), "."), (str(Path.home()), "~")]
