"""The screen at the end of `assemble reproduce`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from common.reporting import records
from common.reporting.promote import promote
from common.reporting.summary import print_summary
from tests.reporting.conftest import Capsys, MakeRecord, Saved

CELLS = ("base", "better", "ucf_1@base", "ucf_1@better")


def test_claims_stand_beside_the_recorded_ones(
    project: Path, make_record: MakeRecord, saved: Saved, capsys: Capsys
) -> None:
    """The paper's margin, that of this run, and that of the recorded runs; a claim without its rows is counted."""
    for seed, isa, gain in ((1, "avx", 4.0), (2, "avx", 6.0), (3, "avx", 3.0), (3, "avx2", 7.0)):
        for stage in CELLS:
            hardware = {"isa": {"requested": isa, "machine": "avx2"}}
            record = make_record(stage, seed, 50.0 + gain * stage.endswith("better"), hardware=hardware)
            folder = records.run_folder(project / "recorded", "mct", "mini", record.draw, stage)
            records.write(folder / records.RECORD_FILE, record)
    promote("mct", ["mini"], project / "recorded")
    console = Console(width=140)
    print_summary("mct", "mini", project / "runs", 61.0, " (--everything runs all)", console)
    assert "nothing was measured" in capsys.readouterr().out
    for stage in CELLS[::2]:
        saved(stage, 0, metrics={"test/top1": 50.0, "test/loss": 1.0})
    colored = Console(width=140, force_terminal=True, color_system="standard")
    print_summary("mct", "mini", project / "runs", 61.0, " (--everything runs all)", colored)
    assert "\x1b[2mnot run: 1 of 1 claims (--everything runs all)\x1b[0m" in capsys.readouterr().out
    for stage in CELLS[1::2]:
        saved(stage, 0, metrics={"test/top1": 50.5, "test/loss": 1.0})
    print_summary("mct", "mini", project / "runs", 61.0, " (--everything runs all)", console)
    shown = capsys.readouterr().out
    assert "MCT at mini scale, seed 0   61 s" in shown
    (line,) = [line.split() for line in shown.splitlines() if line.startswith("One helps")]
    assert line == ["One", "helps", "+0.5", "+0.5", "+5", "(2.52", "to", "7.48;", "rounding", "alone:", "4)", "fails"]
    assert "Your run" in shown
    assert "  details      assemble compare mct\n" in shown
    assert "Transfer (mini)" in (project / "runs/mct/mini/tables.md").read_text(encoding="utf-8")
