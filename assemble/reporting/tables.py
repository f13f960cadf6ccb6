"""Read `tables.yaml`: a paper's published tables, the stages that fill their cells, and the order of stages."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from assemble.reporting.papers import SCALES, paper_named
from assemble.reporting.predicates import CellName, Predicate, parse
from assemble.reporting.records import JOBS
from assemble.reporting.schema import Line, Part, Text, explained, name_of, one_of
from common.errors import ReportingError, nearest
from common.files import read_yaml, stamp_of

PartT = TypeVar("PartT", bound=Part)
ROW = "$row"
UNTRAINED = "untrained"


# During validation, the context holds the valid names of stages, metrics and rows.
_Scale = Annotated[StrictStr, one_of(SCALES, "scale")]
_Scales = Annotated[tuple[_Scale, ...], AfterValidator(lambda given: tuple(s for s in SCALES if s in given))]
_StageName = Annotated[StrictStr, name_of("stage")]
_MetricName = Annotated[StrictStr, name_of("metric")]
#: One stage name, or a list of stage names.
_StageNames = Annotated[
    tuple[_StageName, ...], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
]


# One GPU trains only a few rows per day, so only some tables list `single`.
_UNLISTED = tuple(scale for scale in SCALES if scale != "single")


def _names(info: ValidationInfo) -> dict[str, Any]:
    """Return the validation context, or an empty dict if there is none."""
    return {} if info.context is None else info.context


class Stage(Part):
    """A node of the stage graph.

    Args:
        parents: configuration field to the parent whose checkpoint sets the field; `$row` is the row's model.
        overrides: configuration field to the value that replaces the recipe's.
        given: whether the stage needs a file, because no recipe trains it. Without a file, its rows are left out.
    """

    name: str
    recipe: Text
    job: Annotated[StrictStr, one_of(JOBS)]
    parents: dict[str, _StageName] = Field(default_factory=dict, alias="from")
    overrides: dict[str, Any] = Field(default_factory=dict, alias="set")
    scales: _Scales = SCALES
    given: StrictBool = False


class Metric(Part):
    """A column of a table.

    Args:
        stages: by scale, the stages whose mean fills a cell; `$row` is the row's model.
        key: the metric in the stage's record.
        published: whether the column of published values is shown.
        hidden: whether the metric serves claims only.
        compared: whether `assemble compare` compares the metric; false for a setting that a probe selects, such as a
            learning rate.
        tolerance: by scale, a distance from the recorded mean that counts as reproduced, even outside the prediction
            interval.
    """

    id: str
    label: Text
    stages: dict[_Scale, _StageNames]
    key: Text
    better: Annotated[StrictStr, one_of(("up", "down"))] = "up"
    decimals: Annotated[StrictInt, Field(ge=0, le=9)] = 1
    unit: Line = ""
    published: StrictBool = True
    hidden: StrictBool = False
    compared: StrictBool = True
    tolerance: dict[_Scale, Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)]] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @model_validator(mode="before")
    @classmethod
    def _same_at_every_scale(cls, given: Any) -> Any:
        """Accept `stages` by scale, or one `stage` for all scales."""
        if not isinstance(given, Mapping) or "stage" not in given:
            return given
        rest = {key: value for key, value in given.items() if key != "stage"}
        return {"stages": dict.fromkeys(SCALES, given["stage"]), **rest}


class Published(Part):
    """A published value or the two ends of a range, and the footnote mark, if any."""

    value: StrictFloat | tuple[StrictFloat, StrictFloat]
    mark: Line = ""

    @model_validator(mode="before")
    @classmethod
    def _value_alone(cls, given: Any) -> Any:
        return given if isinstance(given, Mapping | Published) else {"value": given}

    @property
    def ends(self) -> tuple[float, ...]:
        return self.value if isinstance(self.value, tuple) else (self.value,)


class Expected(Part):
    """The values to expect when a published measurement is repeated.

    Args:
        values: results of others who repeated the measurement.
        spread: standard deviation over runs.
        source: where `values` and `spread` come from.
    """

    values: tuple[StrictFloat, ...] = ()
    spread: Annotated[StrictFloat, Field(ge=0)] = 0.0
    source: Text

    def ends(self, published: float) -> tuple[float, float]:
        """Return the lowest and the highest expected value."""
        values = (published, *self.values)
        return min(values) - 2 * self.spread, max(values) + 2 * self.spread


class Row(Part):
    """A row of a table.

    Args:
        model: the stage whose model the row measures; None for other authors' numbers.
        published: published values, by metric id.
        source: source of the published values, if it differs from the table's.
        expected: results of others who repeated the published measurement, by metric id.
        ours: whether we added the row, for a fair comparison.
        reference: whether the row is a bound, such as real images. Figures print a distant bound as text at the edge.
        metrics: the metrics that the row fills; None for all.
        stages: by metric id, the stages whose mean fills the cell, if not the column's stages.
        by_request: scales at which the row runs only when the table, the row or a stage is named.
    """

    label: Text
    model: _StageName | None = None
    published: dict[_MetricName, Published] = Field(default_factory=dict)
    source: Line = ""
    expected: dict[_MetricName, Expected] = Field(default_factory=dict)
    ours: StrictBool = False
    reference: StrictBool = False
    untrained: StrictBool = False
    scales: _Scales = SCALES
    metrics: tuple[_MetricName, ...] | None = None
    stages: dict[_MetricName, _StageNames] = Field(default_factory=dict)
    by_request: _Scales = ()

    @field_validator("stages", mode="before")
    @classmethod
    def _same_stages_for_every_metric(cls, given: Any, info: ValidationInfo) -> Any:
        return given if isinstance(given, Mapping) else dict.fromkeys(_names(info).get("metric", ()), given)

    @property
    def measured(self) -> bool:
        """Check whether we measure the row, rather than only print published numbers."""
        return self.model is not None or self.untrained

    def published_number(self, metric: str) -> float | None:
        """Return the published value of a metric, or None if it is unknown or a range."""
        value = self.published.get(metric)
        return None if value is None or len(value.ends) > 1 else value.ends[0]


def _parsed(given: Any, info: ValidationInfo) -> Any:
    if not isinstance(given, str) or not given.strip():
        return given
    return parse(" ".join(given.split()), _names(info)["row"], _names(info)["metric"])


_Predicate = Annotated[Predicate, BeforeValidator(_parsed)]


class Check(Part):
    """A sanity condition that we add, such as a falling loss or a control at chance."""

    id: Text
    text: Annotated[Text, Field(max_length=90)]
    holds: _Predicate
    scales: _Scales = SCALES


class Claim(Check):
    """An ordering that the paper asserts. `paper` is the paper's margin, by default computed from published cells."""

    paper: Line = ""


def _at_places(given: Any, info: ValidationInfo) -> Any:
    places = info.data.get("at", ())
    return {x: {"id": "point", "text": "point", "holds": f"{given} > 0".replace("{x}", f"{x:g}")} for x in places}


class Curve(Part):
    """A figure that draws a table's cells over a logarithmic axis.

    Args:
        x: label of the axis.
        at: the positions on this axis, ascending.
        panels: label of a vertical axis to the panel's lines: label to an expression over cells, in which `{x}` is the
            position. As in a check, an added number does not count.
        paper: the paper's position on the axis, marked by a dashed line.
    """

    x: Text
    at: Annotated[tuple[Annotated[StrictFloat, Field(gt=0)], ...], Field(min_length=2)]
    panels: dict[Text, dict[Text, Annotated[dict[float, Check], BeforeValidator(_at_places)]]]
    paper: Annotated[StrictFloat, Field(gt=0)] | None = None


class Table(Part):
    """A published table: rows, metrics, claims and checks over its cells.

    README and report page draw the table's `curve` or, if `chart` is true, its measured cells as dots. At the scales in
    `by_request`, its stages run only when the table, a row or a stage is named.
    """

    id: Text
    title: Text
    source: Text
    scales: _Scales = _UNLISTED
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)]
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    claims: tuple[Claim, ...] = ()
    checks: tuple[Check, ...] = ()
    notes: tuple[Line, ...] = ()
    ours: StrictBool = False
    chart: StrictBool = False
    curve: Curve | None = None
    by_request: _Scales = ()

    @model_validator(mode="before")
    @classmethod
    def _names_for_its_parts(cls, given: Any, info: ValidationInfo) -> Any:
        """Pass the names of metrics and rows to the predicates."""
        if not isinstance(given, Mapping):
            return given
        rows, metrics = given.get("rows"), given.get("metrics")
        mappings = [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
        _names(info)["row"] = [" ".join(str(row.get("label")).split()) for row in mappings]
        _names(info)["metric"] = list(metrics) if isinstance(metrics, Mapping) else []
        return {**given, "metrics": _named(metrics, "id")} if isinstance(metrics, Mapping) else given

    @field_validator("rows")
    @classmethod
    def _labels_are_unique(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        _once((row.label for row in rows), "label")
        return rows

    @model_validator(mode="after")
    def _claims_have_ids_and_margins(self) -> Self:
        _once((check.id for check in (*self.claims, *self.checks)), "claim or check id")
        for claim in self.claims:
            self.margin(claim)
        return self

    def margin(self, claim: Claim) -> str:
        """Return the margin in `claim.paper`. If it is empty, return the difference of the published cells."""

        def published(cell: CellName) -> float:
            value = self.row(cell.row).published_number(cell.metric)
            if value is None:
                raise ValueError(f"claim {claim.id!r}: {cell} has no published number; give the margin as 'paper'")
            return value

        if claim.paper:
            return claim.paper
        margins = [f"{comparison.difference(published):+.3g}" for comparison in claim.holds.comparisons]
        labels = [self.metric(comparison.cells()[0].metric).label for comparison in claim.holds.comparisons]
        several = 1 < len(labels) == len(set(labels))
        return ", ".join(f"{label} {margin}" if several else margin for label, margin in zip(labels, margins))

    def metric(self, name: str) -> Metric:
        return next(metric for metric in self.metrics if metric.id == name)

    def row(self, label: str) -> Row:
        return next(row for row in self.rows if row.label == label)

    def rows_at(self, scale: str) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if scale in row.scales)

    def made_by_request(self, row: Row, scale: str) -> bool:
        """Check whether a row runs at a scale only when the table, the row or a stage is named."""
        return scale in (*self.by_request, *row.by_request)


class Released(Part):
    """A file of the authors that replaces a stage.

    Args:
        file: the authors' name of the file.
        source: where the authors publish the file.
        license, checksum: as the authors state them; empty if they state none.
        beside: configuration field to another file in the same folder, which sets the field in place of this file.
        tested_by: the stage that measures the model, since a stage that a file replaces is not tested.
    """

    file: Text
    source: Text
    license: Line = ""
    checksum: Line = ""
    beside: dict[str, Text] = Field(default_factory=dict)
    tested_by: _StageName | None = None

    @property
    def origin(self) -> str:
        return f"{self.source} ({self.license})" if self.license else self.source


class Tables(Part):
    """The contents of a `tables.yaml`. `paper` is the paper's package name, not the file's `paper:` block."""

    paper: str
    path: Path
    stages: dict[str, Stage] = Field(default_factory=dict)
    released: dict[_StageName, Released] = Field(default_factory=dict)
    tables: tuple[Table, ...] = ()

    @field_validator("stages", mode="before")
    @classmethod
    def _names_for_stages(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, Mapping):
            return given
        _names(info)["stage"] = [*given, ROW]
        return dict(zip(given, _named(given, "name")))

    @field_validator("stages")
    @classmethod
    def _have_an_order(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        graph = {name: [parent for parent in stage.parents.values() if parent != ROW] for name, stage in stages.items()}
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            raise ValueError(f"a stage cannot start from itself: {' -> '.join(reversed(error.args[1]))}") from None
        return stages

    @model_validator(mode="after")
    def _has_each_table_once(self) -> Self:
        _once((table.id for table in self.tables), "tables: table id")
        return self

    def table(self, name: str) -> Table:
        for table in self.tables:
            if table.id == name:
                return table
        raise ReportingError(f"{self.path}: unknown table {name!r}: {nearest(name, [t.id for t in self.tables])}")

    def instance(self, stage: str, model: str | None) -> str | None:
        """Return the id of a row's stage: its name and the row's model (`$row`). None if an untrained row lacks it."""
        if stage == ROW:
            return model
        return f"{stage}@{model or UNTRAINED}" if self.uses_row(stage) else stage

    def uses_row(self, stage: str) -> bool:
        """Check whether a stage starts from a row's model, directly or not."""
        return any(parent == ROW or self.uses_row(parent) for parent in self.stages[stage].parents.values())

    def instances(self, table: Table, row: Row, metric: Metric, scale: str, given: Collection[str] = ()) -> list[str]:
        """Return the ids of the stages whose mean fills a cell at a scale, or none if nothing is run for it.

        Files replace the stages in `given`. Those stages aren't tested, so the `tested_by` stage fills their cells.
        """
        if scale not in table.scales or scale not in row.scales or not row.measured:
            return []
        if row.metrics is not None and metric.id not in row.metrics:
            return []
        if row.model is not None and self.stages[row.model].given and row.model not in given:
            return []
        tester = self.released[row.model].tested_by if row.model in given and row.model in self.released else None
        names = row.stages.get(metric.id, metric.stages.get(scale, ()))
        return [i for name in names if (i := self.instance((tester or ROW) if name == ROW else name, row.model))]


@dataclass(frozen=True)
class StageInstance:
    """A stage to run at one scale.

    Args:
        id: `ucf_1` or `ucf_1@avid_cma`.
        row: the row's model stage, `untrained`, or None for a stage without a row.
    """

    id: str
    recipe: str
    job: str
    row: str | None
    parents: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        return self.id.split("@", 1)[0]


def load(paper: str) -> Tables:
    entry = paper_named(paper)
    file = entry.root / "tables.yaml"
    return _loaded(entry.name, file, tuple(stamp_of(file)))


@functools.lru_cache(maxsize=64)
def _loaded(paper: str, file: Path, stamp: tuple[int, ...]) -> Tables:
    given = read_yaml(file, ReportingError)
    if not isinstance(given, Mapping):
        raise ReportingError(f"{file}: expected a mapping, got {given!r}")
    try:
        return Tables.model_validate({**given, "paper": paper, "path": file}, context={})
    except ValidationError as error:
        raise ReportingError(f"{file}: {explained(error, given)}") from None


def _named(parts: Mapping[Any, Any], field: str) -> list[Any]:
    return [{**part, field: str(name)} if isinstance(part, Mapping) else part for name, part in parts.items()]


def part_named(name: str, parts: Sequence[PartT], *fields: str) -> PartT | None:
    """Find the part with this name, ignoring case and a leading `test/`. Earlier fields take precedence."""

    def plain(text: object) -> str:
        return str(text or "").strip().lower().removeprefix("test/")

    matching = (part for field in fields for part in parts if plain(getattr(part, field)) == plain(name))
    return next(matching, None)


def _once(values: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{what} {value!r} occurs twice")
        seen.add(value)


def expand(
    paper: str | Tables,
    scale: str,
    tables: Collection[str] = (),
    rows: Collection[str] = (),
    stages: Collection[str] = (),
    everything: bool = True,
    given: Collection[str] = (),
) -> list[StageInstance]:
    """List the stages that tables and claims need at a scale, in table order, parents before children.

    `tables` (ids), `rows` (labels or model names) and `stages` (names or ids) select stages and their parents.
    Without a selection, `everything` includes the stages that run only on request. Files replace the stages in `given`.
    """
    source = paper if isinstance(paper, Tables) else load(paper)
    kept = [source.table(name) for name in tables] or source.tables
    listed = f"`assemble list {source.paper}` shows all"
    labels = {name for table in kept for row in table.rows for name in (row.label, row.model) if name}
    for name in rows:
        if name not in labels:
            raise ReportingError(f"{source.path}: unknown row {name!r}: {nearest(name, labels)}; {listed}")
    everything = everything or bool(tables or rows or stages)
    needed: dict[str, StageInstance] = {}
    for table in kept:
        for row in table.rows:
            left_out = rows and row.label not in rows and row.model not in rows
            if left_out or (not everything and table.made_by_request(row, scale)):
                continue
            for metric in table.metrics:
                for instance in source.instances(table, row, metric, scale, given):
                    _need(instance, scale, source, needed)
    if not stages:
        return list(needed.values())
    for name in stages:
        if any(name in (instance.id, instance.stage) for instance in needed.values()):
            continue
        if name not in source.stages:
            near = nearest(name, {*source.stages, *needed})
            raise ReportingError(f"{source.path}: unknown stage {name!r}: {near}; {listed}")
        if source.stages[name].given and name not in given:
            raise ReportingError(f"{source.path}: no recipe trains {name!r}; name a file that replaces it with --given")
        if tables or rows:
            raise ReportingError(f"{source.path}: stage {name!r} is in none of the chosen tables and rows")
        _need(name, scale, source, needed)
    chosen = {candidate.id for candidate in needed.values() if candidate.id in stages or candidate.stage in stages}
    for candidate in reversed(needed.values()):  # Parents come before their children.
        chosen |= {*candidate.parents.values()} if candidate.id in chosen else set()
    return [candidate for candidate in needed.values() if candidate.id in chosen]


def _need(instance: str, scale: str, source: Tables, needed: dict[str, StageInstance]) -> None:
    """Add a stage's parents to `needed`, then the stage."""
    name, _, model = instance.partition("@")
    stage = source.stages[name]
    if scale not in stage.scales:
        raise ReportingError(f"{source.path}: stage {instance!r} does not exist at scale {scale!r}")
    if source.uses_row(name) and not model:
        raise ReportingError(f"{source.path}: stage {name!r} starts from {ROW}; no row at scale {scale!r} uses it")
    if instance in needed:
        return
    parents: dict[str, str] = {}
    for key, parent in stage.parents.items():
        # At other scales, the recipe's value applies, such as a released file.
        exists = parent == ROW or scale in source.stages[parent].scales
        if exists and (start := source.instance(parent, None if model == UNTRAINED else model)):
            _need(start, scale, source, needed)
            parents[key] = start
    needed[instance] = StageInstance(instance, stage.recipe, stage.job, model or None, parents, dict(stage.overrides))


def entries(source: Tables, instance: str, scale: str, given: Collection[str] = ()) -> list[tuple[Table, Row, Metric]]:
    """List the cells that a stage fills at a scale. Files replace the stages in `given`."""
    return [
        (table, row, metric)
        for table in source.tables
        for row in table.rows
        for metric in table.metrics
        if instance in source.instances(table, row, metric, scale, given)
    ]


def summary(
    source: Tables, instance: str, scale: str, metrics: Mapping[str, float | None], given: Collection[str] = ()
) -> dict[str, float]:
    """Return a finished stage's cells as `table/<table>/<metric>`. From given weights, the keys start with `given/`."""
    kind, cells = "given" if given else "table", dict[str, float]()
    for table, _, metric in entries(source, instance, scale, given):
        if (value := metrics.get(metric.key)) is not None:
            cells[f"{kind}/{table.id}/{metric.id}"] = value
    return cells
