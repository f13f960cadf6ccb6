"""What commands print about a made-up project, as printed.txt has it; `SNAPSHOT=1` writes that file."""

from __future__ import annotations

import os
from pathlib import Path

from common.commands.main import main
from common.reporting.papers import paper_named
from common.reporting.results import write_results
from tests.reporting.conftest import Capsys, MakeRecord, Saved

COMMANDS = (
    "tables mct", "claims mct --runs RUNS", "compare mct --runs RUNS",
    "runs --runs RUNS", "runs --runs RUNS --diff base+1f2e3d mini/seed0/base", "promote mct --runs RUNS",
)  # fmt: skip


def test_what_commands_print(project: Path, saved: Saved, make_record: MakeRecord, capsys: Capsys) -> None:
    recorded = {"ucf_1@base": (48.0, 52.0, 50.0), "ucf_1@better": (60.0, 63.0, 62.0), "esc@base": (20.0,)}
    records = [make_record(stage, k, value) for stage, values in recorded.items() for k, value in enumerate(values)]
    write_results(paper_named("mct"), records, {})
    for stage, value in (("ucf_1@base", 51.0), ("ucf_1@better", 40.0), ("esc@base", 25.0)):
        saved(stage, 7, value, started="2026-02-03T04:05:06Z")
    for stage, rate in (("base", 0.1), ("base+1f2e3d", 0.3)):
        config = {
            "seed_everything": 0,
            "model": {"class_path": "a.B", "init_args": {"rate": rate}},
            "data": {"root": stage},
        }
        folder = saved(stage, 0, 100 * rate, config=config, job="pretrain", wall_seconds=600 * rate)
        (folder / "metrics.csv").write_text(f"step,name,value\n0,train/loss,3\n9,train/loss,{rate}\n")
    (folder / "identity.json").write_text('{"arguments": ["--model.rate", "0.3"]}')
    running = folder.parents[1] / "seed2" / "base"
    running.mkdir(parents=True)
    (running / "identity.json").write_text("{}")
    os.utime(running / "identity.json", (0, 0))
    (running / "progress.json").write_text('{"step": 30, "share": 0.25, "loss": 1.5, "left": 75.0}')
    found = ""
    for command in COMMANDS:
        status = main(command.replace("RUNS", str(project / "runs")).split())
        lines = capsys.readouterr().out.replace(str(project), "PROJECT").splitlines()
        found += "\n".join([f"$ assemble {command}", *map(str.rstrip, lines), f"exit status {status}\n\n"])
    path = Path(__file__).with_name("printed.txt")
    if os.environ.get("SNAPSHOT"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")
