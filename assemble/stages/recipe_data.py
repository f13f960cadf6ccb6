"""Find the data sets and files that recipes read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assemble.reporting.tables import load
from assemble.stages.configuration import resolve
from assemble.stages.layers import classes_in, substitute
from assemble.stages.recipes import recipes_of
from common.types import class_at

if TYPE_CHECKING:
    from common.data.datasets.base import MediaDataset
    from common.data.overview import FileStatus


def dataset_entries(section: object) -> list[dict[str, Any]]:
    """Return every mapping that names a data set."""
    return [node for _, node in classes_in(section) if node["class_path"].startswith("common.data.datasets.")]


def entries_read(section: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the data sets that a data section reads: none for a synthetic world, and only the used ones of `sets`."""
    arguments = section.get("init_args") or {}
    if arguments.get("world") is not None:
        return []
    if isinstance(sets := arguments.get("sets"), dict):
        used = {*(arguments.get("train_sets") or ()), *(arguments.get("test_sets") or ())}
        arguments = {**arguments, "sets": {name: dataset for name, dataset in sets.items() if name in used}}
    return dataset_entries(arguments)


def dataset_of(entry: dict[str, Any], data: Path) -> MediaDataset:
    """Build the data set that a mapping names, in the folder `data`, without the clips' minimum length.

    To check this length, a listing would open every file.
    """
    substituted = substitute(entry, {"DATA": str(data)})
    arguments = {n: value for n, value in (substituted.get("init_args") or {}).items() if n != "common_seconds"}
    dataset: MediaDataset = class_at(substituted["class_path"])(**arguments)
    return dataset


def datasets_of(paper: str, data: Path) -> list[MediaDataset]:
    """Return the distinct data sets of a paper's published recipes."""
    configs = [resolve(paper, recipe, scale="paper").config for recipe in _published_recipes(paper)]
    datasets = [dataset_of(entry, data) for config in configs for entry in dataset_entries(config.get("data"))]
    return [*{f"{type(dataset)} {vars(dataset)}": dataset for dataset in datasets}.values()]


def files_of(paper: str, data: Path) -> list[FileStatus]:
    """List the files and folders, except data sets, that a paper's recipes read at the scale `paper`."""
    from common.data.overview import look_at

    recipes: dict[str, list[str]] = {}
    for recipe in _published_recipes(paper):
        for path in files_in(resolve(paper, recipe, scale="paper").config):
            recipes.setdefault(path, []).append(recipe)
    return [look_at(path, data, tuple(names)) for path, names in sorted(recipes.items())]


def files_in(config: dict[str, Any]) -> list[str]:
    """List the files and folders, except data sets, that a configuration names. Omit `$DATA/` from their paths."""
    # Skip folders of data sets, but list files that choose a part of one.
    entries = dataset_entries(config.get("data"))
    roots = {path for entry in entries for path in _data_paths(entry) if not Path(path).suffix}
    weights = re.findall(r'"\w*(?:pretrained|warm_start|statistics|checkpoint)": "([^"$]+)"', json.dumps(config))
    return [path for path in dict.fromkeys([*_data_paths(config), *weights]) if path not in roots]


def _published_recipes(paper: str) -> list[str]:
    """List a paper's recipes, except those that its tables use only below paper scale."""
    stages = load(paper).stages.values()
    miniature = {stage.recipe for stage in stages} - {stage.recipe for stage in stages if "paper" in stage.scales}
    return [recipe for recipe in recipes_of(paper) if recipe not in miniature]


def _data_paths(section: object) -> list[str]:
    """List every path below `$DATA/` in a section, relative to that folder."""
    return re.findall(r'"\$DATA/([^"]+)"', json.dumps(section, default=str))


def data_sections(paper: str, root: Path) -> list[dict[str, Any]]:
    """Return the section `data` of each of a paper's recipes at the scale `paper`, with the data in `root`."""
    runs = (resolve(paper, recipe, scale="paper") for recipe in recipes_of(paper))
    return [run.with_placeholders(DATA=str(root), RUN="").get("data") or {} for run in runs]
