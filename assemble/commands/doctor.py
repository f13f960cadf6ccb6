"""The command `assemble doctor`: checks this machine."""

from __future__ import annotations

import importlib
import platform
import re
import shutil
from pathlib import Path
from typing import Annotated

from assemble.commands.data import data_root
from assemble.commands.find import print_rows
from assemble.reporting.papers import checkout, existing_papers, working_folder
from common import files

#: Packages with compiled parts; importing them shows whether their versions fit together.
COMPILED = ("numpy", "torch", "torchvision", "torchaudio", "av")
#: Developers' extras, which `doctor` doesn't check.
DEVELOPING = ("dev", "docs", "bench", "mutation", "actions")
_NO_GPU = "none found: the scales smoke and mini run on the CPU (with an NVIDIA GPU: make clean; make setup TORCH=cuda)"


def doctor(
    *, data: Annotated[Path | None, "folder of the data sets; default: $ASSEMBLE_DATA, else data"] = None
) -> int:
    """Check this machine's devices, keys, packages and data sets.

    Exits with 1 if a required package is missing.
    """
    from assemble.reporting import records
    from assemble.reporting.wandb_server import server, why_no_key

    needed, *extras = _requirements().items()
    versions = {name: _version(name) for name in needed[1]}
    missing = [name for name, version in versions.items() if isinstance(version, Exception)]
    machine = records.hardware()
    gpus = [] if "torch" in missing else _gpus()
    free = shutil.disk_usage(working_folder()).free / 2**30
    reason = why_no_key()
    git = records.git_state(checkout())
    rows = [
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB memory"),
        *(("gpu", name) for name in gpus or [_NO_GPU]),
        ("disk", f"{free:.0f} GiB free at {working_folder()}"),
        ("cache", f"{files.cache_folder()} (set ASSEMBLE_CACHE to move it)"),
        ("W&B key", f"{reason}: runs are logged offline" if reason else f"present for {server()}"),
        ("revision", (git["revision"] or "unknown")[:12] + " with changes" * bool(git["dirty"])),
        ("python", platform.python_version()),
        *(
            (name, f"does not import: {version}" if name in missing else str(version))
            for name, version in versions.items()
        ),
    ]
    for extra, names in extras:
        absent = [name for name in names if isinstance(_version(name), Exception)]
        state = f"missing {', '.join(absent)}: run `make extra-{extra}`" if absent else "installed"
        rows.append((f"extra {extra}", state))
    print_rows(("part", "state"), rows)
    if missing:
        print(f"\nmissing packages: {', '.join(missing)}; run `make setup`")
        return 1
    from assemble.stages.recipe_data import datasets_of

    folder = (data or data_root()).resolve()
    print(f"\ndata sets for the paper scale in {folder} (--data, ASSEMBLE_DATA); smoke and mini need none")
    for paper in existing_papers():
        statuses = [dataset.status() for dataset in datasets_of(paper.name, folder)]
        lacking = dict.fromkeys(status.dataset.full_title for status in statuses if not status.present)
        presence = f"missing {'; '.join(lacking)} (see `assemble data {paper.short}`)" if lacking else "all present"
        print(f"  {paper.short}: {presence}", flush=True)
    return 0


def _version(name: str) -> str | Exception:
    try:
        if name in COMPILED:
            return str(importlib.import_module(name).__version__)
        from importlib.metadata import version

        return version(name)
    except Exception as error:  # An incompatible build may raise any exception.
        return error


def _gpus() -> list[str]:
    import torch

    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in properties]


def _requirements() -> dict[str, list[str]]:
    """Return the required packages by extra. The first entry lists the packages that every run needs."""
    from importlib.metadata import requires

    packages: dict[str, list[str]] = {"": []}
    for requirement in requires("representation-assemble") or []:
        name, extra = re.match(r"([\w.-]+)(?:.*extra == ['\"]([\w-]+))?", requirement).groups("")  # type: ignore[union-attr]
        if extra not in DEVELOPING:
            packages.setdefault(extra, []).append(name)
    return packages
