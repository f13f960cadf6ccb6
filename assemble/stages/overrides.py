"""Parse and check overrides of a recipe, from the command line and from stages in tables.yaml."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from assemble.reporting.records import short_name
from assemble.stages.layers import Layer, place, reach
from common.errors import ConfigurationError, nearest
from common.files import parse_yaml
from common.types import class_at

#: Package of the data sets.
_DATASETS = "common.data.datasets"
#: Fields that limit the length of training.
_LENGTHS = ("max_epochs", "max_steps", "limit_train_batches")
#: A function that makes the layers of one field.
FieldLayers = Callable[[dict[str, Any]], Iterator[Layer]]


def parse_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, Any]], list[Path]]:
    """Split `--key value` / `--key=value` and `--config FILE` arguments."""
    overrides: list[tuple[str, Any]] = []
    files: list[Path] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise ConfigurationError(f"unexpected argument {argument!r}; overrides look like --model.temperature 0.1")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not pending or (pending[0].startswith("--") and len(pending[0]) > 2):
                raise ConfigurationError(
                    f"--{key} needs a value (`assemble fit ... --print_config` shows fields and values)"
                )
            value = pending.pop(0)
        if not value.strip():
            raise ConfigurationError(f"--{key} has an empty value; use null for none")
        if key == "config":
            files.append(Path(value))
        else:
            try:
                parsed = parse_yaml(value)
            except ValueError as error:
                raise ConfigurationError(f"--{key} {value:.100}: {error}") from None
            if isinstance(parsed, str) and value.strip()[0] not in "'\"|>!&*":
                parsed = value.strip()  # YAML would cut `clips #2` at the comment sign
            overrides.append((key, parsed))
    return overrides, files


def field_layers(name: str, fields: Iterable[tuple[str, Any]], flags: Sequence[str]) -> list[FieldLayers]:
    """Return a function per field that makes the field's configuration layers.

    As in LightningCLI, a text is a class name if `flags` set arguments of the class.
    """

    def layers(key: str, value: Any, config: dict[str, Any]) -> Iterator[Layer]:
        for field, stated in _whole_dataset(config, key, value):
            if isinstance(stated, str) and any(flag.startswith(f"{short_name(field)}.") for flag in flags):
                stated = {"class_path": stated}
            yield Layer(f"{name} {field}", place(config, field, stated))

    return [functools.partial(layers, key, value) for key, value in fields]


def _whole_dataset(config: dict[str, Any], key: str, value: Any) -> list[tuple[str, Any]]:
    """Return the fields that `--key value` sets. The short name of a data set sets several fields.

    `--data.dataset NAME` selects the class in `common/data/datasets/NAME.py` of the configured kind (clips, sounds or
    images), reads from the folder of `--data`, and removes the synthetic world.
    """
    node = reach(config, key)[1]
    configured = str(node.get("class_path", "")) if isinstance(node, dict) else ""
    if not isinstance(value, str) or "." in value or not configured.startswith(f"{_DATASETS}."):
        return [(key, value)]
    try:
        module = importlib.import_module(f"{_DATASETS}.{value}")
    except ModuleNotFoundError:
        folder = Path(str(importlib.import_module(_DATASETS).__file__)).parent
        names = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("_") and path.stem != "base"]
        raise ConfigurationError(f"--{key} {value}: {nearest(value, names)}") from None
    kind = class_at(configured).streams[:1]
    fitting = [
        name
        for name, member in vars(module).items()
        if isinstance(member, type) and member.__module__ == module.__name__ and hasattr(member, "name")
        if not name.startswith("_") and member.streams[:1] == kind  # type: ignore[attr-defined]
    ]
    if len(fitting) != 1:
        kinds = "".join(kind) or "text"
        raise ConfigurationError(
            f"--{key} {value}: {len(fitting)} classes of {module.__name__} have {kinds}; give the class itself, as in "
            f"--{key} '{{class_path: {module.__name__}.NAME, init_args: {{root: FOLDER}}}}'"
        )
    return [
        (key, {"class_path": f"{module.__name__}.{fitting[0]}", "init_args": {"root": "$DATA"}}),
        ("data.world", None),
    ]


def check_given(layers: Iterable[Layer], paper: str, seed: int) -> None:
    """Refuse keys that the user's files and flags cannot set."""
    for layer in layers:
        if layer.name == "--seed_everything":
            raise ConfigurationError("use --seed, which also names the run's folder, instead of --seed_everything")
        for key in ("extends", "most_devices"):
            if key in layer.content:
                raise ConfigurationError(f"{layer.name}: {key} only works in a recipe, configs/{paper}/<recipe>.yaml")
        if layer.content.get("seed_everything", seed) != seed:
            raise ConfigurationError(f"{layer.name}: seed_everything is not the seed of this run, {seed}; set --seed")


def check_lengths(layers: Iterable[Layer]) -> None:
    for layer in layers:
        limits = layer.content.get("trainer")
        if isinstance(limits, dict) and 0 in map(limits.get, _LENGTHS):
            raise ConfigurationError(
                f"{layer.name}: a stage that trains no step would record random weights; trainer.max_epochs, max_steps "
                "and limit_train_batches must be above 0"
            )
