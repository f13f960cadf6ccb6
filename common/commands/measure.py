"""The command `assemble gpu-check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from common import files
from common.errors import StageError
from common.reporting.papers import existing_papers, names_of_papers, paper_named, runs_root


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
    command.add_argument("--runs", type=Path, default=runs_root(), help="folder of the records; default: runs")
    command.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, and keep records; exit status 1 when a paper could not be measured."""
    from rich.table import Table

    from common.reporting import records
    from common.stages.gpu_check import measure

    papers = [paper_named(name) for name in arguments.papers] or existing_papers()
    if arguments.recipe and len(papers) != 1:
        raise StageError("--recipe goes with one paper")
    for name in ("batch_size", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise StageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    heads = ("paper", "recipe", "card", "batch", "ms/step", "TFLOP/s", "of the card's own", "peak GB", "idle", "waits")
    table, terminal, failed = Table(*heads), files.console(), False
    for paper in papers:
        try:
            record, kernels = measure(
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
            print(f"{paper.name}: {error}", flush=True)
            failed = True
            continue
        path = record.folder(arguments.runs) / records.RECORD_FILE
        records.write(path, record)
        print(f"written to {path}")
        numbers = {name: value or 0.0 for name, value in record.metrics.items()}
        rate = numbers["flops"] / numbers["step_seconds"]
        step, spread = 1000 * numbers["step_seconds"], 1000 * numbers["step_seconds_std"]
        table.add_row(
            paper.title, record.recipe, *(record.hardware["accelerators"] or [record.hardware["cpu"]]),
            str(record.global_batch), f"{step:.1f} ± {spread:.1f}",
            f"{rate / 1e12:.3g}", f"{rate / numbers['matrix_rate']:.0%}", f"{numbers['peak_bytes'] / 1e9:.1f}",
            f"{numbers['idle_share']:.0%}", f"{numbers['host_waits']:g}",
        )  # fmt: skip
        times = Table("kernel", "ms/step", "share", title=f"{paper.title}: where the time goes")
        for name, seconds in list(kernels.items())[:10]:
            times.add_row(name[:120], f"{1000 * seconds:.2f}", f"{seconds / sum(kernels.values()):.0%}")
        terminal.print(times)
    if table.row_count:
        terminal.print(table)
    return int(failed)
