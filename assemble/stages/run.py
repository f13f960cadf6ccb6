"""Runs one stage: build, fit (or resume), test, record.

The folder `runs/<paper>/<scale>/seed<k>/<stage>/` (`seed<k>-<isa>` with another rounding) holds `identity.json` (which
run it is), `config.yaml` (resolved), `checkpoints/last.ckpt`, `metrics.csv`, `media/`, `wandb/` and, when finished,
`record.json`.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from assemble.reporting import code, records
from assemble.reporting.draws import use
from assemble.reporting.papers import checkout, paper_named
from assemble.stages import stopping
from assemble.stages.launch import is_main_process, require_processes
from assemble.stages.layers import merge, place
from assemble.stages.lightning_import import import_lightning
from assemble.stages.recipe_data import dataset_entries, without_unread_sets
from assemble.stages.request import StageRequest, fingerprint, finished_record, holds, identity_of, trained_again
from assemble.stages.stopping import end_with_parent
from common.data.checksums import digest
from common.errors import STOP, Preempted, StageError, printable
from common.files import cache_folder, lock, make_folder, require_writable, sweep, write_atomically
from common.types import class_at

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from assemble.stages.cli import StageCLI
    from assemble.stages.loggers import StageWandbLogger
    from assemble.stages.preempt import Preemption
    from common.training.callbacks import Sessions

#: Seconds to wait for a stage's lock.
LOCK_PATIENCE = 6.0


def _prepare_folder(request: StageRequest, unless_done: bool = False) -> None:
    """Prepare the stage's folder; an earlier run that it can't continue moves to `<stage>.previous`."""
    folder, previous = request.directory, request.directory.with_name(f"{request.stage}.previous")
    identity = folder / "identity.json"
    if not is_main_process():
        _wait_for_main_process(request)
        return
    aside = previous.with_name(f".{previous.name}")
    if aside.exists() and not (folder.exists() and previous.exists()):  # a kill between the renames below
        aside.rename(previous if folder.exists() else folder)
    found = identity_of(folder)
    if not found and identity.exists():
        raise StageError(
            f"{identity} cannot be read, so it is unknown which run {folder} holds: restore the file to resume, or "
            "move the folder away to start again"
        )
    if not holds(folder, request):
        reason = "the configuration changed"
        if found.get("lineage_hash") == request.lineage:
            parent = trained_again(request, found["digests"])
            reason = f"{parent} was trained again" if parent else "the code changed"
        begun = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
        told = ""
        if holds(previous, replace(request, rerun=True)):
            if folder.exists():
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
            previous.rename(folder)
            if aside.exists():
                aside.rename(previous)
            reverted = reason.replace("changed", "was reverted")
            told = f"{reverted}: the earlier run is restored, the other one is in {previous}"
        elif begun and (previous / "record.json").is_file() and not (folder / "record.json").is_file():
            if request.checkpoint().is_file() and found.get("lineage_hash") != request.lineage:
                raise StageError(
                    f"the configuration changed; {folder} has an unfinished run and {previous} a finished one: move or "
                    "delete one of them"
                )
            shutil.rmtree(folder)
        elif begun:
            replaced = " and replaces an older one" if previous.exists() else ""
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            told = f"{reason}: the earlier run is now in {previous}{replaced}"
        if told:
            print(f"  {request.stage}: {told}")
    if unless_done and finished_record(request) is not None:
        return
    make_folder(folder)
    for swept in (folder, folder / "checkpoints", cache_folder(), *cache_folder().glob("*/")):
        sweep(swept)
    now = fingerprint(request.configuration)
    if request.checkpoint().is_file():
        earlier = identity_of(folder).get("code", {})
        if others := code.differing(earlier, now):
            print(f"  {request.stage}: continues what other code trained: {code.changed_text(others)}", file=sys.stderr)
        now = code.joined(earlier, now)
    about = {
        "lineage_hash": request.lineage,
        "code": now,
        "digests": {name: _digest_of(parent, request) for name, parent in request.parents.items()},
        "stack": request.configuration.describe(),
        "arguments": list(request.arguments),
    }
    write_atomically(identity, json.dumps(about, indent=1, sort_keys=True) + "\n")


def _digest_of(parent: StageRequest, child: StageRequest) -> str:
    """The digest of the checkpoint that a stage starts from, which must be the one that its parent's record states."""
    name = child.configuration.start_from
    path, record = parent.checkpoint(name), finished_record(parent)
    found = digest(path, "sha256")
    if record is not None and record.checkpoints.get(name, found) != found:
        raise StageError(
            f"{child.stage} starts from {path}, which was replaced after {parent.stage} finished: restore the file, or "
            f"delete {parent.directory} to train {parent.stage} again"
        )
    return found


def _wait_for_main_process(request: StageRequest) -> None:
    """Under `srun` all ranks start at once; wait until rank 0 has prepared the folder."""
    deadline = time.monotonic() + 1800  # rank 0 may be checking a user's files
    while not holds(request.directory, request):
        if time.monotonic() > deadline:
            raise StageError(f"{request.stage}: rank 0 did not prepare {request.directory} within half an hour")
        time.sleep(0.1)


def quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Keep the message about which rank died.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*is smaller than the logging interval.*",
        ".*LeafSpec.*is deprecated.*",
        ".*have no .validation_step.*",  # the module validates itself, see common/protocols/search.py
        ".*module.s. in eval mode.*",  # intended for frozen encoders
        ".*ModelCheckpoint with manual optimization.*",  # we want the weights after the step
        ".*overridden .on_before_batch_transfer. in .LightningModule.*",  # intended
        ".*broadcast_buffers. is deprecated.*",  # its successor broadcasts banks and queues at the start
        ".*recommended to use .self.log.*sync_dist=True.*",  # logged values were gathered from all ranks
        ".*dataloader is not resumable.*",  # ours is: the sampler starts at the step of the checkpoint
        "The `srun` command is available.*",  # without it a stage runs on this machine alone, as asked
        "Be aware that when using `ckpt_path`.*",  # a test of a checkpoint needs no training callbacks
    ):
        warnings.filterwarnings("ignore", message=message)


def run_stage(request: StageRequest, unless_done: bool = False) -> records.Record:
    """Run a stage and write its record; `unless_done` keeps a finished one."""
    use(request.isa)
    if not is_main_process():
        end_with_parent()
    record = None
    try:
        with stopping.listening():
            record = _run_listening(request, unless_done)
    except Preempted:
        if record is not None:
            return record  # the signal came after the last check, when nothing was left to stop
        if is_main_process():
            raise
        # If a rank fails, its launcher kills rank 0, which may be saving or requeueing.
        raise SystemExit(0) from None
    return record


def _run_listening(request: StageRequest, unless_done: bool) -> records.Record:
    config = stage_configuration(request)
    require_processes(config["trainer"])
    # Import late: help, plans and skipped stages don't need torch.
    import_lightning()
    STOP.check()
    if request.arguments or (identity_of(request.directory) and not holds(request.directory, request)):
        from assemble.stages.cli import check

        check(request.configuration)  # on all ranks, before an earlier run is moved aside
    _require_files(config.get("data"))
    from assemble.stages.preempt import Preemption, requeue

    STOP.check()
    last = request.checkpoint()
    preemption = Preemption(last)
    if is_main_process():
        stopping.at_end(requeue)
    with _claimed(request):
        _prepare_folder(request, unless_done)
        # Check under the lock, so that no other command can finish it in between.
        done = finished_record(request)
        if done is not None and unless_done:
            return done
        if is_main_process() and (done is None or (request.configuration.trains and not last.is_file())):
            # Other stages must not start from an outdated record. A valid one stays until the new one is written, since
            # this run may fail.
            (request.directory / "record.json").unlink(missing_ok=True)
        try:
            return _run_claimed(request, config, preemption, done is not None and last.is_file())
        except (Exception, Preempted) as error:
            if (number := error.signal if isinstance(error, Preempted) else STOP.received) is not None:
                if is_main_process():
                    print(f"  {preemption.describe(request.stage, number)}", flush=True)
                    requeue(number)
                raise Preempted(number) from error
            if isinstance(error, RuntimeError) and _lost_a_process(error):
                raise StageError(
                    f"{request.stage}: another process of the stage failed, was killed or ran out of memory; its "
                    "messages, if any, say why. Rerun the command to resume from the last checkpoint"
                ) from error
            if str(error).startswith("Caught ") and not isinstance(error, Preempted):
                # An error of a loader process has its traceback before the message.
                told = str(error).rpartition(f"{type(error).__name__}: ")[2]
                raise type(error)(told.strip()) from error
            if str(error).startswith("Expected more than 1 value per channel"):
                raise StageError(
                    f"{request.stage}: batch normalization got a single sample on a process: raise data.batch_size, or "
                    "use fewer devices"
                ) from error
            if type(error).__name__ == "MisconfigurationException":  # of Lightning, such as clipping in a GAN
                raise StageError(f"{request.stage}: {error}") from None
            raise
        finally:
            # Trainer, model and optimizer form a reference cycle, which would keep (GPU) memory during the next stage.
            gc.collect()


def _lost_a_process(error: RuntimeError) -> bool:
    import torch.distributed as dist

    # Gloo's errors have no class, but start with a source path.
    return (dist.is_available() and isinstance(error, dist.DistError)) or "gloo/transport/" in str(error)


@contextmanager
def _claimed(request: StageRequest) -> Iterator[None]:
    """Lock the stage's folder against a second command."""
    if not is_main_process():
        yield
        return
    path = request.directory.with_name(f".{request.stage}.lock")
    try:
        make_folder(path.parent)
        opened = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StageError(
            f"{request.stage} cannot write into {path.parent}: {error.strerror}; give another folder with --runs"
        ) from None
    with opened as file:
        # Loader processes of a killed run hold the lock for up to a second.
        deadline, held = time.monotonic() + LOCK_PATIENCE, None
        while held is None:
            try:
                held = lock(file, wait=False)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StageError(
                        f"{request.stage} ({request.draw}) is already running in another process, which locks {path}; "
                        "wait for it, or stop it"
                    ) from None
                time.sleep(0.2)
        if not held:
            print(f"  {request.stage}: {path.parent} does not support locks: don't run this stage twice at once")
        yield


def stage_configuration(request: StageRequest, required: bool = True) -> dict[str, Any]:
    """The merged configuration of a stage with paths and parents' checkpoints, which must exist if `required`."""
    run = request.configuration
    config = run.with_placeholders(DATA=str(request.data), RUN=str(request.directory))
    for name, parent in request.parents.items():
        path = parent.checkpoint(run.start_from)
        if required and (not path.is_file() or finished_record(parent) is None):
            raise StageError(
                f"{request.stage} starts from {path} ({name}), which does not exist or does not belong to a finished "
                f"stage with this configuration; first run `assemble reproduce {paper_named(request.paper).short} "
                f"--scale {request.scale} --stages {parent.stage}` with the same --seeds, --hardware and --runs"
            )
        if path.is_file():
            config = merge(config, place(config, name, str(path)))
    return config


def _require_files(section: object) -> None:
    """Check the data set and a user's files before building anything; a synthetic world needs none."""
    if not isinstance(section, dict) or (section.get("init_args") or {}).get("world") is not None:
        return
    from common.data.datasets.folder import FolderOfImages, OwnFolder
    from common.data.images import require_captions
    from common.data.prepare import check_files

    arguments = section.get("init_args") or {}
    for entry in dataset_entries(without_unread_sets(section)):
        try:
            dataset = class_at(entry["class_path"])(**(entry.get("init_args") or {}))
        except (ImportError, AttributeError, TypeError):
            continue  # the check of the configuration raises a better error
        dataset.require_folder()
        if isinstance(dataset, OwnFolder) and is_main_process():
            needs_sound = class_at(section["class_path"]).needs_sound
            allowed = arguments.get("max_skipped_fraction", 1.0)
            print(printable("\n".join(check_files(dataset, allowed, needs_sound=needs_sound))))
            if isinstance(dataset, FolderOfImages) and entry is arguments.get("dataset") and arguments.get("tokenizer"):
                split = arguments.get("split", "train")
                listing = dataset.listing(split)
                require_captions(listing, dataset.annotations(split, listing))


def _wandb_of(request: StageRequest, resolved: dict[str, Any], git: Mapping[str, Any]) -> StageWandbLogger | None:
    """The stage's W&B run, which refers to the checkpoints it starts from; None if W&B is off."""
    from assemble.stages.loggers import note_files, own_id, run_name, wandb_logger

    run, revision = request.configuration, git.get("revision") or "unknown"
    draw = request.draw.folder.replace("seed", "s")

    def run_id(stage: StageRequest) -> str:
        return f"{request.paper}-{request.scale}-{draw}-{stage.stage.replace('@', '-')}-{stage.lineage[:8]}"

    configuration = records.config_hash(run.config, records.IGNORED_KEYS | records.SEED_KEYS)
    wandb = wandb_logger(
        directory=request.directory,
        id=own_id(request.directory, run_id(request)),
        name=run_name(request.stage, request.scale, draw, request.arguments),
        group=f"{request.paper}/{request.scale}/{request.stage}-{configuration[:8]}",
        job_type=request.job,
        tags=[request.scale, *([request.row] if request.row else []), revision[:12]],
        # The same keys for every stage, for the dashboard's filters.
        config={
            **resolved,
            "paper": request.paper,
            "scale": request.scale,
            "seed": request.seed,
            "recipe": request.recipe,
            "stage": request.stage,
            "row": request.row or request.stage,
            "config_hash": records.config_hash(run.config),
            "lineage_hash": request.lineage,
            "revision": revision,
            "hardware": request.hardware,
        },
        whole=request.published,
        notes="\n".join(filter(None, (run.describe(), run.describe_ours() and f"ours: {run.describe_ours()}"))),
    )
    if wandb is not None:
        used = {}
        for parent in request.parents.values():  # several fields may take one checkpoint
            record = finished_record(parent)
            parent_id = (record and record.wandb_run_id) or run_id(parent)
            used[f"{parent_id}-{run.start_from}"] = parent.checkpoint(run.start_from)
        note_files(wandb, used, "checkpoint", used=True)
    return wandb


def _checkpoints(request: StageRequest) -> list[Path]:
    made = (request.directory / "checkpoints").glob("*.ckpt")
    return sorted(path for path in made if path.stem != "non_finite")


def _summary_of(request: StageRequest, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """The stage's row in W&B's table of runs: metrics, cells of the tables, extremes of the curves."""
    from assemble.reporting import tables
    from assemble.reporting.curves import summaries

    cells = tables.summary(tables.load(request.paper), request.stage, request.scale, metrics)
    # W&B itself keeps the last value of a curve.
    ends = {
        "/".join(reversed(name.rsplit(":", 1))): value
        for name, value in summaries(request.directory / "metrics.csv").items()
        if name.endswith((":min", ":max"))
    }
    found = {**metrics, **cells, **ends}
    return {k: v for k, v in found.items() if request.published or not k.startswith("published/")}


def _record_of(
    request: StageRequest,
    cli: StageCLI,
    sessions: Sessions,
    started: datetime,
    steps: int,
    metrics: dict[str, float | None],
    wandb_id: str | None,
) -> records.Record:
    """The record of a finished stage; all ranks must call it, since it sums up skipped files."""
    import torch

    from assemble.stages.telemetry import peak_memory_gib

    run, trainer = request.configuration, cli.trainer
    media, identity = request.directory / "media", identity_of(request.directory)
    device = trainer.strategy.root_device
    accelerators = [torch.cuda.get_device_name(device)] * trainer.world_size if device.type == "cuda" else []
    return records.Record(
        paper=request.paper,
        stage=request.stage,
        recipe=request.recipe,
        job=request.job,
        row=request.row,
        scale=request.scale,
        seed=request.seed,
        metrics=metrics,
        selection=getattr(cli.model, "selected_by", "last"),
        config_hash=records.config_hash(run.config),
        lineage_hash=request.lineage,
        config=run.config,
        deviations=[dict(entry) for entry in run.deviations],
        ours=[{"field": name, "value": value} for name, value in run.values_of_ours().items()],
        parents={
            name: {"stage": parent.stage, "lineage_hash": parent.lineage, "digest": identity["digests"][name]}
            for name, parent in request.parents.items()
        },
        checkpoints={path.stem: digest(path, "sha256") for path in _checkpoints(request)} if is_main_process() else {},
        code=identity["code"],
        git=sessions.git,
        versions=records.versions(),
        hardware={**records.hardware(accelerators, request.isa), "peak_memory_gib": peak_memory_gib()},
        precision=str(trainer.precision),
        global_batch=cli.datamodule.batch_size * trainer.accumulate_grad_batches,
        steps=steps,
        wall_seconds=round(sessions.seconds, 1),
        started=started.isoformat().replace("+00:00", "Z"),
        data=cli.datamodule.describe(),
        wandb_run_id=wandb_id,
        media=sorted(str(path.relative_to(request.directory)) for path in media.glob("*")) if media.is_dir() else [],
    )


def _run_claimed(
    request: StageRequest, config: dict[str, Any], preemption: Preemption, trained: bool
) -> records.Record:
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    from assemble.reporting.progress import FILE as PROGRESS_FILE
    from assemble.stages.cli import build
    from assemble.stages.loggers import MetricsFile, note_files
    from assemble.stages.preempt import STARTING
    from assemble.stages.telemetry import Telemetry, reset_peak_memory
    from common.training.callbacks import EpochCount, MissedCheckpoints, Progress, Sessions, WholeCheckpoints

    run, directory = request.configuration, request.directory
    last = request.checkpoint()
    quiet_lightning()
    if run.config["trainer"].get("accelerator") == "cpu":
        # Threads slow down small networks; stages run in parallel instead.
        torch.set_num_threads(1)
    reset_peak_memory()
    started = datetime.now(UTC).replace(microsecond=0)
    git = records.git_state(checkout())
    main_process = is_main_process()
    metrics_file = MetricsFile(directory / "metrics.csv")

    def resumed(step: int, batches: int) -> None:
        print(f"  {request.stage}: resumes from step {step} ({last})")
        metrics_file.drop_after(batches)

    sessions = Sessions(git, resumed)
    progress = Progress(directory / PROGRESS_FILE)
    callbacks = [sessions, preemption, EpochCount(), MissedCheckpoints(), progress, Telemetry()]
    arguments = {"default_root_dir": str(directory), "logger": [metrics_file], "callbacks": callbacks}
    cli = build(run, config, arguments)
    resolved = cli.resolved()
    trainer = cli.trainer
    # Lightning's handlers would save in the middle of a step and call collectives.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    # Before each batch, Lightning broadcasts its own flag for SIGTERM, which syncs the device; nothing sets it here.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if (ranks := getattr(trainer.strategy.launcher, "kill", None)) is not None:
        stopping.at_end(lambda _: ranks(signal.SIGKILL))
    # Write the checkpoint to resume from last: the losses of its step follow it.
    callbacks_of: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks_of.sort(key=lambda one: isinstance(one, ModelCheckpoint) and one.filename == "last")
    trainer.strategy.checkpoint_io = WholeCheckpoints(type(cli.model).__name__)

    wandb = None
    if main_process:
        if cli.datamodule.world is not None:
            require_writable(cache_folder(), "the cache folder (set by ASSEMBLE_CACHE)")
        # A run that takes this file as --config must not write in here.
        kept = records.portable(resolved, [(str(directory), "$RUN")])
        write_atomically(directory / "config.yaml", yaml.safe_dump(kept, sort_keys=False))
        wandb = _wandb_of(request, resolved, git)
        if wandb is not None:
            trainer.loggers = [metrics_file, wandb, *trainer.loggers[1:]]
            preemption.close = partial(wandb.finish, 1)
    interrupted = True
    if trainer.num_devices * trainer.num_nodes > 1:
        stopping.allow(STARTING)
    STOP.check()
    try:
        if run.trains and last.is_file():
            _end_what_is_trained(trainer)
        elif main_process:
            metrics_file.drop_after(-1)
        if run.trains:
            from_checkpoint = str(last) if last.is_file() else None
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=from_checkpoint, weights_only=True)
            if not trained:  # else the file would get another digest
                trainer.save_checkpoint(last)
            STOP.check()
        steps = trainer.global_step
        weights = str(last) if run.trains else None
        trainer.test(cli.model, datamodule=cli.datamodule, verbose=False, ckpt_path=weights, weights_only=True)
        metrics: dict[str, float | None] = {
            name: float(value) for name, value in sorted(trainer.callback_metrics.items()) if name.startswith("test/")
        }
        if wandb is not None:
            wandb.summarize(_summary_of(request, metrics))
        run_id = wandb.version if wandb is not None else None
        record = _record_of(request, cli, sessions, started, steps, metrics, run_id)
        if main_process:
            records.write(directory / "record.json", record)
            if wandb is not None:
                about = {"config_hash": record.config_hash, "lineage_hash": request.lineage, "steps": steps}
                kept = {f"{run_id}-{path.stem}": path for path in _checkpoints(request)}
                note_files(wandb, kept, "checkpoint", used=False, **about)
                note_files(wandb, {f"{run_id}-record": directory / "record.json"}, "record", used=False, **about)
        interrupted = False
    finally:
        if wandb is not None:
            wandb.finish(exit_code=1 if interrupted else 0)
    return record


def _end_what_is_trained(trainer: pl.Trainer) -> None:
    """Run the hooks of a training that resumes with no step left; `on_train_end` keeps the best weights."""
    loop = trainer.fit_loop
    run = loop.run

    def begin_and_end() -> None:
        loop.setup_data()
        epoch: Any = loop.epoch_progress.current
        counted, last = epoch.completed == epoch.ready, epoch.ready == loop.max_epochs
        done = loop.done
        if not counted and (done or (last and loop.epoch_loop.batch_progress.is_last_batch)):
            # Count the checkpoint's step for the loggers, since no step is left to do so.
            loop.epoch_loop._batches_that_stepped += 1
        if not done:
            run()
            return
        loop.on_run_start()
        if not counted:
            epoch.processed = epoch.completed = epoch.ready
        loop.on_run_end()

    loop.run = begin_and_end  # type: ignore[method-assign]
