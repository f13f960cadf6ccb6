"""Test the reporting commands and the promotion."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from assemble.commands.main import main
from assemble.reporting import records
from assemble.reporting.promote import promote
from assemble.reporting.results import find_promoted
from tests.reporting.conftest import Capsys, Saved


def run(*arguments: str) -> int:
    return main([*arguments])


def test_tables(project: Path, saved: Saved, capsys: Capsys) -> None:
    assert run("tables", "--check") == 1
    assert "out of date" in capsys.readouterr().out
    saved("esc@base", 0, 12.5)
    assert run("tables", "--runs", str(project / "runs")) == 0
    assert "12.5" in capsys.readouterr().out
    assert run("tables", "--check") == 1  # printing fresh records must write nothing
    assert run("tables") == 0
    out = capsys.readouterr().out
    assert "12.5" not in out
    assert "wrote" in out
    assert run("tables", "--check") == 0
    saved("ucf_1@base", 0, 50.0)
    saved("ucf_1@better", 0, 60.0)
    assert run("tables", "--check") == 0  # fresh records don't count before promotion
    promote("mct")
    assert run("tables", "--check") == 1
    assert run("tables") == 0
    assert "contrast | 1 sign agrees (mini) |" in (project / "README.md").read_text()


def nested(depth: int) -> dict[str, Any]:
    return functools.reduce(lambda inner, _: {"a": inner}, range(depth), {})


#: Damaged or hostile fields of a record, or the content of another file.
PAYLOADS: dict[str, Any] = {
    "less nested config": {"config": nested(150)},
    "control characters": {"media": ["\0.png"], "selection": "\x1b[2J[/red]", "started": "2026"},
    "long number": {"config": {"a": 10**400}, "data": {"a": {"samples": 10**400}}},
    "data": {"data": {"a": {"samples": [], "skipped": None}}},
    "identity": ("identity.json", b'{"arguments": {"a": [1]}}'),
    "configuration": ("config.yaml", b"a: [" * 5000),
    "progress": ("progress.json", b'{"share": "a"}'),
    "curves": ("metrics.csv", b"step,name,value\n" + b"9" * 400 + b",a,1\n\xff"),
}


@pytest.mark.parametrize("payload", [*PAYLOADS, "pipe"])
def test_no_run_ends_a_command(payload: str, project: Path, saved: Saved, capsys: Capsys) -> None:
    saved("esc@base", 0, 12.5)
    folder = saved("esc@base", 1, 13.5)
    (folder / "identity.json").write_text('{"arguments": []}')
    path, content = folder / records.RECORD_FILE, PAYLOADS.get(payload)
    if isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    elif content:
        (folder / content[0]).write_bytes(content[1])
    else:
        path.unlink()
        os.mkfifo(path)
    for stopped in (False, True):
        if stopped and path.is_file():
            path.unlink()
        for command in (
            ["tables", "mct"], ["claims", "mct"], ["report", "mct"], ["compare", "mct"], ["compare", "mct", "--curves"],
            ["wandb-report", "mct", "--offline"], ["runs"], ["runs", "--json"],
        ):  # fmt: skip
            assert run(*command, "--runs", str(project / "runs")) == 0
            assert "Traceback" not in capsys.readouterr().err


def test_promote(project: Path, saved: Saved, capsys: Capsys) -> None:
    config = {"rate": 1, "out": str(project / "runs"), "home": str(Path.home() / "x")}
    saved("esc@base", 0, config=config)
    saved("esc@base", 0, scale="smoke")
    assert run("promote", "mct") == 0
    assert capsys.readouterr().out == "promoted: mct/mini/seed0/esc@base\n"
    # The promoted record must not name folders of this machine.
    (promoted,) = find_promoted("mct")
    assert promoted.config == {"rate": 1, "out": "./runs", "home": "~/x"}
    assert [p.action for p in promote("mct")] == ["unchanged"]

    saved("esc@base", 0, 51.0, started="2026-03-01T00:00:00Z")
    assert [p.action for p in promote("mct")] == ["updated"]
    saved("esc@base", 0, 52.0, started="2026-02-01T00:00:00Z")
    assert [p.action for p in promote("mct")] == ["kept"]
    assert find_promoted("mct")[0].metrics == {"test/top1": 51.0}


def test_a_trial_is_not_promoted(saved: Saved) -> None:
    saved("esc@base", 0)
    saved("esc@base+3f9a1c", 0)
    saved("a_recipe_of_my_own", 0)
    found = {promotion.record.stage: promotion for promotion in promote("mct")}
    assert {name: one.action for name, one in found.items()} == {
        "esc@base": "promoted", "esc@base+3f9a1c": "kept", "a_recipe_of_my_own": "kept",
    }  # fmt: skip
    assert "not a stage of the paper's tables" in found["esc@base+3f9a1c"].reason
    assert [record.stage for record in find_promoted("mct")] == ["esc@base"]


def test_native_draws_of_different_machines_are_kept_apart(saved: Saved) -> None:
    def of(machine: str, value: float) -> dict[str, str]:
        saved("esc@base", 0, value, hardware={"isa": {"requested": "native", "machine": machine}})
        (promotion,) = promote("mct")
        return {promotion.record.draw.folder: promotion.action}

    assert of("avx512", 50.0) == {"seed0": "promoted"}
    assert of("avx2", 52.0) == {"seed0-avx2": "promoted"}
    assert of("avx2", 52.0) == {"seed0-avx2": "unchanged"}
    assert of("avx512", 50.0) == {"seed0": "unchanged"}
    kept = {record.draw.folder: record.metrics["test/top1"] for record in find_promoted("mct")}
    assert kept == {"seed0": 50.0, "seed0-avx2": 52.0}


@pytest.mark.parametrize(
    ("git", "word"),
    [({"revision": "a", "dirty": True}, "uncommitted changes"), ({"revision": None, "dirty": None}, "unknown")],
)
def test_promote_refuses_what_cannot_be_reproduced(
    project: Path, saved: Saved, capsys: Capsys, git: dict, word: str
) -> None:
    saved("esc@base", 0, git=git)
    assert run("promote", "mct") == 1
    assert re.search(rf"refused: mct/mini/seed0/esc@base: .*{word}", capsys.readouterr().out)
    assert not (project / "papers" / "mct" / "results").exists()
