"""One lock for all systems: complete, hashed, and what pyproject.toml asks for. None of it needs a network."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.sources import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
#: A requirement for each of its lines, and the hashes below it.
ENTRIES = {
    Requirement(entry.partition(" \\\n")[0]): re.findall(r"--hash=(\S+)", entry)
    for entry in re.split(r"\n(?=\S)", LOCK.strip())
}
#: `sys_platform`, `platform_system` and `platform_machine`.
SYSTEMS = {
    "Linux, x86-64": ("linux", "Linux", "x86_64"),
    "Linux, ARM": ("linux", "Linux", "aarch64"),
    "macOS": ("darwin", "Darwin", "arm64"),
}
PYTHONS = ("3.11", "3.12", "3.13")
#: The extras that `make setup` installs.
EXTRAS = ("dev", "features", "wandb-reports")


def pinned(environment: dict[str, str]) -> dict[str, str]:
    """Versions by name that a machine gets."""
    found: dict[str, str] = {}
    for entry in ENTRIES:
        if entry.marker is None or entry.marker.evaluate(environment):
            (version,) = entry.specifier
            assert version.operator == "=="
            assert entry.name not in found, f"{entry.name} stands twice for one machine"
            found[canonicalize_name(entry.name)] = version.version
    return found


def on(system: str, python: str) -> dict[str, str]:
    machine = dict(zip(("sys_platform", "platform_system", "platform_machine"), SYSTEMS[system], strict=True))
    version = {"python_version": python, "python_full_version": f"{python}.0", "os_name": "posix"}
    return {**default_environment(), **machine, **version}


def test_every_entry_has_hashes_and_none_names_a_place() -> None:
    assert len(ENTRIES) > 100
    for entry, hashes in ENTRIES.items():
        assert hashes, f"{entry.name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes)
    assert "://" not in LOCK
    assert " @ " not in LOCK


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_gets_what_the_project_asks_for(system: str, python: str) -> None:
    found = pinned(on(system, python))
    optional = [text for extra in EXTRAS for text in PROJECT["optional-dependencies"][extra]]
    for requirement in map(Requirement, (*PROJECT["dependencies"], *optional)):
        name = canonicalize_name(requirement.name)
        assert name in found, f"{name} is not locked: make lock"
        assert requirement.specifier.contains(found[name], prereleases=True), f"{requirement}, locked {found[name]}"
    cuda = {name for name in found if name.startswith(("nvidia-", "cuda-"))}
    assert bool(cuda) == system.startswith("Linux")
