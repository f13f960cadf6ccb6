"""Every declared dependency imports in one process, beside all the others."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORT_NAMES = {"pillow": "PIL", "scikit-learn": "sklearn", "pyyaml": "yaml", "wandb-workspaces": "wandb_workspaces"}


def test_all_declared_dependencies_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(r"[\[<>=~! ]", requirement)[0] for requirement in project["dependencies"]]
    assert len(names) > 10
    for name in names:
        importlib.import_module(IMPORT_NAMES.get(name, name))


def test_lock_pins_every_dependency_and_names_no_index() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pinned = {line.split("==")[0].lower() for line in lock.splitlines() if "==" in line}
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in declared:
        assert re.split(r"[\[<>=~! ]", requirement)[0].lower() in pinned
    assert "://" not in lock
    assert "--index" not in lock
