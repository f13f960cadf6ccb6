"""One stage to run: its identity, its parents and its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.data.checksums import digest
from common.errors import nearest
from common.reporting import records
from common.reporting.draws import NATIVE, Draw
from common.reporting.papers import example_stage, paper_named
from common.reporting.records import IGNORED_KEYS, MACHINE_KEYS, config_hash, short_name
from common.reporting.tables import StageInstance, expand, load
from common.stages.configuration import (
    ConfigurationError,
    RunConfiguration,
    leaves,
    load_yaml,
    parse_overrides,
    recipes_of,
    resolve,
)
from common.stages.recipe_data import dataset_entries

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Selection:
    """What the user asked for; without `everything`, rows made by request only run if named."""

    scale: str = "mini"
    seeds: tuple[int, ...] = (0,)
    hardware: str = "cpu"
    runs: Path = Path("runs")
    data: Path = Path("data")
    tables: tuple[str, ...] | None = None
    rows: tuple[str, ...] | None = None
    stages: tuple[str, ...] | None = None
    rehearsal: bool = False
    isa: str = NATIVE
    everything: bool = False


@dataclass(frozen=True)
class Parent:
    """The finished stage whose checkpoint fills a field of this one."""

    stage: str
    directory: Path
    lineage_hash: str

    def checkpoint(self, name: str) -> Path:
        return self.directory / "checkpoints" / f"{name}.ckpt"


@dataclass(frozen=True)
class StageRequest:
    """One stage to run.

    Attributes:
        row: the model of the table row that the stage evaluates.
        parents: dotted field -> stage whose checkpoint fills it.
        overrides, arguments: from tables.yaml and from the command line.
        data: folder that `$DATA` in configs means.
        isa: instruction set whose rounding of sums to use.
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
    parents: Mapping[str, Parent] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    rehearsal: bool = False
    isa: str = NATIVE

    @property
    def draw(self) -> Draw:
        return Draw(self.seed, self.isa)

    @property
    def directory(self) -> Path:
        return records.run_folder(self.runs, self.paper, self.scale, self.draw, self.stage)

    @property
    def published(self) -> bool:
        """Whether its numbers are comparable to published ones."""
        return self.scale == "paper" and not self.rehearsal

    def configuration(self) -> RunConfiguration:
        """The merged configuration, without the parents' paths."""
        return resolve(
            self.paper,
            self.recipe,
            scale=self.scale,
            hardware=self.hardware,
            seed=self.seed,
            # Only pre-training uses several nodes: downstream batches are small.
            stage_overrides={**self.overrides, **({} if self.job == "pretrain" else {"trainer.num_nodes": 1})},
            arguments=self.arguments,
            rehearsal=self.rehearsal,
        )

    def lineage_hash(self, run: RunConfiguration | None = None) -> str:
        """Hash of this configuration and its ancestors'."""
        run = run or self.configuration()
        return records.lineage_hash(
            records.config_hash(run.config),
            {
                name: parent.lineage_hash if run.start_from == "last" else f"{parent.lineage_hash}/{run.start_from}"
                for name, parent in self.parents.items()
            },
        )


def finished_record(request: StageRequest, lineage: str) -> records.Record | None:
    """This stage's record; None if it is missing, malformed or of another configuration."""
    path = request.directory / "record.json"
    if not path.is_file():
        return None
    try:
        record = records.read(path)
    except records.RecordError:
        return None
    return record if record.lineage_hash == lineage else None


def recorded_lineage(identity_path: Path) -> str | None:
    try:
        return str(json.loads(identity_path.read_text(encoding="utf-8"))["lineage_hash"])
    except (OSError, ValueError, KeyError):
        return None


def request_for(
    paper: str,
    instance: StageInstance,
    selection: Selection,
    seed: int,
    lineages: dict[str, str],
    arguments: Sequence[str] = (),
) -> StageRequest:
    """The request of one stage instance; `lineages` holds its parents'."""
    parents = {
        field: Parent(
            parent,
            records.run_folder(selection.runs, paper, selection.scale, Draw(seed, selection.isa), parent),
            lineages[parent],
        )
        for field, parent in instance.parents.items()
    }
    return StageRequest(
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
        parents=parents,
        overrides=instance.overrides,
        arguments=tuple(arguments),
        rehearsal=selection.rehearsal,
        isa=selection.isa,
    )


def find_request(name: str, selection: Selection, arguments: Sequence[str] = ()) -> StageRequest:
    """The stage `<paper>/<name>`: an instance of the paper's tables, a stage, or a bare recipe.

    Overrides that affect the measurement give the run its own folder, so they never replace a finished record.
    """
    paper_name, _, wanted = name.partition("/")
    if not wanted:
        raise ConfigurationError(
            f"{name!r} names no stage: write <paper>/<stage or recipe>, such as {example_stage()}; "
            f"`assemble list {paper_named(paper_name).short}` shows them"
        )
    paper = paper_named(paper_name).name
    tables = load(paper)
    instances = {instance.id: instance for instance in expand(tables, selection.scale)}
    seed = selection.seeds[0]
    # A stage of another scale may share its name with a recipe, which runs at every scale.
    elsewhere = wanted in recipes_of(paper) and selection.scale not in getattr(tables.stages.get(wanted), "scales", ())
    if wanted not in instances and wanted in tables.stages and not elsewhere:
        try:
            for instance in expand(tables, selection.scale, stages=[wanted]):
                instances.setdefault(instance.id, instance)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
    if wanted not in instances:
        if wanted not in recipes_of(paper):
            measured = [identity for identity in instances if identity.startswith(f"{wanted}@")]
            if measured:
                raise ConfigurationError(
                    f"{wanted!r} measures a model: say which, as in {paper_name}/{measured[0]}; {', '.join(measured)}"
                )
            known = {*instances, *tables.stages, *recipes_of(paper)}
            raise ConfigurationError(
                f"{paper} has no stage or recipe {wanted!r}; {nearest(wanted, known)}; "
                f"`assemble list {paper_name}` shows all"
            )
        job = next((stage.job for stage in tables.stages.values() if stage.recipe == wanted), "pretrain")
        instances[wanted] = StageInstance(wanted, wanted, job, None)
    instance = instances[wanted]
    overrides, files = parse_overrides(arguments)
    given = {field for field, _ in overrides}
    stated = [leaf for field, value in overrides for leaf in leaves(value, field)]
    stated += [leaf for file in files for leaf in leaves(load_yaml(file))]
    lineages: dict[str, str] = {}

    def lineage(identity: str) -> str:
        if identity not in lineages:
            parent = instances[identity]
            for ancestor in parent.parents.values():
                lineage(ancestor)
            lineages[identity] = request_for(paper, parent, selection, seed, lineages).lineage_hash()
        return lineages[identity]

    for parent in instance.parents.values():
        lineage(parent)
    request = request_for(paper, instance, selection, seed, lineages, arguments)
    stage = request.stage
    words = _words_that_count(arguments)
    if words:
        # Configuration hashes ignore paths, so the folder of a user's data set is part of the name.
        where = [str(selection.data)] if any(field.endswith(".dataset") for field in given) else []
        where += _own_folders(request)
        # So are the contents of override files and weights.
        where += [config_hash(load_yaml(file), IGNORED_KEYS - _WHICH_WEIGHTS) for file in files]
        where += _weights(stated, request.data)
        stage += "+" + hashlib.sha256("\0".join([*words, *where]).encode()).hexdigest()[:6]
    # A parent from the command line or its files replaces the table's.
    fields = {short_name(field) for field in (*given, *(field for field, _ in stated))}
    kept = {field: parent for field, parent in request.parents.items() if short_name(field) not in fields}
    return replace(request, stage=stage, parents=kept)


#: Suffixes of fields that name weights or statistics.
WEIGHTS = ("pretrained", "warm_start", "statistics", "checkpoint")


#: Fields that select weights of a file; hashes usually ignore them.
_WHICH_WEIGHTS = frozenset({"encoder_prefixes", "text_encoder_prefixes", "checkpoint"})


def _words_that_count(arguments: Sequence[str]) -> list[str]:
    """The overrides that can change a measurement: not those of the machine or an extra logger."""
    words: list[str] = []
    pending = list(arguments)
    while pending:
        flag, equals, value = pending.pop(0).partition("=")
        value = value if equals else pending.pop(0)
        if flag.rpartition(".")[2] not in MACHINE_KEYS and not flag.startswith("--trainer.logger"):
            words += [flag, value]
    return words


def _weights(stated: Sequence[tuple[str, Any]], data: Path) -> list[str]:
    """Names and contents of the weights and statistics that fields name; configuration hashes ignore contents."""
    found: list[str] = []
    for name, value in stated:
        if name.rpartition(".")[2].endswith(WEIGHTS) and isinstance(value, str):
            path = Path(value.replace("$DATA", str(data)))
            inside = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")) if path.is_dir() else [path]
            found += [value, *(_content(one) for one in inside if one.is_file())]
    return found


def _content(path: Path) -> str:
    """Checksum of a file; for a finished stage's checkpoint its lineage, since another test rewrites the file."""
    stage = path.parent.parent
    own = recorded_lineage(stage / "identity.json") if (stage / "record.json").is_file() else None
    return f"{own}/{path.name}" if own else digest(path, "sha256")


def _own_folders(request: StageRequest) -> list[str]:
    """The user's own data folders that a stage reads."""
    config = request.configuration().with_placeholders(DATA=str(request.data), RUN="")
    return [
        str(Path(str((entry.get("init_args") or {}).get("root"))).expanduser().resolve())
        for entry in dataset_entries(config)
        if str(entry["class_path"]).startswith("common.data.datasets.folder.")
    ]
