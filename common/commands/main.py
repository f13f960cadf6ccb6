"""The `assemble` command. Parsing and help import neither torch nor lightning."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
from common.commands.data import add_parsers as add_data_parsers
from common.commands.data import data_root
from common.commands.find import add_parsers as add_finding_parsers
from common.commands.models import add_parsers as add_use_parsers
from common.commands.runs import add_parsers as add_runs_parsers
from common.errors import Preempted, ReportingError, StageError, is_ours, nearest, printable
from common.files import console, described, write_atomically
from common.reporting.draws import INSTRUCTION_SETS, NATIVE, Draw, use
from common.reporting.papers import (
    PROMOTED_SCALES,
    SCALES,
    example_stage,
    existing_papers,
    names_of_papers,
    paper_named,
    runs_root,
)
from common.stages import stopping
from common.stages.rehearse import add_parsers as add_rehearse_parsers

if TYPE_CHECKING:
    from common.stages.plan import Selection

RUN_COMMANDS = {
    "fit": "run one stage: train it (where it trains), test it, write its record",
    "validate": "loss of a trained stage on its validation data",
    "test": "measure a trained stage again",
    "predict": "write a trained stage's outputs for its held-out data",
}


CODE = Path(common.__file__).resolve().parents[1]

#: Seeds that numpy takes.
LARGEST_SEED = 2**32 - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a sign, such as that between a mean and its spread, gets a question mark.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has gone, as `head` does; the interpreter must not try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _check_neighbor() -> None:
    """Refuse a package `papers` that is not beside this one: that of the current folder, or of another distribution.

    Raises:
        StageError: it says which one Python finds.
    """
    ours = CODE / "papers"
    spec = importlib.util.find_spec("papers")
    found = Path(spec.origin).resolve() if spec and spec.origin else None
    if found != ours / "__init__.py":
        raise StageError(
            f"`import papers` finds {found or 'no package'}, and this suite needs its own {ours}: rename that file or "
            "folder, or run the command in another one"
        )


def _at_home(value: Any) -> Any:
    """A path below the home folder where it begins with `~`, which a shell leaves as it is after `--output=`."""
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _run(argv: Sequence[str] | None) -> int:
    try:
        _check_neighbor()
        parser = build_parser()
        given = list(sys.argv[1:] if argv is None else argv)
        if given[:1] == ["help"]:
            given = [*given[1:2], "--help"]
        if given and not given[0].startswith("-") and given[0] not in _subcommands(parser):
            raise StageError(f"there is no command {given[0]!r}: {nearest(given[0], _subcommands(parser))}; see --help")
    except (StageError, ReportingError) as error:
        print(f"assemble: {printable(str(error))}", file=sys.stderr)
        return 2
    arguments, rest = parser.parse_known_args(given)
    if "files" in arguments and not any(text.startswith("-") for text in rest):
        # Before Python 3.12.7, files that come after an option are left over.
        arguments.files += [Path(text) for text in rest]
        rest = []
    if rest and arguments.command not in {*RUN_COMMANDS, "gpu-check"}:
        named = {name for paper in existing_papers() for name in (paper.name, paper.short)}
        one = " (it takes one paper; run it for each)" if named & set(rest) else ""
        _subcommands(parser)[arguments.command].error(f"unrecognized arguments: {' '.join(rest)}{one}")
    arguments.rest = rest
    for name, value in vars(arguments).items():
        setattr(arguments, name, [*map(_at_home, value)] if isinstance(value, list) else _at_home(value))
    from common.stages.configuration import ConfigurationError

    try:
        return int(arguments.func(arguments) or 0)
    except (ConfigurationError, StageError, ReportingError) as error:
        print(f"assemble: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("ASSEMBLE_TRACEBACK"):
            raise
        hint = "" if _explained(error) else "\n(ASSEMBLE_TRACEBACK=1 shows where)"
        print(f"assemble: {printable(described(error))}{hint}", file=sys.stderr)
        return 1
    except Preempted as stop:
        return stop.status
    except KeyboardInterrupt:
        return 130


def _explained(error: Exception) -> bool:
    """Whether an error was worded by this code for its user: it is of our own class, or our own line raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(place.filename).resolve()
    ours = any(path.is_relative_to(CODE / package) for package in ("common", "papers"))
    raised = ours and (place.line or "").startswith("raise ")
    return is_ours(error) or raised or (isinstance(error, OSError) and error.errno is None)  # the system's are numbered


def _subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    names = names_of_papers()
    parser = argparse.ArgumentParser(
        prog="assemble",
        description="Re-run CVPR 2021 papers on joint representations and regenerate their tables.",
        epilog=f"Papers: {names}. Scales: smoke (seconds), mini (minutes on a CPU), single (a day on one GPU), paper "
        "(the published recipe).",
    )
    parser.add_argument("--version", action="version", version=f"assemble {common.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    for name, text in RUN_COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. Any further --key value overrides the configuration, such as "
            "--trainer.max_epochs 3 or --model.loss.temperature 0.1; --config FILE adds a layer.",
            epilog="`assemble list PAPER` names stages and recipes; --print_config shows every field that may be set, "
            "--model.help, --data.help and --trainer.help those of a part.",
        )
        command.add_argument("name", help=f"<paper>/<stage or recipe>, such as {example_stage()}")
        _add_run_options(command)
        command.add_argument("--seed", type=_seed, default=0, help="seed of weights, order and miniature data")
        command.add_argument("--print_config", action="store_true", help="print the merged configuration and stop")
        command.add_argument(
            "--checkpoint", type=Path, help="of test, validate and predict: weights instead of the stage's own"
        )
        if name == "fit":
            command.add_argument("--unless_done", action="store_true", help="leave a finished stage as it is")
        command.set_defaults(func=_run_command)

    command = commands.add_parser("reproduce", help="run all stages of a paper that have not run, print its tables")
    command.add_argument("paper", help=names)
    _add_run_options(command)
    _add_selection(command)
    command.add_argument(
        "--jobs",
        type=int,
        default=0,
        help="stages side by side, one thread each; default: the cores, at most 4, on the CPU, and 1 on GPUs",
    )
    command.set_defaults(func=_reproduce_command)

    command = commands.add_parser("plan", help="print the stages and what is left, also as shell or SLURM lines")
    command.add_argument("paper", help=names)
    _add_run_options(command)
    _add_selection(command)
    command.add_argument("--format", choices=("text", "shell", "slurm"), default="text")
    _add_estimate(command)
    command.set_defaults(func=_plan_command)

    add_finding_parsers(commands)
    add_runs_parsers(commands)

    from common.commands.measure import add_parsers as add_measuring_parsers
    from common.commands.reports import add_parsers

    add_parsers(commands)
    add_measuring_parsers(commands)

    add_data_parsers(commands)

    add_use_parsers(commands)

    add_rehearse_parsers(commands)

    command = commands.add_parser("doctor", help="what this machine has and lacks: devices, keys, data, versions")
    command.add_argument("--data", type=Path, default=data_root(), help="folder of the data sets; default: data")
    command.set_defaults(func=_doctor_command)
    return parser


def _add_run_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scale", choices=SCALES, default="mini", help="default: mini")
    command.add_argument(
        "--hardware", default="cpu", help="cpu (the default), gpu1, gpu8, slurm: a file in configs/hardware"
    )
    command.add_argument("--runs", type=Path, default=runs_root(), help="folder of the runs; default: runs")
    command.add_argument("--data", type=Path, default=data_root(), help="folder of the data sets; default: data")
    command.add_argument(
        "--isa",
        choices=INSTRUCTION_SETS,
        default=NATIVE,
        help="instruction set whose rounding to take, in place of another processor; default: this one's own",
    )


def _seed(text: str) -> int:
    # Digits alone: int() also takes "1_0" and signs.
    if not re.fullmatch(r"[0-9]+", text) or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: it is a whole number from 0 to {LARGEST_SEED}")
    return int(text)


def _seeds(text: str) -> list[int]:
    """Seeds with commas between them; several such may follow each other."""
    return [_seed(part) for part in text.split(",")]


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seeds", type=_seeds, nargs="+", default=[[0]], metavar="SEED", help="one or several; default: 0"
    )
    command.add_argument("--tables", nargs="+", help="only these tables (ids)")
    command.add_argument("--rows", nargs="+", help="only these rows (labels or models)")
    command.add_argument("--stages", nargs="+", help="only these stages and what they start from")
    command.add_argument(
        "--everything", action="store_true", help="also the tables and rows that are made by request (assemble list)"
    )


def _add_estimate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--estimate", action="store_true", help="memory, operations, steps and GPU hours of every stage, without a GPU"
    )
    command.add_argument(
        "--card", nargs="+", default=["a100", "h100"], help="v100, rtx4090, a100, h100, h200; default: a100 h100"
    )
    command.add_argument(
        "--utilization", type=float, default=0.3, help="share of a card's matrix rate that is reached; default: 0.3"
    )


def _selection(arguments: argparse.Namespace) -> Any:
    from common.stages.plan import Selection

    def chosen(name: str) -> tuple[str, ...] | None:
        values = getattr(arguments, name, None)
        return tuple(values) if values else None

    seeds = [seed for part in arguments.seeds for seed in part] if "seeds" in arguments else [arguments.seed]
    return Selection(
        scale=arguments.scale,
        # One that is given twice is meant once.
        seeds=tuple(dict.fromkeys(seeds)),
        hardware=arguments.hardware,
        runs=arguments.runs.resolve(),
        data=arguments.data.resolve(),
        tables=chosen("tables"),
        rows=chosen("rows"),
        stages=chosen("stages"),
        isa=arguments.isa,
        everything=getattr(arguments, "everything", False),
    )


def _run_command(arguments: argparse.Namespace) -> int:
    use(arguments.isa)
    from common.stages.single import find_request, print_configuration, run_mode

    # As with LightningCLI, `--model.help` asks what may be set.
    sections = [text[2:-5] for text in arguments.rest if text.startswith("--") and text.endswith(".help")]
    rest = [text for text in arguments.rest if not (text.startswith("--") and text.endswith(".help"))]
    request = find_request(arguments.name, _selection(arguments), rest)
    if arguments.print_config or sections:
        print_configuration(request, sections)
        return 0
    if arguments.checkpoint is not None and arguments.checkpoint.is_dir():
        raise StageError(
            f"--checkpoint {arguments.checkpoint} is a folder: {arguments.command} takes a checkpoint, such as "
            "checkpoints/last.ckpt of a stage; exports are for embed, retrieve, generate, answer, caption and export"
        )
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        raise StageError(f"--checkpoint {arguments.checkpoint} does not exist")
    return run_mode(arguments.command, request, arguments.checkpoint, getattr(arguments, "unless_done", False))


def _reproduce_command(arguments: argparse.Namespace) -> int:
    use(arguments.isa)
    from common.stages.plan import default_jobs, reproduce

    selection = _selection(arguments)
    if arguments.jobs < 0:
        raise StageError(f"--jobs must be at least 1, got {arguments.jobs}")
    jobs = arguments.jobs or default_jobs(selection.hardware)
    paper = paper_named(arguments.paper).name
    printed: set[str] = set()

    def finished(stage: str) -> None:
        print_filled(paper, stage, selection, printed)

    with stopping.listening():
        failed = reproduce(paper, selection, jobs=jobs, finished=finished, watch=True)
        show_tables(paper, selection.scale, selection.runs, printed)
    return 1 if failed else 0


def print_filled(paper: str, stage: str, selection: Selection, printed: set[str]) -> None:
    """Print the tables whose last cell a stage has filled, and add their ids to those `printed`."""
    from common.reporting import render
    from common.reporting.tables import entries, expand, load

    source = load(paper)
    wanted = selection.tables, selection.rows, selection.stages, selection.everything
    made = {instance.id for instance in expand(source, selection.scale, *wanted)}
    touched = {table.id for table, _, _ in entries(source, stage, selection.scale) if selection.scale in table.scales}
    waiting = [t.id for t in source.tables if t.id in touched - printed and t.id in (selection.tables or touched)]
    draws = [Draw(seed, selection.isa) for seed in selection.seeds]
    if waiting:
        for filled in render.fill(source, selection.scale, render.records_of(paper, selection.runs), waiting):
            if filled.result.complete(draws, made):
                render.print_table(filled, console())
                printed.add(filled.result.table.id)


def show_tables(paper: str, scale: str, runs: Path, printed: Collection[str] = ()) -> None:
    """Print a paper's tables from the records in `runs`, and write them to `runs/<paper>/<scale>/tables.md`.

    Those already `printed` (ids) are not printed again.
    """
    from common.reporting import render
    from common.reporting.compare import compare_paper, summary
    from common.reporting.tables import load

    filled = [f for f in render.fill(load(paper), scale, render.records_of(paper, runs)) if f.result.measured]
    if not filled:
        print("nothing was measured: there is no table to show")
        return
    render.print_tables(filled, console(), printed)
    path = runs / paper / scale / "tables.md"
    write_atomically(path, render.tables_markdown(filled) + "\n")
    short = paper_named(paper).short
    where = "" if runs.resolve() == runs_root().resolve() else f" --runs {shlex.quote(os.fspath(runs))}"
    kept = f", `assemble promote {short}{where}` keeps the records" if scale in PROMOTED_SCALES else ""
    print(f"written to {path}; `assemble report{where}` makes a page of it{kept}")
    if compared := compare_paper(paper, scale, runs):
        print(f"{summary(compared)} (`assemble compare {short} --scale {scale}{where}`)")


def _plan_command(arguments: argparse.Namespace) -> int:
    from common.stages.plan import plan, render_plan

    if arguments.estimate:
        from common.stages.estimate import CARDS, estimate_lines

        if not 0 < arguments.utilization <= 1:
            raise StageError(f"--utilization is a share of the card's rate, from 0 to 1, got {arguments.utilization}")
        for name in arguments.card:
            if name not in CARDS:
                raise StageError(f"--card {name}: {nearest(name, CARDS)}")
        planned = plan(arguments.paper, _selection(arguments))
        runs = {f"{item.request.stage} {item.request.draw}": item.run for item in planned}
        for line in estimate_lines(runs, [CARDS[name] for name in arguments.card], arguments.utilization):
            print(line, flush=True)
        return 0
    print(render_plan(plan(arguments.paper, _selection(arguments)), arguments.format))
    return 0


def _doctor_command(arguments: argparse.Namespace) -> int:
    from common.commands.doctor import examine

    return examine(arguments.data.resolve(), [paper.name for paper in existing_papers()])


if __name__ == "__main__":
    sys.exit(main())
