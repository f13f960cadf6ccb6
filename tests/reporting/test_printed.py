"""Run commands on a made-up project and compare their output with printed.txt. `SNAPSHOT=1` rewrites that file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from assemble.commands.main import main
from assemble.reporting.papers import paper_named
from assemble.reporting.results import place_of, write_results
from assemble.reporting.summary import print_summary
from tests.reporting.conftest import Capsys, MakeRecord, Saved
from tests.reporting.test_report import PIXEL

COMMANDS = (
    "tables mct", "tables mct --runs RUNS --scale smoke", "claims mct --runs RUNS",
    "compare mct --runs RUNS", "compare mct --runs RUNS --curves",
    "power mct --row NEW-one --over base --metric UCF --gap 0.01",
    "runs --runs RUNS", "runs --runs RUNS --diff base+1f2e3d mini/seed0/base", "report mct --runs RUNS",
    "wandb-report mct --offline", "promote mct --runs RUNS",
)  # fmt: skip
#: Commands that are run on a narrow terminal with colors.
COLORED = ("tables mct --runs RUNS --scale mini", "compare mct --runs RUNS", "claims mct")
MEDIA = {
    "two_pixels_1.png": PIXEL, "clip.mp4": b"no film", "numbers.json": b"{}", "rows.csv": b"a,b\n" + b"1,<i>\n" * 31,
    "words.row.png": PIXEL, "words.row.json": b'["first", "second"]',
}  # fmt: skip
PAPER: dict[str, Any] = {
    "scale": "paper", "started": "2026-01-01", "git": {"revision": "b" * 40, "dirty": True},
    "data": {"test (ucf)": {"version": "1", "samples": 400, "skipped": 3, "skipped_names": []}},
    "deviations": [{"field": "model.init_args.rate", "reason": "a <small> [rehearsal]"}],
    "ours": [{"field": "data.size", "value": "64"}, {"field": "model.init_args.rate", "value": "0.1"}],
    "media": ["media/a_b_1.png", "media/clip_2.mp4", "media/texts.csv"],
    "hardware": {"cpu": "Some CPU", "accelerators": ["GPU", "GPU", "Other GPU"]},
}  # fmt: skip
OTHER: dict[str, Any] = {"ours": [{"field": "model.init_args.rate", "value": "0.2"}], "hardware": {"cpu": "Old [CPU]"}}


def on_page(text: str) -> str:
    """Return a page without style and script, with the label in place of each drawing."""
    text = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg role="img" aria-label="(.*?)".*?</svg>', r"[\1]", text, flags=re.DOTALL)
    return re.sub(r"\n\s*\n", "\n", text)


def in_report(blocks: list[dict[str, Any]]) -> Iterator[Any]:
    """Yield the blocks, run sets and panels of a W&B report, without the ids that the client generates."""
    for block in blocks:
        yield block["type"], block.get("content", block["children"])
        grid = block.get("metadata", {})
        for one in grid.get("runSets", ()):
            filters = [(part["key"]["name"], part["op"], part["value"]) for part in one["filters"]["filters"]]
            yield one["name"], filters, one["grouping"], list(one["runFeed"]["columnVisible"])
        for panel in grid.get("panelBankSectionConfig", {}).get("panels", ()):
            yield panel["viewType"], panel["layout"], panel["config"]


def test_what_commands_print(
    project: Path, saved: Saved, make_record: MakeRecord, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, found = project / "runs", ""

    def printed(what: str) -> None:
        nonlocal found
        lines = capsys.readouterr().out.replace(str(project), "PROJECT").replace("\x1b", "^").splitlines()
        found += "\n".join([f"$ {what}", *map(str.rstrip, lines), "\n"])

    def end(scale: str = "mini") -> None:
        console = Console(width=140, force_terminal=True, color_system="standard")
        print_summary("mct", scale, runs, 61.0, " (--everything runs all)", console)
        printed(f"assemble reproduce mct --scale {scale}")

    recorded = {"ucf_1@base": (48.0, 52.0, 50.0), "ucf_1@better": (60.0, 63.0, 62.0), "esc@base": (20.0,)}
    records = [make_record(stage, k, value) for stage, values in recorded.items() for k, value in enumerate(values)]
    rounded = {"isa": {"requested": "avx", "machine": "avx2"}}
    records += [make_record(f"ucf_1@{row}", 2, 50.0, hardware=rounded) for row in ("base", "better")]
    records += [make_record("ucf_1@base", 0, 71.0, **PAPER), make_record("ucf_2@base", 0, 72.0, **PAPER | OTHER)]
    bases = [make_record("base", k, metrics={"test/loss": 1.5 + 0.1 * k}, ours=PAPER["ours"]) for k in range(3)]
    curves = {place_of(one): {"train/loss": [(5.0 * k, 3.0 + 0.01 * one.seed - k) for k in range(3)]} for one in bases}
    write_results(paper_named("mct"), records + bases, curves)
    end()
    for stage, rate in (("base", 0.1), ("base+1f2e3d", 0.3)):
        config = {"model": {"class_path": "a.B", "init_args": {"rate": rate}}, "data": {"root": stage}}
        folder = saved(stage, 0, 100 * rate, config=config, job="pretrain", wall_seconds=610 * rate, started="2026-02")
        rows = f"0,train/loss,3\n5,train/loss,2\n10,train/loss,{rate}\n10,val/loss,2\n"
        (folder / "metrics.csv").write_text(f"step,name,value\n{rows}")
    (folder / "identity.json").write_text('{"arguments": ["--model.rate", "0.3"]}')
    running = folder.parents[1] / "seed2" / "base"
    running.mkdir(parents=True)
    (running / "identity.json").write_text("{}")
    os.utime(running / "identity.json", (0, 0))
    (running / "progress.json").write_text('{"step": 30, "share": 0.25, "loss": 1.5, "left": 75.0}')
    os.utime(running / "progress.json", (4e9, 4e9))  # after two minutes, the stage would count as stopped
    for stage, value in (("ucf_1@base", 51.0), ("ucf_1@better", 40.0), ("esc@base", 25.0)):
        media = [f"media/{name}" for name in MEDIA] if stage.endswith("base") else []
        folder = saved(stage, 0, value, started="2026-02-03T04:05:06Z", media=media)
        for name in media:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(MEDIA[Path(name).name])
        if value == 51.0:
            end()
    end()
    for command in COMMANDS:
        print("exit status", main(command.replace("RUNS", str(runs)).split()))
        printed(f"assemble {command}")
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "90"}.items():
        monkeypatch.setenv(name, value)
    for command in COLORED:
        main(command.replace("RUNS", str(runs)).split())
        printed(f"assemble {command}")
    for file in (paper_named("mct").readme, project / "README.md", runs / "mct/mini/tables.md", runs / "report.html"):
        print(on_page(file.read_text(encoding="utf-8")))
        printed(f"cat {file.relative_to(project)}")
    report = json.loads((runs / "mct" / "wandb-report.json").read_text())
    print(*(json.dumps(part, ensure_ascii=False) for part in in_report(report["spec"]["blocks"])), sep="\n")
    printed("cat runs/mct/wandb-report.json")
    saved("esc@base", 0, 25.0, scale="smoke")
    end("smoke")
    path = Path(__file__).with_name("printed.txt")
    if os.environ.get("SNAPSHOT"):
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")
