"""Check what unfinished stages need before the first one starts: data sets, weights, other files and disk space."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assemble.reporting.papers import paper_named
from assemble.stages.layers import classes_in
from assemble.stages.plan import Planned
from assemble.stages.recipe_data import dataset_of, entries_read, files_in
from assemble.stages.request import StageRequest
from common.data.overview import look_at
from common.errors import StageError, printable

if TYPE_CHECKING:
    from common.data.datasets.base import DatasetStatus

#: Assumed bytes of a checkpoint at `mini` and `smoke`; `plan --estimate` gives 1 to 9 MB.
_SMALL = 10e6


@dataclass(frozen=True)
class Needs:
    """What a plan's unfinished stages read and write.

    Attributes:
        rows: (title, what was found, what is missing) -> the stages that read the file or data set.
        blocked: keys of the stages that cannot run.
        free, needed: free bytes on the disk of the runs, and an estimate of the bytes needed (None if unknown).
    """

    planned: Sequence[Planned]
    rows: Mapping[tuple[str, str, str], Sequence[Planned]]
    blocked: set[tuple[int, str]]
    free: float
    needed: float | None

    @property
    def runnable(self) -> list[Planned]:
        return [item for item in self.planned if item.request.key not in self.blocked]

    @property
    def disk_is_short(self) -> bool:
        return self.needed is not None and self.needed > self.free

    def verdict(self, item: Planned) -> str:
        """Return `go` if a stage can run, else what is missing."""
        for (title, _, problem), stages in self.rows.items():
            if problem and item in stages:
                return f"no: {title} {problem}"
        return "no: it starts from a stage that cannot run" if item.request.key in self.blocked else "go"

    def lines(self) -> list[str]:
        """Write a table of what is needed and found. Write nothing if no file is read and the disk has room."""
        if not (self.rows or self.disk_is_short):
            return []
        needed = "unknown" if self.needed is None else f"about {self.needed / 1e9:,.2f} GB"
        space = f"{self.free / 1e9:,.2f} GB free for {self.planned[0].request.runs}, {needed} needed"
        rows = [(title, problem or state, _names(stages)) for (title, state, problem), stages in self.rows.items()]
        rows = [("needed", "found", "read by"), *rows, ("disk", space, "")]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return [printable("  ".join(map(str.ljust, row, widths)).rstrip()) for row in rows]

    def require(self, skip_missing: bool) -> list[Planned]:
        """Return the stages that can run, or raise an error that says what to get."""
        problems = []
        if self.blocked:
            request, waiting = self.planned[0].request, sum(not item.done for item in self.planned)
            missing = sum(bool(problem) for *_, problem in self.rows)
            problems.append(
                f"{missing} of {len(self.rows)} data sets and files are missing, and {len(self.blocked)} of {waiting} "
                f"stages cannot run without them: see `assemble data {paper_named(request.paper).short} "
                f"--data {request.data}`"
            )
            if waiting > len(self.blocked):
                problems.append(f"--skip-missing runs the other {waiting - len(self.blocked)}")
        if self.disk_is_short:
            problems.append(
                "the disk may fill up: free space, or name another folder with --runs (--skip-missing runs anyway)"
            )
        if problems and not skip_missing:
            raise StageError("; ".join(problems))
        return self.runnable


def needs_of(planned: Sequence[Planned]) -> Needs:
    statuses: dict[str, DatasetStatus] = {}
    rows: dict[tuple[str, str, str], list[Planned]] = {}
    blocked: set[tuple[int, str]] = set()
    waiting, done = [item for item in planned if not item.done], {item.request.key for item in planned if item.done}
    for item in waiting:
        if any(parent.key in blocked for parent in item.request.parents.values()):
            blocked.add(item.request.key)
        for row in dict.fromkeys([*_read_by(item, statuses), *_lost_checkpoints(item.request, done)]):
            rows.setdefault(row, []).append(item)
            if row[-1]:
                blocked.add(item.request.key)
    runs = waiting[0].request.runs if waiting else Path.cwd()
    free = shutil.disk_usage(next(path for path in (runs, *runs.parents) if path.is_dir())).free
    return Needs(planned, rows, blocked, free, _checkpoints(planned, waiting))


def _read_by(item: Planned, statuses: dict[str, DatasetStatus]) -> Iterator[tuple[str, str, str]]:
    """Yield (title, what was found, what is missing) for each data set and file that a stage reads."""
    config, data = item.run.config, item.request.data
    arguments = config["data"].get("init_args") or {}
    splits = {value for name, value in arguments.items() if name.endswith("split")}
    if config["trainer"].get("limit_val_batches") == 0:
        splits.discard(arguments.get("held_out_split"))
    for entry in entries_read(config["data"]):
        status = _status(entry, data, statuses)
        yield status.dataset.full_title, *_state(status, splits, arguments.get("fold"), "max_regions" in arguments)
    for name, parent in item.request.parents.items():
        if parent.given is not None and (file_name := parent.given.beside.get(name)):
            present = item.request.start(name) not in (None, parent.given.path)
            yield file_name, "yes" if present else "no; computed from the evaluated data", ""
    for path in files_in({"model": config["model"]} if arguments.get("world") else config):
        file = look_at(path, data)
        lacks = f" (without {', '.join(file.missing)})" if file.missing and file.path.exists() else ""
        yield file.file.title, "yes", "" if file.present else f"missing: {file.path}{lacks}"


def _lost_checkpoints(request: StageRequest, done: Collection[tuple[int, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each finished parent whose checkpoint is missing. Without a child to run, nobody needs it."""
    for name, parent in request.parents.items():
        if parent.given is None and parent.key in done and (problem := request.lost_start(name)):
            yield f"checkpoint of {parent.stage}", "", problem


def _status(entry: dict[str, Any], data: Path, statuses: dict[str, DatasetStatus]) -> DatasetStatus:
    dataset = dataset_of(entry, data)
    key = f"{type(dataset)} {vars(dataset)}"
    if key not in statuses:
        statuses[key] = dataset.status()
    return statuses[key]


def _state(status: DatasetStatus, splits: set[object], fold: object, regions: bool) -> tuple[str, str]:
    """Say what was found of a data set, and what the splits that a stage reads lack."""
    dataset = status.dataset
    if not dataset.root.is_dir():
        return "", f"missing: {dataset.root}"
    wanted = {dataset.split_aliases.get(str(split), str(split)) for split in splits} & {*dataset.splits}
    parts = [part.split() for part in status.counts]
    absent = [
        split
        for split in sorted(wanted)
        if not any(part[0] == split and (fold is None or part[1:] in ([], [str(fold)])) for part in parts)
    ]
    if absent or not parts:
        problem = "".join(status.problems[:1]).splitlines()[:1] or [f"no {' and '.join(absent)}"]
        return "", f"incomplete: {problem[0].removeprefix(f'{dataset.full_title}: ')}"
    paths_of = getattr(dataset, "region_paths", None)
    if regions and paths_of and not any(map(paths_of, dataset.splits)):
        return "", f"incomplete: no region features in {dataset.root}"
    counts = [
        f"{part} {count:,}" + (f" ({status.unlike[part]})" if part in status.unlike else "")
        for part, count in status.counts.items()
    ]
    return f"yes, {', '.join(counts[:2])}{' ...' if len(counts) > 2 else ''} {dataset.unit}", ""


def _checkpoints(planned: Sequence[Planned], waiting: Sequence[Planned]) -> float | None:
    """Estimate the bytes of the checkpoints that stages will keep, and of one that is being written.

    Take the size of a checkpoint from another run of the recipe, else from the bound `checkpoints` in tables.yaml.
    """
    sizes: dict[str, float] = {}
    for item in planned:
        if item.request.given is None and (path := item.request.checkpoint()).is_file():
            sizes[item.request.recipe] = path.stat().st_size
    total, largest = 0.0, 0.0
    for item in waiting:
        request = item.request
        small = request.rehearsal or request.scale in ("mini", "smoke")
        bound = _SMALL if small else 1e9 * paper_named(request.paper).checkpoints.get(request.job, math.nan)
        size = sizes.get(request.recipe, bound) if item.run.trains else 0.0
        total, largest = total + size * _kept(item.run.config["trainer"]), max(largest, size)
    return None if math.isnan(total) else total + largest


def _kept(trainer: Mapping[str, Any]) -> float:
    """Count the checkpoints that a stage keeps. Weights without the optimizer's state count half."""
    kept = 0.0
    for _, callback in classes_in(trainer):
        arguments = callback.get("init_args") or {}
        if callback["class_path"].endswith(".ModelCheckpoint"):
            count = 1
            if arguments.get("save_top_k") == -1:
                epochs = int(trainer.get("max_epochs") or 0) // arguments.get("every_n_epochs", 1)
                every = arguments.get("every_n_train_steps")
                count = max(1, int(trainer.get("max_steps") or 0) // every if every else epochs)
            kept += count * (0.5 if arguments.get("save_weights_only") else 1.0)
    return kept


def _names(stages: Sequence[Planned]) -> str:
    names = list(dict.fromkeys(item.request.stage for item in stages))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
