"""The command `assemble explain`, which doesn't import torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from assemble.commands.find import print_rows
from assemble.commands.parsing import OneScale, Option, PaperName, existing_folder

_KNOWN = {True: "code: unchanged since", False: "code: unknown, since the records are older than fingerprints of code"}


def explain(
    paper: PaperName,
    table: Annotated[str, "id or title"],
    row: Annotated[str, "label or model"],
    metric: Annotated[str, "id, label or key"],
    *,
    scale: OneScale = None,
    run: Annotated[
        Path | None, Option("a run's folder, or a folder of runs, instead of the records", parse=existing_folder)
    ] = None,
    fields: Annotated[bool, "also list the sizes that differ from the paper"] = False,
) -> int:
    """Explain where a number in a table comes from: draws, stages, code and command.

    Without --scale, use the largest measured scale. `assemble list PAPER` shows the names; case does not matter.
    """
    from assemble.reporting import code
    from assemble.reporting.render import measured_text, published_text
    from assemble.stages import explain as explaining

    found = explaining.explain(paper, table, row, metric, scale, run)
    decimals, recorded = found.metric.decimals, found.recorded
    print(f"{found.metric.title} of {found.row.label}, {found.scale}: {found.table.title}")
    at = " at paper scale" if recorded.published else ""
    print(f"  published  {published_text(recorded, decimals)}{at} ({found.row.source or found.table.source})")
    if not found.stages:
        print(f"  not measured at {found.scale}")
        return 0
    print(f"  recorded   {measured_text(recorded, decimals)}")
    if run is not None:
        print(f"  this run   {measured_text(found.cell, decimals)}")
    draws = ", ".join(f"seed {draw.label}: {value:.{decimals}f}" for draw, value in sorted(found.cell.values.items()))
    if draws:
        print(textwrap.indent(textwrap.fill(draws, 90), " " * 13))

    print(f"\nStages (configs/{found.source.paper}/RECIPE.yaml)")
    print_rows(("stage", "recipe", "starts from", "configuration", "minutes", "revision"), found.stage_rows())
    print(code.other_code(found.records) or _KNOWN[all(record.code for record in found.records)])
    if found.neighbor:
        print(f"\nDiffers from the row {found.neighbor.label} in")
        rows = found.differences_from(found.neighbor) or [("nothing", "", "")]
        print_rows(("field", found.row.label, found.neighbor.label), _short(rows))
    if found.scale != "paper":
        print("\nDiffers from the paper in")
        differing = found.differences_from_paper()
        print_rows(("stage", "field", found.scale, "paper"), _short(row for more, *row in differing if more or fields))
        sizes = sum(not more for more, *_ in differing)
        if sizes and not fields:
            print(f"and {sizes} sizes, which --fields lists")
        if found.stand_ins:
            print(f"stages that replace released files: {', '.join(found.stand_ins)}")

    print(f"\nMetric {found.metric.key}, {'higher' if found.metric.better == 'up' else 'lower'} is better")
    print(f"  measured by {', '.join(found.measuring_classes())}; protocol: docs/papers/{found.source.paper}.md")
    print("\nReproduce")
    print("\n".join(f"  {command}" for command in found.commands()))
    return 0


def _short(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[text if len(text) <= 48 else f"{text[:47]}…" for text in row] for row in rows]
