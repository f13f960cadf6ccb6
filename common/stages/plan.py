"""Which stages a paper needs, which of them are done, and running the rest in order.

Planning and skipping import neither torch nor lightning; a plan for SLURM does, to check its configurations.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import Preempted, RunsElsewhereError, StageError, is_ours, printable
from common.files import described, usable_cores
from common.reporting import records
from common.reporting.draws import NATIVE, Draw
from common.reporting.papers import paper_named, working_folder
from common.reporting.progress import Watch, duration
from common.reporting.results import find_promoted
from common.reporting.runs import headline
from common.reporting.tables import StageInstance, TablesError, expand, load
from common.stages import stopping
from common.stages.configuration import RunConfiguration
from common.stages.run import Parent, StageRequest, finished_record, recorded_lineage


@dataclass(frozen=True)
class Selection:
    """What the user asked for: scale, draws, machine, folders, which part of the tables, whether it is a rehearsal.

    Without `everything`, what the tables mark as made by request is left out unless it is named.
    """

    scale: str = "mini"
    seeds: tuple[int, ...] = (0,)
    hardware: str = "cpu"
    runs: Path = Path("runs")
    data: Path = Path("data")
    tables: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    stages: tuple[str, ...] | None = None
    rehearsal: bool = False
    isa: str = NATIVE
    everything: bool = False


@dataclass(frozen=True)
class Planned:
    """A stage with what has to be done about it.

    Attributes:
        request: the stage.
        run: its merged configuration.
        lineage: hash of the configuration and of all that it descends from.
        done: whether its record is there and still fits.
        reason: why it runs or is skipped, for people.
    """

    request: StageRequest
    run: RunConfiguration
    lineage: str
    done: bool
    reason: str


def plan(paper: str, selection: Selection) -> list[Planned]:
    """All stages of a paper in the order in which they can run, for every seed.

    Raises:
        ConfigurationError, TablesError: before anything runs.
    """
    name = paper_named(paper).name
    instances = expand(name, selection.scale, selection.tables, selection.rows, selection.stages, selection.everything)
    if not instances and not any(selection.scale in table.scales for table in load(name).tables):
        raise TablesError(f"{paper_named(name).title} has no table at the scale {selection.scale!r}")
    planned: list[Planned] = []
    for seed in selection.seeds:
        lineages: dict[str, str] = {}
        for instance in instances:
            request = request_for(name, instance, selection, seed, lineages)
            run = request.configuration()
            lineage = request.lineage_hash(run)
            lineages[instance.id] = lineage
            done, reason = state_of(request, lineage)
            planned.append(Planned(request, run, lineage, done, reason))
    return planned


def by_request(paper: str, selection: Selection) -> list[str]:
    """The tables, and rows of other tables, that a selection leaves out because they are made by request."""
    if selection.everything or selection.tables or selection.rows or selection.stages:
        return []
    left_out = []
    for table in load(paper_named(paper).name).tables:
        rows = [row.label for row in table.rows if selection.scale in row.by_request]
        if selection.scale in table.by_request:
            left_out.append(table.id)
        elif rows:
            left_out.append(f"of {table.id} the rows {', '.join(map(repr, rows))}")
    return left_out


def request_for(
    paper: str,
    instance: StageInstance,
    selection: Selection,
    seed: int,
    lineages: dict[str, str],
    arguments: Sequence[str] = (),
) -> StageRequest:
    """The request of one stage instance; `lineages` holds those of its parents."""
    parents = {
        field: Parent(
            parent,
            records.run_folder(selection.runs, paper, selection.scale, Draw(seed, selection.isa), parent),
            lineages[parent],
        )
        for field, parent in instance.parents.items()
    }
    return StageRequest(
        paper=paper,
        stage=instance.id,
        recipe=instance.recipe,
        job=instance.job,
        row=instance.row,
        scale=selection.scale,
        hardware=selection.hardware,
        seed=seed,
        runs=selection.runs,
        data=selection.data,
        parents=parents,
        overrides=instance.overrides,
        arguments=tuple(arguments),
        rehearsal=selection.rehearsal,
        isa=selection.isa,
    )


def state_of(request: StageRequest, lineage: str) -> tuple[bool, str]:
    """Whether a stage is done, and why it runs or is skipped."""
    record = finished_record(request, lineage)
    if record is not None:
        return True, f"done {record.started[:16].replace('T', ' ')} in {duration(record.wall_seconds)}"
    if (path := request.directory / "record.json").is_file():
        try:
            records.read(path)
        except records.RecordError as error:
            records.warn(error)
            return False, "its record is malformed"
        return False, "its configuration or that of a stage it starts from changed"
    if (request.directory / "checkpoints" / "last.ckpt").is_file():
        if recorded_lineage(request.directory / "identity.json") != lineage:
            return False, "was stopped, and its configuration or that of a stage it starts from changed: starts anew"
        return False, "was stopped, goes on from its last checkpoint"
    return False, "not run yet"


def _total(expected: Sequence[float | None]) -> float | None:
    """Sum over stages, an unknown one as long as the others are on average; None where all are unknown."""
    known = [seconds for seconds in expected if seconds is not None]
    return sum(known) * len(expected) / len(known) if known else None if expected else 0.0


def seconds_of(planned: Sequence[Planned]) -> list[float | None]:
    """Expected time of every stage, see `expected_seconds`."""
    if not planned:
        return []
    request = planned[0].request
    here = records.find(request.runs, request.paper, request.scale, malformed=records.warn)
    recorded = find_promoted(request.paper, request.scale)
    return records.expected_seconds([item.request.stage for item in planned], here, recorded, request.isa)


def default_jobs(hardware: str) -> int:
    """How many stages run side by side unless `--jobs` says otherwise."""
    return min(usable_cores(), 4) if hardware == "cpu" else 1


def reproduce(
    paper: str,
    selection: Selection,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = print,
    finished: Callable[[str], None] | None = None,
    watch: bool = False,
) -> list[str]:
    """Run every stage whose record is missing or no longer fits, and say what is skipped and why.

    A stage that fails does not stop those that do not start from it.

    Args:
        paper: package or short name.
        selection: which stages, at which scale, for which seeds.
        jobs: stages to run side by side, each in a process of its own with one thread; 1 runs them in this process.
        say: where the lines go.
        finished: called in this process with the name of every stage that ran to its end.
        watch: show how far the stages are while they run, see :class:`~common.reporting.progress.Watch`.

    Returns:
        The stages that failed, or could not start because a parent failed; empty when all is done.
    """
    planned = plan(paper, selection)
    left_out = by_request(paper, selection)
    if left_out:
        say(f"left out, made by request (--tables, --rows, or --everything): {'; '.join(left_out)}")
    return run_planned(paper_named(paper).title, planned, selection, jobs=jobs, say=say, finished=finished, watch=watch)


def run_planned(
    title: str,
    planned: Sequence[Planned],
    selection: Selection,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = print,
    finished: Callable[[str], None] | None = None,
    watch: bool = False,
) -> list[str]:
    """Run what is not done of planned stages, see `reproduce`; `title` says what they are."""
    waiting = [item for item in planned if not item.done]
    total = len(waiting)
    say(
        f"{title} at scale {selection.scale}: {len(planned)} stages"
        + (f" over seeds {', '.join(map(str, selection.seeds))}" if len(selection.seeds) > 1 else "")
        + (f", rounded as with {selection.isa}" if selection.isa != NATIVE else "")
        + f", {len(planned) - total} done, {total} to run"
    )
    ours = max((item.run.describe_ours() for item in planned), key=len, default="")
    if ours:
        say(f"  values that are ours, in no source of the paper (marked in configs/{planned[0].request.paper}): {ours}")
    for item in planned:
        if item.done:
            say(f"  skip  {_name(item)}: {item.reason}")
    if not waiting:
        return []
    jobs = max(1, min(jobs, total))
    progress = _Progress(waiting, jobs)
    estimate = progress.expected(waiting)
    expected = "unknown, no earlier record of this scale" if estimate is None else duration(estimate / jobs)
    say(f"  expected: {expected}" + (f", {jobs} stages side by side" if jobs > 1 else ""))
    if jobs > 1:
        from common.stages.loggers import say_offline

        say_offline()  # once for all workers

    failed: dict[tuple[int, str], str] = {}
    elsewhere = ended = 0
    running: dict[Future[records.Record], Planned] = {}
    watching = Watch(say) if watch else nullcontext(None)
    workers = stopping.waiting_for(_tell_workers) if jobs > 1 else nullcontext()
    with stopping.listening(), workers, watching as shown, _pool(jobs) as pool:
        try:
            pool.submit(check_configurations, [item.run for item in waiting]).result()
            while waiting or running:
                stopping.check()
                for item in _startable(waiting, running, failed, say)[: jobs - len(running)]:
                    waiting.remove(item)
                    say(f"[{progress.start()}/{total}] {_name(item)} ({item.reason})")
                    # Lightning's own bar shows the step where it is on.
                    if shown is not None and not item.run.config["trainer"].get("enable_progress_bar", True):
                        shown.begin(_name(item), item.request.directory)
                    running[pool.submit(_run if jobs == 1 else _run_in_worker, item)] = item
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    if shown is not None:
                        shown.end(_name(item))
                    try:
                        record = future.result()
                    except BrokenExecutor:
                        raise
                    except Exception as error:  # one stage must not cost the others
                        stopping.check(error)
                        # Our own errors, and those of files and values, say all there is to say.
                        if not is_ours(error) and not isinstance(error, OSError | ValueError):
                            traceback.print_exception(error)
                        failed[item.request.seed, item.request.stage] = described(error)
                        ended += 1
                        elsewhere += isinstance(error, RunsElsewhereError)
                        say(printable(f"  FAILED {_name(item)}: {described(error)}"))
                        continue
                    ended += 1
                    left = progress.finish(item, record.wall_seconds, [*waiting, *running.values()])
                    say(f"  {_name(item)}: {headline(record)}  [{duration(record.wall_seconds)}{left}]")
                    if finished is not None:
                        finished(item.request.stage)
        except (Exception, Preempted) as error:
            if (number := stopping.received()) is not None:
                pool.shutdown(wait=True, cancel_futures=True)
                say("stopped; the same command resumes")
                raise Preempted(number) from error
            if isinstance(error, BrokenExecutor):
                raise StageError(
                    "a process was killed, as systems do when memory runs out; "
                    f"{total - ended} stages are left. The same command resumes; `--jobs {max(1, jobs - 1)}` needs "
                    "less memory"
                ) from None
            raise
    if elsewhere:
        say(
            f"another command runs {elsewhere} of these stages now and {len(failed) - elsewhere} more wait for them: "
            f"when it has ended, the same command does what is left. {total - len(failed)} of {total} stages were "
            "done here."
        )
    elif failed:
        others = "; the others are done" if len(failed) < total else ""
        say(f"{len(failed)} of {total} stages failed{others}. Run the same command again to retry.")
    return [f"{stage} (seed {seed}): {reason}" for (seed, stage), reason in failed.items()]


def _startable(
    waiting: list[Planned],
    running: dict[Future[records.Record], Planned],
    failed: dict[tuple[int, str], str],
    say: Callable[[str], None],
) -> list[Planned]:
    """Stages whose parents are finished, in order; those of failed parents are struck off the list."""
    for item in list(waiting):
        seed = item.request.seed
        blocked = [p.stage for p in item.request.parents.values() if (seed, p.stage) in failed]
        if blocked:
            failed[seed, item.request.stage] = f"starts from {blocked[0]}, which failed"
            waiting.remove(item)
            say(f"  {_name(item)}: left out, it {failed[seed, item.request.stage]}")
    unfinished = {(item.request.seed, item.request.stage) for item in [*waiting, *running.values()]}
    return [
        item
        for item in waiting
        if not any((item.request.seed, p.stage) in unfinished for p in item.request.parents.values())
    ]


class _Here(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _pool(jobs: int) -> Executor:
    if jobs == 1:
        return _Here()
    # Started afresh and not forked: a worker imports torch once and keeps its decoded files for its next stages.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, initializer=_begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command tells its workers
    stopping.end_with_parent(by=signal.SIGTERM)


def _tell_workers(number: int) -> None:
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            os.kill(worker.pid, number)


class _Progress:
    """Counts stages and estimates what is left, from earlier records and from the pace of this call."""

    def __init__(self, planned: Sequence[Planned], jobs: int) -> None:
        self._jobs = jobs
        self._started = 0
        self._expected = dict(zip(map(_name, planned), seconds_of(planned)))
        self._finished: list[tuple[Planned, float]] = []

    def start(self) -> int:
        """Number of the stage that starts."""
        self._started += 1
        return self._started

    def expected(self, planned: Sequence[Planned]) -> float | None:
        """Seconds of stages one after the other, by earlier records; None without any."""
        return _total([self._expected[_name(item)] for item in planned])

    def finish(self, item: Planned, seconds: float, left: Sequence[Planned]) -> str:
        """Text about the time that the stages left will take."""
        self._finished.append((item, seconds))
        if not left:
            return ""
        known = [(took, expected) for one, took in self._finished if (expected := self._expected[_name(one)])]
        # This machine may be faster or slower than the one of the records.
        pace = sum(took for took, _ in known) / sum(expected for _, expected in known) if known else 1.0
        with_another_seed = {one.request.stage: took for one, took in self._finished}
        by_records = [(one.request.stage, self._expected[_name(one)]) for one in left]
        expected = _total([with_another_seed.get(stage, time and time * pace) for stage, time in by_records])
        if expected is None:
            expected = sum(took for _, took in self._finished) / len(self._finished) * len(left)
        return f", about {duration(expected / self._jobs)} left"


def check_configurations(configurations: Sequence[RunConfiguration]) -> None:
    """Check types and ranges of what is about to run; it imports all that the stages need.

    Raises:
        ConfigurationError: naming the recipe and the field.
    """
    from common.stages.lean import import_lightning

    import_lightning()
    from common.stages.cli import check

    for run in {records.config_hash(run.config, {"seed_everything"}): run for run in configurations}.values():
        check(run)


def _name(item: Planned) -> str:
    return f"{item.request.stage} {item.request.draw}"


def _run(item: Planned) -> records.Record:
    """Run a stage in this process, or in its own where Lightning must start several."""
    trainer: dict[str, Any] = item.run.config["trainer"]
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if str(nodes) != "1" and "SLURM_JOB_ID" not in os.environ:
        raise StageError(
            f"{item.request.stage} wants {nodes} nodes, which one command cannot start; submit the stages with "
            f"`assemble plan {item.request.paper} --scale {item.request.scale} --hardware {item.request.hardware} "
            f"--seeds {item.request.seed} --data {shlex.quote(str(item.request.data))} "
            f"--runs {shlex.quote(str(item.request.runs))} --format slurm`"
        )
    if str(devices) in {"1", "auto"} and str(nodes) == "1":
        from common.stages.run import run_stage

        # Another command may have finished it since this one was planned.
        return run_stage(item.request, unless_done=True)
    # Lightning starts the other ranks by running the command line again, so it must be that of this stage alone.
    status = _wait_for([sys.executable, "-m", "common.commands.main", *fit_arguments(item.request), "--unless_done"])
    record = finished_record(item.request, item.lineage)
    if status < 0:
        raise StageError(
            f"{item.request.stage} was ended by {signal.Signals(-status).name}, as when one of its processes died or "
            "memory ran out; see its messages above. The same command goes on where it was"
        )
    if status or record is None:
        raise StageError(f"{item.request.stage} ended with status {status}; see its messages above")
    return record


def _run_in_worker(item: Planned) -> records.Record:
    """Run a stage in a process of a pool, which ends when it is asked to, once its stage is saved.

    A pool that has lost a process asks the others to end and waits for them, while one that only gave up its stage
    would wait for the next: forever, where the lost one held the lock of the queue.
    """
    try:
        with stopping.listening():
            return _run(item)
    except Preempted as stop:
        sys.stdout.flush()
        os._exit(stop.status)


def _wait_for(command: Sequence[str]) -> int:
    """Run a command to its end; asked to stop, it saves its state first."""
    with subprocess.Popen(command) as process, stopping.waiting_for(process.send_signal):
        return process.wait()


def fit_arguments(request: StageRequest) -> list[str]:
    """Command line after `assemble` that runs one stage."""
    # One with overrides is named by them again.
    stage = request.stage.partition("+")[0]
    return [
        "fit", f"{request.paper}/{stage}", "--scale", request.scale, "--seed", str(request.seed),
        *(["--isa", request.isa] if request.isa != NATIVE else []),
        "--hardware", request.hardware, "--runs", str(request.runs), "--data", str(request.data), *request.arguments,
    ]  # fmt: skip


def render_plan(planned: Sequence[Planned], form: str) -> str:
    """The plan as text, as a shell script or as SLURM submissions with dependencies.

    Args:
        planned: the stages in order.
        form: text, shell or slurm.
    """
    if form == "text":
        times = seconds_of(planned)
        rows = [("", "draw", "stage", "recipe", "time", "why")] + [
            (
                "done" if item.done else "run",
                str(item.request.draw),
                item.request.stage,
                item.request.recipe,
                "" if item.done or seconds is None else duration(seconds),
                item.reason,
            )
            for item, seconds in zip(planned, times)
        ]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        waiting = [item for item in planned if not item.done]
        left = _total([seconds for item, seconds in zip(planned, times) if not item.done])
        jobs = min(default_jobs(waiting[0].request.hardware), len(waiting)) if waiting else 1
        told = "unknown, no earlier record of this scale" if left is None else duration(left / jobs)
        lines.append(f"expected time of what is left, {jobs} at a time: {told}")
        return "\n".join(lines)
    todo = [item for item in planned if not item.done]
    check_configurations([item.run for item in todo])
    # This very interpreter: a job may start without an activated environment.
    program = [sys.executable, "-m", "common.commands.main"]
    commands = [shlex.join([*program, *fit_arguments(item.request), "--unless_done"]) for item in todo]
    lines = ["#!/bin/sh", "set -e", f"cd {shlex.quote(str(working_folder()))}"]
    if form == "shell":
        return "\n".join([*lines, *commands])
    logs = sorted({item.request.runs / item.request.paper / item.request.scale / "slurm" for item in todo})
    lines += [f"mkdir -p {shlex.quote(str(folder))}" for folder in logs]
    variables: dict[tuple[int, str], str] = {}
    for number, (item, command) in enumerate(zip(todo, commands), start=1):
        request = item.request
        waits = [
            variables[request.seed, p.stage] for p in request.parents.values() if (request.seed, p.stage) in variables
        ]
        variable = f"stage_{number}"
        variables[request.seed, request.stage] = variable
        lines.append(f"{variable}=$({_submission(item, command, list(dict.fromkeys(waits)))})")
    return "\n".join(lines)


def _submission(item: Planned, command: str, waits: Sequence[str]) -> str:
    """The `sbatch` line of one stage.

    Args:
        item: the stage.
        command: what `srun` starts in every process.
        waits: shell variables with the jobs of its parents.
    """
    request, trainer = item.request, item.run.config["trainer"]
    devices = trainer.get("devices", 1)
    tasks = int(devices) if str(devices).isdigit() else 1
    # A task's processes are itself and its loader's workers; with one more, eight tasks would not fit on 64 cores.
    cpus = max(1, item.run.config["data"]["init_args"].get("num_workers", 0))
    name = f"{request.paper}-{request.stage}-{request.scale}-{request.draw.folder.replace('seed', 's')}"
    log = request.runs / request.paper / request.scale / "slurm" / "%x.log"
    # `singleton`: submitted twice, the second job waits for the first one and then finds its work done.
    dependency = ",".join([f"afterok:{':'.join(f'${wait}' for wait in waits)}"] * bool(waits) + ["singleton"])
    options = [
        f"--job-name={shlex.quote(name)}",
        f"--output={shlex.quote(str(log))}",
        "--open-mode=append",
        f"--nodes={int(trainer.get('num_nodes', 1))}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        *([f"--gres=gpu:{tasks}"] if trainer.get("accelerator") == "gpu" else []),
        # Two minutes to save and to be queued again; the signal goes to the processes, not to the shell around them.
        "--requeue",
        "--signal=USR1@120",
        f"--dependency={dependency}",
        "--kill-on-invalid-dep=yes",
    ]
    # Of its own srun knows nothing of the CPUs of a task, and lets the others wait for one that died.
    step = f"srun --cpus-per-task={cpus} --kill-on-bad-exit=1 {command}"
    return f"sbatch --parsable {' '.join(options)} --wrap={shlex.quote(step)}"
