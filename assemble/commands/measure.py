"""The command `assemble gpu-check`."""

from __future__ import annotations

import math
import traceback
from typing import TYPE_CHECKING, Annotated

from assemble.commands.parsing import Option, PaperNames, Runs, at_least
from assemble.reporting.papers import papers_named, runs_root
from common import files
from common.errors import StageError, is_ours

if TYPE_CHECKING:
    from assemble.reporting.records import Record


def gpu_check(
    papers: PaperNames = (),
    *overrides: str,
    recipe: Annotated[str | None, "default: the paper's main recipe"] = None,
    device: Annotated[str, Option(choices=("cuda", "cpu"))] = "cuda",
    small: Annotated[bool, "use tiny networks, to try the command"] = False,
    precision: Annotated[str, "precision of the trainer"] = "bf16-mixed",
    batch_size: Annotated[
        int | None, Option("samples on the GPU; default: an eighth of the recipe's batch", parse=at_least(1))
    ] = None,
    runs: Runs = None,
) -> int:
    """Measure the papers' training steps on this machine's GPU, without data.

    Each paper trains a few steps at its published width on synthetic batches. Prints the step time, the share of the
    GPU's measured throughput, the memory and the slowest kernels. Further --key value pairs override the recipe.
    """
    from rich.table import Table

    from assemble.reporting import records

    measured = papers_named(papers)
    if recipe and len(measured) != 1:
        raise StageError("--recipe needs one paper")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise StageError("--device cuda: torch finds no GPU on this machine; --device cpu --small runs the same code")
    from assemble.stages.gpu_check import measure

    heads = ("paper", "recipe", "card", "batch", "ms/step", "TFLOP/s", "of the card's rate", "peak GB", "idle", "waits")
    table, terminal, failed = Table(*heads), files.console(), False
    for paper in measured:
        try:
            record, kernels = measure(
                paper.name,
                recipe,
                device=device,
                precision=precision,
                scale="smoke" if small else "paper",
                size=batch_size,
                arguments=overrides,
            )
        except Exception as error:  # One failed paper does not stop the others.
            if not is_ours(error):
                traceback.print_exc()
            print(f"{paper.name}: {error}", flush=True)
            failed = True
            continue
        path = record.folder(runs or runs_root()) / records.RECORD_FILE
        records.write(path, record)
        print(f"written to {path}")
        table.add_row(paper.title, *_cells(record))
        times = Table("kernel", "ms/step", "share", title=f"{paper.title}: where the time goes")
        for name, seconds in list(kernels.items())[:10]:
            times.add_row(name[:120], f"{1000 * seconds:.2f}", f"{seconds / sum(kernels.values()):.0%}")
        terminal.print(times)
    if table.row_count:
        terminal.print(table)
    return int(failed)


def _cells(record: Record) -> list[str]:
    numbers = {name: math.nan if value is None else value for name, value in record.metrics.items()}
    rate = numbers["flops"] / numbers["step_seconds"]
    step, spread = 1000 * numbers["step_seconds"], 1000 * numbers["step_seconds_std"]
    cells = (
        str(record.global_batch), f"{step:.1f} ± {spread:.1f}",
        f"{rate / 1e12:.3g}", f"{rate / numbers['matrix_rate']:.0%}", f"{numbers['peak_bytes'] / 1e9:.1f}",
        f"{numbers['idle_share']:.0%}", f"{numbers['host_waits']:g}",
    )  # fmt: skip
    card = record.hardware["accelerators"] or [record.hardware["cpu"]]
    return [record.recipe, *card, *("-" if "nan" in cell else cell for cell in cells)]
