"""Measured training steps: their files, and the table of them in `docs/gpu.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import ReportingError
from common.files import named, write_atomically
from common.reporting.papers import existing_papers, needed_checkout, paper_named
from common.reporting.render import update_between_markers

MARKERS = "gpu"


@dataclass(frozen=True)
class MeasuredStep:
    """A training step as `assemble gpu-check` measured it.

    Args:
        paper, recipe, scale: what ran.
        card: name of the GPU, or of the processor.
        date: UTC, ISO 8601.
        git, versions: as in a record.
        precision: of the trainer.
        batch: samples of a step on the device.
        steps: steps that were timed.
        seconds, seconds_spread: median of a step, and standard deviation.
        flops: operations of a step: products of matrices, convolutions and attention, forward and backward.
        matrix_rate: operations per second of a large product of matrices on the same card in the same run.
        peak_bytes: most memory of all tensors; 0 on the CPU.
        host_waits: how often a step made the host wait for the device; None on the CPU.
        outside_big_share: share of the kernels' time outside products of matrices, convolutions and attention, 0 to 1.
        idle_share: share of a step in which the device ran no kernel, 0 to 1; None on the CPU.
        kernels: those that take most time: `name`, `seconds` a step, `share`, and whether it is one of the `big`.
    """

    paper: str
    recipe: str
    scale: str
    card: str
    date: str
    git: dict[str, Any]
    versions: dict[str, str]
    precision: str
    batch: int
    steps: int
    seconds: float
    seconds_spread: float
    flops: int
    matrix_rate: float
    peak_bytes: int
    host_waits: float | None
    outside_big_share: float | None
    idle_share: float | None
    kernels: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rate_share(self) -> float:
        """Achieved operations per second as a share of the card's own in a product of matrices."""
        return self.flops / self.seconds / self.matrix_rate

    @property
    def file_name(self) -> str:
        """Name of its file: one for each paper, recipe, precision and card."""
        card = re.sub(r"[^a-z0-9]+", "-", self.card.lower()).strip("-")
        return f"{self.paper}-{self.recipe}-{self.precision}-{card}.json"


def folder() -> Path:
    """Where measurements are kept."""
    return needed_checkout("measurements are kept in docs/gpu unless --output names a folder") / "docs" / "gpu"


def page() -> Path:
    """The page that shows them."""
    return needed_checkout("docs/gpu.md is a page of the repository") / "docs" / "gpu.md"


def write(step: MeasuredStep, where: Path) -> Path:
    """Write a measurement into a folder; one of the same paper, recipe, precision and card is replaced."""
    path = where / step.file_name
    write_atomically(path, json.dumps(asdict(step), indent=1, sort_keys=True) + "\n")
    return path


def read(path: Path) -> MeasuredStep:
    """Read one.

    Raises:
        ReportingError: the file holds none.
    """
    names = {one.name for one in fields(MeasuredStep)}
    try:
        with named(path):
            text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        if set(found) != names:
            raise ValueError(f"fields {', '.join(sorted(set(found) ^ names))}")
        return MeasuredStep(**found)
    except (ValueError, TypeError) as error:
        raise ReportingError(f"{path} is no measurement of gpu-check ({error}); measure again") from None


def find(where: Path | None = None) -> list[MeasuredStep]:
    """All measurements of a folder, in the order of the papers."""
    order = {paper.name: number for number, paper in enumerate(existing_papers())}
    steps = [read(path) for path in sorted((where or folder()).glob("*.json"))]
    return sorted(steps, key=lambda step: (order.get(step.paper, len(order)), step.card, step.recipe, step.precision))


HEADS = (
    "paper", "recipe", "card", "precision", "batch", "ms/step", "TFLOP/s", "of the card's own",
    "peak GB", "outside big kernels", "idle", "host waits", "date", "revision",
)  # fmt: skip


def cells(step: MeasuredStep) -> list[str]:
    """One line of the table."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.0%}"

    revision = str(step.git.get("revision") or "unknown")[:10] + (" + changes" if step.git.get("dirty") else "")
    return [
        paper_named(step.paper).title, step.recipe, step.card, step.precision, str(step.batch),
        f"{1000 * step.seconds:.1f} ± {1000 * step.seconds_spread:.1f}",
        f"{step.flops / step.seconds / 1e12:.3g}", percent(step.rate_share),
        f"{step.peak_bytes / 1e9:.1f}" if step.peak_bytes else "-", percent(step.outside_big_share),
        percent(step.idle_share), "-" if step.host_waits is None else f"{step.host_waits:g}", step.date, revision,
    ]  # fmt: skip


def markdown(steps: Iterable[MeasuredStep]) -> str:
    """The table; papers that were not measured at paper scale are named."""
    kept = [step for step in steps if step.scale == "paper"]
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    lines += ["| " + " | ".join(cells(step)) + " |" for step in kept]
    measured = {step.paper for step in kept}
    for paper in existing_papers():
        if paper.name not in measured:
            lines.append("| " + " | ".join([paper.title, "not measured yet", *["-"] * (len(HEADS) - 2)]) + " |")
    for step in kept:
        lines += ["", f"{paper_named(step.paper).title}, {step.card}, kernels that take most time:", ""]
        lines += ["| kernel | ms/step | share |", "|---|---:|---:|"]
        lines += [f"| `{k['name']}` | {1000 * k['seconds']:.2f} | {k['share']:.0%} |" for k in step.kernels]
    return "\n".join(lines)


def render() -> bool:
    """Bring the page up to date; says whether it changed."""
    return update_between_markers(page(), MARKERS, markdown(find()))
