"""Describe one stage to run: its identity, its parents and its folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from assemble.reporting import code, records
from assemble.reporting.draws import NATIVE, Draw
from assemble.reporting.papers import paper_named
from assemble.reporting.records import MACHINE_KEYS, short_name
from assemble.reporting.tables import StageInstance, Tables, expand, load
from assemble.stages.configuration import RunConfiguration, resolve
from assemble.stages.given import Given
from assemble.stages.layers import classes_in, leaves, load_yaml
from assemble.stages.overrides import parse_overrides
from assemble.stages.recipe_data import dataset_entries
from assemble.stages.recipes import recipe_layers, recipes_of
from common.errors import ConfigurationError
from common.files import digest, read_bytes, stamp_of


@dataclass(frozen=True)
class Selection:
    """The user's selection of stages; `everything` includes those that run only on request.

    `arguments` override the configuration of every stage, as on the command line.
    `given` maps stages to the files that replace them. `absent` lists stages whose released file was not found.
    """

    scale: str = "mini"
    seeds: tuple[int, ...] = (0,)
    hardware: str = "cpu"
    runs: Path = Path("runs")
    data: Path = Path("data")
    tables: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    rehearsal: bool = False
    isa: str = NATIVE
    everything: bool = False
    rerun: bool = False
    given: Mapping[str, Given] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class StageRequest:
    """One stage to run.

    Attributes:
        row: the model of the table row that the stage evaluates.
        parents: dotted field -> parent whose checkpoint sets the field.
        overrides, arguments: configuration values from tables.yaml, and flags from the command line.
        data: folder that replaces `$DATA` in configs.
        isa: instruction set whose rounding to use.
        rerun: whether to start again if the stage was trained by other code.
        given: the file that replaces the stage, which then is not trained.
    """

    paper: str
    stage: str
    recipe: str
    job: str
    row: str | None
    scale: str
    hardware: str
    seed: int
    runs: Path
    data: Path
    parents: Mapping[str, StageRequest] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    rehearsal: bool = False
    isa: str = NATIVE
    rerun: bool = False
    given: Given | None = None

    @property
    def key(self) -> tuple[int, str]:
        """Return the seed and the stage's name, which identify the request in a plan."""
        return self.seed, self.stage

    @property
    def draw(self) -> Draw:
        return Draw(self.seed, self.isa)

    @property
    def directory(self) -> Path:
        return records.run_folder(self.runs, self.paper, self.scale, self.draw, self.stage, bool(self.files))

    @functools.cached_property
    def files(self) -> dict[str, Given]:
        """Return the files that replace this stage or its ancestors, by stage."""
        of_parents = {stage: given for parent in self.parents.values() for stage, given in parent.files.items()}
        return of_parents if self.given is None else {self.stage: self.given}

    def start(self, name: str) -> Path | None:
        """Return the parent's file that a field is set to, or None if the field keeps the recipe's value."""
        parent = self.parents[name]
        return parent.given.fill(name) if parent.given else parent.checkpoint(self.configuration.start_from)

    def checkpoint(self, name: str = "last") -> Path:
        if self.given is not None:
            return self.given.path
        return self.directory / "checkpoints" / f"{name}.ckpt"

    def lost_start(self, name: str) -> str:
        """Say what to do about a field's checkpoint if the file is missing, else return an empty text."""
        path, parent = self.start(name), self.parents[name]
        if path is None or path.is_file():
            return ""
        return f"missing: {path}; restore it, or delete {parent.directory} to train {parent.stage} again"

    @functools.cached_property
    def configuration(self) -> RunConfiguration:
        """Return the merged configuration, without the parents' paths."""
        return resolve(
            self.paper,
            self.recipe,
            scale=self.scale,
            hardware=self.hardware,
            seed=self.seed,
            # Only pre-training uses several nodes, since downstream batches are small.
            stage_overrides={**self.overrides, **({} if self.job == "pretrain" else {"trainer.num_nodes": 1})},
            arguments=self.arguments,
            rehearsal=self.rehearsal,
        )

    @functools.cached_property
    def lineage(self) -> str:
        """Hash the configurations of this stage and its ancestors."""
        if self.given is not None:
            return self.given.lineage
        run = self.configuration
        start = "" if run.start_from == "last" else f"/{run.start_from}"
        parents = {name: f"{parent.lineage}{start}" for name, parent in self.parents.items()}
        return records.lineage_hash(records.config_hash(run.config), parents)


def finished_record(stage: StageRequest) -> records.Record | None:
    """Return a stage's record, or None if the record is missing, malformed or outdated (configuration or parents)."""
    record = _own_record(stage)
    return record if record and not trained_again(stage, digests_in(record)) else None


def _own_record(stage: StageRequest) -> records.Record | None:
    path = stage.directory / "record.json"
    record = _read(path, tuple(stamp_of(path))) if path.is_file() else None
    return record if record and record.lineage_hash == stage.lineage else None


@functools.lru_cache(maxsize=1024)
def _read(path: Path, stamp: tuple[int, ...]) -> records.Record | None:
    try:
        return records.read(path)
    except records.RecordError:
        return None


def digests_in(record: records.Record) -> dict[str, str]:
    """Return the digest of the parent's checkpoint for each configuration field. Old records have none."""
    return {name: parent["digest"] for name, parent in record.parents.items() if "digest" in parent}


def trained_again(stage: StageRequest, digests: Mapping[str, str]) -> str:
    """Name a parent that was trained again since it had these `digests`. Return an empty text if there is none."""
    for name, parent in stage.parents.items():
        record = _own_record(parent)
        if record and not record.saved(digests.get(name)):
            return parent.stage
    return ""


def fingerprint(run: RunConfiguration) -> dict[str, str]:
    """Hash the code of the classes in a configuration, as imported by this process."""
    return code.fingerprint(str(node["class_path"]).rpartition(".")[0] for _, node in classes_in(run.config))


def identity_of(folder: Path) -> dict[str, Any]:
    """Read `identity.json`, which says which run a folder holds. Return {} if the file is missing or malformed."""
    try:
        content = json.loads(read_bytes(folder / "identity.json"))
        return {
            "lineage_hash": str(content["lineage_hash"]),
            "code": dict(content.get("code", {})),
            "digests": dict(content.get("digests", {})),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def holds(folder: Path, stage: StageRequest) -> bool:
    """Check whether a folder's run has this configuration, these parents and, with `rerun`, this code."""
    identity = identity_of(folder)
    return (
        identity.get("lineage_hash") == stage.lineage
        and not trained_again(stage, identity["digests"])
        and not (stage.rerun and code.differing(identity["code"], fingerprint(stage.configuration)))
    )


def changed_code(stage: StageRequest) -> list[str]:
    """List the files that changed since a finished or interrupted stage was trained."""
    record = finished_record(stage)
    if record is None and not (stage.checkpoint().is_file() and holds(stage.directory, replace(stage, rerun=False))):
        return []
    return code.changed(record.code if record else identity_of(stage.directory)["code"])


def requests_for(paper: str, instances: Sequence[StageInstance], selection: Selection, seed: int) -> list[StageRequest]:
    """Make the requests of stage instances. Parents must come first."""
    requests: dict[str, StageRequest] = {}
    for instance in instances:
        given = selection.given.get(instance.id)
        requests[instance.id] = StageRequest(
            paper=paper,
            stage=instance.id,
            recipe=instance.recipe,
            job=instance.job,
            row=instance.row,
            scale=selection.scale,
            hardware=selection.hardware,
            seed=seed,
            runs=selection.runs,
            data=selection.data,
            parents={} if given else {name: requests[parent] for name, parent in instance.parents.items()},
            overrides=instance.overrides,
            arguments=selection.arguments,
            rehearsal=selection.rehearsal,
            isa=selection.isa,
            rerun=selection.rerun,
            given=given,
        )
    return list(requests.values())


def find_request(name: str, selection: Selection, arguments: Sequence[str] = ()) -> StageRequest:
    """Find the stage `<paper>/<name>`. The name is an instance of the paper's tables, a stage, or a recipe.

    Overrides that affect results add a digest to the run's folder, so that the run never replaces the stage's record.
    """
    paper_name, _, wanted = name.partition("/")
    if not wanted:
        raise ConfigurationError(
            f"{name!r} names no stage: write <paper>/<stage or recipe>; "
            f"`assemble list {paper_named(paper_name).short}` shows them"
        )
    paper = paper_named(paper_name).name
    instances = _with_ancestors(load(paper), paper, wanted, selection.scale)
    table_request = requests_for(paper, instances, selection, selection.seeds[0])[-1]
    if table_request.given is not None:
        raise ConfigurationError(f"--given: {table_request.given.path} replaces {wanted}, so there is nothing to run")
    overrides, files = parse_overrides(arguments)
    stated = {field: value for file in files for field, value in leaves(load_yaml(file))}
    stated |= {field: leaf for given, value in overrides for field, leaf in leaves(value, given)}
    # A parent from the command line or its files replaces the table's.
    fields = {short_name(field) for field in (*stated, *(field for field, _ in overrides))}
    kept = {field: parent for field, parent in table_request.parents.items() if short_name(field) not in fields}
    request = replace(table_request, arguments=tuple(arguments), parents=kept)
    if changes := _changes(request, stated):
        return replace(request, stage=f"{request.stage}+{records.config_hash(changes, ignored=())[:6]}")
    return request


def _with_ancestors(tables: Tables, paper: str, wanted: str, scale: str) -> list[StageInstance]:
    """Return the instances of a stage's ancestors, then the stage's instance. A recipe without a stage has none."""
    stage, is_recipe = tables.stages.get(wanted), wanted in recipes_of(paper)
    if not is_recipe or (stage is not None and scale in stage.scales):
        expanded = expand(tables, scale, stages=[wanted])
        if expanded[-1].id == wanted:
            return expanded
        if not is_recipe:
            short = paper_named(paper).short
            example = next(instance.id for instance in expanded if instance.stage == wanted)
            raise ConfigurationError(
                f"{wanted!r} measures a model: say which, as in {short}/{example}; `assemble list {short}` shows all"
            )
    # The recipe comes first, then the recipes that it extends.
    chain = [Path(layer.name).stem for layer in reversed(recipe_layers(paper, wanted))]
    jobs = (stage.job for recipe in chain for stage in tables.stages.values() if stage.recipe == recipe)
    job = next(jobs, "pretrain")
    return [StageInstance(wanted, wanted, job, None)]


#: Suffixes of fields that name weights or statistics.
_WEIGHTS = ("pretrained", "warm_start", "statistics", "checkpoint")


def _changes(request: StageRequest, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that affect results. Add digests of the weights, and the folders of data sets, they name."""
    changes: dict[str, Any] = {}
    for path, value in stated.items():
        name, last = short_name(path), path.rpartition(".")[2]
        if last in MACHINE_KEYS or name.startswith("trainer.logger"):
            continue
        if ".dataset" in name:
            config = request.configuration.with_placeholders(DATA=str(request.data), RUN="")
            roots = [str((entry.get("init_args") or {}).get("root")) for entry in dataset_entries(config)]
            changes["folders"] = [str(Path(root).expanduser().resolve()) for root in roots]
        if last != "root":
            changes[name] = value
        if last.endswith(_WEIGHTS) and isinstance(value, str):
            file = Path(value.replace("$DATA", str(request.data)))
            inside = sorted(file.glob("*.safetensors")) + sorted(file.glob("*.bin")) if file.is_dir() else [file]
            changes[f"content of {name}"] = [_content(part) for part in inside if part.is_file()]
    return changes


def _content(path: Path) -> str:
    """Return a file's checksum. A test rewrites a finished stage's checkpoint, so return the stage's lineage for it."""
    stage = path.parent.parent
    lineage = identity_of(stage).get("lineage_hash") if (stage / "record.json").is_file() else None
    return f"{lineage}/{path.name}" if lineage else digest(path, "sha256")
