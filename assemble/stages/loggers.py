"""Log a stage to an append-only metrics file, which survives a kill, and to Weights & Biases (default: offline)."""

from __future__ import annotations

import csv
import functools
import io
import multiprocessing
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from assemble.reporting.runs import short_overrides
from assemble.reporting.wandb_server import one_line, project, why_unreachable
from common.errors import StageError
from common.files import named, open_regular, parsing, write_atomically


class MetricsFile(Logger):
    """Appends `step,name,value` rows to a CSV file; a written row is never rewritten.

    A resumed run drops the rows after its checkpoint, so its file equals the file of an uninterrupted run.
    """

    name = "metrics"
    version = ""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @property
    def save_dir(self) -> str:
        return str(self._path.parent)

    def drop_after(self, step: int) -> None:
        """Drop the rows after `step` (-1 drops all), and the rows of a test. Steps start at 0."""
        if not self._path.exists():
            return
        with parsing(self._path, StageError), open_regular(self._path, "r", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        # A resumed run repeats the test, whose step is the last one of training.
        rows = list(takewhile(lambda row: not row[1].startswith("test/"), rows))
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["step", "name", "value"], *rows])
        write_atomically(self._path, text.getvalue())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with named(self._path), self._path.open("a", encoding="utf-8", newline="") as file:
            header = [] if file.tell() else [["step", "name", "value"]]
            rows = [[step if step is not None else 0, name, repr(float(value))] for name, value in metrics.items()]
            csv.writer(file).writerows([*header, *rows])
            file.flush()
            # A power loss must not lose rows from before the last checkpoint.
            os.fsync(file.fileno())

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the stage writes its configuration to a separate file."""


def _say(text: str) -> None:
    """Print a line, since Lightning's logger is muted."""
    print(f"  {text}", flush=True)


_say_once = functools.cache(_say)


def _asked_mode() -> str:
    """Return `WANDB_MODE`, or `online` in a W&B sweep. Return an empty text if the user asked for no mode."""
    return os.environ.get("WANDB_MODE", "").strip().lower() or ("online" if os.environ.get("WANDB_SWEEP_ID") else "")


def wandb_mode() -> str:
    """Return the requested mode. Use `offline` by default, without a key, or if the server does not answer."""
    mode = _asked_mode()
    if not mode:
        if multiprocessing.parent_process() is None:  # once, not in every worker
            _say_once("W&B: logging offline; WANDB_MODE=online logs live, `wandb sync` uploads later")
        return "offline"
    os.environ["WANDB_MODE"] = mode  # the client only accepts lowercase
    if mode == "online" and (reason := why_unreachable()):
        _say(f"W&B: {reason}; logging offline, `wandb sync` uploads later")
        return "offline"
    return mode


#: Settings for short runs. They turn off what is useless there and can take longer than the run.
_QUIET: dict[str, Any] = {
    "console": "off", "x_disable_stats": True, "x_disable_meta": True, "disable_git": True,
    "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip


class StageWandbLogger(WandbLogger):
    """Logs a stage to W&B, whose errors never stop the stage. `first` is the step number of the first logged row."""

    def __init__(self, run: Any, directory: Path, first: int = 0) -> None:
        super().__init__(experiment=run, save_dir=str(directory))
        self._first, self._failed = first, False

    def attempt(self, action: Callable[[], object]) -> None:
        """Try an action that may fail, for example because W&B's process was killed or the disk is full."""
        try:
            action()
        except Exception as error:
            if not self._failed:
                _say(
                    f"W&B: {type(error).__name__}: {one_line(error)}; the stage continues, and its values are in "
                    "metrics.csv and record.json"
                )
            self._failed = True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if self._first:
            first, self._first = self._first, 0
            row = {**metrics, "trainer/global_step": step} if step is not None else metrics
            self.attempt(lambda: self.experiment.log(dict(row), step=first, commit=True))
        else:
            self.attempt(lambda: WandbLogger.log_metrics(self, metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the run already has the whole configuration."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        self.attempt(lambda: self.experiment.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        self.attempt(lambda: self.experiment.finish(exit_code=exit_code))
        if self._failed or exit_code:
            _end_service()


def _earlier(directory: Path) -> list[Path]:
    """Return the files of a stage's earlier W&B runs, oldest first."""
    return sorted(
        directory.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name.removeprefix("offline-")
    )


def own_id(directory: Path, stem: str) -> str:
    """Return the id of an earlier W&B run in this folder, or a new id that differs from the ids of teammates' runs."""
    ids = [path.stem.removeprefix("run-") for path in _earlier(directory)]
    return next((name for name in reversed(ids) if name.startswith(stem)), f"{stem[:120]}-{secrets.token_hex(2)}")


def wandb_logger(directory: Path, whole: bool = False, **about: Any) -> StageWandbLogger | None:
    """Start the W&B run of one stage, offline if online fails. Return None if W&B is disabled or cannot start.

    Args:
        directory: parent of the `wandb/` folder.
        whole: also log the console and the machine's load. `ASSEMBLE_WANDB_SYSTEM=1` sets this for every run.
        about: fields of `wandb.init`; `WANDB_RUN_GROUP` replaces the group, `WANDB_TAGS` adds tags.
    """
    mode = wandb_mode()
    if mode == "disabled":
        return None
    tags = [*about["tags"], *(tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(","))]
    about["tags"] = list(dict.fromkeys(tag[:64] for tag in tags if tag))
    about["group"] = os.environ.get("WANDB_RUN_GROUP") or about["group"]
    whole = whole or os.environ.get("ASSEMBLE_WANDB_SYSTEM", "0") not in ("", "0")
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            return _start(directory, attempt, whole, about)
        except Exception as error:
            _say(f"W&B: could not start {attempt} ({type(error).__name__}: {one_line(error)})")
            _end_service()
    return None


def _start(directory: Path, mode: Any, whole: bool, about: Mapping[str, Any]) -> StageWandbLogger:
    if mode == "offline" and _asked_mode() != "online":  # if online failed, only this stage is offline
        # Set these before the import: W&B's telemetry and error reports only read the environment.
        os.environ.update(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
    import wandb

    if re.search("[\udc80-\udcff]", str(directory)):  # W&B would print a traceback for each of its messages
        raise StageError("the folder's name isn't UTF-8, or Python runs without it; set PYTHONUTF8=1")
    directory.mkdir(parents=True, exist_ok=True)
    earlier = _earlier(directory)
    run = wandb.init(
        project=project(),
        dir=str(directory),
        **about,
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(
            init_timeout=60,
            # If the network dies, unsent data stay in the folder.
            finish_timeout=120 if whole else 30,
            silent=mode == "offline",
            quiet=True,
            disable_code=True,
            **({} if whole else _QUIET),
        ),
        reinit="finish_previous",
    )
    # Otherwise the x-axis is the number of calls, and resumed runs don't line up.
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    numbered = mode == "online" and not any(path.parent.name.startswith("offline-") for path in earlier)
    # A row takes more than 32 bytes, so this exceeds the number of rows in these files.
    return StageWandbLogger(run, directory, 0 if numbered else sum(path.stat().st_size for path in earlier) // 32)


def _end_service() -> None:
    """End W&B's process. If a signal already ended it, this prevents a traceback when Python exits."""
    with suppress(Exception, SystemExit):
        import wandb

        wandb.teardown()


def run_name(stage: str, scale: str, draw: str, arguments: Sequence[str]) -> str:
    """Name a run, such as `avid-mini-s0-sse41`. Write overrides (`temperature=0.1`) instead of their digest."""
    overrides = short_overrides(arguments)
    base = stage.partition("+")[0] if overrides else stage
    return " ".join([f"{base}-{scale}-{draw}", *overrides])[:128]


def note_checkpoints(logger: StageWandbLogger, files: Mapping[str, Path], *, used: bool, **about: Any) -> None:
    """Log checkpoints that the run used or made as artifacts by reference. An unchanged file makes no new version."""
    import wandb

    def note(name: str, path: Path) -> None:
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:128], "checkpoint", metadata=about)
        artifact.add_reference(path.resolve().as_uri(), checksum=False)
        # `use_artifact` would wait for the server, and refuse to work offline.
        logger.experiment._log_artifact(artifact, is_user_created=True, use_after_commit=used)

    for name, path in files.items():
        logger.attempt(partial(note, name, path))
