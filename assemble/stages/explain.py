"""Explain where a table's number comes from: its draws, stages, differences, code and command."""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from assemble.reporting.aggregate import Cell, collect, select
from assemble.reporting.draws import NATIVE
from assemble.reporting.papers import SCALES, paper_named
from assemble.reporting.records import (
    IGNORED_KEYS,
    RECORD_FILE,
    SEED_KEYS,
    Record,
    config_hash,
    find,
    read,
    short_name,
)
from assemble.reporting.results import find_promoted
from assemble.reporting.runs import flat, text_of
from assemble.reporting.tables import Metric, PartT, Row, Table, Tables, expand, load, part_named
from assemble.stages.configuration import resolve
from assemble.stages.given import Given, started
from assemble.stages.request import Selection, StageRequest, requests_for
from common.errors import ReportingError, nearest

_NOT_COMPARED = IGNORED_KEYS | SEED_KEYS


@dataclass(frozen=True)
class Explanation:
    """A table's `cell` at one scale, its `records`, and the same cell filled from the recorded runs (`recorded`)."""

    source: Tables
    table: Table
    row: Row
    metric: Metric
    scale: str
    recorded: Cell
    cell: Cell
    records: list[Record]

    @cached_property
    def given(self) -> dict[str, Given]:
        """Return the files that the records start from, by the stage that each replaces."""
        files = {stage: file for record in self.records for stage, file in record.given.items()}
        return {stage: Given(Path(file["file"]), file.get("source", "")) for stage, file in files.items()}

    @cached_property
    def stages(self) -> list[StageRequest]:
        """Return the stages behind the cell, parents first."""
        return self._chain(self.row)

    def _instances(self, row: Row) -> list[str]:
        return self.source.instances(self.table, row, self.metric, self.scale, self.given)

    def _chain(self, row: Row) -> list[StageRequest]:
        if not self._instances(row):
            return []
        named = [self.table.id], [row.label], self._instances(row)
        instances = expand(self.source, self.scale, *named, given=self.given)
        instances = started(instances, self.given, ()) or instances
        return requests_for(self.source.paper, instances, Selection(self.scale, given=self.given), 0)

    def _records_of(self, stage: StageRequest) -> list[Record]:
        """Return a stage's records, newest first."""
        return sorted((r for r in self.records if r.stage == stage.stage), key=lambda r: r.started, reverse=True)

    def _config(self, stage: StageRequest) -> dict[str, Any]:
        """Return the newest record's configuration, or the recipe's if there is no record."""
        records = self._records_of(stage)
        return records[0].config if records else stage.configuration.config

    def stage_rows(self) -> list[tuple[str, ...]]:
        """Return each stage's name, recipe, parents, configuration hash, median minutes and revision."""
        rows: list[tuple[str, ...]] = []
        for stage in self.stages:
            if stage.given is not None:
                rows.append((stage.stage, "given", stage.given.path.name, "-", "-", "-"))
                continue
            records, start = self._records_of(stage), stage.configuration.start_from
            starts = [parent.stage + ("" if start == "last" else f" ({start})") for parent in stage.parents.values()]
            current = config_hash(stage.configuration.config, _NOT_COMPARED)
            hashes = sorted({record.configuration for record in records}) or [current]
            changed = [] if current in hashes else [f"(now {current})"]
            minutes = f"{statistics.median(r.wall_seconds for r in records) / 60:.1f}" if records else "-"
            newest, *earlier = dict.fromkeys(record.revision for record in records) or ["-"]
            revisions = newest + (f" and {len(earlier)} more" if earlier else "")
            starting = ", ".join(dict.fromkeys(starts)) or "-"
            rows.append((stage.stage, stage.recipe, starting, " ".join([*hashes, *changed]), minutes, revisions))
        return rows

    @property
    def neighbor(self) -> Row | None:
        """Return the nearest row above that has this metric. For the first row, return the nearest below."""
        rows = [row for row in self.table.rows_at(self.scale) if self._instances(row)]
        place = rows.index(self.row)
        return rows[place - 1] if place else next(iter(rows[1:]), None)

    def differences_from(self, neighbor: Row) -> list[tuple[str, str, str]]:
        """Return the fields in which two rows' models differ. If the models are equal, compare the last stages."""

        def fields(row: Row) -> dict[str, str]:
            chain = self._chain(row)
            shared = self.given or self.row.model == neighbor.model
            stage = next((stage for stage in chain if stage.stage == row.model and not shared), chain[-1])
            parents = {short_name(name): parent.stage for name, parent in stage.parents.items()}
            return _fields(self._config(stage)) | parents

        return _differences(fields(self.row), fields(neighbor))

    def differences_from_paper(self) -> list[tuple[bool, str, str, str, str]]:
        """Return (whether declared, stage, field, value at this scale, value at paper scale). Skip `stand_ins`."""
        rows = []
        for stage in self.stages:
            if stage.stage not in self.stand_ins:
                there = "paper" in self.source.stages[stage.stage.partition("@")[0]].scales
                overrides = dict(stage.overrides) if there else {}
                published = resolve(stage.paper, stage.recipe, scale="paper", stage_overrides=overrides)
                declared = tuple(f"{short_name(deviation['field'])}." for deviation in stage.configuration.deviations)
                for difference in _differences(_fields(self._config(stage)), _fields(published.config)):
                    rows.append((f"{difference[0]}.".startswith(declared), stage.stage, *difference))
        return rows

    @property
    def stand_ins(self) -> list[str]:
        """Return the stages without a recipe at paper scale, where released files replace them."""
        published = {stage.recipe for stage in self.source.stages.values() if "paper" in stage.scales}
        return [stage.stage for stage in self.stages if stage.recipe not in published]

    def measuring_classes(self) -> list[str]:
        """Return the import paths of the modules that measure the cell."""
        measuring = (stage for stage in self.stages if stage.stage in self.cell.instances)
        return list(dict.fromkeys(str(self._config(stage)["model"]["class_path"]) for stage in measuring))

    def commands(self) -> list[str]:
        """Return the commands that reproduce the draws, one per instruction set."""
        words = ["assemble", "reproduce", paper_named(self.source.paper).short, "--scale", self.scale]
        words += ["--stages", *self.cell.instances]
        files = {stage.stage: stage.given for stage in self.stages if stage.given is not None}
        if files and all(file.source for file in files.values()):
            words += ["--released", "FOLDER"]
        else:
            words += [word for stage, file in files.items() for word in ("--given", f"{stage}={file.path}")]
        seeds: dict[str, list[str]] = {}
        for draw in sorted(self.cell.values):
            seeds.setdefault(draw.isa, []).append(str(draw.seed))
        return [
            shlex.join([*words, *(["--isa", isa] if isa != NATIVE else []), "--seeds", *some])
            for isa, some in (seeds or {NATIVE: ["0"]}).items()
        ]


def explain(paper: str, table: str, row: str, metric: str, scale: str | None, run: Path | None) -> Explanation:
    """Find a cell by its table, row and metric. Without a scale, take the largest one that was measured.

    `run` (a run's folder, or a folder of runs) replaces the recorded runs.
    """
    source = load(paper)
    place = _named(f"table of {source.paper}", source.tables, table, "id", "title")
    line = _named(f"row of {place.id}", place.rows, row, "label", "model")
    column = _named(f"metric of {place.id}", place.metrics, metric, "id", "label", "key")
    planned = [name for name in SCALES if name in place.scales and name in line.scales]
    scales = [name for name in planned if scale in (None, name)]
    if not scales:
        raise ReportingError(f"row {line.label!r} of {place.id} has no scale {scale}; scales: {', '.join(planned)}")
    recorded = find_promoted(source.paper)
    records = recorded if run is None else _of_run(run, source.paper)

    def filled(scale: str, given: bool, records: list[Record]) -> Cell:
        return collect(source, scale, records, [place.id], given)[0].cells[line.label, column.id]

    cells = {(each, given): filled(each, given, records) for each in scales for given in (False, True)}
    unmeasured = "mini" if "mini" in scales else scales[0], False
    at, given = next((place for place, cell in cells.items() if cell.values), unmeasured)
    if run is not None and not cells[at, given].values:
        has = sorted({f"{record.stage} at {record.scale}" for record in records})
        raise ReportingError(f"--run {run} did not measure this cell; it has {', '.join(has[:9]) or 'no record'}")
    kept = [r for r in select(records, source.paper, at, given).kept.values() if r.draw in cells[at, given].values]
    promoted = cells[at, given] if run is None else filled(at, given, recorded)
    return Explanation(source, place, line, column, at, promoted, cells[at, given], kept)


def _named(what: str, parts: Sequence[PartT], name: str, *fields: str) -> PartT:
    part = part_named(name, parts, *fields)
    if part is None:
        names = [getattr(part, fields[0]) for part in parts]
        raise ReportingError(f"there is no {what} named {name!r}: {nearest(name, names)}")
    return part


def _of_run(run: Path, paper: str) -> list[Record]:
    """Return the records in a folder of runs. For the folder of one run, return all records of its draw."""
    folder = run.resolve()
    if not (folder / RECORD_FILE).is_file():
        return find(folder, paper)
    record = read(folder / RECORD_FILE)

    identity = record.draw, bool(record.given)
    # If the folder was copied out of its folder of runs, only its record is found.
    beside = find(folder.parents[:4][-1], paper, record.scale)
    return [record for record in beside if (record.draw, bool(record.given)) == identity] or [record]


def _fields(config: Mapping[str, Any]) -> dict[str, str]:
    """Return, as text, the fields of a configuration that may change results. Write class names without the module."""
    return {
        name: re.sub(r"^(?:common|papers)\.[\w.]+\.(\w+)$", r"\1", text_of(value))
        for name, value in flat(config).items()
        if value is not None and _NOT_COMPARED.isdisjoint(name.split("."))
    }


def _differences(left: Mapping[str, str], right: Mapping[str, str]) -> list[tuple[str, str, str]]:
    pairs = [(name, left.get(name, "-"), right.get(name, "-")) for name in sorted({*left, *right})]
    return [pair for pair in pairs if pair[1] != pair[2]]
