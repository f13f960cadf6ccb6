"""``tables.yaml``: a paper's published tables, the stages that fill their cells, and the order to run them in."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ReportingError, nearest
from common.files import read_yaml
from common.reporting.papers import SCALES, check_scale, paper_named
from common.reporting.predicates import Predicate, PredicateError, parse
from common.reporting.records import JOBS

ROW = "$row"
UNTRAINED = "untrained"
GATES = ("mini", "report")
_COST = {"evaluate": 0, "probe": 1, "fine_tune": 2, "pretrain": 3}


class TablesError(ReportingError):
    """A tables file is wrong; the message names the file and the field."""


@dataclass(frozen=True)
class Stage:
    """A node of the graph of stages.

    Args:
        name: its name.
        recipe: recipe that it runs.
        job: kind of work, one of :data:`common.reporting.records.JOBS`.
        parents: configuration field to the stage whose checkpoint it takes, or ``$row``: the row's own model.
        overrides: configuration field to value, on top of the recipe.
        scales: where it exists.
    """

    name: str
    recipe: str
    job: str
    parents: dict[str, str]
    overrides: dict[str, Any]
    scales: tuple[str, ...]


@dataclass(frozen=True)
class Metric:
    """A column of a table.

    Args:
        id: its name in rows and claims.
        label: its heading.
        stages: per scale, the stages whose mean fills a cell; ``$row`` is the row's own model stage.
        key: the metric in the stage's record.
        better: ``up`` or ``down``.
        decimals: digits after the point.
        unit: unit, such as ``%``.
        published: whether the column of published values is shown.
        hidden: whether the metric serves claims only.
    """

    id: str
    label: str
    stages: dict[str, tuple[str, ...]]
    key: str
    better: str
    decimals: int
    unit: str
    published: bool
    hidden: bool


@dataclass(frozen=True)
class Published:
    """A published value and the footnote mark it carries, if any."""

    value: float
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        label: its heading.
        model: the stage whose model it measures; None for other authors' numbers.
        published: metric id to value.
        source: where the values come from, when not the table's source.
        ours: not in the paper; added for a fair comparison.
        untrained: measures a network that was never pre-trained.
        scales: where it is shown and run.
        metrics: the metrics it fills; None for all.
        stages: metric id to the stages whose mean fills it, where they are not the column's own: one model may be
            measured in several rows, each after another further training.
    """

    label: str
    model: str | None
    published: dict[str, Published]
    source: str
    ours: bool
    untrained: bool
    scales: tuple[str, ...]
    metrics: tuple[str, ...] | None
    stages: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def stages_of(self, metric: Metric, scale: str) -> tuple[str, ...]:
        """Names of the stages whose mean fills a cell; ``$row`` is the row's own model."""
        return self.stages.get(metric.id, metric.stages.get(scale, ()))

    def fills(self, metric: str) -> bool:
        """Whether stages are run for this metric."""
        return (self.model is not None or self.untrained) and (self.metrics is None or metric in self.metrics)


@dataclass(frozen=True)
class Claim:
    """An ordering that the paper asserts.

    Args:
        id: its name.
        text: what it says, for people.
        holds: the predicate.
        when: predicate over means that must hold for the claim to be judged at all.
        gate: ``mini`` when a failure at mini must stop ``assemble claims --gate``; else ``report``.
        scales: where it is judged.
    """

    id: str
    text: str
    holds: Predicate
    when: Predicate | None
    gate: str
    scales: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """Metrics of a table that are one quantity at several places, drawn as a line for every row.

    Args:
        x, y: what the axes show.
        points: place on the x axis, ascending from above 0, to metric id.
    """

    x: str
    y: str
    points: dict[float, str]


@dataclass(frozen=True)
class Table:
    """A published table: rows, metrics, claims over its cells.

    The report page draws its measured cells if asked to (`chart`), and README and page a `curve`.
    """

    id: str
    title: str
    source: str
    scales: tuple[str, ...]
    metrics: tuple[Metric, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    ours: bool
    chart: bool = False
    curve: Curve | None = None

    def metric(self, name: str) -> Metric:
        """The metric of that id."""
        return next(metric for metric in self.metrics if metric.id == name)

    def row(self, label: str) -> Row:
        """The row of that label."""
        return next(row for row in self.rows if row.label == label)

    def rows_at(self, scale: str) -> tuple[Row, ...]:
        """The rows shown at a scale."""
        return tuple(row for row in self.rows if scale in row.scales)


@dataclass(frozen=True)
class Headline:
    """The one number of a paper that the overview shows.

    Args:
        table, row, metric: where it stands.
        mini: the number to show while this one is measured at no scale: of a table that the miniature alone has.
    """

    table: str
    row: str
    metric: str
    mini: Headline | None = None


@dataclass(frozen=True)
class Tables:
    """Everything that a paper's tables file says."""

    paper: str
    path: Path
    stages: dict[str, Stage]
    tables: tuple[Table, ...]
    headline: Headline | None

    def table(self, name: str) -> Table:
        """The table of that id.

        Raises:
            TablesError: for an unknown id, with the nearest valid one.
        """
        for table in self.tables:
            if table.id == name:
                return table
        raise TablesError(f"{self.path}: unknown table {name!r}: {nearest(name, [t.id for t in self.tables])}")

    def instances(self, table: Table, row: Row, metric: Metric, scale: str) -> list[str]:
        """Ids of the stage instances whose mean fills a cell at a scale; empty when nothing is run for it."""
        if scale not in table.scales or scale not in row.scales or not row.fills(metric.id):
            return []
        found: list[str] = []
        for name in row.stages_of(metric, scale):
            if name == ROW:
                found += [row.model] if row.model is not None else []  # an untrained row has no stage of its own
            else:
                found.append(f"{name}@{row.model or UNTRAINED}" if _uses_row(name, self.stages) else name)
        return found


@dataclass(frozen=True)
class StageInstance:
    """A stage to run at one scale.

    Args:
        id: ``ucf_1`` or ``ucf_1@avid_cma``.
        recipe: recipe that it runs.
        job: kind of work.
        row: the row's model stage, ``untrained``, or None for a stage that belongs to no row.
        parents: configuration field to the instance whose checkpoint it takes.
        overrides: configuration field to value.
    """

    id: str
    recipe: str
    job: str
    row: str | None
    parents: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Name of the stage, without the row."""
        return self.id.split("@", 1)[0]


class _Node:
    """A mapping of the file with its place in it, that knows which keys were asked for."""

    def __init__(self, value: Any, path: Path, where: str, keys: Iterable[str]) -> None:
        self.path, self.where = path, where
        if not isinstance(value, Mapping):
            raise self.error(f"expected a mapping, got {value!r}")
        self.values = value
        valid = list(keys)
        for key in value:
            if key not in valid:
                raise self.error(f"unknown key {key!r}: {nearest(str(key), valid)}")

    def error(self, message: str, key: str = "") -> TablesError:
        where = ".".join(part for part in (self.where, key) if part)
        return TablesError(f"{self.path}: {where}: {message}" if where else f"{self.path}: {message}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str) or (default is None and not value.strip()):
            raise self.error(f"expected text, got {value!r}" if key in self.values else "missing", key)
        return " ".join(value.split())

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"expected true or false, got {value!r}", key)
        return value

    def choice(self, key: str, default: str, valid: Collection[str]) -> str:
        value = self.values.get(key, default)
        if value not in valid:
            raise self.error(f"unknown value {value!r}: {nearest(str(value), valid)}", key)
        return str(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self.error(f"expected a mapping with text keys, got {value!r}", key)
        return dict(value)

    def sequence(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(f"expected a list, got {value!r}", key)
        return value

    def scales(self, default: tuple[str, ...] = SCALES) -> tuple[str, ...]:
        if "scales" not in self.values:
            return default
        given = self.sequence("scales")
        for scale in given:
            if scale not in SCALES:
                raise self.error(f"unknown scale {scale!r}: {nearest(str(scale), SCALES)}", "scales")
        return tuple(scale for scale in SCALES if scale in given)


def load(paper: str, path: Path | None = None) -> Tables:
    """Read and validate a paper's tables file.

    Args:
        paper: package or short name.
        path: another file than the paper's own.

    Raises:
        TablesError: naming the file and the field, and the nearest valid key for a misspelt one.
    """
    entry = paper_named(paper)
    file = Path(path) if path is not None else entry.tables_file
    if not file.is_file():
        raise TablesError(f"{file}: not found; {entry.name} has no tables yet")
    top = _Node(read_yaml(file, TablesError), file, "", ("paper", "headline", "stages", "tables"))
    stages = {name: _stage(value, file, name) for name, value in top.mapping("stages").items()}
    _check_graph(stages, file)
    tables = tuple(_table(value, file, i, stages) for i, value in enumerate(top.sequence("tables")))
    _unique((table.id for table in tables), file, "tables", "table id")
    result = Tables(entry.name, file, stages, tables, None)
    if "headline" not in top.values:
        return result
    return Tables(entry.name, file, stages, tables, _headline(top.values["headline"], result))


def _stage(value: Any, path: Path, name: str) -> Stage:
    node = _Node(value, path, f"stages.{name}", ("recipe", "job", "from", "set", "scales"))
    if "@" in name or "/" in name or name in (ROW, UNTRAINED):
        raise node.error(f"{name!r} cannot name a stage")
    if "job" not in node.values:
        raise node.error("missing", "job")
    parents = node.mapping("from")
    for key, parent in parents.items():
        if not isinstance(parent, str):
            raise node.error(f"expected the name of a stage or {ROW}, got {parent!r}", f"from.{key}")
    return Stage(name, node.text("recipe"), node.choice("job", "", JOBS), parents, node.mapping("set"), node.scales())


def _check_graph(stages: Mapping[str, Stage], path: Path) -> None:
    for stage in stages.values():
        for key, parent in stage.parents.items():
            if parent != ROW and parent not in stages:
                raise TablesError(
                    f"{path}: stages.{stage.name}.from.{key}: unknown stage {parent!r}: {nearest(parent, stages)}"
                )
    done: set[str] = set()
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in trail:
            circle = " -> ".join([*trail[trail.index(name) :], name])
            raise TablesError(f"{path}: stages: a stage cannot start from itself: {circle}")
        if name in done:
            return
        trail.append(name)
        for parent in stages[name].parents.values():
            if parent != ROW:
                visit(parent)
        trail.pop()
        done.add(name)

    for name in stages:
        visit(name)


def _uses_row(name: str, stages: Mapping[str, Stage]) -> bool:
    return any(parent == ROW or _uses_row(parent, stages) for parent in stages[name].parents.values())


def _table(value: Any, path: Path, position: int, stages: Mapping[str, Stage]) -> Table:
    name = value.get("id") if isinstance(value, Mapping) else None
    where = f"tables[{position}]" + (f" ({name})" if isinstance(name, str) else "")
    keys = ("id", "title", "source", "scales", "metrics", "rows", "claims", "notes", "ours", "chart", "curve")
    node = _Node(value, path, where, keys)
    scales = node.scales()
    metrics = tuple(_metric(v, path, f"{where}.metrics", k, stages) for k, v in node.mapping("metrics").items())
    if not metrics:
        raise node.error("expected at least one metric", "metrics")
    names = [metric.id for metric in metrics]
    rows = tuple(
        _row(v, path, f"{where}.rows[{i}]", names, stages, scales) for i, v in enumerate(node.sequence("rows"))
    )
    if not rows:
        raise node.error("expected at least one row", "rows")
    _unique((row.label for row in rows), path, f"{where}.rows", "label")
    labels = [row.label for row in rows]
    claims = tuple(
        _claim(v, path, f"{where}.claims[{i}]", labels, names, scales) for i, v in enumerate(node.sequence("claims"))
    )
    _unique((claim.id for claim in claims), path, f"{where}.claims", "claim id")
    notes = tuple(" ".join(str(note).split()) for note in node.sequence("notes"))
    return Table(
        node.text("id"), node.text("title"), node.text("source"), scales, metrics, rows, claims, notes,
        node.flag("ours", False), node.flag("chart", False),
        _curve(node.values["curve"], path, f"{where}.curve", names) if "curve" in node.values else None,
    )  # fmt: skip


def _curve(value: Any, path: Path, where: str, metrics: list[str]) -> Curve:
    node = _Node(value, path, where, ("x", "y", "points"))
    points = node.values.get("points")
    if not isinstance(points, Mapping) or len(points) < 2:
        raise node.error(f"expected at least two places with a metric each, got {points!r}", "points")
    for place, metric in points.items():
        if not isinstance(place, int | float) or isinstance(place, bool) or place <= 0:
            raise node.error(f"expected a number above 0 as a place, got {place!r}", "points")
        if metric not in metrics:
            raise node.error(f"unknown metric {metric!r}: {nearest(str(metric), metrics)}", "points")
    return Curve(node.text("x"), node.text("y"), {float(place): points[place] for place in sorted(points)})


def _metric(value: Any, path: Path, where: str, name: str, stages: Mapping[str, Stage]) -> Metric:
    keys = ("label", "stage", "stages", "key", "better", "decimals", "unit", "published", "hidden")
    node = _Node(value, path, f"{where}.{name}", keys)
    if not name.isidentifier():
        raise node.error("a metric id must be a plain name, so that claims can use it")
    if ("stage" in node.values) == ("stages" in node.values):
        raise node.error("expected either 'stage' or 'stages'")
    given = [node.text("stage")] if "stage" in node.values else node.values["stages"]
    per_scale = given if isinstance(given, Mapping) else dict.fromkeys(SCALES, given)
    chosen: dict[str, tuple[str, ...]] = {}
    for scale, names in per_scale.items():
        if scale not in SCALES:
            raise node.error(f"unknown scale {scale!r}: {nearest(str(scale), SCALES)}", "stages")
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not all(isinstance(stage, str) for stage in listed):
            raise node.error(f"expected a list of stages, got {names!r}", "stages")
        for stage in listed:
            if stage != ROW and stage not in stages:
                raise node.error(f"unknown stage {stage!r}: {nearest(stage, stages)}", "stages")
        chosen[scale] = tuple(listed)
    decimals = node.values.get("decimals", 1)
    if not isinstance(decimals, int) or isinstance(decimals, bool) or not 0 <= decimals <= 9:
        raise node.error(f"expected a whole number from 0 to 9, got {decimals!r}", "decimals")
    return Metric(
        name, node.text("label"), chosen, node.text("key"), node.choice("better", "up", ("up", "down")), decimals,
        node.text("unit", ""), node.flag("published", True), node.flag("hidden", False),
    )  # fmt: skip


def _row(
    value: Any, path: Path, where: str, metrics: list[str], stages: Mapping[str, Stage], scales: tuple[str, ...]
) -> Row:
    keys = ("label", "model", "published", "source", "ours", "untrained", "scales", "metrics", "stages")
    node = _Node(value, path, where, keys)
    label = node.text("label")
    if "`" in label or "|" in label:
        raise node.error("a label holds neither '`' nor '|'", "label")
    model = node.text("model") if node.values.get("model") is not None else None
    if model is not None and model not in stages:
        raise node.error(f"unknown stage {model!r}: {nearest(model, stages)}", "model")
    if model is not None and _uses_row(model, stages):
        raise node.error(f"stage {model!r} starts from {ROW}, so it cannot be a row's model", "model")
    untrained = node.flag("untrained", False)
    if untrained and model is not None:
        raise node.error("an untrained row has no model", "untrained")
    published = {}
    for metric, given in node.mapping("published").items():
        if metric not in metrics:
            raise node.error(f"unknown metric {metric!r}: {nearest(metric, metrics)}", "published")
        if given is not None:
            published[metric] = _published(given, path, f"{where}.published.{metric}")
    only = node.sequence("metrics") if "metrics" in node.values else None
    for metric in only or []:
        if metric not in metrics:
            raise node.error(f"unknown metric {metric!r}: {nearest(str(metric), metrics)}", "metrics")
    return Row(
        label, model, published, node.text("source", ""), node.flag("ours", False), untrained, node.scales(scales),
        tuple(only) if only is not None else None, _stages_of_row(node, metrics, stages),
    )  # fmt: skip


def _stages_of_row(node: _Node, metrics: list[str], stages: Mapping[str, Stage]) -> dict[str, tuple[str, ...]]:
    """One stage for all metrics, or a mapping from metrics to a stage or a list of stages."""
    given = node.values.get("stages")
    if given is None:
        return {}
    per_metric = given if isinstance(given, Mapping) else dict.fromkeys(metrics, given)
    chosen: dict[str, tuple[str, ...]] = {}
    for metric, names in per_metric.items():
        if metric not in metrics:
            raise node.error(f"unknown metric {metric!r}: {nearest(str(metric), metrics)}", "stages")
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not all(isinstance(stage, str) for stage in listed):
            raise node.error(f"expected a stage or a list of stages, got {names!r}", f"stages.{metric}")
        for stage in listed:
            if stage != ROW and stage not in stages:
                raise node.error(f"unknown stage {stage!r}: {nearest(stage, stages)}", f"stages.{metric}")
        chosen[metric] = tuple(listed)
    return chosen


def _published(given: Any, path: Path, where: str) -> Published:
    values = given if isinstance(given, Mapping) else {"value": given}
    node = _Node(values, path, where, ("value", "mark"))
    number = values.get("value")
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise node.error(f"expected a number, got {number!r}; leave an unknown value out or null")
    return Published(float(number), node.text("mark", ""))


def _claim(value: Any, path: Path, where: str, rows: list[str], metrics: list[str], scales: tuple[str, ...]) -> Claim:
    node = _Node(value, path, where, ("id", "text", "holds", "when", "gate", "scales"))
    predicates: dict[str, Predicate | None] = {"when": None}
    for key in ("holds", "when"):
        if key in node.values or key == "holds":
            try:
                predicates[key] = parse(node.text(key), rows, metrics)
            except PredicateError as error:
                raise node.error(str(error), key) from None
    holds = predicates["holds"]
    assert holds is not None
    gate = node.choice("gate", "report", GATES)
    return Claim(node.text("id"), node.text("text"), holds, predicates["when"], gate, node.scales(scales))


def _headline(value: Any, tables: Tables, where: str = "headline") -> Headline:
    node = _Node(value, tables.path, where, ("table", "row", "metric", "mini"))
    names = [table.id for table in tables.tables]
    table = tables.table(node.choice("table", "", names))
    row = node.choice("row", "", [row.label for row in table.rows])
    metric = node.choice("metric", "", [metric.id for metric in table.metrics])
    mini = _headline(node.values["mini"], tables, f"{where}.mini") if "mini" in node.values else None
    return Headline(table.id, row, metric, mini)


def _unique(values: Iterable[str], path: Path, where: str, what: str) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise TablesError(f"{path}: {where}: {what} {value!r} stands twice")
        seen.add(value)


def expand(
    paper: str | Tables,
    scale: str,
    tables: Collection[str] | None = None,
    rows: Collection[str] | None = None,
    stages: Collection[str] | None = None,
) -> list[StageInstance]:
    """The stages that tables and claims need at a scale, parents before children.

    Among the stages that could run next, the cheap come first: a model is measured as soon as it is trained.

    Args:
        paper: package or short name, or a loaded file.
        scale: ``paper``, ``mini`` or ``smoke``.
        tables: keep these tables (ids).
        rows: keep these rows (labels, or names of their models).
        stages: keep these stages (names, or instance ids). Whatever a kept stage starts from is kept too.

    Raises:
        TablesError: for an unknown table, row or stage, and for a stage that is needed where it does not exist.
    """
    source = paper if isinstance(paper, Tables) else load(paper)
    check_scale(scale)
    kept = [source.table(name) for name in tables] if tables is not None else list(source.tables)
    if rows is not None:
        _check_rows(rows, kept, source.path)
    needed: dict[str, StageInstance] = {}
    for table in kept:
        for row in table.rows:
            if rows is not None and row.label not in rows and row.model not in rows:
                continue
            for metric in table.metrics:
                if not source.instances(table, row, metric, scale):
                    continue
                for name in row.stages_of(metric, scale):
                    where = f"table {table.id!r}, row {row.label!r}, metric {metric.id!r}"
                    _need(name, row, scale, source, needed, where)
    if stages is not None:
        needed = _selected(stages, needed, scale, source, free=tables is None and rows is None)
    return _ordered(needed)


def _check_rows(rows: Collection[str], tables: list[Table], path: Path) -> None:
    known = {name for table in tables for row in table.rows for name in (row.label, row.model) if name}
    for name in rows:
        if name not in known:
            raise TablesError(f"{path}: unknown row {name!r}: {nearest(name, known)}")


def _need(
    name: str, row: Row | None, scale: str, source: Tables, needed: dict[str, StageInstance], where: str
) -> str | None:
    """Add the instance of a stage for a row, and its parents; return its id (None: nothing to run)."""
    if name == ROW:
        assert row is not None
        return _need(row.model, None, scale, source, needed, where) if row.model is not None else None
    stage = source.stages[name]
    if scale not in stage.scales:
        raise TablesError(f"{source.path}: {where} needs stage {name!r}, which does not exist at scale {scale!r}")
    per_row = _uses_row(name, source.stages)
    if per_row and row is None:
        raise TablesError(
            f"{source.path}: {where}: stage {name!r} starts from {ROW}; no row at scale {scale!r} uses it"
        )
    model = (row.model or UNTRAINED) if per_row and row is not None else None
    instance = f"{name}@{model}" if model else name
    if instance in needed:
        return instance
    parents: dict[str, str] = {}
    for key, parent in stage.parents.items():
        if parent != ROW and scale not in source.stages[parent].scales:
            continue  # the recipe's own value stands, such as a released file
        found = _need(parent, row if per_row else None, scale, source, needed, where)
        if found is not None:
            parents[key] = found
    needed[instance] = StageInstance(instance, stage.recipe, stage.job, model, parents, dict(stage.overrides))
    return instance


def _selected(
    stages: Collection[str], needed: dict[str, StageInstance], scale: str, source: Tables, free: bool
) -> dict[str, StageInstance]:
    available = dict(needed)
    for name in stages:
        known = any(name in (instance.id, instance.stage) for instance in needed.values())
        if known:
            continue
        if name not in source.stages:
            names = {*source.stages, *needed}
            raise TablesError(f"{source.path}: unknown stage {name!r}: {nearest(name, names)}")
        if not free:
            raise TablesError(f"{source.path}: stage {name!r} is in none of the chosen tables and rows")
        _need(name, None, scale, source, available, f"stage {name!r}")
    chosen: dict[str, StageInstance] = {}

    def keep(instance: str) -> None:
        if instance not in chosen:
            for parent in available[instance].parents.values():
                keep(parent)
            chosen[instance] = available[instance]

    for instance in available.values():
        if instance.id in stages or instance.stage in stages:
            keep(instance.id)
    return chosen


def _ordered(needed: Mapping[str, StageInstance]) -> list[StageInstance]:
    """Topological order; the cheapest ready stage first, then the one that was needed first."""
    position = {name: i for i, name in enumerate(needed)}
    waiting = {name: len(set(instance.parents.values())) for name, instance in needed.items()}
    children: dict[str, list[str]] = {name: [] for name in needed}
    for name, instance in needed.items():
        for parent in set(instance.parents.values()):
            children[parent].append(name)
    ready = [(_COST[needed[name].job], position[name]) for name, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    names = list(needed)
    ordered: list[StageInstance] = []
    while ready:
        _, index = heapq.heappop(ready)
        ordered.append(needed[names[index]])
        for child in children[names[index]]:
            waiting[child] -= 1
            if waiting[child] == 0:
                heapq.heappush(ready, (_COST[needed[child].job], position[child]))
    return ordered


def entries(source: Tables, instance: str, scale: str) -> list[tuple[Table, Row, Metric]]:
    """The cells that a stage instance fills at a scale, e.g. to name its summary values in W&B."""
    return [
        (table, row, metric)
        for table in source.tables
        for row in table.rows
        for metric in table.metrics
        if instance in source.instances(table, row, metric, scale)
    ]


def summary(source: Tables, instance: str, scale: str, metrics: Mapping[str, float | None]) -> dict[str, float]:
    """The table cells that a finished stage fills, under names for a summary of its run.

    Args:
        source: the paper's tables.
        instance: the stage instance.
        scale: its scale.
        metrics: what it measured.

    Returns:
        ``table/<table>/<metric>`` to the measured value and ``published/<table>/<metric>`` to the published one.
    """
    found: dict[str, float] = {}
    for table, row, metric in entries(source, instance, scale):
        value = metrics.get(metric.key)
        if value is None:
            continue
        found[f"table/{table.id}/{metric.id}"] = value
        if metric.id in row.published:
            found[f"published/{table.id}/{metric.id}"] = row.published[metric.id].value
    return found
