"""Check that the lock covers all systems with hashes, and that `make setup` picks PyTorch's builds offline."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.sources import ROOT
from tests.machine import LONG

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
#: Each requirement in the lock, with the hashes below the requirement.
ENTRIES = {
    Requirement(entry.partition(" \\\n")[0]): re.findall(r"--hash=(\S+)", entry)
    for entry in re.split(r"\n(?=\S)", LOCK.strip())
}
#: The values of `sys_platform`, `platform_system` and `platform_machine`.
SYSTEMS = {
    "Linux, x86-64": ("linux", "Linux", "x86_64"),
    "Linux, ARM": ("linux", "Linux", "aarch64"),
    "macOS": ("darwin", "Darwin", "arm64"),
}
PYTHONS = ("3.11", "3.12", "3.13")
#: The extras that `make setup` installs.
EXTRAS = ("dev", "features", "wandb-reports")


def pinned(environment: dict[str, str]) -> dict[str, str]:
    """Return the version of each package that a machine gets."""
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


def wheel(folder: Path, name: str, version: str) -> str:
    """Write an empty package into an index in a folder, and return the package's line in the lock."""
    place = folder / name / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    place.parent.mkdir(parents=True)
    about = f"{place.name.removesuffix('-py3-none-any.whl')}.dist-info"
    with zipfile.ZipFile(place, "w") as archive:
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    (place.parent / "index.html").write_text(f'<a href="{place.name}">{place.name}</a>', encoding="utf-8")
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(place.read_bytes()).hexdigest()}\n"


BACKEND = """\
import zipfile
def build_editable(folder, *_):
    name = "suite-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as archive:
        archive.writestr("suite-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: suite\\nVersion: 1\\n")
        archive.writestr("suite-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr("suite-1.dist-info/RECORD", "")
    return name
"""
CUDA = {"torch": "2.14.1", "torchaudio": "2.11.0", "torchvision": "0.29.2", "nvidia-cublas": "13", "numpy": "2"}
CPU = {"torch": "2.14.1+cpu", "torchaudio": "2.11.0+cpu", "torchvision": "0.29.2+cpu", "numpy": "2"}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Make a clone with the Makefile, a lock of empty packages and indexes in folders, and no NVIDIA driver on PATH."""
    uv = shutil.which("uv") or ROOT / ".uv/bin/uv"
    if not Path(uv).is_file():
        pytest.skip("needs uv, which `make setup` installs into .uv")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").symlink_to(uv)
    for tool in ("awk", "bash", "env", "grep", "ls", "make", "sort", "touch", "uname"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    entries = [wheel(tmp_path / "packages", name, version) for name, version in CUDA.items()]
    (tmp_path / "requirements.lock").write_text("".join(entries), encoding="utf-8")
    locked = [wheel(tmp_path / "cpu", name, version) for name, version in CPU.items() if name != "numpy"]
    (tmp_path / "requirements-cpu.lock").write_text("".join(locked), encoding="utf-8")
    (tmp_path / "backend.py").write_text(BACKEND, encoding="utf-8")
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (tmp_path / "pyproject.toml").write_text(f'{system}[project]\nname = "suite"\nversion = "1"\n', encoding="utf-8")
    return tmp_path


def setup(clone: Path, *variables: str) -> tuple[str, dict[str, str]]:
    """Run `make setup`, and return its output and the installed versions."""
    places = {"UV_DEFAULT_INDEX": (clone / "packages").as_uri(), "UV_CACHE_DIR": str(clone / "cache")}
    done = subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}", f"TORCH_INDEX={(clone / 'cpu').as_uri()}", *variables],
        cwd=clone,
        env={"PATH": str(clone / "bin"), "HOME": str(clone), **places},
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    packages = (clone / ".venv/lib").glob("python*/site-packages/*.dist-info")
    installed = dict(folder.stem.split("-") for folder in packages)
    assert installed.pop("suite") == "1"
    return done.stdout + done.stderr, {name.replace("_", "-"): version for name, version in installed.items()}


def test_without_an_nvidia_device_setup_installs_cpu_builds(clone: Path) -> None:
    printed, installed = setup(clone)
    assert installed == CPU
    assert "CPU builds" in printed
    assert "TORCH=cuda make setup" in printed


def test_with_an_nvidia_device_on_a_cluster_or_on_request_setup_installs_the_lock(clone: Path) -> None:
    for name, script in (("nvidia-smi", "echo GPU 0: H100"), ("sbatch", "")):
        (clone / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
        (clone / "bin" / name).chmod(0o755)
        printed, installed = setup(clone)
        assert installed == CUDA
        assert "TORCH=cpu make setup" in printed
        (clone / "bin" / name).unlink()
        shutil.rmtree(clone / ".venv")
    assert setup(clone, "TORCH=cuda")[1] == CUDA


@pytest.mark.parametrize("fault", ["no index", "another hash"])
def test_setup_falls_back_to_the_lock_and_says_so(clone: Path, fault: str) -> None:
    if fault == "no index":
        shutil.rmtree(clone / "cpu")
    else:
        lock = clone / "requirements-cpu.lock"
        lock.write_text(re.sub("sha256:.*", f"sha256:{'0' * 64}", lock.read_text("utf-8")), encoding="utf-8")
    printed, installed = setup(clone)
    assert installed == CUDA
    assert "gave no CPU builds, so requirements.lock is installed" in printed


def test_the_cpu_builds_are_those_of_the_lock() -> None:
    lines = (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.split(" ")[0].replace("+cpu", "") for line in lines if not line.startswith(" ")]
    assert pins == re.findall(r"^torch(?:audio|vision)?==[^ ]+", LOCK, re.MULTILINE)
