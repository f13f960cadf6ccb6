"""Trains and tests one stage in this process, and writes its record."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from assemble.reporting import records, tables
from assemble.reporting.curves import summaries
from assemble.reporting.papers import checkout
from assemble.reporting.progress import FILE as PROGRESS_FILE
from assemble.stages import loggers, stopping
from assemble.stages.cli import StageCLI, build
from assemble.stages.launch import is_main_process
from assemble.stages.lightning_workarounds import (
    end_training_without_steps,
    leave_signals_to_us,
    quiet_lightning,
    write_last_checkpoint_last,
)
from assemble.stages.loggers import MetricsFile, StageWandbLogger
from assemble.stages.preempt import STARTING, Preemption
from assemble.stages.request import StageRequest, finished_record, identity_of
from assemble.stages.telemetry import Telemetry, peak_memory_gib, reset_peak_memory
from common.errors import STOP
from common.files import digest, write_atomically
from common.training.callbacks import EpochCount, MissedCheckpoints, Progress, Sessions, WholeCheckpoints


def train_and_test(
    request: StageRequest, config: dict[str, Any], preemption: Preemption, trained: bool
) -> records.Record:
    """Fit (or resume) a stage and test it. If the stage is already `trained`, keep its last checkpoint as it is."""
    started = datetime.now(UTC).replace(microsecond=0)
    run, last, main_process = request.configuration, request.checkpoint(), is_main_process()
    metrics_file = MetricsFile(request.directory / "metrics.csv")
    sessions = Sessions(records.git_state(checkout()), partial(_on_resume, request, metrics_file))
    cli = _build_stage(request, config, sessions, preemption, metrics_file)
    trainer = cli.trainer
    wandb = None
    if main_process:
        resolved = cli.resolved()
        # Write $RUN instead of the folder, so that a run with this file as --config doesn't write into it.
        kept = records.portable(resolved, [(str(request.directory), "$RUN")])
        write_atomically(request.directory / "config.yaml", yaml.safe_dump(kept, sort_keys=False))
        wandb = _wandb_of(request, resolved, sessions.git)
    if wandb is not None:
        trainer.loggers = [metrics_file, wandb, *trainer.loggers[1:]]
        preemption.close = partial(wandb.finish, 1)
    if trainer.num_devices * trainer.num_nodes > 1:
        stopping.allow(STARTING)
    STOP.check()
    with _finishing(wandb):
        resumes = run.trains and last.is_file()
        if resumes:
            end_training_without_steps(trainer)
        elif main_process:
            metrics_file.drop_after(-1)
        if run.trains:
            start = str(last) if resumes else None
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=start, weights_only=True)
            if not trained:  # saving again would change the file's digest
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
        record = _record_of(request, cli, sessions, started, steps, metrics, None if wandb is None else wandb.version)
        if main_process:
            records.write(request.directory / "record.json", record)
            if wandb is not None:
                _note_results(wandb, request, record)
    return record


def _on_resume(request: StageRequest, metrics_file: MetricsFile, step: int, batches: int) -> None:
    print(f"  {request.stage}: resumes from step {step} ({request.checkpoint()})")
    metrics_file.drop_after(batches)


def _build_stage(
    request: StageRequest,
    config: dict[str, Any],
    sessions: Sessions,
    preemption: Preemption,
    metrics_file: MetricsFile,
) -> StageCLI:
    """Build trainer, model and data."""
    quiet_lightning()
    if request.configuration.config["trainer"].get("accelerator") == "cpu":
        # Threads slow down small networks; stages run in parallel instead.
        torch.set_num_threads(1)
    reset_peak_memory()
    progress = Progress(request.directory / PROGRESS_FILE)
    callbacks = [sessions, preemption, EpochCount(), MissedCheckpoints(), progress, Telemetry()]
    arguments = {"default_root_dir": str(request.directory), "logger": [metrics_file], "callbacks": callbacks}
    cli = build(request.configuration, config, arguments)
    trainer = cli.trainer
    leave_signals_to_us(trainer)
    write_last_checkpoint_last(trainer)
    trainer.strategy.checkpoint_io = WholeCheckpoints(type(cli.model).__name__)
    if (end_ranks := getattr(trainer.strategy.launcher, "kill", None)) is not None:
        stopping.at_end(lambda _: end_ranks(signal.SIGKILL))
    return cli


@contextmanager
def _finishing(wandb: StageWandbLogger | None) -> Iterator[None]:
    """Finish the W&B run. Mark the run as failed if the body raises an error."""
    status = 1
    try:
        yield
        status = 0
    finally:
        if wandb is not None:
            wandb.finish(exit_code=status)


def _wandb_of(request: StageRequest, resolved: dict[str, Any], git: Mapping[str, Any]) -> StageWandbLogger | None:
    """Start the stage's W&B run, and log the checkpoints that the stage starts from. Return None if W&B is off."""
    run, revision = request.configuration, git.get("revision") or "unknown"
    draw = request.draw.folder.replace("seed", "s")

    def run_id(stage: StageRequest) -> str:
        return f"{request.paper}-{request.scale}-{draw}-{stage.stage.replace('@', '-')}-{stage.lineage[:8]}"

    configuration = records.config_hash(run.config, records.IGNORED_KEYS | records.SEED_KEYS)
    given = {stage: given.path.name for stage, given in request.files.items()}
    wandb = loggers.wandb_logger(
        directory=request.directory,
        id=loggers.own_id(request.directory, run_id(request)),
        name=loggers.run_name(request.stage, request.scale, draw, request.arguments),
        group=f"{request.paper}/{request.scale}/{request.stage}-{configuration[:8]}{records.GIVEN * bool(given)}",
        job_type=request.job,
        tags=[request.scale, *([request.row] if request.row else []), revision[:12], *["given"] * bool(given)],
        # Every stage has the same keys, for the dashboard's filters.
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
            "given": given,
            "hardware": request.hardware,
        },
        whole=request.scale == "paper",
        notes="\n".join(filter(None, (run.describe(), run.describe_ours() and f"ours: {run.describe_ours()}"))),
    )
    if wandb is not None:
        used = {}
        for parent in request.parents.values():  # several fields may take one checkpoint
            record = finished_record(parent)
            parent_id = (record and record.wandb_run_id) or run_id(parent)
            used[f"{parent_id}-{run.start_from}"] = parent.checkpoint(run.start_from)
        loggers.note_checkpoints(wandb, used, used=True)
    return wandb


def _summary_of(request: StageRequest, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the stage's row in W&B's table of runs: metrics, cells of tables, minima and maxima of curves."""
    cells = tables.summary(tables.load(request.paper), request.stage, request.scale, metrics, request.files)
    # W&B itself keeps the last value of a curve.
    ends = {
        "/".join(reversed(name.rsplit(":", 1))): value
        for name, value in summaries(request.directory / "metrics.csv").items()
        if name.endswith((":min", ":max"))
    }
    return {**metrics, **cells, **ends}


def _record_of(
    request: StageRequest,
    cli: StageCLI,
    sessions: Sessions,
    started: datetime,
    steps: int,
    metrics: dict[str, float | None],
    wandb_id: str | None,
) -> records.Record:
    """Make the record of a finished stage. All ranks must call this function, which adds up their skipped files."""
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
            if name in identity["digests"]  # other fields keep the recipe's value
        },
        given={stage: given.recorded() for stage, given in request.files.items()},
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


def _note_results(wandb: StageWandbLogger, request: StageRequest, record: records.Record) -> None:
    """Log the stage's checkpoints to its W&B run."""
    about = {"config_hash": record.config_hash, "lineage_hash": request.lineage, "steps": record.steps}
    kept = {f"{wandb.version}-{path.stem}": path for path in _checkpoints(request)}
    loggers.note_checkpoints(wandb, kept, used=False, **about)


def _checkpoints(request: StageRequest) -> list[Path]:
    paths = (request.directory / "checkpoints").glob("*.ckpt")
    return sorted(path for path in paths if path.stem != "non_finite")
