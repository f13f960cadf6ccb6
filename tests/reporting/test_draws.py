"""Test draws: seed and rounding, the folders of their records, and how a process keeps one rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from assemble.reporting import draws, records
from assemble.reporting.draws import INSTRUCTION_SETS, Draw, machine_isa, use
from common.errors import StageError
from tests.reporting.conftest import MakeRecord, Save, Saved

CPU = {"cpu": "Some CPU", "cores": 2}
VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores changes
        monkeypatch.delenv(name)


def rounded(isa: str) -> dict[str, object]:
    return {**CPU, "isa": {"requested": isa, "machine": "avx512"}}


def test_a_record_without_rounding_is_native_and_others_lie_apart(
    project: Path, make_record: MakeRecord, save: Save, saved: Saved
) -> None:
    assert make_record(hardware=CPU).draw == Draw(0)
    rounding = make_record(hardware=rounded("sse41"))
    assert rounding.draw == Draw(0, "sse41")
    assert save(rounding) == project / "runs/mct/mini/seed0-sse41/esc@base"
    saved()
    assert [r.draw for r in records.find(project / "runs", "mct")] == [Draw(0), Draw(0, "sse41")]


def test_what_the_environment_asks_for_must_be_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    use("native")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    with pytest.raises(StageError, match="ONEDNN_MAX_CPU_ISA is avx2, but --isa native needs it unset"):
        use("native")


def test_a_rounding_needs_its_instructions_and_comes_before_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "machine_isa", lambda: "avx2")
    with pytest.raises(StageError, match="avx512: this machine has avx2"):
        use("avx512")
    monkeypatch.setitem(sys.modules, "torch", sys)
    with pytest.raises(StageError, match="before torch"):
        use("sse41")
    monkeypatch.delitem(sys.modules, "torch")
    use("sse41")
    assert {name: os.environ[name] for name in VARIABLES} == INSTRUCTION_SETS["sse41"]
    monkeypatch.setattr(draws, "machine_isa", lambda: "sse41")
    use("sse41")  # each stage repeats the call, and it must work without stronger instructions
    monkeypatch.setattr(draws, "machine_isa", lambda: None)
    with pytest.raises(StageError, match="has none of these"):
        use("sse41")


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("sse4_1", "sse41"), ("avx", "avx"), ("sse4_1 avx fma", "avx"), ("avx2", None), ("avx2 fma", "avx2"),
        ("avx512f avx512bw avx512dq avx512vl", "avx512"), ("", None),
    ],
)  # fmt: skip
def test_a_machine_has_the_strongest_set_of_its_flags(
    flags: str, isa: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: Some: CPU\nflags\t\t: {flags}\n\nflags\t\t: avx2 fma\n")
    monkeypatch.setattr(draws, "Path", lambda _: tmp_path / "cpuinfo")
    assert machine_isa() == isa
    assert draws.cpu_info("model name") == "Some: CPU"
    assert draws.cpu_info("cores") == ""


@pytest.mark.skipif(machine_isa() not in ("avx2", "avx512"), reason="needs a processor with AVX2")
def test_torch_obeys() -> None:
    program = (
        "from assemble.reporting.draws import use; use('sse41'); import torch;"
        "print(torch.backends.cpu.get_cpu_capability())"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.strip() == "DEFAULT"
