"""The configuration stack: the YAML files of a run, in merge order.

A run is `paper` + `recipe` + `scale` + `hardware` + `seed` + overrides. Later layers win:

    configs/trainer.yaml
    configs/hardware/<hardware>.yaml
    configs/<paper>/base.yaml
    configs/<paper>/<recipe>.yaml        (after the recipes that it `extends`)
    configs/<paper>/<scale>.yaml         (none for the scale `paper`)
    configs/<paper>/rehearsal.yaml       (in a rehearsal)
    --config FILE, then --key value      from the command line

jsonargparse only checks the result. If it merged the files, a plan would import torch, and a layer that changes
`class_path` would keep the old class's init arguments.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from assemble.reporting.papers import paper_named, project_root
from assemble.reporting.records import REHEARSED, short_name
from assemble.stages.layers import SWITCHES, Layer, classes_in, leaves, load_yaml, merge, origin, reach, substitute
from assemble.stages.overrides import check_given, check_lengths, field_layers, parse_overrides
from assemble.stages.recipes import REHEARSAL, hardware_layer, limit_devices, overlay_layers, recipe_layers, scales_of
from common.errors import ConfigurationError, nearest
from common.types import arguments_of, class_at, outside

#: Keys of a YAML layer that only the stack reads, not LightningCLI.
#: `most_devices` is the largest number of devices per node that can share the recipe's groups of samples.
STACK_KEYS = ("extends", "trains", "start_from", "ours", "most_devices")
_TOP_LEVEL = ("seed_everything", "trainer", "model", "data")
#: Flags of `fit` that set no field. An error suggests them for a misspelled key.
_FLAGS = ("scale", "hardware", "seed", "isa", "runs", "unless_done", "print_config", "given", "config")


@dataclass(frozen=True)
class RunConfiguration:
    """The merged configuration of one run.

    Attributes:
        layers: the configuration layers, in merge order.
        config: mapping for LightningCLI. Paths start with the placeholders `$DATA` and `$RUN`, to be the same anywhere.
        deviations: what the scale changes beyond sizes, each `{field, reason}`.
        trains: False for recipes that only test, such as the SVM.
        start_from: which checkpoint of the parents to start from: `last`, or another checkpoint's name.
        ours: dotted fields whose values the paper's sources don't give (key `ours` of a recipe or base).
    """

    paper: str
    recipe: str
    scale: str
    layers: tuple[Layer, ...]
    config: dict[str, Any]
    deviations: tuple[dict[str, str], ...]
    trains: bool
    start_from: str = "last"
    ours: tuple[str, ...] = ()

    def describe(self) -> str:
        """List the configuration layers in one line, in merge order."""
        return " < ".join(layer.name for layer in self.layers)

    def values_of_ours(self) -> dict[str, str]:
        """Return the values of the fields in `ours` that are set. For a class, return its name."""
        short = {short_name(path): str(value) for path, value in leaves(self.config)}
        short |= {
            path.removesuffix(".class_path"): value.rpartition(".")[2]
            for path, value in short.items()
            if path.endswith(".class_path")
        }
        return {name: short[name] for name in self.ours if name in short}

    def describe_ours(self) -> str:
        """Write `values_of_ours` in one line: `field=value, ...`."""
        return ", ".join(f"{name}={value}" for name, value in self.values_of_ours().items())

    def with_placeholders(self, **values: str) -> dict[str, Any]:
        """Return the config with every `$NAME` replaced; see `substitute`."""
        return substitute(self.config, {"SEED": str(self.config["seed_everything"]), **values})


def resolve(
    paper: str,
    recipe: str,
    *,
    scale: str = "mini",
    hardware: str = "cpu",
    seed: int = 0,
    stage_overrides: dict[str, Any] | None = None,
    arguments: Sequence[str] = (),
    rehearsal: bool = False,
) -> RunConfiguration:
    """Merge a run's configuration layers in order, and check the result."""
    paper = paper_named(paper).name
    if scale not in scales_of(paper):
        raise ConfigurationError(f"there is no configs/{paper}/{scale}.yaml; {paper} has {', '.join(scales_of(paper))}")
    overlay, deviations = overlay_layers(paper, recipe, scale)
    files = [
        Layer("configs/trainer.yaml", load_yaml(project_root() / "configs" / "trainer.yaml")),
        hardware_layer(hardware),
        Layer(f"configs/{paper}/base.yaml", load_yaml(project_root() / "configs" / paper / "base.yaml")),
        *recipe_layers(paper, recipe),
        *overlay,
        *(overlay_layers(paper, recipe, REHEARSAL)[0] if rehearsal else ()),
    ]
    overrides, paths = parse_overrides(arguments)
    overrides.sort(key=lambda pair: short_name(pair[0]).count("."))  # set a class before its arguments
    users_files = [Layer(str(path), load_yaml(path)) for path in paths]
    flags = [short_name(key) for key, _ in overrides]
    check_given([*users_files, *(Layer(f"--{key}", {key: value}) for key, value in overrides)], paper, seed)
    merged, layers = _fold(
        *files,
        limit_devices,
        *field_layers("tables.yaml", (stage_overrides or {}).items(), flags),
        *users_files,
        *field_layers("command line", overrides, flags),
    )
    if "data.dataset.root" in flags and reach(merged, "data.world")[1]:
        raise ConfigurationError(
            "--data.dataset.root is not read, since data.world makes the data: add --data.dataset or --data.world null"
        )
    config = _for_lightning(merged, layers, layers[len(files) :], seed)
    if rehearsal:
        published = resolve(
            paper, recipe, scale=scale, hardware=hardware, seed=seed, stage_overrides=stage_overrides,
            arguments=arguments,
        )  # fmt: skip
        deviations += _changes(published.config, config)
    trains, start_from = bool(merged.get("trains", True)), str(merged.get("start_from", "last"))
    ours = tuple(merged.get("ours") or ())
    return RunConfiguration(paper, recipe, scale, tuple(layers), config, tuple(deviations), trains, start_from, ours)


def _for_lightning(merged: dict[str, Any], layers: list[Layer], changes: list[Layer], seed: int) -> dict[str, Any]:
    """Check a merged configuration and return LightningCLI's part. `changes` are the layers after the config files."""
    switches = _switches_of(merged, changes)
    config = copy.deepcopy({key: value for key, value in merged.items() if key not in (*STACK_KEYS, *SWITCHES)})
    config["seed_everything"] = seed
    check_keys(config, layers)
    check_lengths(layer for layer in changes if not layer.name.startswith("tables.yaml"))
    if {"strategy": "ddp", "devices": 1, "num_nodes": 1}.items() <= config["trainer"].items():
        # With one device, DDP would leave its addresses in the environment, and the next stage couldn't start ranks.
        config["trainer"]["strategy"] = "auto"
    if switches:
        config = merge(config, {"model": {"init_args": switches}})
    return config


def _fold(*steps: Layer | Callable[[dict[str, Any]], Iterable[Layer]]) -> tuple[dict[str, Any], list[Layer]]:
    """Merge configuration layers in order. A function makes layers from the configuration merged so far."""
    config: dict[str, Any] = {}
    layers: list[Layer] = []
    for step in steps:
        for layer in [step] if isinstance(step, Layer) else step(config):
            layers.append(layer)
            config = merge(config, layer.content)
    return config, layers


def _switches_of(config: dict[str, Any], layers: Iterable[Layer]) -> dict[str, Any]:
    """Return a configuration's switches. Stages and users may also set switches among the model's arguments."""
    switches = {name: config[name] for name in SWITCHES if name in config}
    for layer in layers:
        model = layer.content.get("model")
        arguments = (model.get("init_args") or {}) if isinstance(model, dict) else {}
        stated = {**arguments, **layer.content}
        switches |= {name: stated[name] for name in SWITCHES if name in stated}
    return switches


def take_switches(config: dict[str, Any]) -> tuple[dict[str, bool | str | int | None], dict[str, Any]]:
    """Split a merged configuration into its switches and the rest."""
    arguments = (config.get("model") or {}).get("init_args") or {}
    switches = {name: arguments[name] for name in SWITCHES if name in arguments}
    if not switches:
        return {}, config
    for name, value in switches.items():
        if name == "batch_norm_group":
            fits = value is None or (type(value) is int and value >= 2)
        elif name == "checkpoint_minutes":
            fits = type(value) in (int, float) and 0 <= value < math.inf
        else:
            fits = isinstance(value, bool) or (name == "compiled" and isinstance(value, str))
        if not fits:
            raise ConfigurationError(
                f"{name} is {value!r}; it must be true or false, the name of a backend (compiled), 2 or more "
                "samples or null (batch_norm_group), or 0 or more minutes (checkpoint_minutes)"
            )
    without = {name: value for name, value in arguments.items() if name not in switches}
    return switches, {**config, "model": {**config["model"], "init_args": without}}


def _changes(published: dict[str, Any], rehearsed: dict[str, Any]) -> list[dict[str, str]]:
    before, after = dict(leaves(published)), dict(leaves(rehearsed))
    return [
        {"field": field, "reason": f"{REHEARSED}{before.get(field, 'not set')} -> {after.get(field, 'not set')}"}
        for field in sorted({**before, **after})
        if before.get(field, ...) != after.get(field, ...)
    ]


def _elsewhere(name: str, config: dict[str, Any], given: str = "") -> str:
    """Suggest where a misplaced field belongs. Return an empty text without a suggestion."""
    places = [path for path, _ in leaves(config) if path.rpartition(".")[2] == name and path not in (name, given)]
    flags = [f"--{short_name(path)}" for path in places[:3]]
    return f"did you mean {' or '.join(flags)}?" if flags else ""


def check_keys(config: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Refuse unknown top-level keys and sections without fields. The error names the layer and suggests a valid key."""
    for key in map(str, config):
        if key not in _TOP_LEVEL:
            raise ConfigurationError(
                f"{origin(key, layers)}: unknown key {key!r}; "
                + (_elsewhere(key, config) or nearest(key, (*_TOP_LEVEL, *STACK_KEYS, *SWITCHES, *_FLAGS)))
            )
        value = config[key]
        if isinstance(value, dict) and not isinstance(value.get("init_args") or {}, dict):
            key, value = f"{key}.init_args", value["init_args"]
        if key != "seed_everything" and not isinstance(value, dict):
            raise ConfigurationError(
                f"{origin(key, layers)}: {key!r} must have fields, as in --trainer.max_epochs 3, got {value!r}"
            )


def check_arguments(config: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Refuse classes that cannot be imported, unknown arguments of classes, and arguments that are out of range."""
    parts = [("trainer", "lightning.pytorch.Trainer", config.get("trainer") or {})]
    parts += [
        (f"{path}.init_args", str(node["class_path"]), node.get("init_args") or {})
        for path, node in classes_in(take_switches(config)[1])
    ]
    for path, name, arguments in parts:
        try:
            cls = class_at(name)
        except (ImportError, AttributeError, ValueError) as error:
            where = f"{path.removesuffix('.init_args')}.class_path"
            raise ConfigurationError(f"{origin(where, layers)}: {where} {name!r} cannot be imported: {error}") from None
        valid = arguments_of(cls)
        for argument in arguments:
            if valid is not None and argument not in valid:
                field = f"{path}.{argument}"
                near = _elsewhere(str(argument), config, field) or nearest(str(argument), valid)
                raise ConfigurationError(f"{origin(field, layers)}: unknown field {field!r} of {name}; {near}")
        for argument, problem in outside(cls, arguments):
            field = f"{path}.{argument}"
            raise ConfigurationError(f"{origin(field, layers)}: {short_name(field)} {problem}")
