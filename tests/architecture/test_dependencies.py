"""Check that all declared dependencies import together, and that every import is declared."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from importlib import metadata

from tests.architecture.sources import ROOT, file_of, imports, modules

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub", "lightning-utilities": "lightning_utilities",
    "pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml",
}  # fmt: skip


def names_of(requirements: list[str]) -> list[str]:
    return [re.split(r"[\[<>=~! ]", requirement)[0] for requirement in requirements]


def test_all_declared_dependencies_import() -> None:
    names = names_of(PROJECT["dependencies"])
    assert len(names) > 10
    for name in names:
        importlib.import_module(IMPORT_NAMES.get(name, name))


def test_every_import_is_declared() -> None:
    optional = [requirement for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    declared = {name.lower().replace("_", "-") for name in names_of([*PROJECT["dependencies"], *optional])}
    distributions = metadata.packages_distributions()
    own = {"assemble", "common", "papers", *sys.stdlib_module_names}
    missing = set()
    for module in modules():
        for imported, _ in imports(module):
            top = imported.partition(".")[0]
            offered = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
            if top not in own and not offered & declared:
                missing.add(f"{file_of(module)} imports {top}")
    assert not missing, "not in pyproject.toml: " + ", ".join(sorted(missing))
