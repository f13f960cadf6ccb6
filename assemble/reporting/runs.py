"""Describe the runs in a folder: state, configuration and metrics, by field name."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assemble.reporting import progress
from assemble.reporting.curves import summaries
from assemble.reporting.records import (
    IGNORED_KEYS,
    RECORD_FILE,
    SEED_KEYS,
    Record,
    read_run,
    run_folders,
    warn_of,
)
from assemble.reporting.schema import parse_json
from assemble.reporting.tables import entries, load
from common.errors import ReportingError, nearest
from common.files import parsing, read_bytes, read_yaml

DONE, RUNNING, STOPPED = "done", "running", "stopped"


@dataclass(frozen=True)
class Run:
    """One run of a stage.

    Attributes:
        name: `<paper>/<scale>/<draw>/<stage>`, the run's folder below the folder of runs.
        progress: how far a running stage is; see `assemble.reporting.progress.read`.
    """

    name: str
    folder: Path
    record: Record | None
    state: str
    progress: dict[str, Any] | None
    overrides: tuple[str, ...]

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Return the configuration's fields. For a finished run, omit fields that neither recipe nor overrides set."""
        return flat(self.record.config) if self.record else self.whole_config

    @functools.cached_property
    def whole_config(self) -> dict[str, Any]:
        """Return the configuration's fields with all defaults, if the run stored the defaults."""
        path = self.folder / "config.yaml"
        if not path.exists():
            return flat(self.record.config) if self.record else {}
        return flat(read_yaml(path, ReportingError))

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """Return state, recipe, revision and similar facts, by name."""
        paper, scale, draw, stage = self.name.split("/")
        record = self.record
        row: dict[str, Any] = {"run": self.name, "paper": paper, "scale": scale, "draw": draw}
        row |= {"seed": int(re.match(r"seed(\d+)", draw)[1]), "stage": stage, "state": self.state}  # type: ignore[index]
        began = (
            record.started
            if record
            else datetime.fromtimestamp((self.folder / "identity.json").stat().st_mtime, UTC).isoformat()
        )
        row["started"] = began[:16].replace("T", " ")
        row["overrides"] = " ".join(short_overrides(self.overrides))
        if self.progress:
            left = self.progress.get("left")
            row["progress"] = f"{100 * self.progress['share']:.0f} %" + (
                "" if left is None else f", {progress.duration(left)} left"
            )
            row["steps"] = self.progress["step"]
        if record:
            row |= {"recipe": record.recipe, "job": record.job, "row": record.row or record.stage}
            row |= {"minutes": round(record.wall_seconds / 60, 2), "steps": record.steps}
            row |= {"revision": record.revision, "config_hash": record.config_hash, "lineage_hash": record.lineage_hash}
            row |= {"cpu": record.hardware.get("cpu", "unknown"), "measured": headline(record)}
        return row

    @functools.cached_property
    def curves(self) -> dict[str, float]:
        """Return the last, smallest and largest value of every curve."""
        return summaries(self.folder / "metrics.csv")


def find_runs(root: Path, papers: Sequence[str] = ()) -> list[Run]:
    """List all runs of these papers (default: all), finished or not. Skip unreadable ones with a warning."""
    runs = []
    for folder in run_folders(root):
        if papers and folder.parts[-4] not in papers:
            continue
        try:
            run = _run(folder.relative_to(root).as_posix(), folder, root)
            if run is not None:
                _ = run.fields, run.config  # Read the files now, so that an unreadable run is skipped here.
                runs.append(run)
        except Exception as error:
            warn_of(f"skipped {folder}: {type(error).__name__}: {error}")
    return runs


def _run(name: str, folder: Path, root: Path) -> Run | None:
    identity = folder / "identity.json"
    finished = (folder / RECORD_FILE).exists()
    if not finished and not identity.exists():
        return None
    record = read_run(root, folder) if finished else None
    reported = None if finished else progress.read(folder, time.time() - 120)
    running = reported is not None or (not finished and _held(folder.with_name(f".{folder.name}.lock")))
    state = DONE if finished else RUNNING if running else STOPPED
    overrides: tuple[str, ...] = ()
    if identity.exists():
        with parsing(identity, ReportingError):
            overrides = tuple(map(str, parse_json(read_bytes(identity)).get("arguments", ())))
    return Run(name, folder, record, state, reported, overrides)


def _held(lock: Path) -> bool:
    """Check whether a process holds a lock. Don't try to take the lock, since that could make another process fail."""
    try:
        place = lock.stat()
        locks = Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(rf":{place.st_ino} ", locks) is not None


def short_overrides(arguments: Sequence[str]) -> list[str]:
    """Shorten overrides to the last part of their field: `--model.loss.temperature 0.1` becomes `temperature=0.1`."""
    said: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            field, _, value = argument[2:].partition("=")
            said.append(f"{field.rpartition('.')[2]}={value}")
        elif said:
            said[-1] += argument if said[-1].endswith("=") else f" {argument}"
    return said


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a configuration to fields as the command line names them. Lists of plain values stay whole.

    >>> flat({"model": {"class_path": "a.B", "init_args": {"rates": [1, 2]}}})
    {'model': 'a.B', 'model.rates': [1, 2]}
    >>> flat({"data": {"class_path": "a.B", "init_args": {}}})
    {'data': 'a.B'}
    """
    if isinstance(config, dict) and config:
        fields: dict[str, Any] = {}
        for key, value in config.items():
            if key == "init_args":
                fields |= flat(value, prefix) if value else {}
            elif key == "class_path" and prefix:
                fields[prefix] = value
            else:
                fields |= flat(value, f"{prefix}.{key}" if prefix else str(key))
        return fields
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        return {k: v for place, item in enumerate(config) for k, v in flat(item, f"{prefix}.{place}").items()}
    return {prefix: config} if prefix else {}


def headline(record: Record) -> str:
    """Select up to three metrics of a run, preferably those that tables show."""
    filled = entries(load(record.paper), record.stage.partition("+")[0], record.scale)
    decimals = {metric.key: metric.decimals for _, _, metric in reversed(filled)}
    names = [name for name in dict.fromkeys(m.key for _, _, m in filled) if name in record.metrics]
    values = {name: record.metrics[name] for name in (names or list(record.metrics))[:3]}
    texts = []
    for name, value in values.items():
        if value is not None:
            places = decimals.get(name, 1 if 10 <= abs(value) < 1e6 else None)
            text = f"{value:.4g}" if places is None else f"{value:.{places}f}"
            texts.append(f"{name.removeprefix('test/')} {text}")
    return ", ".join(texts)


def text_of(value: Any) -> str:
    """Write a field's value as text. None is empty, and a float has five digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def named_runs(runs: Sequence[Run], names: Iterable[str]) -> list[Run]:
    """Find runs by name, by the end of a name or by folder: `mini/seed0/avid`, or `avid` if unique."""
    matching, wrong = [], []
    for name in names:
        end = f"/{name.rstrip('/')}"
        some = [run for run in runs if f"/{run.name}" == end] or [run for run in runs if f"/{run.name}".endswith(end)]
        some = some or [run for run in runs if run.folder.resolve() == Path(name).resolve()]
        if len(some) == 1:
            matching += some
        elif some:
            wrong.append(f"{name!r} means several runs: {', '.join(run.name for run in some)}; name one")
        else:
            wrong.append(f"there is no run {name!r}: {nearest(name, [run.name for run in runs])}")
    if wrong:
        raise ReportingError("; ".join(wrong))
    return matching


def config_differences(first: Run, second: Run) -> list[tuple[str, Any, Any]]:
    """Return the fields that differ between two runs, with both values. Include defaults if both runs stored them."""
    whole = all((run.folder / "config.yaml").is_file() for run in (first, second))
    left, right = ((run.whole_config if whole else run.config) for run in (first, second))
    return [pair for pair in _pairs(left, right) if pair[1] != pair[2]]


def counts(field: str) -> bool:
    """Check whether a field of a configuration may change results."""
    return not IGNORED_KEYS & set(field.split(".")) or bool(SEED_KEYS & set(field.split(".")))


def metric_differences(first: Run, second: Run) -> list[tuple[str, Any, Any]]:
    """Return all metrics of both runs, equal or not: measurements, and the last values of curves."""

    def measured(run: Run) -> dict[str, Any]:
        ends = {name: value for name, value in run.curves.items() if ":" not in name}
        return {**ends, **(run.record.metrics if run.record else {})}

    return _pairs(measured(first), measured(second))


def _pairs(left: dict[str, Any], right: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, left.get(name), right.get(name)) for name in sorted({*left, *right})]
