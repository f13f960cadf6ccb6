"""Print the last screen of `assemble reproduce`: the claims, whether the run matches, and where to look next."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from assemble.reporting import code
from assemble.reporting.aggregate import collect
from assemble.reporting.claims import NOT_RUN, Judged, judge_alike
from assemble.reporting.compare import compare, others_recorded, summary
from assemble.reporting.draws import draws_text
from assemble.reporting.papers import PROMOTED_SCALES, paper_named, runs_root
from assemble.reporting.progress import duration
from assemble.reporting.records import find
from assemble.reporting.render import VERDICT_COLORS, claims_markdown, fill_both, tables_markdown
from assemble.reporting.tables import load
from common.files import write_atomically


def print_summary(paper: str, scale: str, runs: Path, seconds: float, hint: str, console: Console) -> None:
    """Print the screen. Write the measured tables to `runs/<paper>/<scale>/tables.md`. `hint` is for claims not run."""
    source, about = load(paper), paper_named(paper)
    mine = find(runs, paper, scale)
    promoted = others_recorded(paper, scale, mine)
    everything = fill_both(source, scale, mine)
    filled = [f for f in everything if f.result.measured]
    if not filled:
        console.print("nothing was measured: there is no table to show")
        return
    path = runs / paper / scale / "tables.md"
    write_atomically(path, f"{claims_markdown(everything)}\n\n{tables_markdown(filled)}\n")
    kinds = (False, True)
    recorded = {(r.table.id, given): r for given in kinds for r in collect(source, scale, promoted, given=given)}
    run = [judged for f in filled for judged in f.claims if judged.verdict != NOT_RUN]
    draws = {record.draw for f in filled for record in f.result.records}
    console.print(f"\n[bold]{escape(about.title)} at {scale} scale, {draws_text(draws)}[/]   {duration(seconds)}")
    if run:
        lines = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in ("claim", "paper", "yours", "recorded (95 %)", "in your run"):
            lines.add_column(name, justify="left" if name in ("claim", "in your run") else "right")
        for judged in run:
            detail = "; ".join(filter(None, (judged.detail, judged.origin)))
            text = f"{judged.check.text}{f' ({detail})' if detail else ''}"
            margins = (
                judged.paper,
                _margin(judged),
                _margin(judge_alike(judged, recorded[judged.table, bool(judged.origin)])),
            )
            lines.add_row(*map(escape, (text, *margins)), f"[{VERDICT_COLORS[judged.verdict]}]{judged.verdict}[/]")
        console.print("", lines, sep="\n")
    total = sum(len(f.claims) for f in everything)
    if total > len(run):
        console.print(f"not run: {total - len(run)} of {total} claims{hint}", style="dim", highlight=False)
    called = Path(sys.argv[0])  # `make` calls the program without activating the environment.
    program = called if called.name == "assemble" and not called.is_absolute() else "assemble"
    if scale not in PROMOTED_SCALES:
        console.print("\nSmoke runs are never recorded, so there is nothing to compare with.", highlight=False)
        console.print("`make verify` checks that this code computes what was recorded.", highlight=False)
    elif compared := compare(source, scale, mine, promoted):
        console.print(f"\nYour run {summary(compared)}.", markup=False, highlight=False)
    if others := code.other_code(mine):
        console.print(f"\n{others}.", markup=False, highlight=False)
    options = "" if scale == "mini" else f" --scale {scale}"
    options += "" if runs.resolve() == runs_root().resolve() else f" --runs {shlex.quote(os.fspath(runs))}"
    console.print(
        f"\n  tables       {path}\n"
        f"  report       {program} report {about.short}{options}   (--live follows your runs)\n"
        f"  records      {runs / paper / scale}/*/*/record.json\n"
        f"  details      {program} compare {about.short}{options}\n"
        f"  deviations   {program} show {about.short}/{about.recipe}{options}, and the end of {path.name}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _margin(judged: Judged) -> str:
    """Return the margin as `+7.3 (5.9 to 8.6)`, or an empty text if it was not measured."""
    if judged.difference is None:
        return ""
    interval = " to ".join(f"{end:.3g}" for end in judged.interval or ())
    spread = "; ".join(filter(None, (interval, judged.rounding_note)))
    return f"{judged.difference:+.3g}" + (f" ({spread})" if spread else "")
