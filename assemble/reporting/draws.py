"""Handle draws. A draw is the seed and the floating-point rounding of a run.

The CPU's instruction set determines the order of summation, and so the rounding of sums. This can change
the results of a small network that is trained briefly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from common.errors import StageError

NATIVE = "native"
#: The environment variables that restrict oneDNN and ATen to an instruction set, weakest first. `native` sets none.
INSTRUCTION_SETS: dict[str, dict[str, str]] = {
    NATIVE: {},
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx": {"ONEDNN_MAX_CPU_ISA": "AVX", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
}
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
#: The flags in /proc/cpuinfo that each instruction set requires.
_FLAGS = {
    "sse41": {"sse4_1"},
    "avx": {"avx"},
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


class Draw(NamedTuple):
    """The seed and the rounding of a run; `native` is the CPU's default rounding."""

    seed: int
    isa: str = NATIVE

    @property
    def folder(self) -> str:
        """Return the folder's name: `seed0`, or `seed0-sse41`."""
        return f"seed{self.seed}" if self.isa == NATIVE else f"seed{self.seed}-{self.isa}"

    @property
    def label(self) -> str:
        """Return the label in tables: `0`, or `0 (sse41)`."""
        return f"{self.seed}" if self.isa == NATIVE else f"{self.seed} ({self.isa})"

    def __str__(self) -> str:
        return f"seed {self.label}"


def by_seed(values: Mapping[Draw, float]) -> dict[int, list[float]]:
    """Group values by seed. Each seed has one value per rounding."""
    seeds: dict[int, list[float]] = {}
    for draw in sorted(values):
        seeds.setdefault(draw.seed, []).append(values[draw])
    return seeds


def draws_text(draws: Iterable[Draw]) -> str:
    """List draws in words: `seed 0, seed 1, seed 0 (sse41)`."""
    order = list(INSTRUCTION_SETS)
    return ", ".join(map(str, sorted(set(draws), key=lambda draw: (order.index(draw.isa), draw.seed))))


def cpu_info(field: str) -> str:
    """Return a field of the first CPU in /proc/cpuinfo, or an empty text."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def machine_isa() -> str | None:
    """Return this machine's strongest known instruction set, or None if there is none (not x86)."""
    flags = set(cpu_info("flags").split())
    return next((isa for isa in reversed(_FLAGS) if _FLAGS[isa] <= flags), None)


def instruction_sets_here() -> list[str]:
    """List the instruction sets that this machine has, weakest first after `native`."""
    sets, has = list(INSTRUCTION_SETS), machine_isa()
    return sets[: sets.index(has) + 1] if has else [NATIVE]


def use(isa: str) -> None:
    """Restrict this process and its children to an instruction set. Call this before torch is imported."""
    if isa not in instruction_sets_here():
        has = machine_isa() or "none of these"
        raise StageError(f"--isa {isa}: this machine has {has}; use {has}, a weaker one or native")
    for name in _VARIABLES:
        given, wanted = os.environ.get(name, ""), INSTRUCTION_SETS[isa].get(name, "")
        if given.lower() == wanted.lower():
            continue
        if given:
            raise StageError(
                f"{name} is {given}, but --isa {isa} needs it {wanted or 'unset'}; unset it and only use --isa, "
                "so that the folder and the record show the rounding"
            )
        if "torch" in sys.modules:
            raise StageError(f"--isa {isa} must be known before torch is imported; give it on the command line")
    os.environ.update(INSTRUCTION_SETS[isa])
