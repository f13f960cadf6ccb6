"""Promote records of clean revisions: copy them and their curves from runs into the committed results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from assemble.reporting.curves import read_points
from assemble.reporting.draws import NATIVE
from assemble.reporting.papers import PROMOTED_SCALES, paper_named, runs_root
from assemble.reporting.records import Record, find, without_folders
from assemble.reporting.results import find_promoted, place_of, promoted_curves, write_results
from assemble.reporting.tables import Tables, load
from common.files import exclusive

PROMOTED = "promoted"
UPDATED = "updated"
UNCHANGED = "unchanged"
KEPT = "kept"
REFUSED = "refused"


@dataclass(frozen=True)
class Promotion:
    """What happened to one record: `promoted`, `updated`, `unchanged`, `kept` or `refused`, and why."""

    record: Record
    action: str
    reason: str = ""


def promote(
    paper: str,
    scales: Sequence[str] = PROMOTED_SCALES,
    runs: Path | None = None,
    replace: bool = False,
    problem: Callable[[Record], str] = lambda record: "",
) -> list[Promotion]:
    """Copy a paper's records of clean revisions into its results.

    If a seed already has a native draw, another kind of machine's draw is added under that machine's instruction set,
    as with `--isa`. `replace` also replaces records made on another machine. `problem` says why to refuse a record.
    """
    entry, root = paper_named(paper), runs or runs_root()
    records = [r for r in find(root, entry.name, strict=True) if r.scale in scales]
    if not records:
        return []
    tables = load(entry.name)
    runs_root().mkdir(exist_ok=True)
    with exclusive(runs_root() / ".promote.lock"):  # Two promotions at once would overwrite each other's shared parts.
        promoted = {place_of(record): record for record in find_promoted(entry.name)}
        curves = promoted_curves(entry)
        before = list(promoted.values())
        done = []
        for record in records:
            kept = without_folders(_as_kept(record, before))
            place = place_of(kept)
            action, reason = REFUSED, problem(record)
            if not reason:
                action, reason = _decision(kept, promoted.get(place), tables, replace)
            done.append(Promotion(kept, action, reason))
            if action in (PROMOTED, UPDATED, UNCHANGED):
                promoted[place] = kept
                points = read_points(record.folder(root) / "metrics.csv")
                if points or action != UNCHANGED:  # A copied record may lack the curves that are already promoted.
                    curves[place] = points
        if any(outcome.action in (PROMOTED, UPDATED, UNCHANGED) for outcome in done):
            write_results(entry, promoted.values(), curves)
    return done


def unfit(record: Record, tables: Tables) -> tuple[str, str]:
    """Return the decision about a record that can never be promoted, and why. Return empty texts for other records."""
    if "+" in record.stage or record.stage.partition("@")[0] not in tables.stages:
        return KEPT, "not promoted, since it is not a stage of the paper's tables"
    if not record.of_authors:
        return KEPT, "not promoted, since it starts from a file of yours (--given), not from the authors' (--released)"
    if record.rehearsal:
        return (
            REFUSED,
            "it is a rehearsal on tiny data, so its numbers mean nothing; run the stage with `assemble reproduce`",
        )
    if not record.git.get("revision"):
        return REFUSED, "its revision is unknown (no git, or no repository); run the stage in a clone"
    if not record.clean:
        return REFUSED, "it was measured on uncommitted changes; commit them, then run the stage again"
    return "", ""


def _decision(record: Record, present: Record | None, tables: Tables, replace: bool) -> tuple[str, str]:
    """Decide what to do with a record. Also return the reason if the record is not promoted."""
    action, reason = unfit(record, tables)
    if action:
        return action, reason
    if present is None:
        return PROMOTED, ""
    if present == record:
        return UNCHANGED, ""
    if present.started > record.started:
        return KEPT, f"the promoted record is newer ({present.started})"
    if not replace and machine_of(present) != machine_of(record):
        return REFUSED, (
            f"{record.draw} at scale {record.scale} was recorded on {machine_of(present)} and this run on "
            f"{machine_of(record)}; --replace replaces it"
        )
    return UPDATED, ""


def machine_of(record: Record) -> str:
    """Name the parts of a record's machine that may change its numbers."""
    hardware = record.hardware
    processors = [hardware.get("cpu") or "an unknown processor", *hardware.get("accelerators", [])]
    return f"{' with '.join(processors)} ({hardware.get('isa', {}).get('machine') or 'unknown instructions'})"


def _as_kept(record: Record, promoted: Iterable[Record]) -> Record:
    """Return the record to store. If another machine recorded the seed, a native draw gets its instruction set."""
    machine = record.hardware.get("isa", {}).get("machine")
    same = (peer for peer in promoted if (peer.scale, peer.draw) == (record.scale, record.draw))
    machines = {peer.hardware.get("isa", {}).get("machine") for peer in same} - {None}
    if record.draw.isa != NATIVE or machine is None or not machines or machine in machines:
        return record
    isa = {**record.hardware["isa"], "requested": machine}
    return dataclasses.replace(record, hardware={**record.hardware, "isa": isa})
