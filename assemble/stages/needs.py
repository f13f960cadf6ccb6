"""What unfinished stages need before the first one starts: data sets, weights and other files, and disk space."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assemble.reporting.papers import paper_named
from assemble.stages.configuration import class_at, classes_in, substitute
from assemble.stages.plan import Planned
from assemble.stages.recipe_data import dataset_entries, files_in, without_unread_sets
from common.data.released_files import look_at
from common.errors import StageError, printable

if TYPE_CHECKING:
    from common.data.datasets.base import DatasetStatus

#: Bytes of a checkpoint below `single`; `plan --estimate` gives 1 to 9 MB.
_SMALL = 10e6


@dataclass(frozen=True)
class Need:
    """A data set, file or folder that stages read; `problem` says what is missing, else it is empty."""

    title: str
    found: str
    problem: str
    stages: list[Planned]


@dataclass(frozen=True)
class Space:
    """Free bytes of the folder of the runs, and a rough need; None if it is unknown."""

    free: int
    needed: float | None
    folder: Path

    @property
    def short(self) -> bool:
        return self.needed is not None and self.needed > self.free

    @property
    def text(self) -> str:
        needed = "unknown" if self.needed is None else f"about {self.needed / 1e9:,.2f} GB"
        return f"{self.free / 1e9:,.2f} GB free for {self.folder}, {needed} needed"


@dataclass(frozen=True)
class Needs:
    """The needs of a plan's unfinished stages; `blocked` are the keys of those that cannot run."""

    planned: Sequence[Planned]
    rows: list[Need]
    blocked: set[tuple[int, str]]
    disk: Space

    @property
    def runnable(self) -> list[Planned]:
        return [item for item in self.planned if item.request.key not in self.blocked]

    def lines(self) -> list[str]:
        """The table of what is needed and found; empty if nothing is read and the disk has room."""
        rows = [(row.title, row.problem or row.found, _names(row.stages)) for row in self.rows]
        if rows or self.disk.short:
            rows = [("needed", "found", "read by"), *rows, ("disk", self.disk.text, "")]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return [printable("  ".join(map(str.ljust, row, widths)).rstrip()) for row in rows]

    def require(self, skip_missing: bool) -> list[Planned]:
        """The stages that can run, or an error that says what to get."""
        missing = [row for row in self.rows if row.problem]
        if skip_missing or not (missing or self.disk.short):
            return self.runnable
        request = self.planned[0].request
        waiting = sum(not item.done for item in self.planned)
        problems = []
        if missing:
            problems.append(
                f"{len(missing)} of {len(self.rows)} data sets and files are missing, and {len(self.blocked)} of "
                f"{waiting} stages cannot run without them: see `assemble data {paper_named(request.paper).short} "
                f"--data {request.data}`"
            )
            if left := waiting - len(self.blocked):
                problems.append(f"--skip-missing runs the other {left}")
        if self.disk.short:
            problems.append(
                "the disk may fill up: free space, or give another folder with --runs; --skip-missing starts anyway"
            )
        raise StageError(". ".join(problems))


def needs_of(planned: Sequence[Planned]) -> Needs:
    statuses: dict[str, DatasetStatus] = {}
    rows: dict[tuple[str, str, str], list[Planned]] = {}
    blocked: set[tuple[int, str]] = set()
    for item in planned:
        if item.done:
            continue
        if any(parent.key in blocked for parent in item.request.parents.values()):
            blocked.add(item.request.key)
        for row in dict.fromkeys(_read_by(item, statuses)):
            rows.setdefault(row, []).append(item)
            if row[-1]:
                blocked.add(item.request.key)
    return Needs(planned, [Need(*row, stages) for row, stages in rows.items()], blocked, _disk(planned))


def _read_by(item: Planned, statuses: dict[str, DatasetStatus]) -> Iterator[tuple[str, str, str]]:
    """Title, what was found and what is missing of each thing that a stage reads."""
    config, data = item.run.config, item.request.data
    section = without_unread_sets(config["data"])
    arguments = section.get("init_args") or {}
    world = arguments.get("world") is not None
    if not world:
        splits = {value for name, value in arguments.items() if name.endswith("split")}
        if config["trainer"].get("limit_val_batches") == 0:
            splits.discard(arguments.get("held_out_split"))
        for entry in dataset_entries(section):
            status = _status(substitute(entry, {"DATA": str(data)}), statuses)
            regions = "max_regions" in arguments
            yield status.dataset.full_title, *_state(status, splits, arguments.get("fold"), regions)
    for path in files_in({"model": config["model"]} if world else config):
        file = look_at(path, data)
        lacks = f" (without {', '.join(file.missing)})" if file.missing and file.path.exists() else ""
        yield file.file.title, "yes", "" if file.present else f"missing: {file.path}{lacks}"


def _status(entry: dict[str, Any], statuses: dict[str, DatasetStatus]) -> DatasetStatus:
    # Clips of any length: the overview opens no files.
    arguments = {name: value for name, value in entry["init_args"].items() if name != "common_seconds"}
    key = f"{entry['class_path']} {arguments}"
    if key not in statuses:
        statuses[key] = class_at(entry["class_path"])(**arguments).status()
    return statuses[key]


def _state(status: DatasetStatus, splits: set[object], fold: object, regions: bool) -> tuple[str, str]:
    """What was found of a data set, and what is missing of the splits that a stage names."""
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
    counts = [f"{part} {count:,}" for part, count in status.counts.items()]
    return f"yes, {', '.join(counts[:2])}{' ...' if len(counts) > 2 else ''} {dataset.unit}", ""


def _disk(planned: Sequence[Planned]) -> Space:
    """Free space for runs, and a rough need: the checkpoints that unfinished stages keep, and one being written.

    The size of a checkpoint is that of another run of the recipe, else a bound: `checkpoints` in tables.yaml.
    """
    request = planned[0].request
    free = shutil.disk_usage(next(path for path in (request.runs, *request.runs.parents) if path.is_dir())).free
    sizes: dict[str, float] = {}
    for item in planned:
        if (path := item.request.checkpoint()).is_file():
            sizes[item.request.recipe] = path.stat().st_size
    small = request.rehearsal or request.scale in ("mini", "smoke")
    bounds = {} if small else {job: 1e9 * size for job, size in paper_named(request.paper).checkpoints.items()}
    needed, largest = 0.0, 0.0
    for item in planned:
        if item.done or not item.run.trains:
            continue
        size = sizes.get(item.request.recipe, _SMALL if small else bounds.get(item.request.job))
        if size is None:
            return Space(free, None, request.runs)
        needed, largest = needed + size * _kept(item), max(largest, size)
    return Space(free, needed + largest, request.runs)


def _kept(item: Planned) -> float:
    """Number of checkpoints that a stage keeps; weights without the optimizer's state count half."""
    trainer, kept = item.run.config["trainer"], 0.0
    for _, callback in classes_in(trainer):
        arguments = callback.get("init_args") or {}
        if callback["class_path"].endswith(".ModelCheckpoint"):
            every = [
                int(trainer.get(f"max_{unit}") or 0) // arguments[name]
                for unit, name in (("epochs", "every_n_epochs"), ("steps", "every_n_train_steps"))
                if arguments.get(name)
            ]
            count = max(1, *every) if arguments.get("save_top_k") == -1 and every else 1
            kept += count * (0.5 if arguments.get("save_weights_only") else 1.0)
    return kept


def _names(stages: Sequence[Planned]) -> str:
    names = list(dict.fromkeys(item.request.stage for item in stages))
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
