"""Publish reports and views on Weights & Biases. This needs the extra `wandb-reports`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from assemble.reporting import render
from assemble.reporting.papers import Paper
from assemble.reporting.records import Record
from assemble.reporting.tables import Tables, load
from assemble.reporting.wandb_server import project, server, within
from common.errors import ReportingError
from common.files import parsing, read_bytes, write_atomically

SEND_SECONDS = 30.0
"""Timeout for sending a report."""


def paper_report(paper: Paper, records: Sequence[Record], entity: str = "") -> wr.Report:
    """Build one paper's report: tables with verdicts and deviations, panels, curves, pictures.

    `entity` is the user or team that owns the project. It may be empty if the report isn't sent.
    """
    source = load(paper.name)
    filled = render.fill_best(source, records)
    blocks: list[Any] = [
        wr.P(
            "A number measured at mini scale comes from a miniature of data and model, and is not comparable with a "
            "published one. Texts come from records; panels show the runs in this project."
        ),
        wr.TableOfContents(),
    ]
    for f in filled:
        heading, _, body = render.table_markdown(f.result).partition("\n")
        judged = render.judged_markdown(f.claims) + render.judged_markdown(f.checks)
        blocks += [wr.H2(heading.removeprefix("### ")), wr.MarkdownBlock(text="\n".join([body.strip(), *judged]))]
        if f.result.measured:
            blocks.append(_table_panels(source, f))
    blocks += [wr.MarkdownBlock(text=text) for text in render.remarks_markdown(render.remarks(filled))]
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
    title = f"{paper.title}: published and measured"
    return wr.Report(project=project(), entity=entity, title=title, blocks=blocks, width="fluid")


def _runset(name: str, paper: str, scale: str, stages: Sequence[str] = (), columns: Sequence[str] = ()) -> wr.Runset:
    """Select a paper's runs at a scale. Named stages form one group; else each configuration is a group."""
    filters: list[Any] = [expr.Config("paper") == paper, expr.Config("scale") == scale]
    if stages:
        filters.append(expr.Config("stage").isin(list(stages)))
    return wr.Runset(
        name=name,
        filters=filters,
        groupby=["config.paper"] if stages else ["run.group"],
        visible_columns=["run:displayName", "config:stage.value", "tags:__ALL__", *columns],
    )


def _table_panels(source: Tables, filled: render.Filled) -> wr.PanelGrid:
    """Build a run set per row and a chart per metric."""
    result = filled.result
    table, scale = result.table, result.scale
    metrics = [metric for metric in table.metrics if not metric.hidden]
    kind, given = "given" if result.given else "table", {stage for r in result.records for stage in r.given}
    keys = [f"summary:{kind}/{table.id}/{m.id}" for m in metrics]
    runsets = []
    stages_of = {r.label: {m.id: source.instances(table, r, m, scale, given) for m in metrics} for r in result.rows}
    for row in result.rows:
        mine = stages_of[row.label]
        # A run logs every metric that its stage fills in any row. Leave out runs with a metric that this row takes from
        # other stages, since W&B would average it into the row's bar.
        foreign = {s for of in stages_of.values() for m, names in of.items() if mine[m] for s in {*names} - {*mine[m]}}
        if stages := dict.fromkeys(s for names in mine.values() for s in names if s not in foreign):
            runsets.append(_runset(render.row_text(row), source.paper, scale, list(stages), keys))
    panels: list[Any] = []
    for metric in metrics:
        better = ", lower is better" if metric.better == "down" else ""
        title = f"{metric.title}, measured at {scale}{result.origin and f', {result.origin}'}{better}"
        panels.append(_bars(title, f"{kind}/{table.id}/{metric.id}"))
    return wr.PanelGrid(runsets=runsets, panels=panels)


def _bars(title: str, key: str) -> Any:
    # A row's run set is already one group, so each row is one bar.
    return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)], groupby_aggfunc="mean", groupby_rangefunc="stddev")


def _lines(title: str, pattern: str) -> Any:
    x = "trainer/global_step"
    return wr.LinePlot(title=title, x=x, metric_regex=pattern, groupby_aggfunc="mean", groupby_rangefunc="minmax")


def _media(records: Iterable[Record]) -> list[Any]:
    """Build panels of logged media: pictures and clips (numbered files share a key), and tables."""
    files = [PurePosixPath(name) for record in records for name in record.media]
    keys = sorted({re.sub(r"_\d+$", "", f.stem) for f in files if f.suffix in (".png", ".mp4", ".webm", ".gif")})
    tables = sorted({f"{file.stem}_table" for file in files if file.suffix == ".csv"})
    panels: list[Any] = [wr.MediaBrowser(title=key.replace("_", " "), media_keys=[key], num_columns=2) for key in keys]
    return panels + [wr.WeavePanelSummaryTable(table_name=name) for name in tables]


def write(report: wr.Report, path: Path) -> None:
    """Write to a file the JSON that would be sent to the server for a report."""
    model = report._to_model()  # Without this, the package only provides the content when sending.
    content = {
        "project": report.project,
        "entity": report.entity,
        "displayName": report.title,
        "type": "runs",
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def default_entity() -> str:
    """Ask the server which user or team owns the key."""
    return str(within(SEND_SECONDS, lambda: wandb.Api(timeout=10).default_entity or ""))


def paper_workspace(paper: Paper, records: Sequence[Record], entity: str) -> ws.Workspace | None:
    """Build a view of the project: the paper's table as the runs table, and charts of metrics, losses and media.

    Return None if nothing was measured.
    """
    source = load(paper.name)
    filled = [f for f in render.fill_best(source, records) if f.result.measured]
    if not filled:
        return None
    scale = filled[0].result.scale
    shown = [f for f in filled if f.result.scale == scale and f.result.given == filled[0].result.given]
    # Rows with the same model differ only in their stages.
    models = [[row.model for row in f.result.rows if row.model] for f in shown]
    shared = any(len(set(of_table)) < len(of_table) for of_table in models)
    columns, sections, kind = [], [], "given" if filled[0].result.given else "table"
    for f in shown:
        table = f.result.table
        metrics = [metric for metric in table.metrics if not metric.hidden]
        columns += [f"summary:{kind}/{table.id}/{metric.id}" for metric in metrics]
        panels: list[Any] = [_bars(metric.label, f"{kind}/{table.id}/{metric.id}") for metric in metrics]
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
            groupby=[ws.Config("stage" if shared else "row")],
            pinned_columns=["run:displayName", *dict.fromkeys(columns)],
        ),
    )


def send(documents: Iterable[wr.Report | ws.Workspace], sent: Path, entity: str) -> Iterator[str]:
    """Save documents on the server, and yield their addresses.

    The file `sent` stores the ids of documents by server, project and title, so that sending again replaces them.
    """
    with parsing(sent, ReportingError):
        ids = json.loads(read_bytes(sent)) if sent.is_file() else {}
    here = ids.setdefault(f"{server()}/{entity}/{project()}", {})
    for document in documents:
        title = document.title if isinstance(document, wr.Report) else document.name
        try:
            here[title] = _saved(document, here.get(title, ""))
        except ReportingError as error:
            if title not in here or "did not answer" in str(error):
                raise
            here[title] = _saved(document)  # Somebody deleted the earlier document.
        write_atomically(sent, json.dumps(ids) + "\n")
        yield document.url


def _saved(document: wr.Report | ws.Workspace, known: str = "") -> str:
    """Save a document and return its id. Replace the document with the id `known`, if given."""
    if isinstance(document, wr.Report):
        document.id = known
        within(SEND_SECONDS, document.save)
        return document.id
    document._internal_name, _, document._internal_id = known.partition("/")
    within(SEND_SECONDS, document.save)
    return f"{document._internal_name}/{document._internal_id}"
