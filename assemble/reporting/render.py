"""Write filled tables as Markdown, into the READMEs, and to the terminal."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table as RichTable

from assemble.reporting import charts
from assemble.reporting.aggregate import Cell, TableResult, collect, deviations_of
from assemble.reporting.claims import AGREES, DIFFERS, FAILS, HOLDS, NOT_RUN, NOT_SEPARABLE, VERDICTS, Judged, judge
from assemble.reporting.draws import draws_text
from assemble.reporting.papers import PROMOTED_SCALES, SCALES, Paper, existing_papers, paper_named, project_root
from assemble.reporting.records import Record, find, short_name
from assemble.reporting.results import find_promoted
from assemble.reporting.tables import Claim, Metric, Row, Tables, load
from common.errors import ReportingError
from common.files import write_atomically

DASH = "–"
#: Number of claims per paper in the README's figure and at the top of the report.
MARGINS_SHOWN = 6
VERDICT_COLORS = {
    HOLDS: "green", FAILS: "red", NOT_SEPARABLE: "yellow", AGREES: "green", DIFFERS: "yellow", NOT_RUN: "dim",
}  # fmt: skip
_PLURAL = {HOLDS: "hold", FAILS: "fail", AGREES: "signs agree", DIFFERS: "signs differ"}
_MEANINGS = {
    "paper": "the published recipe on the published data",
    "single": "a smaller recipe for one GPU; compare orderings, not values",
    "mini": "a miniature of data and model; compare orderings, not values",
    "smoke": "a few steps on a few samples; the numbers mean nothing",
}
_REHEARSAL = "a rehearsal: random weights and tiny data; the numbers mean nothing"


@dataclass(frozen=True)
class Filled:
    """A filled table with the verdicts on the paper's claims and on our checks."""

    result: TableResult
    claims: list[Judged]
    checks: list[Judged]


def fill(
    source: Tables,
    scale: str,
    records: Iterable[Record],
    tables: Sequence[str] | None = None,
    given: bool = False,
) -> list[Filled]:
    return [
        Filled(result, judge(result, result.table.claims), judge(result, result.table.checks))
        for result in collect(source, scale, records, tables, given)
    ]


def fill_both(
    source: Tables, scale: str, records: Sequence[Record], tables: Sequence[str] | None = None
) -> list[Filled]:
    """Fill each table twice: from our pre-training and from given weights. Keep measured ones, or one empty table."""
    given = [f for f in fill(source, scale, records, tables, given=True) if f.result.measured]
    shown = {f.result.table.id for f in given}
    ours = [f for f in fill(source, scale, records, tables) if f.result.measured or f.result.table.id not in shown]
    return ours + given


def records_of(paper: str, runs: Path | None = None) -> list[Record]:
    """Return a paper's promoted records, or the records in a folder of runs."""
    return find_promoted(paper) if runs is None else find(runs, paper)


def fill_all(source: Tables, records: Sequence[Record], tables: Sequence[str] | None = None) -> list[Filled]:
    """Fill every table at every scale except smoke."""
    return [f for scale in PROMOTED_SCALES for f in fill_both(source, scale, records, tables)]


def fill_best(source: Tables, records: Sequence[Record], tables: Sequence[str] | None = None) -> list[Filled]:
    """Fill every table at every measured scale except smoke. Show an unmeasured table empty, at its largest scale."""
    everywhere = fill_all(source, records, tables)
    filled: list[Filled] = []
    for table in source.tables:
        there = [f for f in everywhere if f.result.table is table]
        filled += [f for f in there if f.result.measured] or there[:1]
    return filled


# ---- the layout that all writers share

PUBLISHED, MEASURED, YOURS, DIFFERENCE = "published", "measured", "yours", "difference"
#: Follows values measured with given weights, such as the authors', instead of our pre-training.
GIVEN_MARK = " †"


@dataclass(frozen=True)
class Value:
    """A value of a cell as text. `kind` is `published`, `measured`, `yours` or `difference`."""

    kind: str
    text: str
    cell: Cell


@dataclass(frozen=True)
class View:
    """A table as text. `kinds` maps a metric to the kinds of values in its cells; `rows` has the values by metric."""

    title: str
    caption: str
    scale: str
    metrics: tuple[Metric, ...]
    kinds: dict[str, tuple[str, ...]]
    rows: tuple[tuple[Row, tuple[tuple[Value, ...], ...]], ...]
    notes: tuple[str, ...]
    provenance: str

    @property
    def paired(self) -> bool:
        """Check whether any cell has several values, such as a published and a measured one."""
        return any(len(kinds) > 1 for kinds in self.kinds.values())


def view(result: TableResult, yours: TableResult | None = None) -> View:
    """Lay out a filled table without empty rows and columns. `yours` is the same table filled from the user's runs."""
    yours = yours if yours is not None and yours.measured else None
    sources = {MEASURED: result} if result.measured else {}
    sources |= {YOURS: yours} if yours is not None else {}
    metrics = tuple(metric for metric in result.table.metrics if not metric.hidden)
    last = [DIFFERENCE] * result.given
    kinds = {m.id: (PUBLISHED, *sources, *last) if is_paired(result, m) else tuple(sources) for m in metrics}
    usual = {kind: usual_draws(source) for kind, source in sources.items()}

    def values(row: Row, metric: Metric) -> tuple[Value, ...]:
        cell = result.cells[row.label, metric.id]
        values = [Value(PUBLISHED, published_text(cell, metric.decimals), cell)]
        for kind, source in sources.items():
            cell = source.cells[row.label, metric.id]
            mark = GIVEN_MARK if source.given and cell.values else ""
            values.append(Value(kind, measured_text(cell, metric.decimals, usual[kind]) + mark, cell))
        values.append(Value(DIFFERENCE, difference_text(cell, metric.decimals), cell))
        return tuple(value for value in values if value.kind in kinds[metric.id])

    laid = {(row.label, metric.id): values(row, metric) for row in result.rows for metric in metrics}
    columns = [place for place, column in laid.items() if any(value.text != DASH for value in column)]
    labels, ids = {label for label, _ in columns}, {metric for _, metric in columns}
    metrics = tuple(metric for metric in metrics if metric.id in ids)
    rows = tuple((row, tuple(laid[row.label, m.id] for m in metrics)) for row in result.rows if row.label in labels)
    shown = list(sources.values()) or [result]
    origin = next((f", {source.origin}" for source in shown if source.origin), "")
    return View(
        result.table.title + origin, caption(result, yours), result.scale, metrics, kinds, rows,
        tuple(dict.fromkeys(note for source in shown for note in notes_of(source))),
        provenance([record for source in shown for record in source.records]),
    )  # fmt: skip


def measured_text(cell: Cell, decimals: int, usual: int = 0) -> str:
    """Return `mean ± standard deviation (n=draws)`. Omit the number of draws if it equals `usual`."""
    mean, spread = cell.mean, cell.spread
    if mean is None:
        return DASH
    deviation = f" ± {spread:.{decimals}f}" if spread is not None else ""
    draws = "" if len(cell.values) == usual else f" (n={len(cell.values)})"
    return f"{mean:.{decimals}f}{deviation}{draws}"


def difference_text(cell: Cell, decimals: int) -> str:
    """Return the difference from the published number. If others repeated the measurement, say whether we agree."""
    if cell.difference is None or cell.mean is None:
        return DASH
    text = f"{cell.difference:+.{decimals}f}"
    if cell.expected is None:
        return text
    low, high = cell.expected.ends(cell.mean - cell.difference)
    return f"{text}, {'as' if low <= round(cell.mean, decimals + 1) <= high else 'not'} expected"


def published_text(cell: Cell, decimals: int) -> str:
    """Return the published value with its footnote mark, or a dash if it is unknown."""
    if cell.published is None:
        return DASH
    mark = f" ({cell.published.mark})" if cell.published.mark else ""
    return "–".join(f"{end:.{decimals}f}" for end in cell.published.ends) + mark


def usual_draws(result: TableResult) -> int:
    """Return the number of draws that most cells of a table have, or 0 if nothing is measured."""
    counts = [len(cell.values) for cell in result.cells.values() if cell.values]
    return max(set(counts), key=lambda n: (counts.count(n), n)) if counts else 0


def heading(metric: Metric) -> str:
    """Return a metric's label and unit, with an arrow if lower is better."""
    return f"{metric.title}{' ↓' if metric.better == 'down' else ''}"


def is_paired(result: TableResult, metric: Metric) -> bool:
    """Check whether cells also show published values. Only measurements at paper scale are comparable with these."""
    return result.scale == "paper" and metric.published and any(metric.id in row.published for row in result.rows)


def row_text(row: Row) -> str:
    """Return the heading of a row. Mark a row that is not in the paper."""
    return f"{row.label} (ours)" if row.ours else row.label


def provenance(records: Sequence[Record]) -> str:
    """Summarize records in one line: draws, configurations, hardware, dates, revisions."""
    if not records:
        return "nothing measured yet"
    configurations = ", ".join(f"{stage} {h}" for stage, h in sorted({(r.stage, r.configuration) for r in records}))
    machines = "; ".join(sorted({r.machine for r in records}))
    days = sorted({r.started[:10] for r in records})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    revisions = ", ".join(sorted({r.revision for r in records}))
    draws = draws_text(r.draw for r in records)
    return f"{draws}; {machines}; {dates}; revision {revisions}; configurations: {configurations}"


# ---- Markdown


def table_markdown(result: TableResult, said: Collection[str] = (), cells: bool = True) -> str:
    """Write a table as Markdown: cells, figure, notes, draws and source. Skip the notes in `said`."""
    shown = view(result)
    title = shown.title if result.scale == "paper" else f"{shown.title} ({shown.scale})"
    if not shown.rows:
        return f"### {title}\n\nNot measured yet."
    lines = [f"### {title}"]
    if cells:
        lines += ["", "| | " + " | ".join(_escape(heading(metric)) for metric in shown.metrics) + " |"]
        lines.append("|---|" + "---:|" * len(shown.metrics))
    for row, row_cells in shown.rows if cells else ():
        texts = [_cell_text(values, shown.paired) for values in row_cells]
        counts = {len(value.cell.values) for values in row_cells for value in values if value.cell.values}
        draws = f" (n={counts.pop()})" if len(counts) == 1 else ""
        # If all cells of a row have the same unusual number of draws, show it only at the label.
        label = row_text(row) + (draws if any(draws and text.endswith(draws) for text in texts) else "")
        lines.append("| " + " | ".join(map(_escape, (label, *(text.removesuffix(draws) for text in texts)))) + " |")
    if text := charts.caption(result):
        lines += ["", f"![{_escape(text)}]({_figure_name(result)})"]
    if notes := [note for note in shown.notes if note not in said]:
        lines += ["", *[f"- {note}" for note in notes]]
    usual = usual_draws(result)
    facts = ["One draw" if usual == 1 else f"{usual} draws"] if usual else []
    facts += [f"Cells are *published / measured{' / difference' if result.given else ''}*"] if shown.paired else []
    facts += _origin(result)
    facts += [] if cells else [f"`assemble tables {paper_named(result.records[0].paper).short}` prints the values"]
    return "\n".join([*lines, "", f"<sub>{html.escape('. '.join(facts), quote=False)}.</sub>"])


def _cell_text(values: Sequence[Value], paired: bool) -> str:
    """Return `81.5 / 50.0 ± 1.4`, with a dash for a missing value, or a single dash if all are missing."""
    if not paired:
        return values[-1].text
    texts = [DASH] * (values[0].kind != PUBLISHED) + [value.text for value in values]
    return DASH if set(texts) == {DASH} else " / ".join(texts)


def judged_cells(judged: Judged) -> dict[str, str]:
    """Return the cells of a claim or check by heading: a claim's margins (the paper's and ours), or a check's value."""
    text, verdict = judged.check.text, judged.verdict
    if isinstance(judged.check, Claim):
        ours = f"{judged.origin or 'ours'} (95 %)"
        return {"claim": text, "paper": judged.paper, ours: judged.outcome, "verdict": verdict}
    return {"check of ours": text, "value (95 %)": judged.outcome, "verdict": verdict}


def judged_markdown(judged: Sequence[Judged]) -> list[str]:
    """Write claims or checks as a table. List those that were not run in one line below."""
    run = [judged_cells(j) for j in _run(judged)]
    lines = []
    if run:
        lines += ["", "| " + " | ".join(run[0]) + " |", "|---|" + "---:|" * (len(run[0]) - 2) + "---|"]
        lines += ["| " + " | ".join(map(_escape, cells.values())) + " |" for cells in run]
    if waiting := [claim.check.text for claim in judged if claim.verdict == NOT_RUN]:
        lines += ["", f"Not run: {'; '.join(waiting)}."]
    return lines


def claims_markdown(filled: Sequence[Filled]) -> str:
    """Write the claims of all tables as one Markdown table per scale, and summarize our checks in a line."""
    lines: list[str] = []
    for scale, origin in dict.fromkeys((f.result.scale, f.result.origin) for f in filled if f.result.measured):
        there = [f for f in filled if (f.result.scale, f.result.origin) == (scale, origin)]
        claims = judged_markdown([claim for f in there for claim in f.claims])
        lines += [line.replace("| ours (95 %)", f"| {scale} (95 %)") for line in claims]
        checks = [check for f in there for check in f.checks if check.verdict != NOT_RUN]
        others = [f"- {c.check.text}: {c.outcome}, {c.verdict}" for c in checks if c.verdict != HOLDS]
        if checks:
            summary = f"Of {len(checks)} checks of ours{origin and f', {origin}'}, {len(checks) - len(others)} hold."
            lines += ["", f"{summary} The others:", "", *others] if others else ["", summary]
    if any("rounding alone" in line for line in lines):
        lines += ["", "*Rounding alone* moves one seed's margin by more than half of the mean; the intervals count it."]
    return "\n".join(lines).strip("\n")


def remarks(filled: Sequence[Filled]) -> dict[str, list[str]]:
    """List, for each scale, the deviations from the paper (except sizes) with reasons, then the values we chose."""
    groups: dict[str, list[str]] = {}
    for scale in SCALES:
        by_reason: dict[str, list[str]] = {}
        for deviation in deviations_of(r for f in filled if f.result.scale == scale for r in f.result.records):
            by_reason.setdefault(deviation["reason"], []).append(f"`{short_name(deviation['field'])}`")
        lines = [f"{', '.join(fields)}: {reason}" for reason, fields in by_reason.items()]
        groups[f"Deviations from the paper at {scale} scale, besides sizes"] = lines
    return {heading: lines for heading, lines in groups.items() if lines} | _values_of_ours(filled)


def _values_of_ours(filled: Sequence[Filled]) -> dict[str, list[str]]:
    groups = {}
    for scale in ("paper", "single"):  # All values of a miniature are ours.
        values: dict[str, dict[str, None]] = {}
        for entry in (e for f in filled if f.result.scale == scale for r in f.result.records for e in r.ours):
            values.setdefault(short_name(entry["field"]), {})[entry["value"]] = None
        if lines := [f"`{name}`: {', '.join(values[name])}" for name in sorted(values)]:
            groups[f"Values we chose at {scale} scale, since no source of the paper gives them"] = lines
    return groups


def remarks_markdown(remarks: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"### {heading}\n\n" + "\n".join(f"- {line}" for line in lines) for heading, lines in remarks.items()]


def _figure_name(result: TableResult) -> str:
    return f"results/{result.scale}/{'released-' * result.given}{result.table.id}.svg"


def caption(result: TableResult, yours: TableResult | None = None) -> str:
    """Say what the cells contain, what the scale means, and where the published values come from."""
    parts = [f"{result.scale.capitalize()} scale, {_draws(result)}"] if result.measured else []
    parts += [f"Yours at {result.scale} scale, {_draws(yours)}"] if yours else []
    rehearsal = any(record.rehearsal for record in result.records)
    meaning = _REHEARSAL if rehearsal else _MEANINGS[result.scale]
    return f"{'. '.join([*parts, meaning[0].upper() + meaning[1:], *_origin(result)])}."


def _draws(result: TableResult) -> str:
    draws = usual_draws(result)
    return f"mean ± standard deviation of {draws} draws" if draws > 1 else "one draw"


def _origin(result: TableResult) -> list[str]:
    if result.table.ours:
        return [f"Ours: {result.table.source}"]
    return [f"Published values: {result.table.source}"] if result.scale == "paper" else []


def notes_of(result: TableResult) -> list[str]:
    """List the table's notes, the sources of single rows, and the omitted records."""
    cited = [row for row in result.rows if row.source and result.scale == "paper"]
    sources = [f"Published values of {row.label}: {row.source}." for row in cited]
    return [*result.table.notes, *sources, *(given_notes(result) if result.given else ()), *result.notes]


def given_notes(result: TableResult) -> list[str]:
    """List the files behind a table of given weights, and the expected values of its cells."""
    files = {f"{f['file']} (SHA-256 {f['sha256'][:12]})": None for r in result.records for f in r.given.values()}
    whose = result.origin.removeprefix("from ")
    notes = [f"† Measured here from {whose}, which we did not pre-train: {', '.join(files)}."] if files else []
    for (label, metric_id), cell in result.cells.items():
        if cell.expected is not None and cell.values and cell.published:
            metric = result.table.metric(metric_id)
            low, high = (f"{end:.{metric.decimals}f}" for end in cell.expected.ends(cell.published.ends[0]))
            notes.append(f"{metric.label} of {label}: expected {low} to {high} ({cell.expected.source}).")
    return notes


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _changes_markdown(filled: Sequence[Filled]) -> list[str]:
    """List, in a line per scale, the fields that deviate from the paper, except sizes."""
    lines = []
    for scale in SCALES:
        records = [record for f in filled if f.result.scale == scale for record in f.result.records]
        if names := [f"`{short_name(deviation['field'])}`" for deviation in deviations_of(records)]:
            reasons = f"`assemble show {paper_named(records[0].paper).short}/RECIPE` gives the reasons"
            lines.append(f"Besides sizes, {scale} deviates from the paper in {', '.join(names)}; {reasons}.")
    return lines


def _is_minor(f: Filled) -> bool:
    """Check whether a table runs only on request, has no claims or checks, and has one row or few draws."""
    result = f.result
    few = any(len(cell.values) in (1, 2) for cell in result.cells.values())
    few = few or len({row for (row, _), cell in result.cells.items() if cell.values}) == 1
    return few and result.scale in result.table.by_request and not (f.claims or f.checks)


def _is_drawn(result: TableResult) -> bool:
    """Check whether a table runs only on request and its curve shows all its content."""
    return bool(result.table.curve) and result.scale in result.table.by_request


def tables_markdown(filled: Sequence[Filled], minor_tables: bool = True) -> str:
    """Write tables as Markdown. Shared notes come first, deviations and the titles of omitted tables last.

    Without `minor_tables`, omit small tables, and the cells of tables that run only on request and have a curve.
    """
    minor = [f.result for f in filled if not minor_tables and _is_minor(f)]
    measured = [f.result for f in filled if f.result.measured and f.result not in minor]
    parts = []
    if measured:
        scales = dict.fromkeys(result.scale for result in measured)
        meanings = "".join(f" {scale.capitalize()}: {_MEANINGS[scale]}." for scale in scales)
        counts = Counter(note for result in measured for note in notes_of(result))
        shared = [note for note, count in counts.items() if count > 1]
        first = "Mean ± standard deviation over draws; *n* marks another number of draws than most cells have."
        parts = ["\n".join([first + meanings, *(["", *(f"- {note}" for note in shared)] if shared else [])])]
        parts += [table_markdown(result, shared, minor_tables or not _is_drawn(result)) for result in measured]
    parts += _changes_markdown(filled)
    parts += remarks_markdown(_values_of_ours(filled))
    if minor:
        small = "; ".join(result.table.title for result in minor)
        paper = paper_named(minor[0].records[0].paper).short
        parts.append(f"`assemble tables {paper}` also prints small tables: {small}.")
    if waiting := [f.result.table for f in filled if not f.result.measured and any(r.measured for r in f.result.rows)]:
        parts.append(f"Not measured yet: {'; '.join(table.title for table in waiting)}.")
    return "\n\n".join(parts)


def tally(judged: Iterable[Judged]) -> dict[str, str]:
    """Count claims or checks by verdict: `3 hold`."""
    counts = Counter(claim.verdict for claim in judged)
    words = {v: v if counts[v] == 1 else _PLURAL.get(v, v) for v in VERDICTS if counts[v]}
    return {verdict: f"{counts[verdict]} {word}" for verdict, word in words.items()}


def overview_markdown() -> str:
    """List the papers with their verdicts at the largest measured scale: `3 hold, 1 not run (mini)`."""
    lines = ["| paper | what it does | its claims |", "|---|---|---|"]
    for paper in existing_papers():
        filled = [f for f in fill_all(load(paper.name), find_promoted(paper.name)) if not f.result.given]
        scale = next((f.result.scale for f in filled if f.result.measured), None)
        counts = tally(claim for f in filled if f.result.scale == scale for claim in f.claims)
        claims = f"{', '.join(counts.values())} ({scale})" if scale else "not measured yet"
        lines.append(f"| [{paper.title}](papers/{paper.name}/README.md) | {_escape(paper.about)} | {claims} |")
    return "\n".join(lines)


def prominent(claims: Iterable[Judged]) -> list[Judged]:
    """Select the claims to show first: claims that fail, then claims whose margin the paper gives."""
    measured = [judged for judged in claims if judged.difference is not None]
    return sorted(measured, key=lambda j: (j.verdict != FAILS, j.paper_margin is None))[:MARGINS_SHOWN]


def margins_figure() -> str | None:
    """Draw published and measured margins of each paper's first claims at mini scale. None if nothing was measured."""
    shown = {}
    for paper in existing_papers():
        judged = [j for f in fill(load(paper.name), "mini", find_promoted(paper.name, "mini")) for j in f.claims]
        if picked := prominent(j for j in judged if j.interval):
            shown[f"{paper.title}: {', '.join(tally(judged).values())}; {len(picked)} of {len(judged)} shown"] = picked
    return charts.margins(shown) if shown else None


# ---- files


def marked(path: Path, **bodies: str) -> str:
    """Replace the text between each `<!-- begin:NAME -->` and `<!-- end:NAME -->` of a file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for name, body in bodies.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ReportingError(f"{path}: expected one line '{begin}' and, below it, one line '{end}'")
        text = text[: text.index(begin)] + begin + "\n" + body.strip("\n") + "\n" + text[text.index(end) :]
    return text


def pages(papers: Iterable[Paper]) -> dict[Path, str | None]:
    """Render READMEs, figures and the overview from the promoted records. An obsolete figure is None."""
    pages: dict[Path, str | None] = {}
    for paper in papers:
        source, records = load(paper.name), find_promoted(paper.name)
        filled = fill_best(source, records)
        pages[paper.readme] = marked(
            paper.readme,
            claims=claims_markdown(fill_all(source, records)),
            tables=tables_markdown(filled, minor_tables=False),
        )
        pages |= dict.fromkeys(sorted(paper.results.rglob("[!.]*.svg")))
        for f in filled:
            if charts.caption(f.result):
                drawn = charts.curve(f.result) if f.result.table.curve else charts.dots(f.result)
                pages[paper.readme.parent / _figure_name(f.result)] = drawn
    top = project_root() / "README.md"
    pages[project_root() / "docs" / "images" / "claims.svg"] = margins_figure()
    return pages | {top: marked(top, overview=overview_markdown())}


def stale(pages: Mapping[Path, str | None]) -> dict[Path, str | None]:
    """List the pages that differ from the files."""
    return {path: text for path, text in pages.items() if text != (path.read_text("utf-8") if path.is_file() else None)}


def write(pages: Mapping[Path, str | None]) -> list[Path]:
    """Write or remove the files that differ from the pages. Return their paths."""
    changed = stale(pages)
    for path, text in changed.items():
        path.unlink() if text is None else write_atomically(path, text)
    return list(changed)


# ---- terminal


def rich_table(shown: View) -> RichTable:
    """Lay out a table for a terminal. The values of a metric share a column, as in Markdown."""
    kinds: tuple[str, ...] = max(shown.kinds.values(), key=len, default=())
    order = f" Cells are {' / '.join(kinds)}." if shown.paired else ""
    table = RichTable(
        title=escape(f"{shown.title} ({shown.scale})"),
        box=box.SIMPLE_HEAD,
        caption=escape(shown.caption + order),
    )
    table.add_column("", overflow="fold")
    for metric in shown.metrics:
        table.add_column(escape(heading(metric)), justify="right", overflow="fold")
    for row, cells in shown.rows:
        table.add_row(escape(row_text(row)), *(escape(_cell_text(values, shown.paired)) for values in cells))
    return table


def rich_judged(judged: Sequence[Judged]) -> RichTable:
    """Write claims or checks for the terminal, grouped by table."""
    table = RichTable(box=box.SIMPLE_HEAD)
    heads = judged_cells(judged[0])
    several = len({claim.origin for claim in judged}) > 1  # the heading of each table says whose weights were measured
    for head in heads:
        table.add_column(head.replace("ours", "measured") if several else head)
    for (name, scale, origin), group in groupby(judged, key=lambda j: (j.table, j.scale, j.origin)):
        where = ", ".join(filter(None, (f"{name} ({scale})", origin)))
        table.add_row(f"[bold]{escape(where)}[/]")
        for claim in group:
            text, *middle, verdict = map(escape, judged_cells(claim).values())
            colored = f"[{VERDICT_COLORS[claim.verdict]}]{verdict}[/]"
            table.add_row(Padding(text, (0, 0, 0, 2)), *middle, colored)
    return table


def print_table(filled: Filled, console: Console, measured_only: bool = False) -> None:
    """Print a table with notes, verdicts and provenance. `measured_only` omits provenance and unmeasured parts."""
    shown, claims, checks = view(filled.result), filled.claims, filled.checks
    if not shown.rows:
        console.print(f"{shown.title} ({shown.scale}): not measured yet", markup=False)
        for note in filled.result.notes:
            console.print(f"- {note}", markup=False, style="dim")
        return
    if measured_only:  # The summary prints the claims.
        claims, checks = [], _run(checks)
    console.print(rich_table(shown))
    for note in shown.notes:
        console.print(f"- {note}", markup=False, style="dim")
    for judged in filter(None, (claims, checks)):
        console.print(rich_judged(judged))
    if not measured_only:
        console.print(f"provenance: {shown.provenance}\n", markup=False, style="dim")


def _run(judged: Sequence[Judged]) -> list[Judged]:
    return [claim for claim in judged if claim.verdict != NOT_RUN]
