"""A draw: seed and floating-point rounding of a run.

A CPU's instruction set determines the order in which numbers are summed, and so how sums are rounded. This can change
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
#: Instruction set to the variables that restrict oneDNN and ATen to it, weakest first; `native` sets none.
INSTRUCTION_SETS: dict[str, dict[str, str]] = {
    NATIVE: {},
    "sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx": {"ONEDNN_MAX_CPU_ISA": "AVX", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
}
_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
#: Flags in /proc/cpuinfo that each requires.
_FLAGS = {
    "sse41": {"sse4_1"},
    "avx": {"avx"},
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


class Draw(NamedTuple):
    """Seed and rounding of a run; `native` is the CPU's default."""

    seed: int
    isa: str = NATIVE

    @property
    def folder(self) -> str:
        """`seed0`, or `seed0-sse41`."""
        return f"seed{self.seed}" if self.isa == NATIVE else f"seed{self.seed}-{self.isa}"

    @property
    def label(self) -> str:
        """`0`, or `0 (sse41)`."""
        return f"{self.seed}" if self.isa == NATIVE else f"{self.seed} ({self.isa})"

    def __str__(self) -> str:
        return f"seed {self.label}"


def by_seed(values: Mapping[Draw, float]) -> dict[int, list[float]]:
    """Seed to its values under one or several roundings."""
    seeds: dict[int, list[float]] = {}
    for draw in sorted(values):
        seeds.setdefault(draw.seed, []).append(values[draw])
    return seeds


def draws_text(draws: Iterable[Draw]) -> str:
    """Draws in a few words: `seed 0, seed 1, seed 0 (sse41)`; empty without draws."""
    order = list(INSTRUCTION_SETS)
    return ", ".join(map(str, sorted(set(draws), key=lambda draw: (order.index(draw.isa), draw.seed))))


def cpu_info(field: str) -> str:
    """A field of the first CPU in /proc/cpuinfo; empty if unknown."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def machine_isa() -> str | None:
    """The strongest known instruction set of this machine; None if it isn't x86 or is unknown."""
    flags = set(cpu_info("flags").split())
    return next((isa for isa in reversed(_FLAGS) if _FLAGS[isa] <= flags), None)


def instruction_sets_here() -> list[str]:
    """Those that this machine can use, weakest first after `native`."""
    sets, has = list(INSTRUCTION_SETS), machine_isa()
    return sets[: sets.index(has) + 1] if has else [NATIVE]


def use(isa: str) -> None:
    """Restrict this process and its children to an instruction set; call before torch is imported."""
    if isa not in instruction_sets_here():
        has = machine_isa() or "none of these"
        raise StageError(f"--isa {isa}: this machine has {has}; use that, a weaker one or native")
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
