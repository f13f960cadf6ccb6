"""Define the record, a JSON file that a finished stage writes, and the hashes that identify its configuration."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, field, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetPydanticSchema, ValidationError
from pydantic.dataclasses import dataclass

from assemble.reporting.draws import INSTRUCTION_SETS, NATIVE, Draw, cpu_info, machine_isa
from assemble.reporting.papers import SCALES, paper_named, project_root
from assemble.reporting.schema import explained, one_of, parse_json
from common import files
from common.errors import ReportingError, printable

JOBS = ("pretrain", "fine_tune", "probe", "evaluate")
RECORD_FILE = "record.json"
#: The reason for each deviation of a rehearsal starts with this text.
REHEARSED = "rehearsal: "
#: A replaced run's folder is named after the stage, this text and a time.
SET_ASIDE = ".previous"
#: Suffix of a draw's folder, for stages that start from the authors' weights or another file.
GIVEN = "-given"

MACHINE_KEYS = frozenset(
    {
        # docs/cluster.md lists the stages whose results do depend on the number of devices.
        "devices", "num_nodes", "accelerator", "strategy", "plugins",
        "num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "cache_bytes", "in_flight_bytes",
        "jobs",  # fits of SVMs at a time
    }
)  # fmt: skip
"""Configuration keys, at any depth, that describe the machine."""

IGNORED_KEYS = MACHINE_KEYS | frozenset(
    {
        # Paths. The lineage hash identifies the parents' checkpoints; the record's field `data` identifies the data.
        "root", "cache", "cache_dir", "cache_folder", "data_dir", "default_root_dir", "dirpath", "save_dir",
        "checkpoint_dir", "output_dir", "ckpt_path", "checkpoint", "checkpoint_path", "warm_start", "pretrained",
        "statistics", "config",
        "encoder_prefixes", "text_encoder_prefixes",
        # Logging and checkpoints to resume from.
        "checkpoint_minutes",
        "logger", "log_every_n_steps", "enable_progress_bar", "enable_model_summary", "profiler",
    }
)  # fmt: skip
"""Configuration keys, at any depth, that do not change a stage's result. The seed is not among them."""

SEED_KEYS = frozenset({"seed", "seed_everything"})
"""Keys that may differ between records that are averaged."""

PACKAGES = (
    "torch", "torchvision", "torchaudio", "lightning", "jsonargparse", "torchmetrics", "transformers", "timm",
    "av", "numpy", "pillow", "scikit-learn", "representation-assemble",
)  # fmt: skip


class RecordError(ReportingError):
    """Says that a record is malformed. The message names the file and the field."""


def _finite(value: float | None) -> float | None:
    # Store a diverged diagnostic as missing, so that a long run still gets its record.
    return value if value is not None and abs(value) < 1e300 else None


def _plain(value: Any) -> Any:
    """Copy a value as plain JSON data. Tuples become lists; infinities and NaN become text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise ValueError(f"expected text, numbers, lists and mappings with string keys, got {value!r:.100}")


def _keys(*keys: str, optional: str = "") -> AfterValidator:
    def check(given: dict[str, str]) -> dict[str, str]:
        if set(given) - {optional} != set(keys):
            raise ValueError(f"expected {' and '.join(map(repr, keys))}, got {given!r:.100}")
        return given

    return AfterValidator(check)


def _checked_as(kind: Any) -> GetPydanticSchema:
    """Validate a mapping as a more precise type than its annotation."""
    return GetPydanticSchema(lambda _, handler: handler(kind))


def _of_kinds(**kinds: type) -> AfterValidator:
    def check(given: dict[str, Any]) -> dict[str, Any]:
        for name, kind in kinds.items():
            if not isinstance(given.get(name, kind()), kind):
                raise ValueError(f"{name}: expected {kind.__name__}, got {given[name]!r:.100}")
        return given

    return AfterValidator(check)


_Text = Annotated[str, AfterValidator(printable)]
_Name = Annotated[_Text, Field(min_length=1)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Plain = Annotated[dict[str, Any], BeforeValidator(_plain)]
_GIT = dict[str, _Text | bool | list[_Text] | None]
_ISA = dict[str, Annotated[str, one_of(INSTRUCTION_SETS)] | None]
_HARDWARE = Annotated[
    dict[str, _Text | int | float | list[_Text] | _ISA], _of_kinds(cpu=str, accelerators=list, isa=dict)
]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Record:
    """Store what a finished stage measured, and how.

    Args:
        stage: instance id, `ucf_1` or `ucf_1@avid_cma`.
        row: the stage that trained the measured model.
        metrics: accuracies in percent; a value that isn't finite is null.
        selection: which weights were measured: `last`, or the module's `selected_by`, such as `best on validation`.
        ours: values that no source of the paper gives.
        deviations: what the scale changes besides sizes; at scale `paper`, what a rehearsal changes.
        parents: configuration field to the parent whose checkpoint sets the field, with the checkpoint's SHA-256.
        given: each direct or indirect parent that a file replaces -> the file's name, its SHA-256 and, for a file of
            the authors, where they publish it.
        checkpoints: SHA-256 of each of the stage's checkpoints, by name.
        code: file to its hashes, see `assemble.reporting.code`; empty in old records.
        git: see `git_state`. `dirty` is true if the tree was dirty in any session of the stage. `earlier` lists the
            revisions of earlier sessions.
        hardware: see `hardware`; `peak_memory_gib` is the most memory the process held.
        global_batch: samples per step over all devices.
        started: UTC, ISO 8601.
        data: data set name to `{"version", "samples", "missing", "notes", "skipped", "skipped_names"}`.
        media: picture files, relative to the run's folder.
        former: the record's hashes before a migration rewrote its configuration.
    """

    paper: _Name
    stage: _Name
    recipe: _Name
    job: Annotated[str, one_of(JOBS)]
    row: str | None
    scale: Annotated[str, one_of(SCALES)]
    seed: _Count
    metrics: dict[_Text, Annotated[float | None, AfterValidator(_finite)]]
    config_hash: _Name
    lineage_hash: _Name
    config: _Plain
    git: Annotated[dict[str, Any], _checked_as(_GIT)]
    started: _Name
    selection: _Name = "last"
    deviations: list[Annotated[dict[str, _Text], _keys("field", "reason")]] = field(default_factory=list)
    ours: list[Annotated[dict[str, _Text], _keys("field", "value")]] = field(default_factory=list)
    parents: dict[str, Annotated[dict[str, str], _keys("stage", "lineage_hash", optional="digest")]] = field(
        default_factory=dict
    )
    given: dict[str, Annotated[dict[str, str], _keys("file", "sha256", optional="source")]] = field(
        default_factory=dict
    )
    checkpoints: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    versions: dict[str, _Text] = field(default_factory=dict)
    hardware: Annotated[dict[str, Any], _checked_as(_HARDWARE)] = field(default_factory=dict)
    precision: _Name = "32-true"
    global_batch: _Count = 0
    steps: _Count = 0
    wall_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    data: dict[str, _Plain] = field(default_factory=dict)
    wandb_run_id: str | None = None
    media: list[str] = field(default_factory=list)
    former: list[Annotated[dict[str, str], _keys("config_hash", "lineage_hash", "migration")]] = field(
        default_factory=list
    )
    schema: Literal[1] = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Record:
        """Build a record from its fields by name, or raise a ValueError that names the malformed field."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise ValueError(explained(error, values)) from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        return cls.of(parse_json(text))

    @functools.cached_property
    def configuration(self) -> str:
        return config_hash(self.config, ignored=IGNORED_KEYS | SEED_KEYS)

    @property
    def draw(self) -> Draw:
        return Draw(self.seed, self.hardware.get("isa", {}).get("requested", NATIVE))

    def folder(self, root: Path) -> Path:
        return run_folder(root, self.paper, self.scale, self.draw, self.stage, bool(self.given))

    def saved(self, digest: str | None) -> bool:
        """Check whether one of the checkpoints has this digest. Old records list none, so assume that it has."""
        return not self.checkpoints or digest in self.checkpoints.values()

    @property
    def of_authors(self) -> bool:
        """Check that every given stage, if any, uses the authors' weights."""
        return all("source" in file for file in self.given.values())

    @property
    def rehearsal(self) -> bool:
        return any(deviation["reason"].startswith(REHEARSED) for deviation in self.deviations)

    @property
    def machine(self) -> str:
        """Name the accelerators, or the processor of a run without one."""
        accelerators = self.hardware.get("accelerators") or []
        names = ", ".join(f"{accelerators.count(n)} x {n}" for n in dict.fromkeys(accelerators))
        return names or f"{self.hardware.get('cpu', 'unknown CPU')}, {self.hardware.get('cores', '?')} cores"

    @property
    def revision(self) -> str:
        """Return the short revision. Mark it if the tree was dirty or git did not answer."""
        if not (revision := self.git.get("revision")):
            return "unknown"
        return f"{revision[:10]}{'' if self.clean else ' (dirty)'}"

    @property
    def clean(self) -> bool:
        """Check that the record comes from a known revision of a clean tree."""
        return bool(self.git.get("revision")) and self.git.get("dirty") is False


def short_name(field: str) -> str:
    """Return a field as the command line names it: `model.temperature` for `model.init_args.temperature`."""
    return field.replace(".init_args", "")


def config_hash(config: Mapping[str, Any], ignored: Iterable[str] = IGNORED_KEYS) -> str:
    """Hash a configuration without the `ignored` keys, which don't change results. Return 12 hexadecimal digits."""
    canonical = json.dumps(counted(_plain(config), frozenset(ignored)), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def counted(value: Any, ignored: frozenset[str]) -> Any:
    """Return the part of a configuration that `config_hash` covers."""
    if isinstance(value, dict):
        # Keep only the name of a class, since moving it to another module doesn't change an experiment.
        return {
            key: item.rpartition(".")[2] if key == "class_path" and isinstance(item, str) else counted(item, ignored)
            for key, item in value.items()
            if key not in ignored
        }
    if isinstance(value, list):
        return [counted(item, ignored) for item in value]
    return value


def lineage_hash(configuration: str, parents: Mapping[str, str]) -> str:
    """Hash a stage's `config_hash` and its parents' lineage hashes. `parents` maps fields to those hashes."""
    canonical = json.dumps({"config": configuration, "parents": dict(parents)}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def portable(value: Any, replacements: Sequence[tuple[str, str]]) -> Any:
    """Copy plain data and replace each path's leading folder by a name. Use the first (folder, name) pair that fits."""
    if isinstance(value, str):
        for folder, name in replacements:
            if value == folder or value.startswith(folder.rstrip("/") + "/"):
                return name + value[len(folder.rstrip("/")) :]
        return value
    if isinstance(value, list):
        return [portable(item, replacements) for item in value]
    if isinstance(value, dict):
        return {key: portable(item, replacements) for key, item in value.items()}
    return value


def without_folders(record: Record) -> Record:
    """Return a copy to publish, without this machine's folders in the configuration."""
    folders = [(str(project_root()), "."), (str(Path.home()), "~")]
    return replace(record, config=portable(record.config, folders))


def write(path: Path, record: Record) -> None:
    files.write_atomically(Path(path), record.to_json())


def read(path: Path) -> Record:
    with files.parsing(path, RecordError):
        return Record.from_json(files.read_bytes(path))


def read_run(root: Path, folder: Path) -> Record:
    """Read the record in a run's folder. Raise `RecordError` if the record is malformed or from another run."""
    path = folder / RECORD_FILE
    record = read(path)
    with files.parsing(path, RecordError):  # `record.folder` parses the draw, which may be malformed.
        if record.folder(root) != folder:
            raise ValueError(f"the record is of another run, whose folder is {record.folder(root)}; move or delete it")
    return record


def run_folder(root: Path, paper: str, scale: str, draw: Draw, stage: str, given: bool = False) -> Path:
    """Return `<root>/<paper>/<scale>/<draw>/<stage>`. `given` appends `-given` to the draw, for given weights."""
    return Path(root) / paper / scale / f"{draw.folder}{GIVEN if given else ''}" / stage


@functools.cache
def warn_of(text: str) -> None:
    """Print a warning to standard error. Print each text only once."""
    print(printable(f"warning: {text}"), file=sys.stderr)


def run_folders(root: Path, paper: str = "*", scale: str = "*") -> list[Path]:
    """List the folders of runs by paper, scale, draw and stage. Skip replaced runs."""
    records = []
    for path in Path(root).glob(f"{paper}/{scale}/seed*/*"):
        place, draw = path.parts[-4:-2], re.fullmatch(r"seed(\d+)(-\w+)*", path.parts[-2])
        if draw and place[1] in SCALES and path.is_dir() and SET_ASIDE not in path.name and path.name[0] != ".":
            records.append(((place[0], SCALES.index(place[1]), int(draw[1]), draw[0], path.name), path))
    return [path for _, path in sorted(records)]


def find(
    root: Path,
    paper: str | None = None,
    scale: str | None = None,
    strict: bool = False,
) -> list[Record]:
    """List the records under a folder of runs. Warn of malformed records and skip them, or raise if `strict`."""
    records = []
    for folder in run_folders(root, paper_named(paper).name if paper else "*", scale or "*"):
        try:
            records += [read_run(root, folder)] if (folder / RECORD_FILE).exists() else []
        except RecordError as error:
            if strict:
                raise
            warn_of(f"skipped a malformed record: {error}")
    return in_order(records)


def in_order(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r.paper, SCALES.index(r.scale), r.draw, r.stage))


def expected_seconds(
    stages: Iterable[str], here: Iterable[Record], recorded: Sequence[Record], isa: str = NATIVE
) -> dict[str, float]:
    """Estimate how many seconds each stage takes on this machine. Leave out stages without a record.

    Prefer local runs, then recorded runs on the same processor, on the same instruction set, and on any machine. Scale
    the times of a less preferred kind by the median ratio of the two kinds over their common stages. Take the fastest
    run of each processor, because other work only slows a run down, then the median over processors.
    """
    wanted, cpu = machine_isa() if isa == NATIVE else isa, processor()
    kinds: list[list[Record]] = [[], [], [], [record for record in here if record.draw.isa == isa]]
    for record in recorded:
        alike = instructions(record) == wanted
        kinds[alike + (alike and record.hardware.get("cpu") == cpu)].append(record)
    tables, estimates = [_typical(kind) for kind in kinds], dict[str, float]()
    for number, times in enumerate(tables):
        for better in tables[number + 1 :]:
            if paces := [better[stage] / times[stage] for stage in times.keys() & better.keys() if times[stage]]:
                times = {stage: seconds * median(paces) for stage, seconds in times.items()}
        estimates |= times
    return {stage: estimates[stage] for stage in stages if stage in estimates}


def _typical(records: Iterable[Record]) -> dict[str, float]:
    fastest: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        cpu = record.hardware.get("cpu", "")
        fastest[record.stage][cpu] = min(record.wall_seconds, fastest[record.stage].get(cpu, math.inf))
    return {stage: median(seconds.values()) for stage, seconds in fastest.items()}


def instructions(record: Record) -> str | None:
    return record.hardware.get("isa", {}).get("machine") if record.draw.isa == NATIVE else record.draw.isa


def git_state(root: Path | None) -> dict[str, Any]:
    """Return a working tree's `revision`, and whether the tree is `dirty`. Both are None without git or a repository.

    Promoted results, Markdown pages and folders of runs don't count, so promoting one record doesn't block the next.
    """
    if root is None:
        return {"revision": None, "dirty": None}
    revision = _git(root, "rev-parse", "HEAD")
    apart = ("papers/*/results/**", "docs/images/claims.svg", "**/*.md", *(f"**/{scale}/seed*/**" for scale in SCALES))
    counted = (":/", *(f":(exclude,top,glob){pattern}" for pattern in apart))
    status = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *counted)
    if revision is None or status is None:
        return {"revision": None, "dirty": None}
    return {"revision": revision.strip(), "dirty": bool(status.strip())}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            # Reading must not block a commit, or leave a lock behind if it is killed.
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def hardware(accelerators: Sequence[str] = (), isa: str = NATIVE) -> dict[str, Any]:
    """Describe the machine for a record. The caller passes the device names, because finding them needs torch."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": processor(),
        "cores": files.usable_cores(),
        "memory_gib": round(memory, 1),
        "accelerators": list(accelerators),
        "isa": {"requested": isa, "machine": machine_isa()},
    }


def processor() -> str:
    return cpu_info("model name") or platform.processor() or platform.machine() or "unknown"


def versions() -> dict[str, str]:
    from importlib import metadata

    packages = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[package] = metadata.version(package)
    return packages
