"""Runs one stage: checks it, claims its folder, trains and tests it, and explains its errors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from assemble.reporting.draws import use
from assemble.reporting.papers import paper_named
from assemble.reporting.records import Record
from assemble.stages import stopping
from assemble.stages.folder import claimed, prepare_folder
from assemble.stages.launch import is_main_process, require_processes
from assemble.stages.layers import merge, place
from assemble.stages.lightning_workarounds import import_lightning
from assemble.stages.recipe_data import entries_read
from assemble.stages.request import StageRequest, finished_record, holds, identity_of
from assemble.stages.stopping import end_with_parent
from common.errors import STOP, Preempted, StageError, printable
from common.types import class_at

if TYPE_CHECKING:
    from assemble.stages.preempt import Preemption


def run_stage(request: StageRequest, unless_done: bool = False) -> Record:
    """Run a stage and write its record. With `unless_done`, keep the record of a finished stage."""
    use(request.isa)
    if not is_main_process():
        end_with_parent()
    with _ending_with_signals():
        config = stage_configuration(request)
        require_processes(config["trainer"])
        # Import late: help, plans and skipped stages don't need torch.
        import_lightning()
        STOP.check()
        if request.arguments or (identity_of(request.directory) and not holds(request.directory, request)):
            from assemble.stages.cli import check

            check(request)  # on all ranks, before an earlier run is moved aside
        _require_data_sets(config["data"])
        from assemble.stages.preempt import Preemption, requeue
        from assemble.stages.training import train_and_test

        STOP.check()
        preemption = Preemption(request.checkpoint())
        if is_main_process():
            stopping.at_end(requeue)
        with claimed(request):
            prepare_folder(request, unless_done)
            # Check under the lock, so that no other command can finish it in between.
            done, checkpoint = finished_record(request), request.checkpoint().is_file()
            if done is not None and unless_done:
                return done
            if is_main_process() and (done is None or (request.configuration.trains and not checkpoint)):
                # Delete an outdated record, so that no stage starts from it. A valid one stays until the new one is
                # written, since this run may fail.
                (request.directory / "record.json").unlink(missing_ok=True)
            with _explaining_errors(request, preemption):
                return train_and_test(request, config, preemption, trained=done is not None and checkpoint)


@contextmanager
def _ending_with_signals() -> Iterator[None]:
    """Stop at a signal. Ignore a signal after the last check, when nothing is left to stop."""
    finished = False
    try:
        with stopping.listening():
            yield
            finished = True
    except Preempted:
        if finished:
            return
        if is_main_process():
            raise
        # If a rank fails, its launcher kills rank 0, which may be saving or requeueing.
        raise SystemExit(0) from None


@contextmanager
def _explaining_errors(request: StageRequest, preemption: Preemption) -> Iterator[None]:
    """Turn errors after a signal into `Preempted`, and explain other errors. Free the stage's memory at the end."""
    try:
        yield
    except (Exception, Preempted) as error:
        if (number := error.signal if isinstance(error, Preempted) else STOP.received) is not None:
            if is_main_process():
                from assemble.stages.preempt import requeue

                print(f"  {preemption.describe(request.stage, number)}", flush=True)
                requeue(number)
            raise Preempted(number) from error
        if isinstance(error, Exception) and (explained := _explained(error, request.stage)) is not None:
            raise explained from error
        raise
    finally:
        # Trainer, model and optimizer form a reference cycle, which would keep (GPU) memory during the next stage.
        gc.collect()


def _explained(error: Exception, stage: str) -> Exception | None:
    """Return an error that says what to do, or None if the message already does."""
    import torch.distributed as dist

    text = str(error)
    # Gloo's errors have no class, but start with a source path.
    if (dist.is_available() and isinstance(error, dist.DistError)) or (
        isinstance(error, RuntimeError) and "gloo/transport/" in text
    ):
        return StageError(
            f"{stage}: another process of the stage failed, was killed or ran out of memory; its messages, if any, say "
            "why. Rerun the command to resume from the last checkpoint"
        )
    if text.startswith("Caught "):
        # An error of a loader process has its traceback before the message.
        return type(error)(text.rpartition(f"{type(error).__name__}: ")[2].strip())
    if text.startswith("Expected more than 1 value per channel"):
        return StageError(
            f"{stage}: batch normalization got a single sample on a process: raise data.batch_size, or use fewer "
            "devices"
        )
    if type(error).__name__ == "MisconfigurationException":  # from Lightning, such as clipping gradients in a GAN
        return StageError(f"{stage}: {error}")
    return None


def stage_configuration(request: StageRequest, required: bool = True) -> dict[str, Any]:
    """Return a stage's configuration with real paths. If `required`, the parents' checkpoints must exist."""
    run = request.configuration
    config = run.with_placeholders(DATA=str(request.data), RUN=str(request.directory))
    for name, parent in request.parents.items():
        path = request.start(name)
        if path is None:
            continue
        if required and parent.given is None and finished_record(parent) is None:
            raise StageError(
                f"{request.stage} starts from {parent.stage} ({name}), which is not finished with this configuration; "
                f"first run `assemble reproduce {paper_named(request.paper).short} "
                f"--scale {request.scale} --stages {parent.stage}` with the same --seeds, --hardware and --runs"
            )
        if required and (problem := request.lost_start(name)):
            raise StageError(f"{request.stage} starts from {parent.stage} ({name}): {problem}")
        if path.is_file():
            config = merge(config, place(config, name, str(path)))
    return config


def _require_data_sets(section: dict[str, Any]) -> None:
    """Check that the folders of data sets exist, and print what the user's data sets hold, before building anything."""
    from common.data.datasets.folder import OwnFolder

    for entry in entries_read(section):
        try:
            dataset = class_at(entry["class_path"])(**(entry.get("init_args") or {}))
        except (ImportError, AttributeError, TypeError):
            continue  # the check of the configuration raises a better error
        dataset.require_folder()
        if isinstance(dataset, OwnFolder) and is_main_process():
            print(printable(dataset.summary()))
