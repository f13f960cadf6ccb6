"""`assemble doctor`: what this machine has and lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.files import cache_folder
from common.reporting import records
from common.reporting.papers import checkout, working_folder
from common.stages.single import datasets_of

REQUIRED = (
    "numpy", "torch", "torchvision", "torchaudio", "lightning", "jsonargparse", "transformers", "timm", "torchmetrics",
    "wandb", "av", "sklearn", "rich", "matplotlib", "jinja2",
)  # fmt: skip


def examine(data: Path, papers: list[str]) -> int:
    """Print versions, devices, key and data sets; returns 1 when something that every run needs is missing."""
    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    missing: list[str] = []

    machine = records.hardware()
    table.add_row("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB memory")
    table.add_row("python", platform.python_version())
    for name in REQUIRED:
        try:
            module = importlib.import_module(name)
            table.add_row(name, str(getattr(module, "__version__", "present")))
        except Exception as error:  # a library of another build raises what it likes
            missing.append(name)
            table.add_row(name, f"[red]does not import: {escape(str(error))}[/red]")
    if "torch" not in missing:
        import torch

        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                table.add_row(f"gpu {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        else:
            table.add_row("gpu", "none found: the scales smoke and mini run on the CPU")
    free = shutil.disk_usage(working_folder()).free / 2**30
    table.add_row("disk", f"{free:.0f} GiB free at {working_folder()}")
    table.add_row("cache", f"{cache_folder()} (ASSEMBLE_CACHE moves it)")
    if "wandb" not in missing:
        from common.reporting.wandb_server import server, why_no_key

        reason = why_no_key()
        found = f"{reason}: runs are logged offline" if reason else f"present for {server()}; WANDB_MODE=online uses it"
        table.add_row("W&B key", escape(found))
    git = records.git_state(checkout())
    state = "unknown" if git["revision"] is None else git["revision"][:12] + (" with changes" if git["dirty"] else "")
    table.add_row("revision", state)
    console.print(table)

    if missing and papers:
        console.print("\ndata sets: not looked for before the packages are there, which their classes need")
    for paper in [] if missing else papers:
        console.print(
            f"\n[bold]{paper}[/bold]: data sets of the scale paper, looked for in {escape(str(data))} "
            "(--data, ASSEMBLE_DATA)",
            soft_wrap=True,
        )
        for dataset in datasets_of(paper, data):
            status = dataset.status()
            mark = "[green]present[/green]" if status.present else "[yellow]missing[/yellow]"
            # A path is copied whole.
            console.print(f"  {mark}  {escape(f'{status.title}: {status.path}')}", soft_wrap=True)
        console.print(f"  `assemble data {paper}` says how to get them; smoke and mini need none")
    if missing:
        console.print(f"\n[red]missing packages: {', '.join(missing)}[/red]; run `make setup`")
    return 1 if missing else 0
