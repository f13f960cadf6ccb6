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
from contextlib import nullcontext
from typing import Any

from common.errors import Preempted, RunsElsewhereError, StageError, is_ours, printable
from common.files import described
from common.reporting import records
from common.reporting.draws import NATIVE
from common.reporting.papers import paper_named
from common.reporting.progress import Watch, duration
from common.reporting.runs import headline
from common.stages import stopping
from common.stages.plan import Planned, _total, by_request, check_configurations, fit_arguments, plan, seconds_of
from common.stages.request import Selection, finished_record


def reproduce(
    paper: str,
    selection: Selection,
    *,
    jobs: int = 1,
    say: Callable[[str], None] = print,
    finished: Callable[[str], None] | None = None,
    watch: bool = False,
) -> list[str]:
    """Run every stage without a current record; a failed stage only stops its descendants."""
    planned = plan(paper, selection)
    left_out = by_request(paper, selection)
    if left_out:
        say(f"left out, made by request (--tables, --rows, or --everything): {'; '.join(left_out)}")
    waiting = [item for item in planned if not item.done]
    total = len(waiting)
    say(
        f"{paper_named(paper).title} at scale {selection.scale}: {len(planned)} stages"
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
            stopping.check()
            checked = pool.submit(check_configurations, [item.run for item in waiting])
            while not wait([checked], timeout=0.5).done:
                stopping.check()
            checked.result()
            while waiting or running:
                stopping.check()
                for item in _startable(waiting, running, failed, say)[: jobs - len(running)]:
                    waiting.remove(item)
                    say(f"[{progress.start()}/{total}] {_name(item)} ({item.reason})")
                    # Otherwise Lightning's bar shows the step.
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
                        # Our own errors, and those of files and values, need no traceback.
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
                if jobs > 1:
                    _tell_workers(signal.SIGTERM)  # also those that began after the signal
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
    """Stages whose parents are finished, in order; drops descendants of failed stages."""
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
    # Not forked: a worker imports torch once and keeps its decoded files for later stages.
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
    """Counts stages and estimates the time left from earlier records and this call's pace."""

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
        """Seconds of the stages in sequence, from earlier records; None without any."""
        return _total([self._expected[_name(item)] for item in planned])

    def finish(self, item: Planned, seconds: float, left: Sequence[Planned]) -> str:
        """Record a finished stage; returns text on the time left."""
        self._finished.append((item, seconds))
        if not left:
            return ""
        known = [(took, expected) for one, took in self._finished if (expected := self._expected[_name(one)])]
        # The records may be from a faster or slower machine.
        pace = sum(took for took, _ in known) / sum(expected for _, expected in known) if known else 1.0
        with_another_seed = {one.request.stage: took for one, took in self._finished}
        by_records = [(one.request.stage, self._expected[_name(one)]) for one in left]
        expected = _total([with_another_seed.get(stage, time and time * pace) for stage, time in by_records])
        if expected is None:
            expected = sum(took for _, took in self._finished) / len(self._finished) * len(left)
        return f", about {duration(expected / self._jobs)} left"


def _name(item: Planned) -> str:
    return f"{item.request.stage} {item.request.draw}"


def _run(item: Planned) -> records.Record:
    """Run a stage in this process, or in its own if Lightning must start several."""
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

        # Another command may have finished it since planning.
        return run_stage(item.request, unless_done=True)
    # Lightning starts other ranks by rerunning the command line, so it must name only this stage.
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
    """Run a stage in a pool process, which exits on a signal: a dead worker may hold the queue's lock."""
    try:
        with stopping.listening():
            return _run(item)
    except Preempted as stop:
        sys.stdout.flush()
        os._exit(stop.status)


def _wait_for(command: Sequence[str]) -> int:
    """Run a command to its end, forwarding signals so it can save."""
    with subprocess.Popen(command) as process, stopping.waiting_for(process.send_signal):
        return process.wait()
