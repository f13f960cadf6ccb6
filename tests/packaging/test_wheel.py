"""Check that the wheel has all files that the commands read. It is built from a copy and used outside any checkout.

The tests unpack the wheel instead of installing it, which works without a network. Python can't tell the difference.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

import common
from assemble.stages.configuration import resolve
from assemble.stages.request import fingerprint
from tests.architecture.sources import ROOT
from tests.machine import LONG

SHIPPED = ("assemble", "common", "configs", "papers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tree, with the installed setuptools."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SHIPPED:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "representation_assemble.py"):
        shutil.copy(ROOT / name, source)
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(output)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=source, capture_output=True, text=True, timeout=LONG, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel into a folder on Python's path."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a user's folder that contains nothing of this project."""
    return tmp_path_factory.mktemp("away")


def python(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("ASSEMBLE_ROOT", "ASSEMBLE_DATA")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(site), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )


def assemble(site: Path, folder: Path, *commands: str, after: str = "") -> str:
    """Run commands and then a line of code in one process, and return the output."""
    program = (
        f"from assemble.commands.main import main\nfor line in {commands}: assert main(line.split()) == 0\n{after}"
    )
    done = python(site, folder, "-c", program)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    missing = [
        path.relative_to(ROOT).as_posix()
        for name in SHIPPED
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and path.relative_to(ROOT).as_posix() not in held
    ]
    assert not missing
    kept = {name.split("/")[0] for name in held if ".dist-info" not in name}
    assert kept == {*SHIPPED, "representation_assemble.py"}


def test_the_version_and_the_command_are_those_of_the_package(site: Path, away: Path) -> None:
    (info,) = site.glob("*.dist-info")
    assert f"\nVersion: {common.__version__}\n" in (info / "METADATA").read_text(encoding="utf-8")
    done = python(site, away, "-m", "assemble", "--version")
    assert done.stdout == f"assemble {common.__version__}\n"
    entries = ConfigParser()
    entries.read(info / "entry_points.txt")
    module, _, function = entries["console_scripts"]["assemble"].partition(":")
    assert callable(getattr(import_module(module), function))


def test_commands_that_do_not_train_work_without_a_checkout_and_torch(site: Path, away: Path) -> None:
    """Check also that a stage has the same code hashes as in a checkout."""
    about = "from assemble.stages.request import fingerprint; from assemble.stages.configuration import resolve; "
    about += "import json, sys; print(json.dumps(fingerprint(resolve('avid', 'cma')))); "
    about += "assert not {'torch', 'lightning'} & sys.modules.keys()"
    printed = assemble(site, away, "list avid", "tables avid", "claims avid", "report avid", after=about)
    assert json.loads(printed.splitlines()[-1]) == fingerprint(resolve("avid", "cma"))
    for expected in ("ucf101_fine_tune", "Transfer after pre-training on Kinetics", "holds"):
        assert expected in printed
    page = (away / "runs" / "report.html").read_text(encoding="utf-8")
    assert "Transfer after pre-training on Kinetics" in page
    assert not (site / "runs").exists()


def test_what_writes_into_the_repository_asks_for_a_checkout(site: Path, away: Path) -> None:
    done = python(site, away, "-m", "assemble", "promote", "avid")
    assert done.returncode == 2
    assert "ASSEMBLE_ROOT" in done.stderr


def test_training_export_and_use_work_without_a_checkout(site: Path, away: Path) -> None:
    run = away / "runs" / "avid_cma" / "smoke" / "seed0" / "avid"
    export = f"export avid --checkpoint {run / 'checkpoints' / 'last.ckpt'} --output avid"
    use = "from papers.avid_cma import AVID; print(AVID.from_export('avid').training, AVID.__module__)"
    printed = assemble(site, away, "plan avid", "fit avid/avid --scale smoke", export, after=use)
    assert "ucf_1@avid_cma" in printed
    assert printed.endswith("\nFalse papers.avid_cma.use\n")
    assert '"revision": null' in (run / "record.json").read_text(encoding="utf-8")


def test_packages_below_one_of_the_user_and_a_folder_of_configurations_do_not_collide(
    site: Path, tmp_path: Path
) -> None:
    for name in ("mine/__init__.py", "mine/common/__init__.py", "mine/papers/__init__.py", "configs/mine.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    done = python(site, tmp_path, "-c", "import mine.common, mine.papers; from papers.avid_cma import loss")
    assert done.returncode == 0, done.stderr
    assert "avid_cma" in assemble(site, tmp_path, "list avid")


@pytest.mark.parametrize("name", ["common/__init__.py", "common.py", "papers/__init__.py"])
def test_a_foreign_package_beside_a_script_is_named(site: Path, tmp_path: Path, name: str) -> None:
    foreign = tmp_path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("")
    taken = name.split("/")[0].removesuffix(".py")
    if taken == "common":
        done = python(site, tmp_path, "-c", "from papers.avid_cma import AVID")
        assert done.returncode == 1
        assert f"ImportError: `import common` finds {foreign}" in done.stderr
    # If a user's folder of the same name comes first on the path, the command says so in one line.
    command = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from representation_assemble import main; sys.exit(main())"
    )
    done = python(site, site.parent, "-c", command, str(tmp_path), "list")
    assert done.returncode == 2
    assert done.stderr.startswith(f"assemble: `import {taken}` finds {foreign}, ")
    assert len(done.stderr.splitlines()) == 1
    done = python(site, site.parent, "-c", command, str(site), "--version")
    assert done.stdout == f"assemble {common.__version__}\n"
