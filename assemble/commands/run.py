"""Define the commands that run stages: fit, test, reproduce, plan and rehearse."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from assemble.commands.data import data_root
from assemble.commands.parsing import Option, PaperName, PaperNames, Runs, Scale, StageName, at_least, parse_seed
from assemble.reporting.draws import INSTRUCTION_SETS, NATIVE, Draw, use
from assemble.reporting.papers import existing_papers, paper_named, runs_root
from assemble.reporting.wandb_server import check_environment
from assemble.stages import stopping
from common.errors import StageError
from common.files import console, usable_cores

if TYPE_CHECKING:
    from assemble.stages.request import Selection, StageRequest


@dataclass(frozen=True)
class Where:
    """The flags for a run's scale, machine and folders, and for the files that replace stages."""

    scale: Scale = "mini"
    hardware: Annotated[str, "cpu, gpu1, gpu8, slurm: a file in configs/hardware"] = "cpu"
    runs: Runs = None
    data: Annotated[Path | None, "folder of the data sets; default: $ASSEMBLE_DATA, else data"] = None
    isa: Annotated[
        str, Option("emulate the floating-point rounding of another CPU; default: native", choices=INSTRUCTION_SETS)
    ] = NATIVE
    released: Annotated[Path | None, "folder of the authors' weights, used instead of pre-training"] = None
    given: Annotated[
        Sequence[str], "stage=FILE, such as avid=avid.pth.tar: use this checkpoint instead of training the stage"
    ] = ()


@dataclass(frozen=True)
class OneStage(Where):
    """The flags of commands for one stage."""

    seed: Annotated[
        int, Option("seed of the initial weights, the order of samples and the miniature data", parse=parse_seed)
    ] = 0


@dataclass(frozen=True)
class TrainedStage(OneStage):
    """The flags of `test`."""

    checkpoint: Annotated[Path | None, "checkpoint to test; default: the stage's checkpoints/last.ckpt"] = None
    validation: Annotated[bool, "compute the loss on the validation data instead"] = False


Rerun = Annotated[bool, "after a code change: rerun the stages that older code trained, and all that start from them"]


@dataclass(frozen=True)
class ManyStages(Where):
    """The flags of commands for a paper's stages."""

    seeds: Annotated[Sequence[int], Option("one or more; default: 0", parse=parse_seed)] = (0,)
    tables: Annotated[Sequence[str], "only these tables (ids)"] = ()
    rows: Annotated[Sequence[str], "only these rows (labels or models)"] = ()
    stages: Annotated[Sequence[str], "only these stages and those they start from"] = ()
    everything: Annotated[
        bool, "also run the tables and rows that run only on request (in brackets in `assemble list PAPER`)"
    ] = False
    skip_missing: Annotated[
        bool, "leave out stages whose data or weights are missing, and the stages that start from them"
    ] = False
    rerun: Rerun = False


def fit(
    name: StageName,
    *overrides: str,
    options: OneStage,
    print_config: Annotated[bool, "print the merged configuration and stop"] = False,
    unless_done: Annotated[bool, "skip the stage if it is finished"] = False,
    rerun: Rerun = False,
) -> int:
    """Train and test one stage, and write its record.

    Any further --key value overrides the configuration, such as --trainer.max_epochs 3 or --model.loss.temperature 0.1;
    --config FILE adds a configuration file.

    `assemble list PAPER` lists stages and recipes; --print_config shows the fields that the files set.
    """
    if any(override.partition("=")[0] == "--checkpoint" for override in overrides):
        raise StageError(
            "--checkpoint is a flag of `test`; `fit` resumes automatically. To start from other weights, set "
            "--model.warm_start or --model.pretrained"
        )
    request = _one_stage(name, overrides, options, rerun)
    from assemble.stages import modes

    if print_config:
        modes.print_configuration(request)
        return 0
    return modes.fit(request, unless_done)


def test(name: StageName, *overrides: str, options: TrainedStage) -> int:
    """Test a trained stage again, without writing a record."""
    checkpoint = options.checkpoint
    request = _one_stage(name, overrides, options)
    from assemble.stages import modes

    return modes.measure(request, checkpoint, options.validation)


def _one_stage(name: str, overrides: Sequence[str], options: OneStage, rerun: bool = False) -> StageRequest:
    use(options.isa)
    from assemble.stages.request import find_request

    selection = _selection(name.partition("/")[0], options, seeds=(options.seed,), rerun=rerun)
    return find_request(name, selection, overrides)


def _many_stages(paper: str, options: ManyStages) -> Selection:
    if len(set(options.seeds)) < len(options.seeds):
        raise StageError(f"--seeds {' '.join(map(str, options.seeds))}: give each seed once")
    return _selection(paper, options)


def _selection(paper: str, options: Where, **others: Any) -> Selection:
    """Return the selection that the flags describe. Flags and fields have the same names."""
    from assemble.reporting.tables import load
    from assemble.stages.given import find_given
    from assemble.stages.request import Selection

    check_environment()
    names = {field.name for field in fields(Selection)}
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(options).items() if name in names}
    values["given"], values["absent"] = find_given(load(paper), options.scale, options.released, options.given)
    values["runs"] = (options.runs or runs_root()).resolve()
    values["data"] = (options.data or data_root()).resolve()
    return Selection(**{**values, **others})


Jobs = Annotated[
    int,
    Option(
        "number of stages to run in parallel, one thread each; default: one per core, at most 4; on GPUs 1",
        parse=at_least(1),
    ),
]


def reproduce(
    paper: PaperName,
    *,
    options: ManyStages,
    jobs: Jobs = 0,
    keep: Annotated[bool, "after a code change: use finished stages as they are, and resume unfinished ones"] = False,
) -> int:
    """Run a paper's unfinished stages. Prints each table when it is complete, and the claims at the end."""
    use(options.isa)
    from assemble.reporting.summary import print_summary
    from assemble.stages.plan import default_jobs
    from assemble.stages.reproduce import run_paper

    began = time.monotonic()
    if options.rerun and keep:
        raise StageError("--rerun and --keep exclude each other: leave out one")
    selection = _many_stages(paper, options)
    name = paper_named(paper).name
    printed: set[str] = set()
    side_by_side = jobs or default_jobs(selection.hardware)
    with stopping.listening():
        failed = run_paper(
            name,
            selection,
            jobs=side_by_side,
            keep=keep,
            finished=lambda stage: print_filled(name, stage, selection, printed),
            skip_missing=options.skip_missing,
        )
        chosen = options.tables or options.rows or options.stages or options.everything
        hint = "" if failed or chosen else " (--everything runs all)"
        print_summary(name, selection.scale, selection.runs, time.monotonic() - began, hint, console())
    return 1 if failed else 0


def print_filled(paper: str, stage: str, selection: Selection, printed: set[str]) -> None:
    """Print the tables that a finished stage completes. Add their ids to `printed`."""
    from assemble.reporting import render
    from assemble.reporting.tables import entries, load
    from assemble.stages.plan import chosen

    source, given = load(paper), selection.given
    trained = {instance.id for instance in chosen(paper, selection)[0]} - {*given}
    touched = {t.id for t, _, _ in entries(source, stage, selection.scale, given) if selection.scale in t.scales}
    waiting = [t.id for t in source.tables if t.id in touched - printed and t.id in (selection.tables or touched)]
    draws = [Draw(seed, selection.isa) for seed in selection.seeds]
    if waiting:
        for filled in render.fill_both(source, selection.scale, render.records_of(paper, selection.runs), waiting):
            if filled.result.complete(draws, trained):
                render.print_table(filled, console(), measured_only=True)
                printed.add(filled.result.table.id)


def plan(
    paper: PaperName,
    *,
    options: ManyStages,
    format_: Annotated[str, Option(choices=("text", "shell", "slurm"))] = "text",
    estimate: Annotated[
        bool,
        "estimate memory, steps and GPU hours of every stage; with --given or --released only hours, cheapest first",
    ] = False,
    utilization: Annotated[float, "with --estimate: assumed fraction of the GPU's peak throughput"] = 0.3,
) -> int:
    """Print a paper's stages, or print the unfinished ones as shell or SLURM commands."""
    from assemble.reporting.tables import load
    from assemble.stages.given import given_lines
    from assemble.stages.needs import needs_of
    from assemble.stages.plan import plan_stages, render_plan

    if not 0 < utilization <= 1:
        raise StageError(f"--utilization must be above 0 and at most 1, got {utilization}")
    if estimate and format_ != "text":
        raise StageError(f"--estimate prints text: leave out --format {format_}")
    selection = _many_stages(paper, options)
    planned = plan_stages(paper, selection)
    needs = needs_of(planned)
    planned = needs.runnable if options.skip_missing else planned
    if estimate:
        from assemble.stages import estimate as estimating

        waiting = [item for item in planned if item.request.given is None]
        runs = {f"{item.request.stage} {item.request.draw}": item.run for item in waiting}
        if selection.given:
            verdicts = dict(zip(runs, map(needs.verdict, waiting)))
            first = estimating.cheapest_first(runs, utilization, verdicts)
            lines: Iterable[str] = itertools.chain(first, ["", *needs.lines()])
        else:
            lines = estimating.estimate_lines(runs, utilization)
            if selection.hardware == "cpu" and selection.scale in ("paper", "single"):
                print("--hardware cpu: estimates for one GPU that takes the whole batch; --hardware gpu8 has eight")
        for line in lines:
            print(line, flush=True)
    else:
        print(render_plan(planned, format_))
        if (files := given_lines(load(paper), selection.given, selection.absent)) and format_ == "text":
            print("\n".join(["", *files]))
        if (table := needs.lines()) and (format_ == "text" or needs.blocked):
            # With --format, standard output is a script, so print messages to standard error.
            print("\n".join(["", *table]), file=sys.stdout if format_ == "text" else sys.stderr)
    return 0


def rehearse(
    papers: PaperNames = (),
    *,
    scale: Annotated[str, Option(choices=("paper", "single"))] = "paper",
    stages: Annotated[Sequence[str], "only these stages and those they start from"] = (),
    folder: Annotated[Path | None, "folder of data and runs; default: runs/rehearsal"] = None,
    released: Annotated[
        bool, "only stages that start from the authors' weights; uses random weights in the same layout"
    ] = False,
    jobs: Jobs = 0,
) -> int:
    """Check that the published recipes run, on tiny data sets in the real layouts.

    Released weights are replaced by random ones. configs/<paper>/rehearsal.yaml lists the reduced sizes.
    Finished stages are skipped.
    """
    from assemble.reporting import render
    from assemble.reporting.progress import duration
    from assemble.reporting.tables import load
    from assemble.stages import rehearse as rehearsal
    from assemble.stages.paper_modules import optional_part
    from assemble.stages.recipes import scales_of
    from assemble.stages.request import Selection

    root = (folder or runs_root() / "rehearsal").resolve()
    names = [paper_named(name).name for name in papers] or [
        paper.name
        for paper in existing_papers()
        if hasattr(optional_part(paper.name, "rehearsal"), "write_released" if released else "write_datasets")
        and scale in scales_of(paper.name)
    ]
    if stages and len(names) > 1:
        raise StageError("--stages needs one paper: name it")
    failed, lines = 0, []
    with stopping.listening():
        for name in names:
            title = paper_named(name).title
            data = root / "data" / name
            wanted = Selection(scale, runs=root, data=data, stages=tuple(stages), rehearsal=True, rerun=True)
            entries = rehearsal.rehearse(name, wanted, jobs or min(usable_cores(), 4), released)
            print("\n".join([f"Rehearsal of {title}", *map(str, entries)]))
            measured = [entry.record for entry in entries if entry.record is not None]
            for filled in render.fill(load(name), scale, measured, given=True):
                if filled.result.measured:
                    render.print_table(filled, console(), measured_only=True)
            problems = sum(bool(entry.problem) for entry in entries)
            took = duration(sum(entry.record.wall_seconds for entry in entries if entry.record is not None))
            lines.append(f"{title}: {len(entries) - problems} of {len(entries)} stages passed, {took} in all")
            failed += problems
    print("\n".join(lines))
    return 1 if failed else 0
