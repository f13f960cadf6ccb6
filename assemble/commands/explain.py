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
        Path | None, Option("explain this run (or folder of runs) instead of the recorded runs", parse=existing_folder)
    ] = None,
    fields: Annotated[bool, "also list the sizes that differ from the paper"] = False,
) -> int:
    """Explain where a number in a table comes from: draws, stages, code and command.

    Without --scale, use the largest measured scale. `assemble list PAPER` shows the names; case does not matter.
    """
    from assemble.reporting import code
    from assemble.reporting.aggregate import from_whose_weights
    from assemble.reporting.render import measured_text, published_text
    from assemble.stages import explain as explaining

    origin = explaining.explain(paper, table, row, metric, scale, run)
    decimals, recorded = origin.metric.decimals, origin.recorded
    print(f"{origin.metric.title} of {origin.row.label}, {origin.scale}: {origin.table.title}")
    at = " at paper scale" if recorded.published else ""
    print(f"  published  {published_text(recorded, decimals)}{at} ({origin.row.source or origin.table.source})")
    if not origin.stages:
        print(f"  not measured at {origin.scale}")
        return 0
    origin_text = f" ({from_whose_weights(origin.records)})" if origin.given else ""
    print(f"  recorded   {measured_text(recorded, decimals)}{origin_text if recorded.values else ''}")
    if run is not None:
        print(f"  this run   {measured_text(origin.cell, decimals)}{origin_text}")
    draws = ", ".join(f"seed {draw.label}: {value:.{decimals}f}" for draw, value in sorted(origin.cell.values.items()))
    if draws:
        print(textwrap.indent(textwrap.fill(draws, 90), " " * 13))

    print(f"\nStages (configs/{origin.source.paper}/RECIPE.yaml)")
    print_rows(("stage", "recipe", "starts from", "configuration", "minutes", "revision"), origin.stage_rows())
    print(code.other_code(origin.records) or _KNOWN[all(record.code for record in origin.records)])
    if origin.neighbor:
        print(f"\nDiffers from the row {origin.neighbor.label} in")
        rows = origin.differences_from(origin.neighbor) or [("nothing", "", "")]
        print_rows(("field", origin.row.label, origin.neighbor.label), _short(rows))
    if origin.scale != "paper":
        print("\nDiffers from the paper in")
        differing = origin.differences_from_paper()
        shown = [row for declared, *row in differing if declared or fields]
        print_rows(("stage", "field", origin.scale, "paper"), _short(shown))
        sizes = sum(not declared for declared, *_ in differing)
        if sizes and not fields:
            print(f"and {sizes} sizes (--fields lists them)")
        if origin.stand_ins:
            print(f"stages trained in place of released files: {', '.join(origin.stand_ins)}")

    print(f"\nMetric {origin.metric.key}, {'higher' if origin.metric.better == 'up' else 'lower'} is better")
    print(f"  measured by {', '.join(origin.measuring_classes())}; protocol: docs/papers/{origin.source.paper}.md")
    print("\nReproduce")
    print("\n".join(f"  {command}" for command in origin.commands()))
    return 0


def _short(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[text if len(text) <= 48 else f"{text[:47]}…" for text in row] for row in rows]
