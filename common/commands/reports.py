"""The commands of tables, claims, reports and promotion, as `assemble --help` lists them: thin, and quick to start."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import files
from common.errors import ReportingError, optional_package
from common.reporting.papers import (
    PROMOTED_SCALES,
    SCALES,
    checkout,
    existing_papers,
    needed_checkout,
    paper_named,
    project_root,
    runs_root,
)

if TYPE_CHECKING:
    from common.reporting.render import Filled

LEGEND = """
A claim is an ordering that the paper asserts, a check a sanity condition of ours. Both compare rows draw by draw; a
draw is a seed and a rounding. They hold when the mean difference lies beyond what is asked with 95 % confidence, fail
when it lies on the other side, and are not separable between; one draw alone never fails or holds.
(gate): `assemble claims --gate` ends with an error when this one fails at mini scale."""

Command = Callable[[argparse.Namespace], int]


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the reporting commands to a command line; each sets ``func`` to its function.

    Args:
        subparsers: what ``ArgumentParser.add_subparsers`` returned.
    """
    known = existing_papers()
    names = ", ".join(f"{p.short} ({p.name})" if p.short != p.name else p.name for p in known)

    def add(name: str, function: Command, text: str) -> argparse.ArgumentParser:
        parser = subparsers.add_parser(name, help=text, description=text)
        parser.add_argument("papers", nargs="*", metavar="paper", help=f"{names}; default: all that exist")
        parser.set_defaults(func=function)
        return parser

    tables = add("tables", tables_command, "Render the tables from stored records; never trains.")
    tables.add_argument("--scale", choices=SCALES, help="print this scale only")
    tables.add_argument("--table", action="append", metavar="ID", help="print this table only; may be repeated")
    tables.add_argument("--tables", dest="table", action="extend", nargs="+", metavar="ID", help="the same for several")
    tables.add_argument("--check", action="store_true", help="write nothing; exit with 1 when a README is out of date")
    tables.add_argument("--no-write", action="store_true", help="print only")
    _add_runs(tables, "print the tables of fresh records instead of the promoted ones; READMEs are not touched")

    claims = add("claims", claims_command, "Judge the papers' claims, and our checks, over the stored records.")
    claims.add_argument("--scale", choices=SCALES, help="this scale only")
    claims.add_argument(
        "--gate",
        action="store_true",
        help="exit with 1 when a gated claim or check fails at mini, with 2 when one was not run",
    )
    _add_runs(claims, "judge fresh records instead of the promoted ones")

    compare = add("compare", compare_command, "Do my runs match? Every measured cell beside the recorded draws.")
    compare.add_argument("--scale", choices=SCALES, help="this scale only; default: those of the runs, without smoke")
    compare.add_argument("--runs", type=Path, help="folder of runs; default: runs")
    compare.add_argument("--against", type=Path, metavar="FOLDER", help="another folder of runs, not the records")
    compare.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 when more is outside than chance allows (docs/comparing-runs.md), or nothing compared",
    )

    report = add("report", report_command, "Write one static HTML page: claims, tables, charts, curves, media.")
    report.add_argument("--scale", choices=SCALES, help="this scale only")
    report.add_argument("--output", type=Path, help="the file; default: runs/report.html")
    report.add_argument("--runs", type=Path, help="folder of runs; default: runs")
    report.add_argument("--live", action="store_true", help="serve the page to this machine, and follow running stages")
    report.add_argument("--port", type=int, default=8321, help="of --live; default: %(default)s; 0 takes any free one")

    dashboard = add(
        "wandb-report",
        wandb_report_command,
        "Make a W&B report of each paper and, when no paper is named, one of all; without a key, write it to a file.",
    )
    dashboard.add_argument("--offline", action="store_true", help="write the files only, send nothing")
    dashboard.add_argument("--entity", default="", help="user or team on W&B; default: WANDB_ENTITY, or the key's own")
    _add_runs(dashboard, "tables of fresh records instead of the promoted ones")

    views = add(
        "wandb-workspace",
        wandb_workspace_command,
        "Save a view of the W&B project for each paper, in which the runs table is the paper's table.",
    )
    views.add_argument("--entity", default="", help="user or team on W&B; default: WANDB_ENTITY, or the key's own")
    _add_runs(views, "the tables that fresh records fill, instead of the promoted ones")

    promote = add("promote", promote_command, "Copy the records of clean revisions into the papers' results.")
    promote.add_argument("--scale", choices=SCALES, action="append", help="may be repeated; default: all but smoke")
    promote.add_argument("--stage", action="append", help="this stage or instance only; may be repeated")
    promote.add_argument("--stages", dest="stage", action="extend", nargs="+", help="the same for several")
    promote.add_argument("--runs", type=Path, help="folder of runs; default: runs")
    promote.add_argument("--replace", action="store_true", help="also replace records that another machine made")


def _add_runs(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--runs", type=Path, nargs="?", const=runs_root(), metavar="FOLDER", help=text)


def _names(args: argparse.Namespace) -> list[str]:
    """The papers asked for; all that exist when none was."""
    return [paper.name for paper in [paper_named(name) for name in args.papers] or existing_papers()]


def _folder(args: argparse.Namespace) -> Path | None:
    runs: Path | None = args.runs
    if runs is not None and not runs.is_dir():
        raise ReportingError(f"--runs {runs}: no such folder")
    return runs


def tables_command(args: argparse.Namespace) -> int:
    """Print the tables and write them into the READMEs; with ``--check`` only say which READMEs are out of date."""
    from common.reporting import render
    from common.reporting.tables import load

    names = _names(args)
    if args.check:
        needed_checkout("--check compares the READMEs of the repository with the records")
        stale = render.check()
        for path in stale:
            print(f"out of date: {path} (run `assemble tables`)")
        if not stale:
            print("up to date: every README holds what the records say")
        return 1 if stale else 0
    console, runs = files.console(), _folder(args)
    for name in names:
        source, records = load(name), render.records_of(name, runs)
        if args.scale:
            filled = render.fill(source, args.scale, records, args.table)
        elif runs is not None:
            filled = [f for s in SCALES for f in render.fill(source, s, records, args.table) if f.result.measured]
        else:
            filled = [f for f in render.fill_best(source, records) if not args.table or f.result.table.id in args.table]
            for table in args.table or ():
                source.table(table)
        render.print_tables(filled, console)
        if not filled:
            console.print(f"{name}: no record under {runs}" if runs else f"{name}: nothing to show", markup=False)
    if args.no_write or runs is not None:
        return 0
    if checkout() is None:
        print("no README is written: this is an installed package and no checkout")
        return 0
    for name in names:
        _say(render.render_paper(name), paper_named(name).readme)
    _say(render.render_overview(), project_root() / "README.md")
    return 0


def _say(changed: bool, path: Path) -> None:
    print(f"{'wrote' if changed else 'up to date'}: {path}")


def claims_command(args: argparse.Namespace) -> int:
    """Print the verdicts; with ``--gate`` exit with 1 when one fails at mini, with 2 when one was not run."""
    from common.reporting import render
    from common.reporting.claims import gate_failures
    from common.reporting.tables import load

    console, runs = files.console(), _folder(args)
    if args.gate and args.scale not in (None, "mini"):
        raise ReportingError(f"--gate judges claims at mini scale: leave out --scale {args.scale}")
    judged = []
    for name in _names(args):
        # A gate must not pass on what is left of the draws.
        source, records = load(name), render.records_of(name, runs, strict=args.gate)
        scales = [args.scale] if args.scale else SCALES
        filled = {s: render.fill(source, s, records) for s in scales}
        # Without --scale, a scale at which nothing was measured says nothing, except mini when it gates.
        shown = [s for s in scales if args.scale or (s == "mini" and args.gate) or _measured(filled[s])]
        claims = [one for s in shown for f in filled[s] for one in f.claims]
        checks = [one for s in shown for f in filled[s] for one in f.checks]
        judged += claims + checks
        console.print(f"\n{paper_named(name).title}", style="bold")
        for found in filter(None, (claims, checks)):
            console.print(render.rich_judged(found, console.width))
        if not shown:
            console.print("nothing measured yet")
    if judged:
        console.print(LEGEND, style="dim", markup=False)
    if not args.gate:
        return 0
    failed, missing = gate_failures(judged)
    for one in failed:
        asked = f"{one.outcome}; asked: {one.check.holds.text}"
        print(f"gate: {one.table}.{one.check.id} fails at mini scale: {asked}", file=sys.stderr)
    for one in missing:
        print(f"gate: {one.table}.{one.check.id} was not run at mini scale: {one.detail}", file=sys.stderr)
    return 1 if failed else 2 if missing else 0


def _measured(filled: Sequence[Filled]) -> bool:
    return any(f.result.measured for f in filled)


def compare_command(args: argparse.Namespace) -> int:
    """Print the comparison; with ``--strict`` exit with 1 when it is no match, or when nothing was compared."""
    from common.reporting import compare
    from common.reporting.draws import told

    console, runs = files.console(), _folder(args) or runs_root()
    if args.against is not None and not args.against.is_dir():
        raise ReportingError(f"--against {args.against}: no such folder")
    scales = [args.scale] if args.scale else SCALES if args.against else PROMOTED_SCALES
    everything: list[compare.Compared] = []
    failed = False
    for name in _names(args):
        for scale in scales:
            compared = compare.compare_paper(name, scale, runs, args.against)
            if not compared:
                continue
            everything += compared
            mine, reference = map(told, compare.draws_of(compared))
            console.print(f"\n{paper_named(name).title}, {scale}", style="bold", markup=False)
            console.print(compare.rich_comparison(compared))
            console.print(f"measured: {mine}; reference: {reference or 'none'}", markup=False, style="dim")
            console.print(compare.summary(compared), markup=False)
            if args.strict and (failure := compare.strict_failure(compared)):
                failed = True
                print(f"strict: {paper_named(name).short}, {scale}: {failure}", file=sys.stderr)
    if not everything:
        console.print(f"no measured cell at {' or '.join(scales)} scale under {runs}", markup=False)
    if args.strict and all(c.verdict == compare.NO_REFERENCE for c in everything):
        failed = True
        print("strict: nothing could be compared", file=sys.stderr)
    return int(failed)


def report_command(args: argparse.Namespace) -> int:
    """Write the report page and say where it is, or serve it until Ctrl-C."""
    from common.reporting import report

    names, runs = _names(args), _folder(args)
    if args.live:
        from common.reporting.live import LiveReport

        folder = runs or runs_root()
        with LiveReport(lambda stamp: report.page(names, args.scale, folder, stamp), folder, args.port) as server:
            print(f"{server.address} shows {folder}; Ctrl-C ends it", flush=True)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        return 0
    path = report.build(args.output or runs_root() / "report.html", names, args.scale, runs)
    print(f"wrote: {path} ({path.stat().st_size / 2**20:.1f} MB)")
    return 0


def wandb_report_command(args: argparse.Namespace) -> int:
    """Write the specifications of the reports, then send them where there is a key."""
    from common.reporting import render
    from common.reporting.wandb_server import entity as entity_of_environment
    from common.reporting.wandb_server import why_no_key, why_unreachable

    names, runs = _names(args), _folder(args)
    missing = "--offline" if args.offline else why_no_key()
    unreachable = None if missing else why_unreachable()
    sending = not missing and not unreachable
    optional_package("wandb_workspaces", "wandb-reports")
    from common.reporting import wandb_report

    entity = args.entity or entity_of_environment() or (wandb_report.default_entity() if sending else "")
    papers = [(paper_named(name), render.records_of(name, runs)) for name in names]
    reports = [
        (
            wandb_report.paper_report(paper, records, entity, runs is not None),
            runs_root() / paper.name / "wandb-report.json",
        )
        for paper, records in papers
    ]
    if not args.papers:
        reports.append((wandb_report.overview_report(papers, entity), runs_root() / "wandb-report.json"))
    known = wandb_report.Sent(runs_root() / "wandb-sent.json", entity) if sending else None
    for report, path in reports:
        wandb_report.write(report, path)
        print(f"wrote: {path}")
        if known is not None:
            print(f"sent: {wandb_report.send(report, known.id(report.title))}")
            known.keep(report.title, report.id)
    if unreachable:
        raise ReportingError(f"W&B: {unreachable}; the reports are written and not sent")
    if missing:
        again = " ".join(["assemble wandb-report", *args.papers, *(["--runs", str(runs)] if runs else [])])
        again += f" --entity {args.entity}" if args.entity else ""
        print(f"not sent: {missing}; with a key, `{again}` sends them")
    return 0


def wandb_workspace_command(args: argparse.Namespace) -> int:
    """Save the views, and say where they are."""
    from common.reporting import render
    from common.reporting.wandb_server import entity as entity_of_environment
    from common.reporting.wandb_server import why_no_key, why_unreachable

    if missing := why_no_key() or why_unreachable():
        raise ReportingError(f"W&B: {missing}; a view lies on the server, so it needs both")
    optional_package("wandb_workspaces", "wandb-reports")
    from common.reporting import wandb_report

    entity = args.entity or entity_of_environment() or wandb_report.default_entity()
    known = wandb_report.Sent(runs_root() / "wandb-sent.json", entity)
    runs, papers = _folder(args), [paper_named(name) for name in _names(args)]
    for paper in papers:
        records = render.records_of(paper.name, runs)
        if not records and not args.papers:
            continue
        workspace = wandb_report.paper_workspace(paper, records, entity)
        url, identity = wandb_report.save_workspace(workspace, known.id(workspace.name))
        known.keep(workspace.name, identity)
        print(f"saved: {url}")
    return 0


def promote_command(args: argparse.Namespace) -> int:
    """Promote records and say what happened to each; exit with 1 when one was refused."""
    from common.reporting.promote import REFUSED, promote

    needed_checkout("`assemble promote` writes into papers/*/results of the repository")
    scales = tuple(args.scale) if args.scale else PROMOTED_SCALES
    done = [p for name in _names(args) for p in promote(name, scales, _folder(args), args.stage, args.replace)]
    for p in done:
        where = f"{p.record.paper}/{p.record.scale}/{p.record.draw.folder}/{p.record.stage}"
        print(f"{p.action}: {where}" + (f": {p.reason}" if p.reason else ""))
    if not done:
        print(f"no record at {' or '.join(scales)} scale under {args.runs or runs_root()}")
    return 1 if any(p.action == REFUSED for p in done) else 0
