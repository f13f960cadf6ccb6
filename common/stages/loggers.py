"""What a stage logs to: an append-only metrics file that survives a kill, and Weights & Biases (offline by default)."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from common.errors import StageError
from common.files import write_atomically
from common.reporting.runs import short_overrides
from common.reporting.wandb_server import project, why_no_key, why_unreachable


class MetricsFile(Logger):
    """Appends `step,name,value` rows to a CSV file.

    The long form needs no header that changes when a new metric appears, so a row once written is never rewritten. A
    resumed run first drops the rows after its checkpoint, then goes on: the file equals that of an uninterrupted run.
    Lightning's CSVLogger starts its file anew instead.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.exists() and not path.is_file():
            raise StageError(f"{path} is no file, but the values of training are written there: move it away")
        self._path = path

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    def drop_after(self, step: int) -> None:
        """Forget rows of steps greater than `step` (-1 forgets everything). Steps start at 0."""
        if not self._path.exists():
            return
        with self._path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["step", "name", "value"], *rows])
        write_atomically(self._path, text.getvalue())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = not self._path.exists()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "name", "value"])
            writer.writerows([step if step is not None else 0, name, repr(float(v))] for name, v in metrics.items())
            # Else a loss of power takes rows of before the last checkpoint, which the resumed run does not make again.
            file.flush()
            os.fsync(file.fileno())

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is kept beside the file by the stage, not in it."""


def wandb_mode() -> str:
    """`online`, `offline` or `disabled`, from the environment and what the network allows.

    `WANDB_MODE` decides when it is set. Otherwise: online for an agent of a sweep, which cannot do without, else
    offline, and one line says so. Online needs a key and a server that answers within a few seconds; where it does not,
    the run goes on offline, and so does the rest of the process.
    """
    mode = os.environ.get("WANDB_MODE", "").lower()
    if mode in {"disabled", "dryrun", "offline"}:
        return "disabled" if mode == "disabled" else "offline"
    if mode != "online" and not os.environ.get("WANDB_SWEEP_ID"):
        return "offline"
    if reason := why_no_key():
        rank_zero_info(f"W&B: {'WANDB_MODE=online' if mode else 'a sweep'} but {reason}; logging offline instead")
        return "offline"
    if reason := why_unreachable():
        rank_zero_info(f"W&B: {reason}; logging offline, `wandb sync` sends it later")
        return "offline"
    return "online"


#: Left out where runs are many and short: it takes longer than some of them, and says nothing of them.
_QUIET: dict[str, Any] = {
    "console": "off", "x_disable_stats": True, "x_disable_meta": True, "disable_git": True,
    "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip


def wandb_logger(
    *,
    directory: Path,
    run_id: str,
    name: str,
    group: str,
    job_type: str,
    tags: list[str],
    config: dict[str, Any],
    notes: str = "",
    whole: bool = False,
) -> WandbLogger | None:
    """The W&B run of one stage; None when disabled or when W&B cannot start.

    Args:
        directory: folder that gets the `wandb/` folder.
        run_id: stable id, so that a resumed stage continues its run.
        name: `<stage>-<scale>-s<seed>`, `-<isa>` with another rounding, and what was changed.
        group: `<paper>/<scale>`; `WANDB_RUN_GROUP` is another.
        job_type: pretrain, fine_tune, probe or evaluate.
        tags: scale, row, revision; those of `WANDB_TAGS` are added.
        config: the whole resolved configuration, and what tells the run from others.
        notes: the configuration stack in one line.
        whole: log the console, the load of the machine and what it is, too; `ASSEMBLE_WANDB_SYSTEM=1` asks for it.
    """
    mode = wandb_mode()
    if mode == "disabled":
        return None
    if mode == "offline":
        # For all of the process and those that it starts, and before the import: W&B's own telemetry and its reports of
        # errors ask the environment, not the run, and would look for their servers.
        os.environ.update(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
    import wandb

    wanted = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",")]
    directory.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        init_timeout=20,
        # A network that dies meanwhile: what was not sent stays in the folder, and `wandb sync` sends it.
        finish_timeout=120,
        silent=True,
        disable_code=True,
        **({} if whole or os.environ.get("ASSEMBLE_WANDB_SYSTEM", "0") not in ("", "0") else _QUIET),
    )
    if "wandb.sdk.launch" not in sys.modules and hasattr(wandb.Run, "_detect_and_apply_job_inputs"):
        # Every run looks for inputs that its process has staged for a launch agent, and to find none imports the agent,
        # which takes three quarters of the start. Who has not imported it has staged none.
        wandb.Run._detect_and_apply_job_inputs = lambda run: None  # type: ignore[method-assign, assignment]
    try:
        run = wandb.init(
            project=project(),
            dir=str(directory),
            id=run_id,
            name=name,
            group=os.environ.get("WANDB_RUN_GROUP") or group,
            job_type=job_type,
            tags=list(dict.fromkeys(tag[:64] for tag in (*tags, *wanted) if tag)),
            config=config,
            notes=notes,
            mode="online" if mode == "online" else "offline",
            resume="allow" if mode == "online" else None,
            settings=settings,
            reinit="finish_previous",
        )
    except Exception as error:  # W&B must never end a run: the record is the source of truth.
        rank_zero_info(f"W&B: could not start ({type(error).__name__}: {error}); this stage is not logged there")
        return None
    # Else the axis is the number of calls, and runs that log at other steps, or were resumed, do not line up.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if mode == "online":
        print(f"  W&B: {run.url}", flush=True)
    return WandbLogger(experiment=run, save_dir=str(directory))


def run_name(stage: str, scale: str, draw: str, arguments: Sequence[str]) -> str:
    """Name of a run: of one with overrides it says them, by the last parts of their fields.

    Args:
        stage: the stage; of one with overrides with a digest of them after a plus sign, which the name replaces.
        scale: its scale.
        draw: its seed and rounding, `s0` or `s0-sse41`.
        arguments: overrides as on the command line, `--field value` or `--field=value`.
    """
    said = short_overrides(arguments)
    base = stage.partition("+")[0] if said else stage
    return " ".join([f"{base}-{scale}-{draw}", *said])[:128]


def note_files(logger: WandbLogger, files: Mapping[str, Path], kind: str, *, used: bool, **about: Any) -> None:
    """Note files as artifacts by reference, without sending them, so that the dashboard draws what came from what.

    The same name and file is the same version, whoever notes it: a child that uses a checkpoint need not find its
    parent on the server, and offline runs note the same.

    Args:
        logger: the run.
        files: name of each artifact, and the file.
        kind: type of the artifacts, such as `checkpoint`.
        used: whether the run took them, rather than made them.
        about: metadata.
    """
    import wandb

    for name, path in files.items():
        try:
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:128], kind, metadata=about)
            artifact.add_reference(path.resolve().as_uri(), checksum=False)
            # What `use_artifact` does with a new artifact, but that waits for the server, and refuses offline.
            logger.experiment._log_artifact(artifact, is_user_created=True, use_after_commit=used)
        except Exception as error:  # as above: W&B must never end a run
            rank_zero_info(f"W&B: {name} is not noted ({type(error).__name__}: {error})")
