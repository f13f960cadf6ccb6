"""The command `assemble sweep`: one stage with several values of its fields."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from common.errors import StageError
from common.reporting.draws import use
from common.reporting.papers import example_stage, paper_named


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    add_run_options: Callable[[argparse.ArgumentParser], None],
    seeds: Callable[[str], list[int]],
) -> None:
    """Add the command to a command line; options of runs and the reading of seeds are those of its other commands."""
    command = commands.add_parser(
        "sweep",
        help="one stage with every combination of some values, over seeds; ends in a table",
        description="Run a stage with every combination of the values that follow --fields, over seeds, and print the "
        "trials, the best first. Stopped and started again, it goes on where it was; with more values, or another "
        "--sort, what is done is not done again.",
        epilog=f"Example: assemble sweep {example_stage()} --model.loss.temperature 0.05 0.07 0.1 --seeds 0 1",
    )
    command.add_argument("name", help=f"<paper>/<stage or recipe>, such as {example_stage()}")
    add_run_options(command)
    command.add_argument(
        "--seeds", type=seeds, nargs="+", default=[[0]], metavar="SEED", help="one or several; default: 0"
    )
    command.add_argument("--jobs", type=int, default=0, help="stages side by side; default: as of reproduce")
    command.add_argument("--sort", metavar="METRIC", help="default: the first that the paper's tables show")
    order = command.add_mutually_exclusive_group()
    order.add_argument("--smallest", action="store_true", help="the smallest first, as for losses and error rates")
    order.add_argument("--largest", action="store_true", help="the largest first")
    command.set_defaults(func=sweep_command)


def sweep_command(arguments: argparse.Namespace) -> int:
    """Run the trials that are left, and print all; 1 when one failed."""
    use(arguments.isa)
    from common.files import console, usable_cores
    from common.stages.plan import Selection, run_planned
    from common.stages.sweep import chosen_metric, plan_sweep, result

    if arguments.jobs < 0:
        raise StageError(f"--jobs must be at least 1, got {arguments.jobs}")
    selection = Selection(
        scale=arguments.scale,
        seeds=tuple(dict.fromkeys(seed for part in arguments.seeds for seed in part)),
        hardware=arguments.hardware,
        runs=arguments.runs.resolve(),
        data=arguments.data.resolve(),
        isa=arguments.isa,
    )
    planned, trials = plan_sweep(arguments.name, selection, arguments.rest)
    jobs = arguments.jobs or (min(usable_cores(), 4) if selection.hardware == "cpu" else 1)
    paper = paper_named(planned[-1].request.paper)
    failed = run_planned(f"{paper.title}, {len(trials)} trials", planned, selection, jobs=jobs, watch=True)
    if not any(trial.metrics() for trial in trials):
        print("no trial is done: there is no table to show")
        return 1
    metric, larger = chosen_metric(trials, arguments.sort)
    larger = arguments.largest or (larger and not arguments.smallest)
    terminal: Any = console()
    terminal.print(result(trials, metric, larger))
    print(f"sorted by {metric}, {'largest' if larger else 'smallest'} first; `assemble runs --diff` compares two")
    return 1 if failed else 0
