"""Define the commands for tables, claims, comparisons, reports and promotion. Slow imports are lazy."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from assemble.commands.parsing import (
    ExistingRuns,
    OneScale,
    Option,
    PaperName,
    PaperNames,
    Runs,
    Scale,
    existing_folder,
)
from assemble.reporting.papers import (
    PROMOTED_SCALES,
    SCALES,
    Paper,
    checkout,
    paper_named,
    papers_named,
    runs_root,
)
from common import files
from common.errors import ReportingError, StageError, optional_package

if TYPE_CHECKING:
    from assemble.reporting.promote import Promotion
    from assemble.reporting.records import Record

LEGEND = """
A claim is an ordering that the paper asserts; a check is a sanity condition of ours. Both compare rows within each draw
(a seed and a rounding). They hold if the 95 % interval of the mean difference is beyond the threshold, fail if it is on
the other side, and are not separable if it contains the threshold. One seed has no interval: its sign agrees or
differs."""

FreshRuns = Annotated[
    Path | None,
    Option("use the records of this folder (default: runs) instead of the promoted ones",
           const=runs_root, parse=existing_folder),
]  # fmt: skip


def _names(papers: Sequence[str]) -> list[str]:
    return [paper.name for paper in papers_named(papers)]


def tables(
    papers: PaperNames = (),
    *,
    scale: OneScale = None,
    tables: Annotated[Sequence[str], "only these tables (ids)"] = (),
    check: Annotated[bool, "write nothing; exit with 1 if a README is out of date"] = False,
    runs: FreshRuns = None,
) -> int:
    """Write the tables into the READMEs, from stored records. Nothing is trained.

    With --runs, or in an installed package, the tables are only printed.
    """
    from assemble.reporting import code, render
    from assemble.reporting.tables import load

    names = _names(papers)
    if check:
        if scale or tables or runs:
            raise ReportingError("--check compares whole READMEs with the records: leave out the other options")
        if checkout() is None:
            raise ReportingError("--check needs a clone: run it in one, or set ASSEMBLE_ROOT")
        stale = render.stale(render.pages(map(paper_named, names)))
        for path in stale:
            print(f"out of date: {path} (run `assemble tables`)")
        if not stale:
            print("up to date: all READMEs match the records")
        return 1 if stale else 0
    console = files.console()
    for name in names:
        source, records = load(name), render.records_of(name, runs)
        if scale is None and runs is None:
            filled = render.fill_best(source, records, tables or None)
        else:
            scales = [scale] if scale else SCALES
            filled = [f for s in scales for f in render.fill_both(source, s, records, tables or None)]
            filled = [f for f in filled if scale or f.result.measured]
        for f in filled:
            render.print_table(f, console)
        for heading, lines in render.remarks(filled).items():
            for line in (f"{heading}:", *lines):
                console.print(line, markup=False, style="dim")
        if not filled:
            console.print(f"{name}: nothing measured", markup=False)
        if runs is not None and (note := code.other_code(records)):
            console.print(note, markup=False)
    if runs is not None or checkout() is None:
        return 0
    written = render.write(render.pages(map(paper_named, names)))
    for path in written:
        print(f"wrote: {path}")
    if not written:
        print("up to date: the READMEs match the records")
    return 0


def claims(papers: PaperNames = (), *, scale: OneScale = None, runs: FreshRuns = None) -> int:
    """Judge the papers' claims and our checks from the stored records."""
    from assemble.reporting import render
    from assemble.reporting.tables import load

    console = files.console()
    for name in _names(papers):
        records = render.records_of(name, runs)
        filled = [f for s in ([scale] if scale else SCALES) for f in render.fill_both(load(name), s, records)]
        # Without --scale, show only the measured scales.
        measured = {f.result.scale for f in filled if f.result.measured}
        shown = [f for f in filled if scale or f.result.scale in measured]
        console.print(f"\n{paper_named(name).title}", style="bold")
        for judged in ([claim for f in shown for claim in f.claims], [check for f in shown for check in f.checks]):
            if judged:
                console.print(render.rich_judged(judged))
        if not any((*f.claims, *f.checks) for f in shown):
            console.print("no claim at the measured scales" if shown else "nothing measured yet")
    console.print(LEGEND, style="dim", markup=False)
    return 0


def power(
    paper: PaperName,
    *,
    row: Annotated[str, "label or model of a row"],
    over: Annotated[str, "label or model of the row to compare with"],
    metric: Annotated[str, "id or label of a column"],
    table: Annotated[str, "id of the table, needed if several tables have the metric"] = "",
    gap: Annotated[float | None, "true difference between the rows; default: the recorded mean"] = None,
    scale: Scale = "mini",
    runs: Runs = None,
) -> int:
    """Estimate how many runs it takes to separate two rows, and how long they take here.

    Rows are separated if the 95 % interval of their mean difference excludes zero. Runs with the same seed and rounding
    are paired. The standard deviation comes from the recorded runs.
    """
    import math
    import statistics

    from assemble.reporting import power as planning
    from assemble.reporting.aggregate import collect
    from assemble.reporting.claims import interval_of
    from assemble.reporting.progress import duration
    from assemble.reporting.records import expected_seconds, find
    from assemble.reporting.results import find_promoted
    from assemble.reporting.tables import expand, load
    from assemble.stages.plan import default_jobs, side_by_side

    if gap is not None and not math.isfinite(gap):
        raise ReportingError(f"--gap is a finite number, got {gap}")
    source, recorded = load(paper), find_promoted(paper, scale)
    pair = planning.find_pair(collect(source, scale, recorded, [table] if table else None), row, over, metric)
    differences = pair.differences
    mean, spread, count = statistics.fmean(differences), statistics.stdev(differences), len(differences)
    interval = " to ".join(f"{end:+.3g}" for end in interval_of(differences) or ())
    wanted = abs(mean if gap is None else gap)
    spreads = (spread, *planning.spread_range(spread, count))
    needed, *ends = (planning.runs_for(wanted, deviation, planning.POWER) for deviation in spreads)
    most = planning.MOST_RUNS
    counts = [f"{number:,}" if number <= most else f"over {most:,}" for number in (needed, *ends)]
    print(f"{pair.result.table.id} ({scale}), {pair.metric.title}: {pair.row.label} over {pair.over.label}")
    print(f"recorded: {mean:+.3g} ({interval}; n={count}), standard deviation over runs {spread:.3g}")
    least = planning.smallest_gap(spread, count, planning.POWER)
    print(f"{count} runs separate a gap of {least:.3g} or more with {100 * planning.POWER:.0f} % power")
    print(f"a gap of {wanted:.3g} needs {counts[0]} paired runs (95 % range of the spread: {counts[1]} to {counts[2]})")
    if needed > most:
        return 0
    stages = expand(source, scale, [pair.result.table.id], [pair.row.label, pair.over.label], pair.stages)
    parents = {stage.id: stage.parents.values() for stage in stages}
    seconds = expected_seconds(parents, find(runs or runs_root(), paper, scale), recorded)
    usual = statistics.fmean(seconds.values())
    one_run = {stage: seconds.get(stage, usual) for stage in parents}
    jobs = default_jobs("cpu")
    took = max(side_by_side(one_run, parents, jobs), needed * sum(one_run.values()) / jobs)
    print(f"time here: {duration(took)} for {needed} runs of {len(parents)} stages, {jobs} at a time")
    return 0


def compare(
    papers: PaperNames = (),
    *,
    scale: OneScale = None,
    runs: ExistingRuns = None,
    against: Annotated[
        Path | None, Option("compare with this folder of runs instead of the recorded runs", parse=existing_folder)
    ] = None,
    curves: Annotated[bool, "show where your training curves leave the recorded band, and the likely cause"] = False,
    strict: Annotated[
        bool, "exit with 1 if the runs don't match or nothing could be compared (docs/comparing-runs.md)"
    ] = False,
) -> int:
    """Compare your runs with the recorded ones, cell by cell.

    Without --scale, compare at all scales of the runs except smoke (with --against, smoke as well).
    """
    from assemble.reporting import code
    from assemble.reporting import compare as comparing
    from assemble.reporting.draws import draws_text
    from assemble.reporting.records import find
    from assemble.reporting.tables import load

    console, folder = files.console(), runs or runs_root()
    scales = [scale] if scale else SCALES if against else PROMOTED_SCALES
    if curves:
        left = [_compare_curves(name, each, folder, against) for name in _names(papers) for each in scales]
        if all(outcome is None for outcome in left):
            print(f"no curves to compare at {' or '.join(scales)} scale under {folder}")
            return int(strict)
        return int(strict and any(left))
    everything: list[comparing.Compared] = []
    failed = False
    for name in _names(papers):
        for level in scales:
            measured = find(folder, name, level)
            reference = find(against, name, level) if against else comparing.others_recorded(name, level, measured)
            compared = comparing.compare(load(name), level, measured, reference)
            if not compared:
                continue
            everything += compared
            mine = draws_text(r.draw for c in compared for r in c.mine.records)
            theirs = draws_text(r.draw for c in compared for r in c.reference.records)
            console.print(f"\n{paper_named(name).title}, {level}", style="bold", markup=False)
            console.print(comparing.rich_comparison(compared))
            console.print(f"measured: {mine}; reference: {theirs or 'none'}", markup=False, style="dim")
            console.print(comparing.summary(compared), markup=False)
            for line in (code.other_code(measured), reference and code.against(measured, reference)):
                console.print(line, markup=False) if line else None
            if strict and (failure := comparing.strict_failure(compared)):
                failed = True
                print(f"strict: {paper_named(name).short}, {level}: {failure}", file=sys.stderr)
    if not everything:
        console.print(f"no measured cell at {' or '.join(scales)} scale under {folder}", markup=False)
    if strict and all(c.verdict == comparing.NO_REFERENCE for c in everything):
        failed = True
        print("strict: nothing could be compared", file=sys.stderr)
    return int(failed)


def _compare_curves(name: str, scale: str, folder: Path, against: Path | None) -> bool | None:
    """Print where curves leave the recorded band. Return whether any curve does, or None if that is unknown."""
    from assemble.commands.find import print_rows
    from assemble.reporting import code
    from assemble.reporting.divergence import LEAST, diverging, recorded, with_curves
    from assemble.reporting.records import find

    paper = paper_named(name)
    mine = with_curves(find(folder, name, scale), folder)
    if not mine:
        return None
    print(f"\n{paper.title}, {scale}")
    reference = recorded(paper, scale, against)
    stages = diverging(mine, reference)
    if not stages:
        print(f"cannot be judged: fewer than {LEAST} recorded runs have curves of these stages")
        return None
    reported = [stage for stage in stages if stage.reported]
    if reported:
        rows = []
        for stage in reported:
            left = "stays inside" if stage.step is None else f"step {stage.step:.0f} of {stage.last:.0f}, {stage.curve}"
            also = [kind for kind in stage.differences if kind != stage.cause]
            rows.append((stage.stage, stage.draw.label, left, stage.reason, ", ".join(also)))
        print_rows(("stage", "draw", "leaves the band", "likely cause", "also differs"), rows)
    inside = sum(stage.step is None for stage in stages)
    chance = ", so their differences are within chance" if inside else ""
    print(f"{inside} of {len(stages)} stages stay inside the band{chance}")
    judged = [record for record, _ in mine if any(stage.stage == record.stage for stage in stages)]
    print(code.against(judged, [record for record, _ in reference]))
    if len(stages) < len(mine):
        print(f"no band (no training, or fewer than {LEAST} recorded runs): {len(mine) - len(stages)} stages")
    return inside < len(stages)


def report(
    papers: PaperNames = (),
    *,
    scale: OneScale = None,
    output: Annotated[Path | None, "file to write; default: runs/report.html"] = None,
    runs: ExistingRuns = None,
    live: Annotated[bool, "serve the page on this machine and update it during runs"] = False,
    port: Annotated[int, "port for --live; 0 takes any free port"] = 8321,
) -> int:
    """Write claims, tables, charts, curves and media to one HTML page."""
    from assemble.reporting import report as pages

    names, folder = _names(papers), runs or runs_root()
    if live and output:
        raise StageError("--live serves the page and writes no file: leave out --output")
    if live:
        from assemble.reporting.live import LiveReport

        with LiveReport(lambda stamp: pages.page(names, scale, folder, stamp), folder, port) as server:
            print(f"{server.address} shows {folder}; Ctrl-C stops the server", flush=True)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        return 0
    path = output or runs_root() / "report.html"
    if path.is_dir():
        raise StageError(f"--output {path} is a folder: name a file")
    files.write_atomically(path, pages.page(names, scale, folder))
    print(f"wrote: {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    return 0


def wandb_report(
    papers: PaperNames = (),
    *,
    offline: Annotated[bool, "only write the files; send nothing to W&B"] = False,
    entity: Annotated[str, "user or team on W&B; default: WANDB_ENTITY, or the owner of the key"] = "",
    runs: FreshRuns = None,
) -> int:
    """Publish tables and claims of each paper as a W&B report and as a view of the project.

    Without a key, only write the reports to files.
    """
    from assemble.reporting import render
    from assemble.reporting.wandb_server import why_no_key, why_unreachable

    missing = "--offline" if offline else why_no_key()
    unreachable = "" if missing else why_unreachable()
    optional_package("wandb_workspaces", "wandb-reports")
    from assemble.reporting import wandb_report as reporting

    sending = not missing and not unreachable
    owner = entity or os.environ.get("WANDB_ENTITY", "") or (reporting.default_entity() if sending else "")
    measured = [(paper_named(name), render.records_of(name, runs)) for name in _names(papers)]
    reports = {paper.name: reporting.paper_report(paper, records, owner) for paper, records in measured}
    for place, report in reports.items():
        path = runs_root() / place / "wandb-report.json"
        reporting.write(report, path)
        print(f"wrote: {path}")
    if unreachable:
        raise ReportingError(f"W&B: {unreachable}; the reports were written but not sent")
    if missing:
        rerun = "" if offline else "; rerun with a key to send them"
        print(f"the reports are in these files and were not sent: {missing}{rerun}")
        return 0
    views = [view for paper, records in measured if (view := reporting.paper_workspace(paper, records, owner))]
    for address in reporting.send([*reports.values(), *views], runs_root() / "wandb-sent.json", owner):
        print(f"sent: {address}")
    return 0


def contribute(paper: PaperName, *, scale: OneScale = None, runs: ExistingRuns = None) -> int:
    """Pack finished stages into one archive to send: records, curves and the result of `assemble verify`.

    The archive has no paths, user or host names, keys, logs or media. `assemble promote --from` reads the archive.
    """
    from assemble.reporting.promote import unfit
    from assemble.reporting.records import find
    from assemble.reporting.tables import load
    from assemble.stages import contribution

    entry, folder, scales = paper_named(paper), runs or runs_root(), (scale,) if scale else PROMOTED_SCALES
    chosen, source = [], load(entry.name)
    for record in find(folder, entry.name, strict=True):
        if record.scale in scales:
            if reason := unfit(record, source)[1]:
                print(f"left out: {record.folder(Path())}: {reason}")
            else:
                chosen.append(record)
    if not chosen:
        raise ReportingError(
            f"no finished stage of {entry.short} at {' or '.join(scales)} scale under {folder} can be sent; "
            f"`assemble reproduce {entry.short}` runs them"
        )
    packed = contribution.pack(entry, chosen, folder)
    content = contribution.archive(packed)
    path = folder / f"contribution-{entry.short}.zip"
    files.write_atomically(path, content)
    _show_contribution(entry, chosen, folder / "verify" / "result.json")
    print(f"wrote: {path} ({len(content):,} bytes, {len(packed)} files); nothing was sent")
    print('Read it, then attach it to a pull request or to the issue form "I ran it on a GPU".')
    return 0


def _show_contribution(paper: Paper, records: Sequence[Record], result: Path) -> None:
    """Print the stages, machines and revisions of a contribution, and whether `assemble verify` agreed."""
    from assemble.reporting.promote import machine_of
    from assemble.stages.contribution import verified

    given = sum(bool(record.given) for record in records)
    print(f"stages:    {len(records)}" + (f", {given} of them from the authors' weights" if given else ""))
    print(f"machine:   {', '.join(sorted({machine_of(record) for record in records}))}")
    print(f"revision:  {', '.join(sorted({str(record.git['revision'])[:12] for record in records}))}")
    if verify := verified(paper, result):
        print(f"verify:    {'agrees' if verify['papers'][paper.name]['agrees'] else 'differs'}")
    else:
        print(f"verify:    no result; `assemble verify {paper.short}` makes one to pack")


def promote(
    papers: PaperNames = (),
    *,
    scale: OneScale = None,
    runs: ExistingRuns = None,
    from_: Annotated[Path | None, "take the records of an archive that `assemble contribute` made"] = None,
    replace: Annotated[bool, "also replace records made on another machine"] = False,
) -> int:
    """Copy records of committed code into the papers' results. Exits with 1 if a record was refused."""
    from assemble.reporting import promote as promoting

    if checkout() is None:
        raise ReportingError("promote writes into the repository: run it in a clone, or set ASSEMBLE_ROOT")
    scales = (scale,) if scale else PROMOTED_SCALES
    if from_ is not None:
        if runs is not None:
            raise ReportingError("--from takes the records of the archive: leave out --runs")
        done = _promote_archive(from_, papers, scales, replace)
    else:
        done = [p for name in _names(papers) for p in promoting.promote(name, scales, runs, replace)]
    for p in done:
        print(f"{p.action}: {p.record.folder(Path())}" + (f": {p.reason}" if p.reason else ""))
    if not done:
        print(f"no record at {' or '.join(scales)} scale {'in' if from_ else 'under'} {from_ or runs or runs_root()}")
    return 1 if any(p.action == promoting.REFUSED for p in done) else 0


def _promote_archive(path: Path, papers: Sequence[str], scales: Sequence[str], replace: bool) -> list[Promotion]:
    """Check an archive, print where it comes from, and promote its records."""
    from assemble.reporting.promote import promote as promote_records
    from assemble.reporting.records import find
    from assemble.stages import contribution

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paper = contribution.unpack(path, folder)
        if papers and [paper_named(name) for name in papers] != [paper]:
            raise ReportingError(f"--from {path} holds records of {paper.short}: name this paper")
        _show_contribution(paper, find(folder, paper.name, strict=True), folder / contribution.VERIFY)
        return promote_records(paper.name, scales, folder, replace, contribution.checker(paper, folder))
