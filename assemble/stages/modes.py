"""Show the configuration of one stage, run the stage, or test it again."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from assemble.reporting.papers import paper_named
from assemble.reporting.records import short_name
from assemble.reporting.tables import ROW, load
from assemble.stages.launch import is_main_process, require_processes
from assemble.stages.layers import Layer, leaves, origin
from assemble.stages.lightning_workarounds import quiet_lightning
from assemble.stages.request import StageRequest
from assemble.stages.run import run_stage, stage_configuration
from common.errors import StageError


def print_configuration(request: StageRequest) -> None:
    """Check a configuration, then print the merged files, the deviations of the scale and the result."""
    from assemble.stages.cli import check

    check(request)
    run = request.configuration
    print(f"# {run.describe()}")
    for deviation in run.deviations:
        print(f"# deviation of scale {run.scale}: {deviation['field']}: {deviation['reason']}")
    if run.describe_ours():
        print(f"# values that the paper's sources don't give, as set here: {run.describe_ours()}")
    for field, parent in request.parents.items():
        print(f"# {field} <- stage {parent.stage}: {parent.checkpoint(run.start_from)}")
    for line in _with_origins(run.config, run.layers, request.parents):
        print(line)


def _with_origins(
    tree: dict[str, Any], layers: Sequence[Layer], filled: Container[str], *parents: str
) -> Iterator[str]:
    """Write a configuration as YAML, with the file that set each value. Skip fields that parents' checkpoints set."""
    for key, value in tree.items():
        path, start = (*parents, str(key)), f"{'  ' * len(parents)}{_in_one_line(key)}:"
        if ".".join(path) in filled:
            continue
        if isinstance(value, dict) and value:
            yield start
            yield from _with_origins(value, layers, filled, *path)
        else:
            yield f"{start} {_in_one_line(value)}   # {origin('.'.join(path), layers)}"


def _in_one_line(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=float("inf")).removesuffix("\n").removesuffix("\n...")


def fit(request: StageRequest, unless_done: bool) -> int:
    if is_main_process() and (missing := _missing_weights(request)):
        print(f"warning: {missing}", file=sys.stderr, flush=True)
    metrics = run_stage(request, unless_done).metrics
    if is_main_process():
        _print_metrics(metrics)
        print(f"record: {request.directory / 'record.json'}")
    return 0


def _missing_weights(request: StageRequest) -> str:
    """Return a warning if a stage is run by its recipe's name and measures a model, but gets no weights."""
    stages = load(request.paper).stages
    name = request.stage.partition("+")[0]
    if name != request.recipe or (name in stages and ROW not in stages[name].parents.values()):
        return ""
    config = dict(leaves(request.configuration.config))
    for stage in (candidate for candidate in stages.values() if request.scale in candidate.scales):
        fields = [field for field, parent in stage.parents.items() if stage.recipe == request.recipe and parent == ROW]
        empty = [short_name(field) for field in fields if config.get(field, "") is None]
        if empty:
            return (
                f"without --{' and --'.join(empty)}, {request.recipe} measures random weights or wrong statistics; "
                f"{stage.name}@<model> measures a stage's model, see `assemble list {paper_named(request.paper).short}`"
            )
    return ""


def _print_metrics(metrics: Mapping[str, float | None]) -> None:
    for name, value in metrics.items():
        print(f"{name:<40} {value if value is None else format(value, '.4f')}")


def measure(request: StageRequest, checkpoint: Path | None, validation: bool) -> int:
    """Test or validate a trained stage and print its metrics. Write no record."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from assemble.stages.cli import build

    run = request.configuration
    weights = checkpoint or request.checkpoint()
    if not run.trains:
        raise StageError(f"{request.stage} does not train: `assemble fit` tests it and writes its record")
    # Use the parents' checkpoints if they exist: they hold metric networks, which the stage's checkpoint lacks.
    config = stage_configuration(request, required=False)
    config["trainer"] = {k: v for k, v in config["trainer"].items() if k not in {"limit_val_batches", "callbacks"}}
    require_processes(config["trainer"])
    if not weights.is_file():
        raise StageError(f"{weights} does not exist: train the stage first (assemble fit) or give --checkpoint")
    from common.encoders.checkpoint_files import CheckpointError, read_checkpoint

    try:
        content = read_checkpoint(weights)
        if "state_dict" not in content:
            raise CheckpointError(f"{weights}: has no 'state_dict'; give checkpoints/last.ckpt of a stage")
        class_name = str(run.config["model"]["class_path"]).rpartition(".")[2]
        if content.get("module", class_name) != class_name:
            raise CheckpointError(
                f"{weights} is a checkpoint of {content['module']}, but {request.stage} needs one of {class_name}"
            )
    except CheckpointError as error:
        raise StageError(str(error)) from None
    # A test must not overwrite the record's images.
    folder = request.directory / "test"
    quiet_lightning()
    cli = build(run, config, {"default_root_dir": str(folder), "logger": False})
    validated = is_overridden("val_dataloader", cli.datamodule) and is_overridden("validation_step", cli.model)
    if validation and not validated:
        raise StageError(f"{request.stage} has no validation; leave out --validation")
    run_loop = cli.trainer.validate if validation else cli.trainer.test
    run_loop(cli.model, datamodule=cli.datamodule, ckpt_path=str(weights), weights_only=True, verbose=False)
    if is_main_process():
        _print_metrics({name: float(value) for name, value in sorted(cli.trainer.callback_metrics.items())})
    return 0
