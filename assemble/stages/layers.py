"""Read and merge the YAML layers of a configuration, and find fields in them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from common.files import read_yaml, stamp_of

#: Keys of a layer or the command line that apply to every model; see common/training/switches.py.
SWITCHES = ("compiled", "channels_last", "gradient_checkpointing", "batch_norm_group", "checkpoint_minutes")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file. The result is cached, so don't change it."""
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
    """Return `base` with `layer` merged over it. Mappings merge key by key; other values are replaced.

    A new `class_path` replaces the whole mapping, including the old class's arguments. The key `name+` appends to the
    list `name`.
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
    """Yield the (dotted path, value) pairs of a nested mapping. Lists and empty mappings are values."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


@dataclass(frozen=True)
class Layer:
    """One layer of the configuration: its source and its settings."""

    name: str
    content: dict[str, Any]


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


def reach(config: dict[str, Any], dotted: str) -> tuple[list[str], Any]:
    """Return the keys that lead to a field, and the field's value or None. Like LightningCLI, insert `init_args`."""
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
    """Return a nested mapping that sets a field. The mapping omits `class_path`, so that `merge` keeps the class."""
    for part in reversed(reach(config, dotted)[0]):
        value = {part: value}
    return value


def classes_in(node: Any, path: str = "") -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield every mapping that names a class, with its dotted path."""
    if isinstance(node, dict):
        if "." in str(node.get("class_path", "")):  # skip short names, which LightningCLI resolves
            yield path, node
        for key, value in node.items():
            yield from classes_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from classes_in(value, f"{path}.{position}")


def origin(dotted: str, layers: Sequence[Layer]) -> str:
    """Name the last configuration layer that sets a dotted path or appends to its list."""
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
