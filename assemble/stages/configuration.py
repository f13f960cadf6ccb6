"""The configuration stack: the YAML files of a run, in merge order.

A run is `paper` + `recipe` + `scale` + `hardware` + `seed` + overrides. Later layers win:

    configs/trainer.yaml
    configs/hardware/<hardware>.yaml
    configs/<paper>/base.yaml
    configs/<paper>/<recipe>.yaml        (after the recipes that it `extends`)
    configs/<paper>/<scale>.yaml         (none for the scale `paper`)
    configs/<paper>/rehearsal.yaml       (in a rehearsal)
    --config FILE, then --key value      from the command line

jsonargparse only checks the result: if it merged, a plan would import torch, and the old class's init arguments would
remain when a layer changes `class_path`.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from assemble.reporting.papers import SCALES, paper_named, project_root
from assemble.reporting.records import REHEARSED, short_name
from assemble.stages.signatures import arguments_of, fields_of, is_missing
from common.errors import ConfigurationError, nearest
from common.files import parse_yaml, read_yaml, stamp_of
from common.types import class_at

#: Keys of a YAML layer for the stack itself, not for LightningCLI.
#: `most_devices`: the most devices per node over which the recipe's groups of samples can be split.
STACK_KEYS = ("extends", "trains", "start_from", "ours", "most_devices")

#: Keys of a layer or the command line that apply to every model; see common/training/switches.py.
SWITCHES = ("compiled", "channels_last", "gradient_checkpointing", "batch_norm_group")

#: Keys of an overlay file; see `_overlay_layers`.
_OVERLAY_KEYS = ("all", "families", "sizes", "deviations")
#: Overlay that runs large recipes on tiny data; see assemble/stages/rehearse.py.
REHEARSAL = "rehearsal"
#: Fields that limit a training.
_LENGTHS = ("max_epochs", "max_steps", "limit_train_batches")
#: Files in configs/<paper>/ other than recipes.
_NO_RECIPES = frozenset({"base", REHEARSAL, *SCALES})


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML layer; cached, so do not change the result."""
    return _loaded(path, tuple(stamp_of(path)))


@functools.lru_cache(maxsize=512)
def _loaded(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    loaded = read_yaml(path, ConfigurationError)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigurationError(f"{path} must have a mapping at its top level, not {type(loaded).__name__}")
    return loaded


def merge(base: Any, layer: Any) -> Any:
    """Merge `layer` over `base` without changing either: mappings key by key, anything else replaces.

    Another `class_path` replaces its whole mapping, dropping the old class's init arguments. `name+` appends to `name`.
    """
    if not (isinstance(base, dict) and isinstance(layer, dict)):
        return layer
    if "class_path" in layer and layer["class_path"] != base.get("class_path"):
        return layer
    merged = dict(base)
    for key, value in layer.items():
        if isinstance(key, str) and key.endswith("+"):
            name = key[:-1]
            present = merged.get(name) or []
            merged[name] = [*present, *(value if isinstance(value, list) else [value])]
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def leaves(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """All (dotted path, value) pairs of a nested mapping; lists and empty mappings are leaves."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


@dataclass(frozen=True)
class Layer:
    """One part of the stack: its source and its settings."""

    name: str
    content: dict[str, Any]


@dataclass(frozen=True)
class RunConfiguration:
    """The merged configuration of one run.

    Attributes:
        layers: in merge order.
        config: mapping for LightningCLI; keeps the placeholders `$DATA` and `$RUN`, so it does not depend on paths.
        deviations: what the scale changes beyond sizes, each `{field, reason}`.
        trains: False for evaluation recipes that only test, such as the SVM.
        start_from: the parents' checkpoint to start from: `last` or the name of a kept one.
        ours: dotted fields whose values no source of the paper gives (key `ours` of a recipe or base).
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
        """The stack in one line, in merge order."""
        return " < ".join(layer.name for layer in self.layers)

    def values_of_ours(self) -> dict[str, str]:
        """Values of the fields in `ours` that are set; for a class, its name."""
        short = {short_name(path): str(value) for path, value in leaves(self.config)}
        short |= {
            path.removesuffix(".class_path"): value.rpartition(".")[2]
            for path, value in short.items()
            if path.endswith(".class_path")
        }
        return {name: short[name] for name in self.ours if name in short}

    def describe_ours(self) -> str:
        """`values_of_ours` in one line, `field=value, ...`; may be empty."""
        return ", ".join(f"{name}={value}" for name, value in self.values_of_ours().items())

    def with_placeholders(self, **values: str) -> dict[str, Any]:
        """The config with `$NAME` replaced; see `substitute`."""
        return substitute(self.config, {"SEED": str(self.config["seed_everything"]), **values})


def substitute(tree: Any, values: dict[str, str]) -> Any:
    """Replace `$NAME` in every string of a nested structure; a bare `$SEED` becomes an int."""
    if isinstance(tree, dict):
        return {key: substitute(value, values) for key, value in tree.items()}
    if isinstance(tree, list):
        return [substitute(value, values) for value in tree]
    if isinstance(tree, str) and "$" in tree:
        if tree == "$SEED":
            return int(values["SEED"])
        for name, value in values.items():
            tree = tree.replace(f"${name}", value)
    return tree


def recipes_of(paper: str) -> list[str]:
    """A paper's recipes: its YAML files except the base and the overlays."""
    folder = project_root() / "configs" / paper_named(paper).name
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in _NO_RECIPES)


def scales_of(paper: str) -> list[str]:
    """A paper's scales: `paper` and those with an overlay."""
    folder = project_root() / "configs" / paper_named(paper).name
    return [scale for scale in SCALES if scale == "paper" or (folder / f"{scale}.yaml").is_file()]


def recipe_layers(paper: str, recipe: str) -> list[Layer]:
    """The recipe's layer after those that it extends, oldest first."""
    folder = project_root() / "configs" / paper
    chain: list[Layer] = []
    name: str | None = recipe
    while name is not None:
        path = folder / f"{name}.yaml"
        if name in _NO_RECIPES or not path.is_file():
            where = f"recipe {recipe!r} extends" if chain else "there is no recipe"
            raise ConfigurationError(f"{where} {name!r} in configs/{paper}: {nearest(name, recipes_of(paper))}")
        content = load_yaml(path)
        layer = Layer(f"configs/{paper}/{name}.yaml", content)
        if any(other.name == layer.name for other in chain):
            raise ConfigurationError(f"configs/{paper}/{recipe}.yaml extends itself through {name!r}")
        chain.insert(0, layer)
        name = content.get("extends")
    return chain


def _overlay_layers(paper: str, recipe: str, name: str) -> tuple[list[Layer], list[dict[str, str]]]:
    """The overlay of a scale or of the rehearsal for one recipe, and its deviations.

    An overlay's keys: `all` (settings of every recipe), `families` (see `family_of`), `sizes` (fields that it may
    set: sizes, steps, data, learning rates) and `deviations` (other fields, a list of `{field, reason, families}`). A
    recipe without a family gets the settings of the nearest recipe that it extends.
    """
    if name == "paper":
        return [], []
    path = project_root() / "configs" / paper / f"{name}.yaml"
    overlay = load_yaml(path)
    for key in overlay:
        if key not in _OVERLAY_KEYS:
            raise ConfigurationError(f"{path}: unknown key {key!r}; {nearest(key, _OVERLAY_KEYS)}")
    families = overlay.get("families") or {}
    try:
        chain = (family_of(Path(layer.name).stem, families) for layer in reversed(recipe_layers(paper, recipe)))
        lineage = next((found for found in chain if found), [])
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    layers = [Layer(f"configs/{paper}/{name}.yaml", overlay.get("all") or {})]
    for family in lineage:
        settings = {key: value for key, value in families[family].items() if key not in ("recipes", "extends")}
        layers.append(Layer(f"configs/{paper}/{name}.yaml [{family}]", settings))
    deviations = [
        {"field": entry["field"], "reason": " ".join(str(entry["reason"]).split())}
        for entry in overlay.get("deviations") or []
        if "families" not in entry or not {*lineage}.isdisjoint(entry["families"])
    ]
    return layers, deviations


def family_of(recipe: str, families: dict[str, dict[str, Any]]) -> list[str]:
    """The overlay families whose `recipes` (shell patterns) or name match, after those they extend; may be empty."""
    found = [
        name for name, own in families.items() if any(fnmatchcase(recipe, one) for one in own.get("recipes", [name]))
    ]
    if len(found) > 1:
        raise ValueError(f"recipe {recipe!r} is in the families {' and '.join(found)}, but may only be in one")

    def lineage(name: str) -> list[str]:
        if name not in families:
            raise ValueError(f"unknown family {name!r}; {nearest(name, families)}")
        extended = families[name].get("extends", [])
        parents = [extended] if isinstance(extended, str) else extended
        return [*(one for parent in parents for one in lineage(parent)), name]

    return list(dict.fromkeys(one for name in found for one in lineage(name)))


def _reach(config: dict[str, Any], dotted: str) -> tuple[list[str], Any]:
    """The keys to a field, with `init_args` inserted below a class, as LightningCLI does; its value, or None."""
    path: list[str] = []
    node: Any = config
    for part in dotted.split("."):
        if isinstance(node, dict) and "class_path" in node and part not in {"class_path", "init_args", "dict_kwargs"}:
            path.append("init_args")
            node = node.get("init_args")
        path.append(part)
        node = node.get(part) if isinstance(node, dict) else None
    return path, node


def place(config: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A nested mapping that sets a field; without a `class_path` in it, merge() keeps the class."""
    for part in reversed(_reach(config, dotted)[0]):
        value = {part: value}
    return value


#: Package of the data sets.
_DATASETS = "common.data.datasets"


def _whole_dataset(config: dict[str, Any], key: str, value: Any) -> list[tuple[str, Any]]:
    """The fields that `--key value` sets; a short name of a data set sets several.

    `--data.dataset NAME` selects the class in `common/data/datasets/NAME.py` of the configured kind (clips, sounds or
    images), reads from the folder of `--data`, and removes the synthetic world.
    """
    node = _reach(config, key)[1]
    configured = str(node.get("class_path", "")) if isinstance(node, dict) else ""
    if not isinstance(value, str) or "." in value or not configured.startswith(f"{_DATASETS}."):
        return [(key, value)]
    try:
        module = importlib.import_module(f"{_DATASETS}.{value}")
    except ModuleNotFoundError:
        folder = Path(str(importlib.import_module(_DATASETS).__file__)).parent
        known = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("_") and path.stem != "base"]
        raise ConfigurationError(f"--{key} {value}: {nearest(value, known)}") from None
    kind = class_at(configured).streams[:1]
    fitting = [
        name
        for name, one in vars(module).items()
        if isinstance(one, type) and one.__module__ == module.__name__ and hasattr(one, "name")
        if not name.startswith("_") and one.streams[:1] == kind  # type: ignore[attr-defined]
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
                raise ConfigurationError(f"--{key} {value}: the value is {error}") from None
            if isinstance(parsed, str) and value.strip()[0] not in "'\"|>!&*":
                parsed = value.strip()  # YAML would cut `clips #2` at the comment sign
            overrides.append((key, parsed))
    return overrides, files


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
    """List the layers of a run, merge them in order, and check the result."""
    paper = paper_named(paper).name
    if scale not in scales_of(paper):
        raise ConfigurationError(f"there is no configs/{paper}/{scale}.yaml; {paper} has {', '.join(scales_of(paper))}")
    overlay, deviations = _overlay_layers(paper, recipe, scale)
    overrides, paths = parse_overrides(arguments)
    overrides.sort(key=lambda pair: short_name(pair[0]).count("."))  # set a class before its arguments
    flags = [short_name(key) for key, _ in overrides]
    given = [Layer(str(path), load_yaml(path)) for path in paths]
    _check_given([*given, *(Layer(f"--{key}", {key: value}) for key, value in overrides)], paper, seed)
    files = [
        Layer("configs/trainer.yaml", load_yaml(project_root() / "configs" / "trainer.yaml")),
        _hardware_layer(hardware),
        Layer(f"configs/{paper}/base.yaml", load_yaml(project_root() / "configs" / paper / "base.yaml")),
        *recipe_layers(paper, recipe),
        *overlay,
        *(_overlay_layers(paper, recipe, REHEARSAL)[0] if rehearsal else ()),
    ]
    config, layers = _fold(
        *files,
        _limit_devices,
        *_field_layers("tables.yaml", (stage_overrides or {}).items(), flags),
        *given,
        *_field_layers("command line", overrides, flags),
    )
    if "data.dataset.root" in flags and _reach(config, "data.world")[1]:
        raise ConfigurationError(
            "--data.dataset.root is not read, since data.world makes the data: add --data.dataset or --data.world null"
        )
    ours: Any = config.get("ours") or ()
    if not isinstance(ours, list | tuple):
        raise ConfigurationError(f"{origin('ours', layers)}: 'ours' must be a list of fields, got {ours!r}")
    trains, start_from = bool(config.get("trains", True)), str(config.get("start_from", "last"))
    switches = _switches_of(config, layers[len(files) :])
    config = copy.deepcopy({key: value for key, value in config.items() if key not in (*STACK_KEYS, *SWITCHES)})
    config["seed_everything"] = seed
    check_keys(config, layers)
    _check_lengths(layer for layer in layers[len(files) :] if not layer.name.startswith("tables.yaml"))
    if {"strategy": "ddp", "devices": 1, "num_nodes": 1}.items() <= config["trainer"].items():
        # With one device, DDP would leave its addresses in the environment, and the next stage couldn't start ranks.
        config["trainer"]["strategy"] = "auto"
    if switches:
        config = merge(config, {"model": {"init_args": switches}})
    check_names(take_switches(config)[1], layers)
    if rehearsal:
        published = resolve(
            paper, recipe, scale=scale, hardware=hardware, seed=seed, stage_overrides=stage_overrides,
            arguments=arguments,
        )  # fmt: skip
        deviations += _changes(published.config, config)
    return RunConfiguration(
        paper=paper,
        recipe=recipe,
        scale=scale,
        layers=tuple(layers),
        config=config,
        deviations=tuple(deviations),
        trains=trains,
        start_from=start_from,
        ours=tuple(ours),
    )


def _fold(*steps: Layer | Callable[[dict[str, Any]], Iterable[Layer]]) -> tuple[dict[str, Any], list[Layer]]:
    """Merge layers in order; a function makes layers that depend on what was merged before."""
    config: dict[str, Any] = {}
    layers: list[Layer] = []
    for step in steps:
        for layer in [step] if isinstance(step, Layer) else step(config):
            layers.append(layer)
            config = merge(config, layer.content)
    return config, layers


def _hardware_layer(hardware: str) -> Layer:
    folder = project_root() / "configs" / "hardware"
    machines = [path.stem for path in folder.glob("*.yaml")]
    if hardware not in machines:
        raise ConfigurationError(f"there is no configs/hardware/{hardware}.yaml; {nearest(hardware, machines)}")
    return Layer(f"configs/hardware/{hardware}.yaml", load_yaml(folder / f"{hardware}.yaml"))


def _limit_devices(config: dict[str, Any]) -> Iterator[Layer]:
    most, devices = config.get("most_devices"), (config.get("trainer") or {}).get("devices")
    if most is not None and isinstance(devices, int) and devices > most:
        yield Layer(f"most_devices {most}", {"trainer": {"devices": most}})


def _check_given(layers: Iterable[Layer], paper: str, seed: int) -> None:
    """Refuse keys that the user's files and flags cannot set."""
    for layer in layers:
        if layer.name == "--seed_everything":
            raise ConfigurationError("use --seed, which also names the run's folder, instead of --seed_everything")
        for key in ("extends", "most_devices"):
            if key in layer.content:
                raise ConfigurationError(f"{layer.name}: {key} only works in a recipe, configs/{paper}/<recipe>.yaml")
        if layer.content.get("seed_everything", seed) != seed:
            raise ConfigurationError(f"{layer.name}: seed_everything is not the seed of this run, {seed}; set --seed")


def _check_lengths(layers: Iterable[Layer]) -> None:
    for layer in layers:
        limits = layer.content.get("trainer")
        if isinstance(limits, dict) and 0 in map(limits.get, _LENGTHS):
            raise ConfigurationError(
                f"{layer.name}: a stage that trains no step would record random weights; trainer.max_epochs, max_steps "
                "and limit_train_batches must be above 0"
            )


#: A function that makes the layers of one field.
FieldLayers = Callable[[dict[str, Any]], Iterator[Layer]]


def _field_layers(name: str, fields: Iterable[tuple[str, Any]], flags: Sequence[str]) -> list[FieldLayers]:
    """A function per field; with separate `flags` for its arguments a text is a class, as in LightningCLI."""

    def layers(key: str, value: Any, config: dict[str, Any]) -> Iterator[Layer]:
        for field, stated in _whole_dataset(config, key, value):
            if isinstance(stated, str) and any(flag.startswith(f"{short_name(field)}.") for flag in flags):
                stated = {"class_path": stated}
            yield Layer(f"{name} {field}", place(config, field, stated))

    return [functools.partial(layers, key, value) for key, value in fields]


def _switches_of(config: dict[str, Any], layers: Iterable[Layer]) -> dict[str, Any]:
    """The switches of a configuration; layers of stages and users may state them among the model's arguments, too."""
    switches = {name: config[name] for name in SWITCHES if name in config}
    for layer in layers:
        model = layer.content.get("model")
        arguments = (model.get("init_args") or {}) if isinstance(model, dict) else {}
        stated = {**arguments, **layer.content}
        switches |= {name: stated[name] for name in SWITCHES if name in stated}
    return switches


def _changes(published: dict[str, Any], rehearsed: dict[str, Any]) -> list[dict[str, str]]:
    before, after = dict(leaves(published)), dict(leaves(rehearsed))
    return [
        {"field": field, "reason": f"{REHEARSED}{before.get(field, 'not set')} -> {after.get(field, 'not set')}"}
        for field in sorted({**before, **after})
        if before.get(field, ...) != after.get(field, ...)
    ]


_TOP_LEVEL = ("seed_everything", "trainer", "model", "data")
#: Flags of `fit` beside the configuration, which may be misspelled.
_FLAGS = ("scale", "hardware", "seed", "isa", "runs", "unless_done", "print_config", "config")


def _elsewhere(name: str, config: dict[str, Any], given: str = "") -> str:
    """Hint where a misplaced field belongs; may be empty."""
    places = [path for path, _ in leaves(config) if path.rpartition(".")[2] == name and path not in (name, given)]
    found = [f"--{short_name(path)}" for path in places[:3]]
    return f"did you mean {' or '.join(found)}?" if found else ""


def check_keys(config: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Refuse unknown top-level keys and bare values; names the layer and the nearest valid key."""
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


def take_switches(config: dict[str, Any]) -> tuple[dict[str, bool | str | int | None], dict[str, Any]]:
    """The switches of a merged configuration, and the configuration without them."""
    arguments = (config.get("model") or {}).get("init_args") or {}
    switches = {name: arguments[name] for name in SWITCHES if name in arguments}
    if not switches:
        return {}, config
    for name, value in switches.items():
        if name == "batch_norm_group":
            fits = value is None or (type(value) is int and value >= 2)
        else:
            fits = isinstance(value, bool) or (name == "compiled" and isinstance(value, str))
        if not fits:
            raise ConfigurationError(
                f"{name} is {value!r}; it must be true or false, the name of a backend (compiled), or 2 or more "
                "samples, or null (batch_norm_group)"
            )
    without = {name: value for name, value in arguments.items() if name not in switches}
    return switches, {**config, "model": {**config["model"], "init_args": without}}


def classes_in(node: Any, path: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    """Every mapping that names a class, with its dotted path."""
    if isinstance(node, dict):
        if "." in str(node.get("class_path", "")):  # LightningCLI resolves short names
            yield path, node
        for key, value in node.items():
            yield from classes_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from classes_in(value, f"{path}.{position}")


def check_names(config: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Refuse unknown classes and arguments, without importing anything."""
    given = [("trainer", "lightning.pytorch.Trainer", config.get("trainer") or {})]
    given += [
        (f"{p}.init_args", str(node["class_path"]), node.get("init_args") or {}) for p, node in classes_in(config)
    ]
    for path, cls, arguments in given:
        if is_missing(cls):
            where = f"{path.removesuffix('.init_args')}.class_path"
            raise ConfigurationError(f"{origin(where, layers)}: {where} {cls!r} does not exist")
        valid = arguments_of(cls)
        if valid is None or not isinstance(arguments, dict):
            continue
        for argument in map(str, arguments):
            if argument not in valid:
                field = f"{path}.{argument}"
                near = _elsewhere(argument, config, field) or nearest(argument, valid)
                raise ConfigurationError(f"{origin(field, layers)}: unknown field {field!r} of {cls}; {near}")
        for argument, fields in fields_of(cls).items():
            stated = arguments.get(argument)
            for name in stated if isinstance(stated, dict) and "class_path" not in stated else ():
                if name not in fields:
                    field = f"{path}.{argument}.{name}"
                    raise ConfigurationError(
                        f"{origin(field, layers)}: unknown field {field!r}; {nearest(str(name), fields)}"
                    )


def check_ranges(config: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Refuse classes that cannot be imported, and arguments out of range."""
    from common.types import outside

    for path, node in classes_in(take_switches(config)[1]):
        try:
            cls = class_at(node["class_path"])
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(
                f"{origin(path, layers)}: {path}.class_path {node['class_path']!r} cannot be imported: {error}"
            ) from None
        for argument, value, problem in outside(cls, node.get("init_args") or {}) if isinstance(cls, type) else ():
            if value != "$SEED":
                field = f"{path}.init_args.{argument}"
                raise ConfigurationError(
                    f"{short_name(field)} is {value!r}: {problem} (set in: {origin(field, layers)})"
                )


def origin(dotted: str, layers: Sequence[Layer]) -> str:
    """The last layer that sets a dotted path, or adds to it."""
    for layer in reversed(layers):
        node: Any = layer.content
        for part in dotted.split("."):
            if isinstance(node, list) and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            elif isinstance(node, dict) and (part in node or f"{part}+" in node):
                node = node.get(part, node.get(f"{part}+"))
            else:
                break
        else:
            return layer.name
    switch = dotted.removeprefix("model.init_args.")
    return origin(switch, layers) if switch in SWITCHES and switch != dotted else "configuration"
