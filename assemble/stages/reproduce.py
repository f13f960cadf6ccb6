"""Runs the planned stages of a paper, in sequence or in parallel."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from assemble.reporting import records
from assemble.reporting.draws import NATIVE
from assemble.reporting.papers import Paper, paper_named
from assemble.reporting.progress import Watch, duration
from assemble.reporting.runs import headline
from assemble.reporting.tables import load
from assemble.stages import stopping
from assemble.stages.given import given_lines
from assemble.stages.needs import needs_of
from assemble.stages.paper_modules import optional_part
from assemble.stages.plan import (
    Planned,
    check_configurations,
    chosen,
    expected_text,
    fit_arguments,
    other_code,
    plan_stages,
    seconds_by_records,
    seconds_left,
    start_order,
)
from assemble.stages.request import Selection, StageRequest, finished_record
from common.errors import STOP, OtherCodeError, Preempted, StageError, is_ours, message


def run_paper(
    paper: str,
    selection: Selection,
    *,
    jobs: int = 1,
    keep: bool = False,
    finished: Callable[[str], object] = lambda stage: None,
    skip_missing: bool = False,
) -> dict[tuple[int, str], str]:
    """Run every stage that has no current record. A failed stage stops only its descendants. Return why stages failed.

    Check data sets, files and disk space first. `skip_missing` leaves out the stages that lack data or files.
    `keep` uses stages that other code trained, and resumes stages that other code began.
    """
    planned = _stages_to_run(paper, selection, keep, skip_missing)
    waiting = [item for item in planned if not item.done]
    queue = _Queue(planned, start_order(waiting, seconds_by_records(planned)[0], jobs), jobs)
    _announce(paper_named(paper), planned, selection, queue.jobs)
    if not queue.waiting:
        return {}
    workers = stopping.waiting_for(_signal_workers) if queue.jobs > 1 else nullcontext()
    with stopping.listening(), workers, Watch() as watch, _pool(queue.jobs) as pool:
        try:
            checked = pool.submit(check_configurations, [item.request for item in queue.waiting])
            while not wait([checked], timeout=0.5).done:
                STOP.check()
            checked.result()
            while queue.waiting or queue.running:
                STOP.check()
                for item in queue.startable():
                    queue.begin(item, watch)
                    queue.running[pool.submit(start_stage, item)] = item
                for future in wait(queue.running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    if (stage := queue.end(future, watch)) is not None:
                        finished(stage)
        except (Exception, Preempted) as error:
            if (number := STOP.received) is not None:
                _stop_workers(pool, queue.jobs, number)
                raise Preempted(number) from error
            if isinstance(error, BrokenExecutor):
                raise StageError(
                    "a worker process was killed, probably because memory ran out. Rerun the command to resume; "
                    f"`--jobs {max(1, queue.jobs - 1)}` needs less memory"
                ) from None
            raise
    if queue.failed:
        say(queue.failures())
    return queue.failed


def start_stage(item: Planned) -> records.Record:
    """Run a stage in this process, or in a new one if Lightning has to start several."""
    with _ending_worker(), stopping.listening():
        request = item.request
        trainer: dict[str, Any] = request.configuration.config["trainer"]
        devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
        if nodes != 1 and "SLURM_JOB_ID" not in os.environ:
            raise StageError(
                f"{request.stage} needs {nodes} nodes, which one command cannot start; submit the stages with "
                f"`assemble plan {request.paper} --scale {request.scale} --hardware {request.hardware} "
                f"--seeds {request.seed} --data {shlex.quote(str(request.data))} "
                f"--runs {shlex.quote(str(request.runs))} --format slurm`"
            )
        if devices != 1 or nodes != 1:
            return _fit_in_new_process(request)
        from assemble.stages.run import run_stage

        # Another command may have finished it since planning.
        return run_stage(request, unless_done=True)


def _fit_in_new_process(request: StageRequest) -> records.Record:
    """Run a stage with `assemble fit` in a new process, since Lightning starts ranks by rerunning rank 0's command."""
    command = [sys.executable, "-m", "assemble", *fit_arguments(request)]
    with subprocess.Popen(command) as process, stopping.waiting_for(process.send_signal):
        status = process.wait()
    record = finished_record(request)
    if status or record is None:
        ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise StageError(f"{request.stage} {ended}; see its messages above. Rerun the command to resume")
    return record


def _stages_to_run(paper: str, selection: Selection, keep: bool, skip_missing: bool) -> list[Planned]:
    """Return the planned stages that can run. Raise an error if other code trained a stage or if data is missing."""
    planned = plan_stages(paper, selection)
    if lines := given_lines(load(paper), selection.given, selection.absent):
        say("\n".join([*lines, ""]))
    if (changed := other_code(planned)) and not keep:
        raise OtherCodeError(
            f"{paper_named(paper).title} at scale {selection.scale}: {changed}\n  --rerun (make: RERUN=1) runs them "
            "again, and all stages that start from them; --keep (make: KEEP=1) uses them as they are"
        )
    needs = needs_of(planned)
    if lines := needs.lines():
        say("\n".join([*lines, ""]))
    planned = needs.require(skip_missing)
    _check_files(planned)
    if needs.blocked:
        say(f"{len(needs.blocked)} stages are left out: their data is missing, or they start from such a stage")
    return planned


def _check_files(planned: Sequence[Planned]) -> None:
    """Check checksums, tensor names and shapes in the files that replace stages, if any stage is left to run."""
    given = {item.request.stage: item for item in planned if item.request.given is not None}
    if not given or all(item.done for item in planned):
        return
    from assemble.stages.lightning_workarounds import import_lightning

    import_lightning()
    from assemble.stages.synthetic import built_without_files
    from common.encoders.checkpoint_files import CheckpointError, require_intact

    for stage, item in given.items():
        check = getattr(optional_part(item.request.paper, "weights"), "check", None)
        try:
            require_intact(item.request.checkpoint())
            if check is not None:
                cli = built_without_files(item.run)
                check(item.request.checkpoint(), cli.model, cli.datamodule)
        except CheckpointError as error:
            raise StageError(f"the file for {stage} cannot replace it: {error}") from None


def say(text: str) -> None:
    print(text, flush=True)


def _announce(paper: Paper, planned: Sequence[Planned], selection: Selection, jobs: int) -> None:
    waiting = [item for item in planned if not item.done]
    given = sum(item.request.given is not None for item in planned)
    _, left_out = chosen(paper.name, selection)
    say(
        f"{paper.title} at scale {selection.scale}: {len(planned)} stages"
        + (f" over seeds {', '.join(map(str, selection.seeds))}" if len(selection.seeds) > 1 else "")
        + (f", rounded as with {selection.isa}" if selection.isa != NATIVE else "")
        + (f", {given} given" if given else "")
        + f", {len(planned) - len(waiting) - given} done, {len(waiting)} to run"
        + (f", {left_out * len(selection.seeds)} left out (--everything trains them)" if left_out else "")
    )
    if waiting:
        seconds, measured_here = seconds_by_records(planned)
        expected = expected_text(seconds_left(seconds, waiting, jobs), measured_here)
        say(f"  expected: {expected}" + (f", {jobs} stages in parallel" if jobs > 1 else ""))


@dataclass
class _Queue:
    """The stages that wait, that run and that failed."""

    planned: Sequence[Planned]
    waiting: list[Planned]
    jobs: int
    running: dict[Future[records.Record], Planned] = field(default_factory=dict)
    failed: dict[tuple[int, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = len(self.waiting)
        self.jobs = max(1, min(self.jobs, self.total))

    def startable(self) -> list[Planned]:
        """List the stages that may start now, because their parents are finished. Drop descendants of failed stages."""
        for item in list(self.waiting):
            blocked = [parent.stage for parent in item.request.parents.values() if parent.key in self.failed]
            if blocked:
                self.failed[item.request.key] = f"starts from {blocked[0]}, which failed"
                self.waiting.remove(item)
                say(f"  {_name(item)}: skipped, it {self.failed[item.request.key]}")
        unfinished = {item.request.key for item in [*self.waiting, *self.running.values()]}
        ready = [i for i in self.waiting if unfinished.isdisjoint(p.key for p in i.request.parents.values())]
        return ready[: self.jobs - len(self.running)]

    def begin(self, item: Planned, watch: Watch) -> None:
        self.waiting.remove(item)
        bar = item.run.config["trainer"].get("enable_progress_bar", True)  # Lightning's bar, which counts steps
        if bar or item.reason:
            say(f"  {_name(item)}: {item.reason or 'started'}")
        if not bar:
            watch.begin(_name(item), item.request.directory)

    def end(self, future: Future[records.Record], watch: Watch) -> str | None:
        """Print a stage's result. Return the stage's name, or None if it failed."""
        item = self.running.pop(future)
        watch.end(_name(item))
        try:
            record = future.result()
        except BrokenExecutor:
            raise
        except Exception as error:  # a failed stage must not stop the others
            STOP.check(error)
            # Our errors, and errors of files and values, need no traceback.
            if not is_ours(error) and not isinstance(error, OSError | ValueError):
                traceback.print_exception(error)
            self.failed[item.request.key] = str(error)
            say(f"  FAILED {_name(item)}: {message(error)}")
            return None
        seconds = seconds_left(seconds_by_records(self.planned)[0], [*self.running.values(), *self.waiting], self.jobs)
        left = f", about {duration(seconds)} left" if seconds else ""
        place = f"[{self.total - len(self.waiting) - len(self.running)}/{self.total}]"
        say(f"{place} {_name(item)}: {headline(record)}  [{duration(record.wall_seconds)}{left}]")
        return item.request.stage

    def failures(self) -> str:
        failed = [item.request for item in self.planned if item.request.key in self.failed]
        skipped = sum(any(parent.key in self.failed for parent in stage.parents.values()) for stage in failed)
        text = f"{len(failed) - skipped} of {self.total} stages failed" + (f", {skipped} skipped" if skipped else "")
        others = "; the others are done" if len(failed) < self.total else ""
        return f"{text}{others}. Rerun the command to retry."


class _Here(Executor):
    """Runs a submitted function at once, in this process."""

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
    # Workers import torch once, and keep decoded files for later stages.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, initializer=_begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process forwards signals
    stopping.end_with_parent(by=signal.SIGTERM)


def _signal_workers(number: int) -> None:
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(worker.pid, number)


def _stop_workers(pool: Executor, jobs: int, number: int) -> None:
    """Wait until workers have saved, then requeue the SLURM job if the signal warns of its time limit."""
    if jobs > 1:
        _signal_workers(signal.SIGTERM)  # some may have begun after the signal
    pool.shutdown(wait=True, cancel_futures=True)
    if number == stopping.REQUEUE_SIGNAL:
        from assemble.stages.preempt import requeue

        requeue(number)
    say("stopped; rerun the command to resume")


@contextmanager
def _ending_worker() -> Iterator[None]:
    """End a worker on a signal. Skip the cleanup, which could wait for a lock that a dead worker holds."""
    try:
        yield
    except Preempted as stop:
        if multiprocessing.parent_process() is None:
            raise
        sys.stdout.flush()
        os._exit(stop.status)


def _name(item: Planned) -> str:
    return f"{item.request.stage} {item.request.draw}"
