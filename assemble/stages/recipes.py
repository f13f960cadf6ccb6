"""Read recipes, and the overlays of scales and rehearsals."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from assemble.reporting.papers import SCALES, paper_named, project_root
from assemble.stages.layers import Layer, load_yaml
from common.errors import ConfigurationError, nearest

#: Overlay that runs large recipes on tiny data; see assemble/stages/rehearse.py.
REHEARSAL = "rehearsal"
#: Keys of an overlay file; see `overlay_layers`.
_OVERLAY_KEYS = ("all", "families", "sizes", "deviations")
#: Files in configs/<paper>/ other than recipes.
_NO_RECIPES = frozenset({"base", REHEARSAL, *SCALES})


def recipes_of(paper: str) -> list[str]:
    """List a paper's recipes: its YAML files except the base and the overlays."""
    folder = project_root() / "configs" / paper_named(paper).name
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in _NO_RECIPES)


def scales_of(paper: str) -> list[str]:
    """List a paper's scales: `paper` and those with an overlay."""
    folder = project_root() / "configs" / paper_named(paper).name
    return [scale for scale in SCALES if scale == "paper" or (folder / f"{scale}.yaml").is_file()]


def recipe_layers(paper: str, recipe: str) -> list[Layer]:
    """Return the configuration layers of the recipes that a recipe extends, base first, then the recipe's layer."""
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
        if any(earlier.name == layer.name for earlier in chain):
            raise ConfigurationError(f"configs/{paper}/{recipe}.yaml extends itself through {name!r}")
        chain.insert(0, layer)
        name = content.get("extends")
    return chain


def overlay_layers(paper: str, recipe: str, name: str) -> tuple[list[Layer], list[dict[str, str]]]:
    """Return the overlay of a scale or of the rehearsal for one recipe, and its deviations.

    An overlay's keys: `all` (settings of every recipe), `families` (see `family_of`), `sizes` (fields that the overlay
    may set: sizes, steps, data, learning rates) and `deviations` (other fields: `{field, reason, families}` each). A
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
        lineage = next(filter(None, chain), [])
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
    """Return the overlay family that fits a recipe, after the families that it extends.

    A family fits if one of its `recipes` (shell patterns; by default, its name) matches the recipe's name.
    """
    fitting = [
        name
        for name, settings in families.items()
        if any(fnmatchcase(recipe, pattern) for pattern in settings.get("recipes", [name]))
    ]
    if len(fitting) > 1:
        raise ValueError(f"recipe {recipe!r} is in the families {' and '.join(fitting)}, but may only be in one")

    def lineage(name: str) -> list[str]:
        if name not in families:
            raise ValueError(f"unknown family {name!r}; {nearest(name, families)}")
        extended = families[name].get("extends", [])
        parents = [extended] if isinstance(extended, str) else extended
        return [*(ancestor for parent in parents for ancestor in lineage(parent)), name]

    return list(dict.fromkeys(ancestor for name in fitting for ancestor in lineage(name)))


def hardware_layer(hardware: str) -> Layer:
    folder = project_root() / "configs" / "hardware"
    machines = [path.stem for path in folder.glob("*.yaml")]
    if hardware not in machines:
        raise ConfigurationError(f"there is no configs/hardware/{hardware}.yaml; {nearest(hardware, machines)}")
    return Layer(f"configs/hardware/{hardware}.yaml", load_yaml(folder / f"{hardware}.yaml"))


def limit_devices(config: dict[str, Any]) -> Iterator[Layer]:
    most, devices = config.get("most_devices"), (config.get("trainer") or {}).get("devices")
    if most is not None and isinstance(devices, int) and devices > most:
        yield Layer(f"most_devices {most}", {"trainer": {"devices": most}})
