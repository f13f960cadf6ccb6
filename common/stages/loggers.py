"""What a stage logs to: an append-only metrics file that survives a kill, and Weights & Biases (offline by default)."""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import multiprocessing
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from common.errors import StageError
from common.files import write_atomically
from common.reporting.runs import short_overrides
from common.reporting.wandb_server import one_line, project, why_no_key, why_unreachable


class MetricsFile(Logger):
    """Appends `step,name,value` rows to a CSV file.

    The long form needs no header that changes when a new metric appears, so a row once written is never rewritten. A
    resumed run first drops the rows after its checkpoint, then goes on: the file equals that of an uninterrupted run.
    Lightning's CSVLogger starts its file anew instead. Rows that a full disk does not take wait for the next ones.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.exists() and not path.is_file():
            raise StageError(f"{path} is no file, but the values of training are written there: move it away")
        self._path = path
        self._waiting: list[list[Any]] = []

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
        """Forget rows of steps greater than `step` (-1 forgets everything), and those of a test. Steps start at 0."""
        if not self._path.exists():
            return
        with self._path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        # A test stands under the last step of training, and is made again.
        rows = list(takewhile(lambda row: not row[1].startswith("test/"), rows))
        text = io.StringIO(newline="")
        csv.writer(text).writerows([["step", "name", "value"], *rows])
        write_atomically(self._path, text.getvalue())

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        told = bool(self._waiting)
        self._waiting += [[step if step is not None else 0, name, repr(float(v))] for name, v in metrics.items()]
        try:
            self._write()
        except OSError as error:
            if not told:
                _say(
                    f"{self._path} cannot be written ({error.strerror}): training goes on, and its values wait in "
                    "memory until it can; free space, or the next checkpoint stops it"
                )

    @rank_zero_only
    def flush(self) -> None:
        """Write the rows that wait: a checkpoint or record that comes after them must not be there without them.

        Raises:
            StageError: the disk does not take them.
        """
        if self._waiting:
            try:
                self._write()
            except OSError as error:
                raise StageError(
                    f"could not write {self._path}: {error.strerror}. Free space, and the same command goes on from "
                    "the last checkpoint"
                ) from error

    def _write(self) -> None:
        """Append the rows that wait, all or none."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which would be written a second time when the file is closed.
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            text = io.StringIO(newline="")
            csv.writer(text).writerows([*([] if size else [["step", "name", "value"]]), *self._waiting])
            content = text.getvalue().encode()
            try:
                while content:
                    content = content[file.write(content) :]
                # Else a loss of power takes rows of before the last checkpoint, which the resumed run does not make
                # again.
                os.fsync(file.fileno())
            except OSError as error:
                if content or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no fsync
                    os.truncate(self._path, size)  # the row that was cut off
                    raise
        self._waiting = []

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is kept beside the file by the stage, not in it."""


def _say(text: str) -> None:
    """One line for the user: what Lightning's own logger is told is not shown, see `run._quiet_lightning`."""
    print(f"  {text}", flush=True)


@functools.cache
def say_offline() -> None:
    """Say once that runs stay on this machine, where nobody asked for W&B."""
    if not os.environ.get("WANDB_MODE", "").strip() and not os.environ.get("WANDB_SWEEP_ID"):
        _say("W&B: offline; WANDB_MODE=online logs live, `wandb sync` sends it later")


def wandb_mode() -> str:
    """`online`, `offline` or `disabled`, from the environment and what the network allows.

    `WANDB_MODE` decides when it is set. Otherwise: online for an agent of a sweep, which cannot do without, else
    offline, and one line says so. Online needs a key and a server that answers within a few seconds; where it does not,
    the run goes on offline, and so does the rest of the process.
    """
    given = os.environ.get("WANDB_MODE", "")
    mode = {"dryrun": "offline", "run": "online"}.get(given.strip().lower(), given.strip().lower())
    if mode not in ("", "online", "offline", "disabled"):
        _say(f"W&B: WANDB_MODE={given} is none of online, offline and disabled; logging offline")
        mode = "offline"
    if mode:
        os.environ["WANDB_MODE"] = mode  # the client refuses other spellings of it
    if mode in ("offline", "disabled"):
        return mode
    if not mode and not os.environ.get("WANDB_SWEEP_ID"):
        if multiprocessing.parent_process() is None:  # a command says it for its workers
            say_offline()
        return "offline"
    if reason := why_no_key():
        _say(f"W&B: {'WANDB_MODE=online' if mode else 'a sweep'} but {reason}; logging offline instead")
        return "offline"
    if reason := why_unreachable():
        _say(f"W&B: {reason}; logging offline, `wandb sync` sends it later")
        return "offline"
    return "online"


#: Left out where runs are many and short: it takes longer than some of them, and says nothing of them.
_QUIET: dict[str, Any] = {
    "console": "off", "x_disable_stats": True, "x_disable_meta": True, "disable_git": True,
    "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip


class StageWandbLogger(WandbLogger):
    """The W&B run of a stage, which never ends the stage: what fails there is said once, and the stage goes on.

    The client fails when its own process was killed or a disk is full, long after it started.

    Args:
        run: the run.
        directory: folder of the stage.
        first: number of the first row. An offline run that goes on must count on from its earlier file itself, since
            no server does.
    """

    def __init__(self, run: Any, directory: Path, first: int = 0) -> None:
        super().__init__(experiment=run, save_dir=str(directory))
        self._first, self._failed = first, False

    def attempt(self, action: Callable[[], object]) -> None:
        """Do something that W&B may fail at."""
        try:
            action()
        except Exception as error:
            if not self._failed:
                _say(
                    f"W&B: {type(error).__name__}: {one_line(error)}; the stage goes on, and {_KEPT}, but W&B may lack "
                    "some of it"
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
        """The run has the whole configuration already, under the same keys for every stage."""

    @rank_zero_only
    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda: WandbLogger.log_table(self, *args, **kwargs))

    @rank_zero_only
    def log_image(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda: WandbLogger.log_image(self, *args, **kwargs))

    @rank_zero_only
    def log_video(self, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda: WandbLogger.log_video(self, *args, **kwargs))

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Write values into the run's summary."""
        self.attempt(lambda: self.experiment.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        """End the run, and say so when it was not kept or sent as a whole."""
        run = self.experiment
        self.attempt(lambda: run.finish(exit_code=exit_code))
        if not self._failed and (reason := _first_error(Path(run.settings.log_internal))):
            send = f"`wandb sync --include-online {run.settings.sync_dir}` sends what may be missing there"
            lacking = "its offline file lacks some of them"
            _say(f"W&B: {reason}; {_KEPT}, and {send if run.settings.mode == 'online' else lacking}")


#: What holds without W&B.
_KEPT = "its values are in metrics.csv and record.json"


def _first_error(log: Path) -> str:
    """The first error that the client's own process wrote into its log; empty when there is none.

    What it could not send or write it tells nowhere else.
    """
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:  # a full disk cut it off
            continue
        if isinstance(told, dict) and told.get("level") == "ERROR":
            parts = [str(told[key]) for key in ("msg", "status", "error") if told.get(key)]
            return " ".join(": ".join(parts).split())[:300]
    return ""


def _earlier(directory: Path) -> list[Path]:
    """Files of a stage's runs on W&B so far, the last at the end."""
    return sorted(
        directory.glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.parent.name.removeprefix("offline-")
    )


def own_id(directory: Path, stem: str) -> str:
    """Id of a stage's run: that under which its folder was logged before, else a new one that nobody else has.

    Others of a team run the same stage: with the same id, the server would mix theirs and this one.

    Args:
        directory: folder of the stage.
        stem: what the id begins with.
    """
    ids = [path.stem.removeprefix("run-") for path in _earlier(directory)]
    return next((found for found in reversed(ids) if found.startswith(stem)), "") or _new_id(stem)


def _new_id(stem: str) -> str:
    return f"{stem[:120]}-{secrets.token_hex(2)}"


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
) -> StageWandbLogger | None:
    """The W&B run of one stage; None when disabled or when W&B cannot start.

    A run that cannot start online starts offline, and one that was deleted on the server gets another id.

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
    wanted = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",")]
    earlier = _earlier(directory)
    # A record takes more than 32 bytes of a file, so this is past all that they hold.
    first = sum(path.stat().st_size for path in earlier) // 32
    began_offline = any(path.parent.name.startswith("offline-") for path in earlier)

    def start(mode: str, run_id: str) -> StageWandbLogger:
        if mode == "offline":
            # For all of the process and those that it starts, and before the import: W&B's own telemetry and its
            # reports of errors ask the environment, not the run, and would look for their servers.
            os.environ.update(WANDB_MODE="offline", WANDB_ERROR_REPORTING="false")
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            init_timeout=20,
            # A network that dies meanwhile: what was not sent stays in the folder, and `wandb sync` sends it.
            finish_timeout=120 if whole else 30,
            silent=True,
            disable_code=True,
            **({} if whole or os.environ.get("ASSEMBLE_WANDB_SYSTEM", "0") not in ("", "0") else _QUIET),
        )
        if "wandb.sdk.launch" not in sys.modules and hasattr(wandb.Run, "_detect_and_apply_job_inputs"):
            # Every run looks for inputs that its process has staged for a launch agent, and to find none imports the
            # agent, which takes three quarters of the start. Who has not imported it has staged none.
            wandb.Run._detect_and_apply_job_inputs = lambda run: None  # type: ignore[method-assign, assignment]
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
        # Else the axis is the number of calls, and runs that log at other steps, or were resumed, do not line up.
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        if mode == "online":
            print(f"  W&B: {run.url}", flush=True)
        return StageWandbLogger(run, directory, first if mode == "offline" or began_offline else 0)

    def start_anew(mode: str, run_id: str) -> StageWandbLogger:
        try:
            return start(mode, run_id)
        except ConnectionError:  # not the server's: the client's own process died in an earlier stage
            _forget_client()
            return start(mode, run_id)

    # W&B must never end a run: the record is the source of truth.
    if mode == "online":
        try:
            return start_anew("online", run_id)
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
        if "deleted" in reason:
            try:
                logger = start("online", _new_id(run_id))  # the client's process holds the other one
                _say(f"W&B: {run_id} was deleted on the server, so this goes on under another id")
                return logger
            except Exception as error:
                reason = f"{type(error).__name__}: {one_line(error)}"
        _forget_client()  # it holds the id of the run that did not start
        _say(f"W&B: could not start online ({reason}); logging offline, `wandb sync` sends it later")
    try:
        return start_anew("offline", run_id)
    except Exception as error:
        _say(f"W&B: could not start ({type(error).__name__}: {one_line(error)}); not logged there, but {_KEPT}")
        return None


def _forget_client() -> None:
    """End the client's process, whatever became of it; the next run starts another."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown()


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


def note_files(logger: StageWandbLogger, files: Mapping[str, Path], kind: str, *, used: bool, **about: Any) -> None:
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

    def note(name: str, path: Path) -> None:
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:128], kind, metadata=about)
        artifact.add_reference(path.resolve().as_uri(), checksum=False)
        # What `use_artifact` does with a new artifact, but that waits for the server, and refuses offline.
        logger.experiment._log_artifact(artifact, is_user_created=True, use_after_commit=used)

    for name, path in files.items():
        logger.attempt(partial(note, name, path))
