"""One stage from the command line: find it, show its configuration, run, validate or predict with it."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.data.checksums import digest
from common.errors import StageError, nearest
from common.reporting.papers import example_stage, paper_named
from common.reporting.records import IGNORED_KEYS, MACHINE_KEYS, config_hash, short_name
from common.reporting.tables import ROW, StageInstance, expand, load
from common.stages.configuration import (
    ConfigurationError,
    Layer,
    class_at,
    leaves,
    load_yaml,
    merge,
    origin,
    parse_overrides,
    place,
    recipes_of,
    resolve,
)
from common.stages.launch import is_main_process, require_processes
from common.stages.plan import Selection, request_for
from common.stages.run import StageRequest, dataset_entries, recorded_lineage, run_stage

if TYPE_CHECKING:
    from common.data.datasets.base import MediaDataset
    from common.data.released_files import FileStatus

_DATA = "$DATA/"
#: What fields that name a file or folder of weights or of statistics end with.
WEIGHTS = ("pretrained", "warm_start", "statistics", "checkpoint")
#: What says which weights of a file; a hash leaves it out with the file, which a file of overrides names, too.
_WHICH_WEIGHTS = frozenset({"encoder_prefixes", "text_encoder_prefixes", "checkpoint"})


def find_request(name: str, selection: Selection, arguments: Sequence[str] = ()) -> StageRequest:
    """The stage that `<paper>/<name>` means: an instance of the paper's tables, a stage of it, or a bare recipe.

    A run with overrides is another run than the table's: it gets a folder of its own, so that trying something never
    costs a finished record. Overrides that only say on what it runs, such as the number of devices, are none.

    Raises:
        ConfigurationError: nothing has that name; the message has the nearest.
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
    # A stage of other scales may have a recipe of its name, which runs at every scale.
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
        # With a data set of one's own, the folder says which: hashes of configurations leave out where things lie.
        where = [str(selection.data)] if any(field.endswith(".dataset") for field in given) else []
        where += _own_folders(request)
        # So does the content of files: of these, but for where things lie, and of the weights that they name.
        where += [config_hash(load_yaml(file), IGNORED_KEYS - _WHICH_WEIGHTS) for file in files]
        where += _weights(stated, request.data)
        stage += "+" + hashlib.sha256("\0".join([*words, *where]).encode()).hexdigest()[:6]
    # A parent given on the command line or in a file of it replaces that of the table.
    fields = {short_name(field) for field in (*given, *(field for field, _ in stated))}
    kept = {field: parent for field, parent in request.parents.items() if short_name(field) not in fields}
    return replace(request, stage=stage, parents=kept)


def _words_that_count(arguments: Sequence[str]) -> list[str]:
    """The words of overrides, but of those that change nothing of what is measured: the machine, one more logger.

    `--field=value`, as a sweep writes it, is the run of `--field value`.
    """
    words: list[str] = []
    pending = list(arguments)
    while pending:
        flag, equals, value = pending.pop(0).partition("=")
        value = value if equals else pending.pop(0)
        if flag.rpartition(".")[2] not in MACHINE_KEYS and not flag.startswith("--trainer.logger"):
            words += [flag, value]
    return words


def _weights(stated: Sequence[tuple[str, Any]], data: Path) -> list[str]:
    """What is in the weights and statistics that fields name; no hash of a configuration looks into files."""
    found: list[str] = []
    for field, value in stated:
        if field.rpartition(".")[2].endswith(WEIGHTS) and isinstance(value, str):
            path = Path(value.replace("$DATA", str(data)))
            inside = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")) if path.is_dir() else [path]
            found += [value, *(_content(one) for one in inside if one.is_file())]
    return found


def _content(path: Path) -> str:
    """Checksum of a file; of the checkpoint of a finished stage its lineage, as another test writes it anew."""
    stage = path.parent.parent
    own = recorded_lineage(stage / "identity.json") if (stage / "record.json").is_file() else None
    return f"{own}/{path.name}" if own else digest(path, "sha256")


def _own_folders(request: StageRequest) -> list[str]:
    """The folders of one's own that a stage reads, however its configuration names them."""
    config = request.configuration().with_placeholders(DATA=str(request.data), RUN="")
    return [
        str(Path(str((entry.get("init_args") or {}).get("root"))).expanduser().resolve())
        for entry in dataset_entries(config)
        if str(entry["class_path"]).startswith("common.data.datasets.folder.")
    ]


def print_configuration(request: StageRequest, sections: Sequence[str] = ()) -> None:
    """Print the stack, the deviations of the scale and the merged configuration.

    Args:
        request: the stage.
        sections: parts of the configuration, such as `model`, to print alone as flags; none = all of it.

    Raises:
        ConfigurationError: there is no such part.
    """
    run = request.configuration()
    for section in sections:
        if section not in run.config:
            raise ConfigurationError(f"--{section}.help: {nearest(section, run.config)}")
        print(f"# --{section}.FIELD VALUE, as {run.recipe} sets it at scale {run.scale}")
        for path, value in leaves(run.config[section], section):
            flag, _, field = short_name(path).rpartition(".")
            if field == "class_path":
                print(f"# --{flag} is a {value}")
            else:
                print(f"--{flag}.{field} {_in_one_line(value)}")
    if sections:
        return
    print("# " + " < ".join(layer.name for layer in run.layers))
    for deviation in run.deviations:
        print(f"# deviation of scale {run.scale}: {deviation['field']}: {deviation['reason']}")
    if run.describe_ours():
        print(f"# ours, in no source of the paper: {run.describe_ours()}")
    for field, parent in request.parents.items():
        print(f"# {field} <- stage {parent.stage}: {parent.checkpoint(run.start_from)}")
    for line in _with_origins(run.config, run.layers):
        print(line)


def _with_origins(tree: dict[str, Any], layers: Sequence[Layer], *parents: str) -> Iterator[str]:
    """A configuration as YAML, with the file that set a value as the comment of its line."""
    for key, value in tree.items():
        path, start = (*parents, str(key)), f"{'  ' * len(parents)}{_in_one_line(key)}:"
        if isinstance(value, dict) and value:
            yield start
            yield from _with_origins(value, layers, *path)
        else:
            yield f"{start} {_in_one_line(value)}   # {origin('.'.join(path), layers)}"


def _in_one_line(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n").removesuffix("\n...")


def run_mode(command: str, request: StageRequest, checkpoint: Path | None, unless_done: bool = False) -> int:
    """`fit`, `test`, `validate` or `predict` for one stage; prints what came out.

    Only `fit` writes a record: the others look at a trained stage without changing it.
    """
    if command == "fit":
        if checkpoint is not None:
            raise StageError(
                "--checkpoint goes with test, validate and predict; a fit goes on from its own folder, or "
                "starts from another stage with --model.warm_start or --model.pretrained"
            )
        ours = request.configuration().describe_ours()
        if ours and is_main_process():
            print(f"values that are ours, in no source of the paper: {ours}")
        untrained = _starts_from_nothing(request)
        if untrained and is_main_process():
            print(f"warning: {untrained}", file=sys.stderr, flush=True)
        metrics = run_stage(request, unless_done).metrics
        if is_main_process():
            _print_metrics(metrics)
            if untrained:
                print(f"warning: {untrained}", file=sys.stderr)
            print(f"record: {request.directory / 'record.json'}")
        return 0
    return _use(command, request, checkpoint)


def _starts_from_nothing(request: StageRequest) -> str:
    """What a bare recipe that measures a trained model must be told when it is given none; else empty."""
    stages = load(request.paper).stages
    name = request.stage.partition("+")[0]
    if name != request.recipe or (name in stages and ROW not in stages[name].parents.values()):
        return ""
    config = dict(leaves(request.configuration().config))
    for stage in stages.values():
        filled = [field for field, parent in stage.parents.items() if stage.recipe == request.recipe and parent == ROW]
        empty = [field for field in filled if config.get(field, "") is None]
        if empty and len(empty) < len(filled):
            given = next(field for field in filled if field not in empty)
            return (
                f"--{short_name(empty[0])} is null: give it the checkpoint of "
                f"--{short_name(given)}, so that the model is measured as it was trained"
            )
        if empty:
            return (
                f"--{short_name(empty[0])} is null, so {request.recipe} measures random weights, unless "
                f"an encoder of yours brings its own; {stage.name}@<model> measures a stage's model, see "
                f"`assemble list {paper_named(request.paper).short}`"
            )
    return ""


def _print_metrics(metrics: Mapping[str, float | None]) -> None:
    for name, value in metrics.items():
        print(f"{name:<40} {value if value is None else format(value, '.4f')}")


def _use(command: str, request: StageRequest, checkpoint: Path | None) -> int:
    import torch
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from common.stages.cli import build

    run = request.configuration()
    weights = checkpoint or request.directory / "checkpoints" / "last.ckpt"
    if not run.trains:
        raise StageError(f"{request.stage} trains nothing: `assemble fit` measures it and writes its record")
    config = run.with_placeholders(DATA=str(request.data), RUN=str(request.directory))
    config["trainer"] = {k: v for k, v in config["trainer"].items() if k not in {"limit_val_batches", "callbacks"}}
    if command == "predict":
        # One file holds all outputs; of several processes each would write its share over the others'.
        config["trainer"] |= {"devices": 1, "num_nodes": 1}
    require_processes(config["trainer"])
    if not weights.is_file():
        raise StageError(f"{weights} does not exist: train the stage first (assemble fit) or give --checkpoint")
    from common.encoders.checkpoint_files import CheckpointError, read_checkpoint
    from common.files import write_whole

    try:
        content = read_checkpoint(weights)
        if "state_dict" not in content:
            raise CheckpointError(f"{weights}: holds no 'state_dict'; give checkpoints/last.ckpt of a stage")
        own = str(run.config["model"]["class_path"]).rpartition(".")[2]
        if content.get("module", own) != own:
            raise CheckpointError(
                f"{weights} is of {content['module']}, and {request.stage} is of {own}: give a checkpoint of such a "
                "stage"
            )
    except CheckpointError as error:
        raise StageError(str(error)) from None
    for name, parent in request.parents.items():
        # A network that measures is no part of the weights; one that training started from may be gone by now.
        if parent.checkpoint(run.start_from).is_file():
            config = merge(config, place(config, name, str(parent.checkpoint(run.start_from))))
    # The pictures of a test go beside the record's, not over them.
    folder = request.directory / command
    cli = build(run, config, {"default_root_dir": str(folder), "logger": False})
    loader = {"validate": "val", "test": "test", "predict": "predict"}[command] + "_dataloader"
    if not is_overridden(loader, cli.datamodule):
        raise StageError(f"{request.stage} has no data to {command} with; `assemble test` measures it")
    use = getattr(cli.trainer, command)
    outputs = use(
        cli.model,
        datamodule=cli.datamodule,
        ckpt_path=str(weights),
        weights_only=True,
        **({} if command == "predict" else {"verbose": False}),
    )
    if command != "predict":
        if is_main_process():
            _print_metrics({name: float(value) for name, value in sorted(cli.trainer.callback_metrics.items())})
        return 0
    path = folder / "predictions.pt"
    write_whole(path, lambda whole: torch.save(outputs, whole))
    print(f"written to {path}")
    return 0


def datasets_of(paper: str, data: Path) -> list[MediaDataset]:
    """Every data set that a paper's recipes read at the scale `paper`, and those that it can read, once each.

    The latter are named by `OPTIONAL_DATASETS` in the paper's package; they lie in a folder of their own name. Recipes
    of which the paper's tables know only stages in miniature are left out.
    """
    found: dict[tuple[str, str], Any] = {}
    for recipe in _published_recipes(paper):
        config = resolve(paper, recipe, scale="paper").with_placeholders(DATA=str(data), RUN="")
        for entry in dataset_entries(config.get("data")):
            arguments = entry.get("init_args") or {}
            key = (entry["class_path"], str(arguments))
            if key not in found:
                found[key] = class_at(entry["class_path"])(**arguments)
    for path in getattr(importlib.import_module(f"papers.{paper}"), "OPTIONAL_DATASETS", ()):
        dataset = class_at(path)
        found[path, ""] = dataset(data / dataset.name)
    return list(found.values())


def files_of(paper: str, data: Path, verify: bool = False) -> list[FileStatus]:
    """Every file and folder that a paper's recipes read at the scale `paper` beside data sets: weights, lists, ...

    Args:
        paper: package name.
        data: folder of the data sets.
        verify: also compare published checksums.
    """
    from common.data.released_files import look_at

    recipes: dict[str, list[str]] = {}
    roots: set[str] = set()
    for recipe in _published_recipes(paper):
        config = resolve(paper, recipe, scale="paper").config
        for entry in dataset_entries(config.get("data")):
            # Folders of data sets; a file that chooses a part of one is listed.
            roots.update(path for path in _data_paths(entry) if not Path(path).suffix)
        for path in _data_paths(config):
            recipes.setdefault(path, []).append(recipe)
    return [
        look_at(path, data, tuple(dict.fromkeys(own)), verify)
        for path, own in sorted(recipes.items())
        if path not in roots
    ]


def _published_recipes(paper: str) -> list[str]:
    """Recipes of a paper but those of which its tables know only stages in miniature."""
    stages = load(paper).stages.values()
    miniature = {stage.recipe for stage in stages} - {stage.recipe for stage in stages if "paper" in stage.scales}
    return [recipe for recipe in recipes_of(paper) if recipe not in miniature]


def _data_paths(section: object) -> Iterator[str]:
    """Every path below the folder of the data sets in a section of a configuration, relative to it."""
    if isinstance(section, Mapping):
        for value in section.values():
            yield from _data_paths(value)
    elif isinstance(section, list):
        for value in section:
            yield from _data_paths(value)
    elif isinstance(section, str) and section.startswith(_DATA):
        yield section.removeprefix(_DATA)
