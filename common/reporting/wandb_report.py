"""Reports on Weights & Biases: one per paper and one for all, with the tables and panels of their runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
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
    """The report of one paper: tables with verdicts and deviations, panels, curves, pictures.

    Args:
        entity: user or team that owns the project; may stay empty until the report is sent.
        fresh: whether the records are of runs instead of the promoted ones.
    """
    import wandb_workspaces.reports.v2 as wr

    source = load(paper.name)
    filled = render.fill_best(source, records)
    blocks: list[Any] = [
        wr.P(
            "A number measured at mini scale comes from a miniature of data and model, and is not comparable with a "
            f"published one. Texts come from {'fresh records' if fresh else 'the promoted records'}; panels show the "
            "runs in this project."
        ),
        wr.TableOfContents(),
    ]
    for f in filled:
        heading, _, body = render.table_markdown(f).partition("\n")
        blocks += [wr.H2(heading.removeprefix("### ")), wr.MarkdownBlock(text=body.strip())]
        if f.result.measured:
            blocks.append(_table_panels(source, f))
    blocks += [wr.MarkdownBlock(text=text) for text in render.remarks_markdown(filled)]
    if scales := list(dict.fromkeys(f.result.scale for f in filled if f.result.measured)):
        runs = [_runset(f"{paper.title}, {scale}", paper.name, scale) for scale in scales]
        # The names of losses differ between papers, and a stage logs those of its own objective.
        patterns = {"Training loss": "^train/loss$", "Parts of the loss": "^train/.+_loss$", "Validation": "^val/"}
        panels: dict[str, list[Any]] = {
            "Training": [_lines(title, pattern) for title, pattern in patterns.items()],
            "Pictures, clips and texts": _media([r for r in records if r.scale in scales]),
            "What differs between configurations": [wr.RunComparer(diff_only="split", layout=wr.Layout(w=24, h=15))],
        }
        for title, some in panels.items():
            blocks += [wr.H2(title), wr.PanelGrid(runsets=runs, panels=some)]
    return _report(f"{paper.title}: published and measured", entity, blocks)


def overview_report(papers: Sequence[tuple[Paper, Sequence[Record]]], entity: str = "") -> Report:
    """The report of all papers: overview, claims with verdicts, and panels of each headline's table."""
    import wandb_workspaces.reports.v2 as wr

    blocks: list[Any] = [wr.TableOfContents(), wr.H2("Overview"), wr.MarkdownBlock(text=_overview(papers))]
    for paper, records in papers:
        source = load(paper.name)
        filled = [f for f in render.fill_best(source, records) if f.result.measured]
        blocks.append(wr.H2(paper.title))
        if not filled:
            blocks.append(wr.P("Nothing was measured yet."))
            continue
        blocks.append(wr.UnorderedList(items=[_claim(claim) for f in filled for claim in f.claims]))
        headline = source.headline
        tables = {h.table for h in (headline, headline and headline.mini) if h}
        blocks.append(_table_panels(source, next((f for f in filled if f.result.table.id in tables), filled[0])))
    return _report("Representation Assemble: overview", entity, blocks)


def _report(title: str, entity: str, blocks: list[Any]) -> Report:
    import wandb_workspaces.reports.v2 as wr

    return wr.Report(project=project(), entity=entity, title=title, blocks=blocks, width="fluid")


def _overview(papers: Sequence[tuple[Paper, Sequence[Record]]]) -> str:
    lines = ["| paper | headline | published | measured at paper scale | claims |", "|---|---|---:|---:|---|"]
    for paper, records in papers:
        row = render.overview_row(load(paper.name), records)
        lines.append(f"| {paper.title} | {row.headline} | {row.published} | {row.measured} | {row.claims} |")
    return "\n".join(lines)


def _claim(claim: Judged) -> str:
    _, paper, ours, verdict = render.judged_cells(claim).values()
    return f"{verdict} at {claim.scale}: {claim.check.text} (paper: {paper}; ours: {ours})"


def _runset(name: str, paper: str, scale: str, stages: Sequence[str] = (), columns: Sequence[str] = ()) -> Runset:
    """Runs of a paper and scale: named stages as one group, else a group per configuration."""
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr

    filters: list[Any] = [expr.Config("paper") == paper, expr.Config("scale") == scale]
    if stages:
        filters.append(expr.Config("stage").isin(list(stages)))
    return wr.Runset(
        name=name,
        filters=filters,
        groupby=["config.paper"] if stages else ["run.group"],
        visible_columns=["run:displayName", "config:stage.value", "tags:__ALL__", *columns],
    )


def _table_panels(source: Tables, filled: render.Filled) -> PanelGrid:
    """A run set per row, a chart per metric, and separate charts of published values."""
    import wandb_workspaces.reports.v2 as wr

    result = filled.result
    table, scale = result.table, result.scale
    metrics = [metric for metric in table.metrics if not metric.hidden]
    # Runs only have the published value if theirs is comparable.
    kinds = ("table", "published") if scale == "paper" else ("table",)
    keys = [f"summary:{kind}/{table.id}/{m.id}" for m in metrics for kind in kinds]
    runsets = []
    stages_of = {r.label: {m.id: source.instances(table, r, m, scale) for m in metrics} for r in result.rows}
    for row in result.rows:
        mine = stages_of[row.label]
        # A run logs every metric of the table that its stage fills in some row. One that this row has from other stages
        # would be averaged into its bar: such a run is left out.
        foreign = {s for of in stages_of.values() for m, names in of.items() if mine[m] for s in {*names} - {*mine[m]}}
        if stages := dict.fromkeys(s for names in mine.values() for s in names if s not in foreign):
            runsets.append(_runset(render.row_text(row), source.paper, scale, list(stages), keys))
    panels: list[Any] = []
    for metric in metrics:
        better = ", lower is better" if metric.better == "down" else ""
        panels.append(_bars(f"{metric.title}, measured at {scale}{better}", f"table/{table.id}/{metric.id}"))
        known = any(metric.id in row.published and stages_of[row.label][metric.id] for row in result.rows)
        if known and scale == "paper" and render.is_paired(result, metric):
            panels.append(_bars(f"{metric.title}, published", f"published/{table.id}/{metric.id}"))
    return wr.PanelGrid(runsets=runsets, panels=panels)


def _bars(title: str, key: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    # No grouping of its own: the set of runs of a row is one group, so that a row is one bar.
    return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)], groupby_aggfunc="mean", groupby_rangefunc="stddev")


def _lines(title: str, pattern: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    x = "trainer/global_step"
    return wr.LinePlot(title=title, x=x, metric_regex=pattern, groupby_aggfunc="mean", groupby_rangefunc="minmax")


def media_keys(records: Iterable[Record]) -> tuple[list[str], list[str]]:
    """Keys of logged media: pictures and clips (numbered files share one), and tables."""
    files = [PurePosixPath(name) for record in records for name in record.media]
    seen = {re.sub(r"_\d+$", "", file.stem) for file in files if file.suffix in (".png", ".mp4", ".webm", ".gif")}
    return sorted(seen), sorted({f"{file.stem}_table" for file in files if file.suffix == ".csv"})


def _media(records: Iterable[Record]) -> list[Any]:
    """A panel for each kind of logged picture, clip and table."""
    import wandb_workspaces.reports.v2 as wr

    seen, tables = media_keys(records)
    panels: list[Any] = [wr.MediaBrowser(title=key.replace("_", " "), media_keys=[key], num_columns=2) for key in seen]
    return panels + [wr.WeavePanelSummaryTable(table_name=name) for name in tables]


def write(report: Report, path: Path) -> None:
    """Write a report as the JSON sent to the server."""
    model = report._to_model()  # the package offers no other way to it than to send it
    content = {
        "project": report.project,
        "entity": report.entity,
        "displayName": report.title,
        "type": "runs",
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def default_entity() -> str:
    """The user or team that the key belongs to, asked of the server."""
    import wandb

    return str(within(SEND_SECONDS, lambda: wandb.Api(timeout=10).default_entity or ""))


def send(report: Report, known: str = "") -> str:
    """Save a report on the server, replacing the one with id `known` if it exists; return its address."""
    report.id = known
    try:
        return str(within(SEND_SECONDS, lambda: report.save().url))
    except ReportingError as error:
        if not known or "did not answer" in str(error):
            raise
    return send(report)


def paper_workspace(paper: Paper, records: Sequence[Record], entity: str) -> Workspace:
    """A view of the project with the paper's table as its runs table, and charts of metrics, losses and media."""
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
    return ws.Workspace(
        entity=entity,
        project=project(),
        name=f"{paper.title}: table, {scale}",
        sections=[
            *sections,
            ws.Section(name="Training", panels=[_lines("Training loss", "^train/loss$")]),
            ws.Section(name="Pictures, clips and texts", panels=_media([r for r in records if r.scale == scale])),
        ],
        settings=ws.WorkspaceSettings(x_axis="trainer/global_step"),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Config("paper") == paper.name, ws.Config("scale") == scale],
            groupby=[ws.Config("stage" if _shared_rows(shown) else "row")],
            pinned_columns=["run:displayName", *dict.fromkeys(columns)],
        ),
    )


def _shared_rows(filled: Sequence[render.Filled]) -> bool:
    """Whether two rows of a table share a model, so only their stages tell them apart."""
    models = [[row.model for row in f.result.rows if row.model] for f in filled]
    return any(len(set(of_table)) < len(of_table) for of_table in models)


def save_workspace(workspace: Workspace, known: str = "") -> tuple[str, str]:
    """Save a view on the server, replacing `known` (`<name>/<id>`) if it exists; return address and `<name>/<id>`."""
    workspace._internal_name, _, workspace._internal_id = known.partition("/")
    try:
        saved = within(SEND_SECONDS, workspace.save)
    except ReportingError as error:
        if not known or "did not answer" in str(error):
            raise
        return save_workspace(workspace)
    return str(saved.url), f"{saved._internal_name}/{saved._internal_id}"


class Sent:
    """Ids of earlier uploads, by server, project and name, so they are replaced."""

    def __init__(self, path: Path, entity: str) -> None:
        self._path, self._place = path, f"{server()}/{entity}/{project()}"

    def _all(self) -> dict[str, dict[str, str]]:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def id(self, name: str) -> str:
        """The id of an earlier upload, or empty."""
        return self._all().get(self._place, {}).get(name, "")

    def keep(self, name: str, identity: str) -> None:
        found = self._all()
        found.setdefault(self._place, {})[name] = identity
        write_atomically(self._path, json.dumps(found, indent=1, sort_keys=True) + "\n")
