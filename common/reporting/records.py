"""The record: the JSON file that a finished stage writes, and the hashes that say what it stands for."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import (
    AfterValidator,
    Field,
    Strict,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from common import files
from common.errors import ReportingError, nearest, printable
from common.reporting.draws import INSTRUCTION_SETS, NATIVE, Draw, machine_isa
from common.reporting.papers import SCALES, check_scale, paper_named
from common.reporting.schema import first_of, one_of

SCHEMA = 1
JOBS = ("pretrain", "fine_tune", "probe", "evaluate")
RECORD_FILE = "record.json"
REHEARSED = "rehearsal: "
"""What the reason of a deviation begins with that a rehearsal makes."""
SET_ASIDE = ".previous"
"""Ending of the folder of an earlier run that another configuration replaced; its record no longer counts."""

MACHINE_KEYS = frozenset(
    {
        # Configs state the global batch, and samples that a layer or a loss compares with each other are numbers of the
        # recipe, such as batch_norm_group, where it gives them: docs/cluster.md says which stages depend on the number
        # of devices all the same.
        "devices", "num_nodes", "accelerator", "strategy", "plugins",
        "num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "cache_bytes", "in_flight_bytes",
    }
)  # fmt: skip
"""Configuration keys, at any depth, that say on what a stage runs."""

IGNORED_KEYS = MACHINE_KEYS | frozenset(
    {
        # Where things lie on this machine. The identity of a parent's checkpoint is in the lineage hash, the
        # identity of the data in the record's `data`.
        "root", "cache", "cache_dir", "cache_folder", "data_dir", "default_root_dir", "dirpath", "save_dir",
        "checkpoint_dir", "output_dir", "ckpt_path", "checkpoint", "checkpoint_path", "warm_start", "pretrained",
        "statistics", "config",
        # Where in such a file an encoder lies.
        "encoder_prefixes", "text_encoder_prefixes",
        # What is written about the run.
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
    """A record is malformed; the message names the file and the field."""


def _folder_name(stage: str) -> str:
    if "/" in stage or stage.startswith("."):
        raise ValueError(f"{stage!r} cannot name a folder")
    return stage


def _iso_time(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"expected an ISO 8601 time, got {text!r}") from None
    return text


def _has_revision(git: dict[str, Any]) -> dict[str, Any]:
    if "revision" not in git or "dirty" not in git:
        raise ValueError(f"expected the keys 'revision' and 'dirty', got {sorted(git)}")
    return git


def _known_rounding(hardware: dict[str, Any]) -> dict[str, Any]:
    isa = hardware.get("isa", {"requested": NATIVE})
    if not isinstance(isa, dict) or isa.get("requested") not in INSTRUCTION_SETS:
        raise ValueError(f"expected 'isa' with 'requested', one of {', '.join(INSTRUCTION_SETS)}; got {isa!r}")
    return hardware


def _inside(file: str) -> str:
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"expected names inside the run's folder, got {file!r}")
    return file


def _this_version(schema: int) -> int:
    if schema != SCHEMA:
        raise ValueError(f"this code reads version {SCHEMA}, got {schema!r}")
    return schema


def _entry(*keys: str) -> AfterValidator:
    """A mapping that has these keys and no others."""

    def check(given: dict[str, str]) -> dict[str, str]:
        if set(given) != set(keys):
            raise ValueError(f"expected {' and '.join(map(repr, keys))}, got {given!r}")
        return given

    return AfterValidator(check)


def _finite(value: float | None) -> float | None:
    # A diverged diagnostic must not cost the record of a long run: it is kept, as missing.
    return value if value is not None and abs(value) < 1e300 else None


_Name = Annotated[StrictStr, Field(min_length=1)]
_Count = Annotated[StrictInt, Field(ge=0)]


@dataclass(frozen=True)
class Record:
    """What a finished stage measured, and where that came from.

    Args:
        paper: package name of the paper.
        stage: instance id, `ucf_1` or `ucf_1@avid_cma`.
        recipe: name of the recipe under `configs/<paper>/`.
        job: one of `pretrain`, `fine_tune`, `probe`, `evaluate`.
        row: the model stage that the row measures, or None.
        scale: `paper`, `single`, `mini` or `smoke`.
        seed: the seed of the run.
        metrics: name to value; accuracies in percent. A value that is not finite is kept as null.
        selection: which weights were measured: `last`, or what the module names in `selected_by`, such as `best on
            validation`.
        config_hash: see `config_hash`.
        lineage_hash: see `lineage_hash`.
        config: the whole resolved configuration, plain data.
        ours: `{"field": ..., "value": ...}` for what no source of the paper gives, as the recipe lists it.
        deviations: `{"field": ..., "reason": ...}` for whatever the scale changes beyond sizes; at the scale
            `paper` for everything that a rehearsal changes.
        parents: configuration field to `{"stage": ..., "lineage_hash": ...}`.
        git: `{"revision": ..., "dirty": ...}` as `git_state` gives it; `dirty` when any session of the stage was, and
            `earlier` with the revisions of sessions before the last, where there are others.
        versions: package to version.
        hardware: as :func:`hardware` gives it, and `peak_memory_gib`, the most memory that the process held. One
            without `isa` is native.
        precision: precision of the trainer, such as `32-true`.
        global_batch: samples per step over all devices.
        steps: optimizer steps done.
        wall_seconds: duration of the stage.
        started: UTC start, ISO 8601.
        data: data set name to `{"version", "samples", "skipped", "skipped_names"}`.
        wandb_run_id: id of the W&B run, or None.
        media: names of the picture files, relative to the run's folder.
        former: `{"config_hash": ..., "lineage_hash": ..., "migration": ...}`, the hashes that it had before a
            migration rewrote its configuration.
        schema: version of this layout.

    Raises:
        RecordError: when a field has the wrong type or an impossible value.
    """

    paper: _Name
    stage: Annotated[_Name, AfterValidator(_folder_name)]
    recipe: _Name
    job: Annotated[StrictStr, one_of(JOBS)]
    row: StrictStr | None
    scale: Annotated[StrictStr, one_of(SCALES)]
    seed: _Count
    metrics: dict[StrictStr, Annotated[float | None, Strict(), AfterValidator(_finite)]]
    config_hash: _Name
    lineage_hash: _Name
    config: dict[str, Any]
    git: Annotated[dict[str, Any], AfterValidator(_has_revision)]
    started: Annotated[_Name, AfterValidator(_iso_time)]
    selection: _Name = "last"
    deviations: list[Annotated[dict[str, str], _entry("field", "reason")]] = field(default_factory=list)
    ours: list[Annotated[dict[str, str], _entry("field", "value")]] = field(default_factory=list)
    parents: dict[str, Annotated[dict[str, str], _entry("stage", "lineage_hash")]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Annotated[dict[str, Any], AfterValidator(_known_rounding)] = field(default_factory=dict)
    precision: _Name = "32-true"
    global_batch: _Count = 0
    steps: _Count = 0
    wall_seconds: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] = 0.0
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    wandb_run_id: StrictStr | None = None
    media: list[Annotated[StrictStr, AfterValidator(_inside)]] = field(default_factory=list)
    former: list[Annotated[dict[str, str], _entry("config_hash", "lineage_hash", "migration")]] = field(
        default_factory=list
    )
    schema: Annotated[StrictInt, AfterValidator(_this_version)] = SCHEMA

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            given = getattr(self, name)
            # Numbers that JSON lacks are named, but for metrics.
            plain = given if name == "metrics" else _plain(given, name)
            try:
                object.__setattr__(self, name, kind.validate_python(plain))
            except ValidationError as error:
                where, what = first_of(error, plain)
                place = f"{name}{'.' if where and where[0] != '[' else ''}{where}"
                raise RecordError(f"field {place!r}: {what}") from None

    def to_json(self) -> str:
        """The record as JSON text with sorted keys and a closing newline."""
        return json.dumps(asdict(self), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "record") -> Record:
        """Parse and validate.

        Args:
            text: JSON text.
            source: name of the file, for messages.

        Raises:
            RecordError: for broken JSON, a missing, unknown or malformed field.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # among them numbers of too many digits and endless brackets
            raise RecordError(f"{source}: not valid JSON ({error}); delete it and run the stage again") from None
        if not isinstance(values, dict):
            raise RecordError(f"{source}: expected a JSON object")
        names = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
        for key in values:
            if key not in names:
                raise RecordError(f"{source}: unknown field {key!r}: {nearest(key, names)}")
        missing = [name for name, needed in names.items() if needed and name not in values]
        if missing:
            raise RecordError(f"{source}: missing field(s) {', '.join(missing)}")
        try:
            return cls(**values)
        except RecordError as error:
            raise RecordError(f"{source}: {error}") from None

    @property
    def configuration(self) -> str:
        """Hash of the configuration without seeds: equal for the seeds of one configuration."""
        return config_hash(self.config, ignored=IGNORED_KEYS | SEED_KEYS)

    @property
    def draw(self) -> Draw:
        """Its seed and rounding."""
        return Draw(self.seed, self.hardware.get("isa", {}).get("requested", NATIVE))

    def folder(self, root: Path) -> Path:
        """Folder of its run under a folder of runs."""
        return run_folder(root, self.paper, self.scale, self.draw, self.stage)

    @property
    def rehearsal(self) -> bool:
        """Whether it comes from a rehearsal, which gives each of its changes as a reason of its own."""
        return any(one["reason"].startswith(REHEARSED) for one in self.deviations)

    @property
    def clean(self) -> bool:
        """Whether the record comes from a known revision with nothing changed in the tree."""
        return bool(self.git.get("revision")) and self.git.get("dirty") is False


@functools.cache
def _kinds() -> dict[str, TypeAdapter[Any]]:
    """What checks each field of a record."""
    return {name: TypeAdapter(kind) for name, kind in get_type_hints(Record, include_extras=True).items()}


def _plain(value: Any, where: str) -> Any:
    """Copy as plain JSON data; tuples become lists, numbers that JSON lacks become their names."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecordError(f"field {where!r}: keys must be strings, got {key!r}")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise RecordError(f"field {where!r}: expected plain data (text, numbers, lists, mappings), got {type(value)}")


def short_name(field: str) -> str:
    """A field as the command line names it: `model.temperature` for `model.init_args.temperature`."""
    return field.replace(".init_args", "")


def config_hash(config: Mapping[str, Any], ignored: Iterable[str] = IGNORED_KEYS) -> str:
    """Hash of what in a configuration changes the result.

    Args:
        config: resolved configuration, plain data.
        ignored: keys left out at every depth.

    Returns:
        The first 12 hexadecimal digits of the SHA-256 of its canonical JSON.
    """
    canonical = json.dumps(_without(_plain(config, "config"), frozenset(ignored)), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _without(value: Any, ignored: frozenset[str]) -> Any:
    if isinstance(value, dict):
        # A class counts by its name: moving it to another module is not a new experiment.
        return {
            key: item.rpartition(".")[2] if key == "class_path" and isinstance(item, str) else _without(item, ignored)
            for key, item in value.items()
            if key not in ignored
        }
    if isinstance(value, list):
        return [_without(item, ignored) for item in value]
    return value


def lineage_hash(own: str, parents: Mapping[str, str]) -> str:
    """Hash of a stage's configuration together with everything it started from.

    Args:
        own: the stage's `config_hash`.
        parents: configuration field to the lineage hash of the stage whose checkpoint it takes.

    Returns:
        12 hexadecimal digits; equal to no plain configuration hash by construction.
    """
    canonical = json.dumps({"config": own, "parents": dict(parents)}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def portable(value: Any, replacements: Sequence[tuple[str, str]]) -> Any:
    """Copy of plain data in which leading folders of paths are replaced, so that it reads alike on every machine.

    Args:
        value: plain data.
        replacements: (folder, name) pairs, tried in order.
    """
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


def write(path: Path, record: Record) -> None:
    """Write a record in one step.

    Raises:
        AtomicWriteError: when the disk is full or the folder not writable; an older record stays intact.
    """
    files.write_atomically(Path(path), record.to_json())


def read(path: Path) -> Record:
    """Read and validate one record.

    Raises:
        RecordError: when it is malformed, naming the file and the field.
    """
    try:
        with files.named(Path(path)):
            text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not UTF-8 ({error.reason}); delete it and run the stage again") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from None
    return Record.from_json(text, source=str(path))


def run_folder(root: Path, paper: str, scale: str, draw: Draw, stage: str) -> Path:
    """Folder of one stage run: `<root>/<paper>/<scale>/seed<k>/<stage>`; see `Draw` for the third."""
    return Path(root) / paper / scale / draw.folder / stage


def warn(error: RecordError) -> None:
    """Say on the standard error stream that a record is left out, and why; of one record once."""
    warn_of(f"a record is left out: {error}")


@functools.cache
def warn_of(text: str) -> None:
    """Say on the standard error stream what was left out of a page, and why; the same thing once."""
    print(printable(f"warning: {text}"), file=sys.stderr)


def find(
    root: Path,
    paper: str | None = None,
    scale: str | None = None,
    malformed: Callable[[RecordError], None] | None = None,
) -> list[Record]:
    """Every record under a folder of runs, ordered by paper, scale, draw and stage.

    Args:
        root: folder of runs.
        paper: keep one paper, by package or short name.
        scale: keep one scale.
        malformed: called with what is wrong with a record, which is then left out (`warn`); None to raise it.

    Raises:
        RecordError: for a malformed record, or one that lies where it does not belong, unless `malformed` is given.
    """
    pattern = (
        f"{paper_named(paper).name if paper else '*'}/{check_scale(scale) if scale else '*'}/seed*/*/{RECORD_FILE}"
    )
    paths = sorted(path for path in Path(root).glob(pattern) if path.parent.suffix != SET_ASIDE)
    found = []
    for path in paths:
        try:
            record = read(path)
            _check_place(path, record.folder(root) / RECORD_FILE)
        except RecordError as error:
            if malformed is None:
                raise
            malformed(error)
        else:
            found.append(record)
    return in_order(found)


def _check_place(path: Path, expected: Path) -> None:
    if path.resolve() != expected.resolve():
        raise RecordError(f"{path}: by its content this record belongs at {expected}; move or delete it")


def in_order(found: Iterable[Record]) -> list[Record]:
    """Records by paper, scale, draw and stage."""
    return sorted(found, key=lambda r: (r.paper, SCALES.index(r.scale), r.draw, r.stage))


def expected_seconds(records: Iterable[Record], scale: str, stage: str) -> float | None:
    """Median duration of a stage in earlier records of that scale, or None when there is none."""
    seconds = sorted(r.wall_seconds for r in records if r.scale == scale and r.stage == stage)
    return seconds[len(seconds) // 2] if seconds else None


def git_state(root: Path | None) -> dict[str, Any]:
    """Revision of a working tree, and whether it differs from it.

    Promoted results, Markdown pages and folders of runs, wherever `--runs` puts them, do not count as a difference:
    running one stage, promoting its record or rendering a table must not make the next record unfit for promotion.

    Args:
        root: a folder in the working tree; None for a package that was installed without one.

    Returns:
        `{"revision": str, "dirty": bool}`; both None where git or the repository is missing.
    """
    if root is None:
        return {"revision": None, "dirty": None}
    revision = _git(root, "rev-parse", "HEAD")
    apart = ("papers/*/results/**", "**/*.md", *(f"**/{scale}/seed*/**" for scale in SCALES))
    counted = (":/", *(f":(exclude,top,glob){pattern}" for pattern in apart))
    status = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *counted)
    if revision is None or status is None:
        return {"revision": None, "dirty": None}
    return {"revision": revision.strip(), "dirty": bool(status.strip())}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            # Reading must neither hold up a commit in the meantime nor, when killed, leave a lock behind.
            ["git", "--no-optional-locks", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def hardware(accelerators: Sequence[str] = (), isa: str = NATIVE) -> dict[str, Any]:
    """The machine in a few words.

    Args:
        accelerators: names of the devices used, passed in because asking for them needs torch.
        isa: instruction set that was asked for.

    Returns:
        `cpu`, `cores` (usable by this process), `memory_gib`, `accelerators` and `isa`: the instruction set
        that was `requested`, and the strongest that the `machine` has.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        memory = 0.0
    return {
        "cpu": _cpu_model(),
        "cores": files.usable_cores(),
        "memory_gib": round(memory, 1),
        "accelerators": list(accelerators),
        "isa": {"requested": isa, "machine": machine_isa()},
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions, read from package metadata without importing anything; what is not installed is left out."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
