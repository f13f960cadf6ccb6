"""Reports on Weights & Biases: a document for each paper and one for all, with the tables beside their runs.

Texts come from the records; panels ask the dashboard for the runs of a table's rows, by group and stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from common.errors import ReportingError
from common.files import write_atomically
from common.reporting import render
from common.reporting.claims import Judged
from common.reporting.papers import Paper
from common.reporting.records import Record
from common.reporting.tables import Tables, load
from common.reporting.wandb_server import project, server, within

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import PanelGrid, Report, Runset
    from wandb_workspaces.workspaces import Workspace

SEND_SECONDS = 30.0
"""How long sending a report may take before it is given up."""


def paper_report(paper: Paper, records: Sequence[Record], entity: str = "", fresh: bool = False) -> Report:
    """The report of one paper: its tables with verdicts and deviations, panels for each, curves, pictures.

    Args:
        paper: the paper.
        records: its records; of what was measured at no scale, the text alone is shown.
        entity: user or team that owns the project; may stay empty until the report is sent.
        fresh: whether the records are of runs and not the promoted ones.
    """
    import wandb_workspaces.reports.v2 as wr

    source = load(paper.name)
    filled = render.fill_best(source, records)
    blocks: list[Any] = [
        wr.P(
            "Published and measured values stand apart. A number measured at mini scale comes from a miniature of data "
            "and model, and is not comparable with a published one. Texts come from "
            f"{'fresh records' if fresh else 'the promoted records'}; panels show the runs that are in this project."
        ),
        wr.TableOfContents(),
    ]
    for f in filled:
        heading, _, body = render.table_markdown(f).partition("\n")
        blocks += [wr.H2(heading.removeprefix("### ")), wr.MarkdownBlock(text=body.strip())]
        if f.result.measured:
            blocks.append(_table_panels(source, f))
    for text in filter(None, (render.deviations_markdown(filled), render.ours_markdown(filled))):
        blocks.append(wr.MarkdownBlock(text=text))
    scales = list(dict.fromkeys(f.result.scale for f in filled if f.result.measured))
    if scales:
        blocks += [wr.H2("Training"), _training_panels(paper, scales)]
        blocks += [wr.H2("Pictures, clips and texts"), _media_panels(paper, scales, records)]
        blocks += [wr.H2("What differs between configurations"), _comparison(paper, scales)]
    return wr.Report(
        project=project(),
        entity=entity,
        title=f"{paper.title}: published and measured",
        description=f"Tables, claims, curves and pictures of {paper.title}.",
        blocks=blocks,
        width="fluid",
    )


def overview_report(papers: Sequence[tuple[Paper, Sequence[Record]]], entity: str = "") -> Report:
    """The report of all papers: the overview, every claim with its verdict, and a panel for each headline number."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.P("What the papers claim, and what was measured here."), wr.TableOfContents()]
    blocks += [wr.H2("Overview"), wr.MarkdownBlock(text=_overview(papers))]
    for paper, records in papers:
        source = load(paper.name)
        filled = [f for f in render.fill_best(source, records) if f.result.measured]
        blocks.append(wr.H2(paper.title))
        if not filled:
            blocks.append(wr.P("Nothing was measured yet."))
            continue
        blocks.append(wr.UnorderedList(items=[_claim(claim) for f in filled for claim in f.claims]))
        headline = source.headline
        shown = [f for f in filled if headline and f.result.table.id in _headline_tables(source)] or filled[:1]
        blocks.append(_table_panels(source, shown[0]))
    return wr.Report(
        project=project(),
        entity=entity,
        title="Representation Assemble: overview",
        description="Claims and headline numbers of all papers.",
        blocks=blocks,
        width="fluid",
    )


def _headline_tables(source: Tables) -> set[str]:
    headline = source.headline
    return {h.table for h in (headline, headline.mini if headline else None) if h}


def _overview(papers: Sequence[tuple[Paper, Sequence[Record]]]) -> str:
    lines = ["| paper | headline | published | measured at paper scale | claims |", "|---|---|---:|---:|---|"]
    for paper, records in papers:
        row = render.overview_row(paper, load(paper.name), records)
        lines.append(f"| {paper.title} | {row.headline} | {row.published} | {row.measured} | {row.claims} |")
    return "\n".join(lines)


def _claim(claim: Judged) -> str:
    _, paper, ours, verdict = render.judged_cells(claim).values()
    return f"{verdict} at {claim.scale}: {claim.check.text} (paper: {paper}; ours: {ours})"


def _runset(name: str, group: str, stages: Sequence[str] = (), columns: Sequence[str] = ()) -> Runset:
    """Runs of a paper and scale; of some stages where they are named, averaged over seeds."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    filters: list[Any] = [expr.Metric("Group") == group]
    if stages:
        filters.append(expr.Config("stage").isin(list(stages)))
    return wr.Runset(
        name=name,
        filters=filters,
        groupby=["run.group"] if stages else ["config.stage"],
        visible_columns=["run:displayName", "config:stage.value", "tags:__ALL__", *columns],
    )


def _table_panels(source: Tables, filled: render.Filled) -> PanelGrid:
    """One set of runs for each row that is run, one chart for each metric, published values in charts of their own."""
    import wandb_workspaces.reports.v2 as wr

    result = filled.result
    table, group = result.table, f"{source.paper}/{result.scale}"
    metrics = [metric for metric in table.metrics if not metric.hidden]
    # Runs have the published value only where theirs may be compared with it.
    kinds = ("table", "published") if result.scale == "paper" else ("table",)
    keys = [f"summary:{kind}/{table.id}/{m.id}" for m in metrics for kind in kinds]
    runsets = []
    stages_of = {r.label: {m.id: source.instances(table, r, m, result.scale) for m in metrics} for r in result.rows}
    for row in result.rows:
        mine = stages_of[row.label]
        # A run logs every metric of the table that its stage fills in some row. One that this row has from other stages
        # would be averaged into its bar: such a run is left out.
        foreign = {s for of in stages_of.values() for m, names in of.items() if mine[m] for s in {*names} - {*mine[m]}}
        if stages := dict.fromkeys(s for names in mine.values() for s in names if s not in foreign):
            runsets.append(_runset(render.row_text(row), group, list(stages), keys))
    panels: list[Any] = []
    for metric in metrics:
        better = ", lower is better" if metric.better == "down" else ""
        panels.append(_bars(f"{metric.title}, measured at {result.scale}{better}", f"table/{table.id}/{metric.id}"))
        known = any(
            metric.id in row.published and source.instances(table, row, metric, result.scale) for row in result.rows
        )
        if known and result.scale == "paper" and render.is_paired(result, metric):
            panels.append(_bars(f"{metric.title}, published", f"published/{table.id}/{metric.id}"))
    return wr.PanelGrid(runsets=runsets, panels=panels)


def _bars(title: str, key: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    # No grouping of its own: the set of runs of a row is one group, so that a row is one bar.
    return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)], groupby_aggfunc="mean", groupby_rangefunc="stddev")


def _training_panels(paper: Paper, scales: Sequence[str]) -> PanelGrid:
    import wandb_workspaces.reports.v2 as wr

    # The names of losses differ between papers, and a stage logs those of its own objective.
    patterns = {"Training loss": "^train/loss$", "Parts of the loss": "^train/.+_loss$", "On validation data": "^val/"}
    return wr.PanelGrid(
        runsets=[_runset(f"{paper.title}, {scale}", f"{paper.name}/{scale}") for scale in scales],
        panels=[
            wr.LinePlot(
                title=title,
                x="trainer/global_step",
                metric_regex=pattern,
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
            )
            for title, pattern in patterns.items()
        ],
    )


def media_keys(records: Sequence[Record]) -> tuple[list[str], list[str]]:
    """Names under which runs log what is in their media folders.

    Args:
        records: records, which name the files.

    Returns:
        Keys of pictures and clips, where numbered files share one; keys of tables.
    """
    seen: set[str] = set()
    tables: set[str] = set()
    for record in records:
        for file in map(PurePosixPath, record.media):
            if file.suffix in (".png", ".mp4", ".webm", ".gif"):
                seen.add(re.sub(r"_\d+$", "", file.stem))
            elif file.suffix == ".csv":
                tables.add(f"{file.stem}_table")
    return sorted(seen), sorted(tables)


def _media_panels(paper: Paper, scales: Sequence[str], records: Sequence[Record]) -> PanelGrid:
    import wandb_workspaces.reports.v2 as wr

    return wr.PanelGrid(
        runsets=[_runset(f"{paper.title}, {scale}", f"{paper.name}/{scale}") for scale in scales],
        panels=_media([r for r in records if r.scale in scales]),
    )


def _media(records: Sequence[Record]) -> list[Any]:
    """A panel for each kind of picture, clip and table that runs log."""
    import wandb_workspaces.reports.v2 as wr

    seen, tables = media_keys(records)
    panels: list[Any] = [wr.MediaBrowser(title=key.replace("_", " "), media_keys=[key], num_columns=2) for key in seen]
    return panels + [wr.WeavePanelSummaryTable(table_name=name) for name in tables]


def _comparison(paper: Paper, scales: Sequence[str]) -> PanelGrid:
    import wandb_workspaces.reports.v2 as wr

    return wr.PanelGrid(
        runsets=[_runset(f"{paper.title}, {scale}", f"{paper.name}/{scale}") for scale in scales],
        panels=[wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=15))],
    )


def specification(report: Report) -> dict[str, Any]:
    """What is sent to the server for a report, as plain data."""
    model = report._to_model()  # the package offers no other way to it than to send it
    spec: dict[str, Any] = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    return {
        "project": report.project,
        "entity": report.entity,
        "displayName": report.title,
        "description": report.description,
        "type": "runs",
        "spec": spec,
    }


def write(report: Report, path: Path) -> None:
    """Write the specification of a report as JSON, in one step."""
    write_atomically(path, json.dumps(specification(report), indent=1, ensure_ascii=False) + "\n")


def default_entity() -> str:
    """The user or team that a key belongs to, asked of the server.

    Raises:
        ReportingError: when the server does not answer in time or refuses.
    """
    import wandb

    return str(within(SEND_SECONDS, lambda: wandb.Api(timeout=10).default_entity or ""))


def send(report: Report, known: str = "") -> str:
    """Save a report on the server.

    Args:
        report: it then has its id.
        known: id of the report that it replaces; where the server has none such any more, a new one is made.

    Returns:
        Its address.

    Raises:
        ReportingError: when the server does not answer in time or refuses.
    """
    if known:
        report.id = known
        try:
            return str(within(SEND_SECONDS, lambda: report.save().url))
        except ReportingError as error:
            if "did not answer" in str(error):
                raise
            report.id = ""
    return str(within(SEND_SECONDS, lambda: report.save().url))


def paper_workspace(paper: Paper, records: Sequence[Record], entity: str) -> Workspace:
    """A view of the project whose runs table is the paper's table: a line for each row, a column for each metric.

    Its sections hold a chart for each metric of each measured table, the losses, and what there is to look at.

    Raises:
        ReportingError: nothing of the paper was measured.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    source = load(paper.name)
    filled = [f for f in render.fill_best(source, records) if f.result.measured]
    if not filled:
        raise ReportingError(f"{paper.title}: nothing was measured, so there is no table to show")
    scale = filled[0].result.scale
    shown = [f for f in filled if f.result.scale == scale]
    columns, sections = [], []
    for f in shown:
        table = f.result.table
        metrics = [metric for metric in table.metrics if not metric.hidden]
        columns += [f"summary:table/{table.id}/{metric.id}" for metric in metrics]
        panels: list[Any] = [_bars(metric.label, f"table/{table.id}/{metric.id}") for metric in metrics]
        sections.append(ws.Section(name=table.title, panels=panels, is_open=f is shown[0]))
    lines: list[Any] = [wr.LinePlot(title="Training loss", x="trainer/global_step", metric_regex="^train/loss$")]
    return ws.Workspace(
        entity=entity,
        project=project(),
        name=f"{paper.title}: table, {scale}",
        sections=[
            *sections,
            ws.Section(name="Training", panels=lines),
            ws.Section(name="Pictures, clips and texts", panels=_media([r for r in records if r.scale == scale])),
        ],
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step"),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group") == f"{paper.name}/{scale}"],
            groupby=[ws.Config("stage" if _shared_rows(shown) else "row")],
            pinned_columns=["run:displayName", *dict.fromkeys(columns)],
        ),
    )


def _shared_rows(filled: Sequence[render.Filled]) -> bool:
    """Whether a table has two rows of one model, which are told apart by their stages alone."""
    models = [[row.model for row in f.result.rows if row.model] for f in filled]
    return any(len(set(of_table)) < len(of_table) for of_table in models)


def save_workspace(workspace: Workspace, known: str = "") -> tuple[str, str]:
    """Save a view on the server.

    Args:
        workspace: the view.
        known: `<name>/<id>` of the view that it replaces, as this function gave it.

    Returns:
        Its address, and `<name>/<id>`.

    Raises:
        ReportingError: when the server does not answer in time or refuses.
    """
    workspace._internal_name, _, workspace._internal_id = known.partition("/")
    try:
        saved = within(SEND_SECONDS, workspace.save)
    except ReportingError as error:
        if not known or "did not answer" in str(error):
            raise
        workspace._internal_name = workspace._internal_id = ""
        saved = within(SEND_SECONDS, workspace.save)
    return str(saved.url), f"{saved._internal_name}/{saved._internal_id}"


class Sent:
    """What was sent before, so that it is replaced: a file of ids by server, project and name.

    Args:
        path: the file.
        entity: user or team that owns the project.
    """

    def __init__(self, path: Path, entity: str) -> None:
        self._path, self._place = path, f"{server()}/{entity}/{project()}"

    def _all(self) -> dict[str, dict[str, str]]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def id(self, name: str) -> str:
        """The id under which something was sent; empty when it was not."""
        return str(self._all().get(self._place, {}).get(name, ""))

    def keep(self, name: str, identity: str) -> None:
        """Remember the id of what was sent."""
        found = self._all()
        found.setdefault(self._place, {})[name] = identity
        write_atomically(self._path, json.dumps(found, indent=1, sort_keys=True) + "\n")
