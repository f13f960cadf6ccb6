"""The command `assemble gpu-check`; thin, and quick to start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import files
from common.errors import StageError
from common.reporting.papers import existing_papers, names_of_papers, paper_named


def add_parsers(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a command line."""
    names = names_of_papers()
    command = commands.add_parser(
        "gpu-check",
        help="measure every paper's training step on this machine's GPU, without data",
        description="Train every paper for some steps at its published width on made-up batches: time of a step, share "
        "of the card's own rate, memory, kernels. Further --key value override the recipe.",
    )
    command.add_argument("papers", nargs="*", metavar="paper", help=f"{names}; default: all")
    command.add_argument("--recipe", help="a recipe of the paper instead of its main one")
    command.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    command.add_argument("--small", action="store_true", help="the smallest widths, to try the command")
    command.add_argument("--precision", default="bf16-mixed", help="of the trainer; default: %(default)s")
    command.add_argument("--batch-size", type=int, help="samples on the GPU; default: an eighth of the recipe's")
    command.add_argument("--steps", type=int, default=20, help="steps that are timed; default: 20")
    command.add_argument("--output", type=Path, help="folder of the measurements; default: docs/gpu, for docs/gpu.md")
    command.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and keep what was measured; exit status 1 when a paper could not be."""
    from rich.table import Table

    from common.reporting import gpu
    from common.stages.gpu_check import measure

    papers = [paper_named(name) for name in arguments.papers] or existing_papers()
    if arguments.recipe and len(papers) != 1:
        raise StageError("--recipe goes with one paper")
    for name in ("batch_size", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise StageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    found: list[Any] = []
    failed = 0
    # What was measured on the CPU, or in small, is no result.
    kept = arguments.output is not None or (arguments.device == "cuda" and not arguments.small)
    where = (arguments.output or gpu.folder()) if kept else None
    for paper in papers:
        try:
            step = measure(
                paper.name,
                arguments.recipe,
                device=arguments.device,
                precision=arguments.precision,
                scale="smoke" if arguments.small else "paper",
                size=arguments.batch_size or (4 if arguments.small else None),
                warm_up=1 if arguments.small else 5,
                steps=arguments.steps,
                arguments=arguments.rest,
            )
        except StageError as error:
            # A paper that lacks the file for this is named already.
            told = str(error)
            print(told if told.startswith(paper.name) else f"{paper.name}: {told}", flush=True)
            failed += 1
            continue
        found.append(step)
        if where is not None:
            print(f"written to {gpu.write(step, where)}")
    if not found:
        return 1
    table = Table(*gpu.HEADS)
    for step in found:
        table.add_row(*gpu.cells(step))
    terminal = files.console()
    terminal.print(table)
    for step in found:
        kernels = Table("kernel", "ms/step", "share", "big", title=f"{step.paper}: where the time goes")
        for kernel in step.kernels:
            big = "yes" if kernel["big"] else ""
            kernels.add_row(kernel["name"], f"{1000 * kernel['seconds']:.2f}", f"{kernel['share']:.0%}", big)
        terminal.print(kernels)
    if where is not None and arguments.output is None:
        print(f"{'wrote' if gpu.render() else 'up to date'}: {gpu.page()}")
    return 1 if failed else 0
