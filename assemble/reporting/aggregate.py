"""Join records with a paper's tables: collect each cell's values over draws, and list the omitted records."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from assemble.reporting.draws import Draw
from assemble.reporting.records import Record
from assemble.reporting.tables import Expected, Published, Row, Table, Tables


def from_whose_weights(records: Iterable[Record]) -> str:
    """Say in words whose weights the records start from: the authors' or other given weights."""
    return "from the authors' weights" if all(r.of_authors for r in records) else "from given weights"


@dataclass(frozen=True)
class Cell:
    """A cell of a table at one scale; `values` are means over the cell's stages, whose ids are `instances`.

    `finished` lists the draws whose stages are all recorded, even if a value is missing (METEOR needs Java).
    """

    published: Published | None = None
    expected: Expected | None = None
    values: dict[Draw, float] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    instances: tuple[str, ...] = ()
    finished: frozenset[Draw] = frozenset()

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def difference(self) -> float | None:
        """Return the mean minus the published number. None if a number is missing, or if a range is published."""
        published = self.published.ends if self.published else ()
        return self.mean - published[0] if self.mean is not None and len(published) == 1 else None

    @property
    def spread(self) -> float | None:
        """Return the sample standard deviation over draws, or None for fewer than two draws."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Chosen:
    """The records of one paper and scale to average (`kept`), and why others are omitted, by stage (`left_out`)."""

    kept: dict[tuple[str, Draw], Record]
    left_out: dict[str, list[str]]


@dataclass(frozen=True)
class TableResult:
    """A table with the results of one scale. `cells` maps (row label, metric id) to the cell, for the rows shown.

    `given` is true if the records start from files, such as the authors' weights, and false after our pre-training.
    """

    table: Table
    scale: str
    cells: dict[tuple[str, str], Cell]
    notes: tuple[str, ...]
    given: bool = False

    @property
    def rows(self) -> tuple[Row, ...]:
        return self.table.rows_at(self.scale)

    @property
    def records(self) -> list[Record]:
        """Return every record behind the table, once."""
        unique = {(r.stage, r.draw): r for cell in self.cells.values() for r in cell.records}
        return [unique[key] for key in sorted(unique)]

    @property
    def origin(self) -> str:
        """Return `from the authors' weights` or similar if we did not pre-train the weights; else an empty text."""
        return from_whose_weights(self.records) if self.given else ""

    @property
    def measured(self) -> bool:
        return any(cell.values for cell in self.cells.values())

    def complete(self, draws: Collection[Draw], made: Collection[str]) -> bool:
        """Check that each draw finished every cell whose stages are all in `made`."""
        filled = [cell for cell in self.cells.values() if cell.instances and set(cell.instances) <= set(made)]
        return bool(filled) and all(cell.finished >= set(draws) for cell in filled)


def deviations_of(records: Iterable[Record]) -> list[dict[str, str]]:
    """List the records' deviations from the paper. Each field appears once, as the newest record states it."""
    by_age = sorted(records, key=lambda record: record.started)
    newest = {deviation["field"]: deviation for record in by_age for deviation in record.deviations}
    return [newest[field] for field in sorted(newest)]


def select(records: Iterable[Record], paper: str, scale: str, given: bool = False) -> Chosen:
    """Choose the records to average: one scale, each stage's newest configuration, and no replaced parents.

    If `given` is true, choose the records that start from a given file.
    """
    newest: dict[tuple[str, Draw], Record] = {}
    for record in records:
        if record.paper == paper and record.scale == scale and bool(record.given) == given:
            key = (record.stage, record.draw)
            if key not in newest or record.started > newest[key].started:
                newest[key] = record
    kept = dict(newest)
    left_out: dict[str, list[str]] = {}

    def leave_out(record: Record, why: str) -> None:
        del kept[record.stage, record.draw]
        left_out.setdefault(record.stage, []).append(f"{record.draw} of `{record.stage}` is left out: {why}")

    def other_parent(record: Record) -> str | None:
        """Find a parent that was replaced after the record was measured."""
        for start in record.parents.values():
            key = (start["stage"], record.draw)
            parent = kept.get(key)
            if key in newest and not (
                parent and parent.lineage_hash == start["lineage_hash"] and parent.saved(start.get("digest"))
            ):
                return start["stage"]
        return None

    current = {record.stage: record.configuration for record in sorted(newest.values(), key=lambda r: r.started)}
    for (stage, _), record in sorted(newest.items()):
        if record.configuration != current[stage]:
            leave_out(record, f"configuration {record.configuration}, while the newest record has {current[stage]}")
    while stale := next(((record, at) for _, record in sorted(kept.items()) if (at := other_parent(record))), None):
        leave_out(stale[0], f"`{stale[1]}`, which it starts from, was trained again since; run it again")
    return Chosen(kept, left_out)


def collect(
    source: Tables,
    scale: str,
    records: Iterable[Record],
    tables: Sequence[str] | None = None,
    given: bool = False,
) -> list[TableResult]:
    """Fill a paper's tables at a scale. `records` may have any scale, and `tables` limits the ids."""
    chosen = select(records, source.paper, scale, given)
    wanted = source.tables if tables is None else tuple(source.table(name) for name in tables)
    return [_fill(source, table, scale, chosen, given) for table in wanted if scale in table.scales]


def _fill(source: Tables, table: Table, scale: str, chosen: Chosen, given: bool) -> TableResult:
    files = {stage for record in chosen.kept.values() for stage in record.given}
    cells: dict[tuple[str, str], Cell] = {}
    notes: dict[str, None] = {}
    lacking: dict[str, dict[str, None]] = {}
    for row, metric in itertools.product(table.rows_at(scale), table.metrics):
        instances = source.instances(table, row, metric, scale, files)
        for instance in instances:
            notes.update(dict.fromkeys(chosen.left_out.get(instance, ())))
        values: dict[Draw, float] = {}
        used: list[Record] = []
        finished: set[Draw] = set()
        for draw in sorted({draw for stage, draw in chosen.kept if stage in instances}):
            records = [chosen.kept[name, draw] for name in instances if (name, draw) in chosen.kept]
            numbers = {record.stage: record.metrics.get(metric.key) for record in records}
            finite = [number for number in numbers.values() if number is not None]
            if len(records) < len(instances):
                recorded = f"{len(records)} of {len(instances)} stages recorded; shown when all are"
                notes[f"{metric.label} of {row.label}, {draw}: {recorded}"] = None
                continue
            finished.add(draw)
            if len(finite) < len(records):
                without = (stage for stage, number in numbers.items() if number is None)
                lacking.setdefault(metric.key, {}).update(dict.fromkeys(without))
            else:
                values[draw] = statistics.fmean(finite)
                used += records
        cells[row.label, metric.id] = Cell(
            row.published.get(metric.id),
            row.expected.get(metric.id),
            values,
            tuple(used),
            tuple(instances),
            frozenset(finished),
        )
    for key, stages in lacking.items():
        notes[f"no finite `{key}` in the record of " + ", ".join(f"`{stage}`" for stage in stages)] = None
    return TableResult(table, scale, cells, tuple(notes), given)
