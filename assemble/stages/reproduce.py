"""Runs the planned stages of a paper, in sequence or in parallel."""

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
from contextlib import nullcontext, suppress
from operator import itemgetter
from typing import Any

from assemble.reporting import records
from assemble.reporting.draws import NATIVE
from assemble.reporting.papers import Paper, paper_named
from assemble.reporting.progress import Watch, duration
from assemble.reporting.runs import headline
from assemble.stages import stopping
from assemble.stages.needs import needs_of
from assemble.stages.plan import (
    Planned,
    check_configurations,
    count_by_request,
    expected_text,
    fit_arguments,
    other_code,
    plan,
    seconds_by_records,
    seconds_left,
)
from assemble.stages.request import Selection, StageRequest, finished_record
from common.errors import STOP, OtherCodeError, Preempted, StageError, is_ours, printable


def reproduce(
    paper: str,
    selection: Selection,
    *,
    jobs: int = 1,
    keep: bool = False,
    finished: Callable[[str], object] = lambda stage: None,
    skip_missing: bool = False,
) -> dict[tuple[int, str], str]:
    """Run every stage without a current record; a failed one stops only its descendants. Returns why stages failed.

    Data sets, files and disk space are checked first; `skip_missing` leaves out the stages that lack some.
    `keep` uses stages that other code trained, and resumes those that it began.
    """
    planned = plan(paper, selection)
    if (others := other_code(planned)) and not keep:
        raise OtherCodeError(
            f"{paper_named(paper).title} at scale {selection.scale}: {others}\n  --rerun (make: RERUN=1) runs them "
            "again, and all that start from them; --keep (make: KEEP=1) uses them as they are"
        )
    needs = needs_of(planned)
    if lines := needs.lines():
        say("\n".join([*lines, ""]))
    planned = needs.require(skip_missing)
    if needs.blocked:
        say(f"{len(needs.blocked)} stages are left out: their data is missing, or they start from such a stage")
    waiting = [item for item in planned if not item.done]
    total = len(waiting)
    jobs = max(1, min(jobs, total))
    _announce(paper_named(paper), planned, selection, jobs)
    if not waiting:
        return {}

    failed: dict[tuple[int, str], str] = {}
    running: dict[Future[records.Record], Planned] = {}
    workers = stopping.waiting_for(_tell_workers) if jobs > 1 else nullcontext()
    with stopping.listening(), workers, Watch(say) as shown, _pool(jobs) as pool:
        try:
            checked = pool.submit(check_configurations, [item.run for item in waiting])
            while not wait([checked], timeout=0.5).done:
                STOP.check()
            checked.result()
            while waiting or running:
                STOP.check()
                for item in _startable(waiting, running, failed)[: jobs - len(running)]:
                    waiting.remove(item)
                    bar = item.run.config["trainer"].get("enable_progress_bar", True)  # Lightning's, of the steps
                    if bar or item.reason:
                        say(f"  {_name(item)}: {item.reason or 'started'}")
                    if not bar:
                        shown.begin(_name(item), item.request.directory)
                    running[pool.submit(_run, item)] = item
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    shown.end(_name(item))
                    try:
                        record = future.result()
                    except BrokenExecutor:
                        raise
                    except Exception as error:  # a failed stage must not stop the others
                        STOP.check(error)
                        # Our own errors, and those of files and values, need no traceback.
                        if not is_ours(error) and not isinstance(error, OSError | ValueError):
                            traceback.print_exception(error)
                        failed[item.request.key] = str(error)
                        say(printable(f"  FAILED {_name(item)}: {error}"))
                        continue
                    left = seconds_left(seconds_by_records(planned)[0], [*running.values(), *waiting], jobs)
                    told = f", about {duration(left)} left" if left else ""
                    place = f"[{total - len(waiting) - len(running)}/{total}]"
                    say(f"{place} {_name(item)}: {headline(record)}  [{duration(record.wall_seconds)}{told}]")
                    finished(item.request.stage)
        except (Exception, Preempted) as error:
            if (number := STOP.received) is not None:
                if jobs > 1:
                    _tell_workers(signal.SIGTERM)  # also those that began after the signal
                pool.shutdown(wait=True, cancel_futures=True)
                if number == stopping.REQUEUE_SIGNAL:
                    from assemble.stages.preempt import requeue

                    requeue(number)
                say("stopped; rerun the command to resume")
                raise Preempted(number) from error
            if isinstance(error, BrokenExecutor):
                raise StageError(
                    "a worker process was killed, probably because memory ran out. Rerun the command to resume; "
                    f"`--jobs {max(1, jobs - 1)}` needs less memory"
                ) from None
            raise
    if failed:
        blocked = (any(p.key in failed for p in i.request.parents.values()) for i in planned if i.request.key in failed)
        skipped = sum(blocked)
        told = f"{len(failed) - skipped} of {total} stages failed" + (f", {skipped} skipped" if skipped else "")
        others = "; the others are done" if len(failed) < total else ""
        say(f"{told}{others}. Rerun the command to retry.")
    return failed


def say(text: str) -> None:
    print(text, flush=True)


def _announce(paper: Paper, planned: Sequence[Planned], selection: Selection, jobs: int) -> None:
    if more := count_by_request(paper.name, selection):
        say(f"--everything adds {more} tables or parts of tables")
    waiting = [item for item in planned if not item.done]
    say(
        f"{paper.title} at scale {selection.scale}: {len(planned)} stages"
        + (f" over seeds {', '.join(map(str, selection.seeds))}" if len(selection.seeds) > 1 else "")
        + (f", rounded as with {selection.isa}" if selection.isa != NATIVE else "")
        + f", {len(planned) - len(waiting)} done, {len(waiting)} to run"
    )
    chosen, request = max(((len(i.run.values_of_ours()), i.request) for i in planned), key=itemgetter(0))
    if chosen:
        name = f"{paper.short}/{request.recipe} --scale {selection.scale}"
        say(f"  {chosen} values that no source gives: `assemble show {name}` lists them")
    if selection.scale == "paper" and waiting:
        say(f"  memory and hours: assemble plan {paper.short} --scale paper --hardware {selection.hardware} --estimate")
    if waiting:
        known, measured_here = seconds_by_records(planned)
        expected = expected_text(seconds_left(known, waiting, jobs), measured_here)
        say(f"  expected: {expected}" + (f", {jobs} stages in parallel" if jobs > 1 else ""))


def _startable(
    waiting: list[Planned],
    running: dict[Future[records.Record], Planned],
    failed: dict[tuple[int, str], str],
) -> list[Planned]:
    """Stages whose parents are finished, in order; drops descendants of failed stages."""
    for item in list(waiting):
        blocked = [parent.stage for parent in item.request.parents.values() if parent.key in failed]
        if blocked:
            failed[item.request.key] = f"starts from {blocked[0]}, which failed"
            waiting.remove(item)
            say(f"  {_name(item)}: skipped, it {failed[item.request.key]}")
    unfinished = {item.request.key for item in [*waiting, *running.values()]}
    return [item for item in waiting if unfinished.isdisjoint(p.key for p in item.request.parents.values())]


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


def _tell_workers(number: int) -> None:
    for worker in multiprocessing.active_children():
        if worker.pid is not None:
            with suppress(ProcessLookupError):  # it may just have ended
                os.kill(worker.pid, number)


def _name(item: Planned) -> str:
    return f"{item.request.stage} {item.request.draw}"


def _run(item: Planned) -> records.Record:
    """Run a stage. On a signal a worker exits without cleanup: a dead one may hold the lock of the pool's queue."""
    try:
        with stopping.listening():
            return _run_listening(item.request)
    except Preempted as stop:
        if multiprocessing.parent_process() is None:
            raise
        sys.stdout.flush()
        os._exit(stop.status)


def _run_listening(request: StageRequest) -> records.Record:
    """Run a stage in this process, or in a new one if Lightning has to start several."""
    trainer: dict[str, Any] = request.configuration.config["trainer"]
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if nodes != 1 and "SLURM_JOB_ID" not in os.environ:
        raise StageError(
            f"{request.stage} needs {nodes} nodes, which one command cannot start; submit the stages with "
            f"`assemble plan {request.paper} --scale {request.scale} --hardware {request.hardware} "
            f"--seeds {request.seed} --data {shlex.quote(str(request.data))} "
            f"--runs {shlex.quote(str(request.runs))} --format slurm`"
        )
    if devices == 1 and nodes == 1:
        from assemble.stages.run import run_stage

        # Another command may have finished it since planning.
        return run_stage(request, unless_done=True)
    # Lightning starts other ranks by rerunning the command line, so it must name only this stage.
    command = [sys.executable, "-m", "assemble.commands.main", *fit_arguments(request)]
    with subprocess.Popen(command) as process, stopping.waiting_for(process.send_signal):
        status = process.wait()
    record = finished_record(request)
    if status or record is None:
        ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise StageError(f"{request.stage} {ended}; see its messages above. Rerun the command to resume")
    return record
