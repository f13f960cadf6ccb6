"""Test the progress file of a training stage, its display, and the tables that are printed during a run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich import get_console

from assemble.commands.run import print_filled
from assemble.reporting.progress import FILE, Watch, duration, read
from assemble.reporting.records import Record
from assemble.stages.plan import seconds_left, start_order
from assemble.stages.request import Selection
from common.files import console
from common.training import callbacks
from common.training.callbacks import Progress
from tests.reporting.conftest import make_record, project, save  # noqa: F401 - fixtures


def trainer(batch: int, max_steps: int = -1, **fields: Any) -> Any:
    given = {"is_global_zero": True, "max_steps": max_steps, "max_epochs": 2, "num_training_batches": 10}
    given["accumulate_grad_batches"] = 1
    loop = SimpleNamespace(total_batch_idx=batch)
    return SimpleNamespace(fit_loop=loop, global_step=2 * (batch + 1), **(given | fields))


def test_live_lines_and_tables_share_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert console() is get_console()


def test_a_stage_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress, module = Progress(tmp_path / FILE, every=0.0), SimpleNamespace(automatic_optimization=True)
    started, clock = time.time(), SimpleNamespace(monotonic=lambda: 0.5)
    monkeypatch.setattr(callbacks, "time", clock)
    loss = {"loss": torch.tensor(2.5)}

    def after(at: Any, outputs: Any = loss) -> dict[str, Any] | None:
        progress.on_train_batch_end(at, module, outputs, None, 0)  # type: ignore[arg-type]
        return read(tmp_path, started)

    assert after(trainer(0)) == {"step": 2, "share": 0.05, "loss": 2.5, "left": None}
    clock.monotonic = lambda: 9.5  # the time of nine steps, with ten more to go
    assert after(trainer(9), torch.tensor(2.0)) == {"step": 20, "share": 0.5, "loss": 2.0, "left": pytest.approx(10.0)}
    # If several batches make a step, Lightning passes the batch's loss divided by the number of batches.
    parts = {"max_steps": 20, "accumulate_grad_batches": 4}
    assert [after(trainer(7, **parts), own)["loss"] for own in (loss, None)] == [10.0, None]  # type: ignore[index]
    module.automatic_optimization = False
    assert after(trainer(7, **parts))["loss"] == 2.5  # type: ignore[index]
    assert after(trainer(9, is_global_zero=False))["step"] == 16  # type: ignore[index]
    assert read(tmp_path, time.time() + 60) is None  # the file is from an earlier session
    progress.every = 60.0  # the loss is not read in every step
    assert [after(trainer(batch))["step"] for batch in (1, 2)] == [4, 4]  # type: ignore[index]
    progress.on_fit_end(trainer(9, is_global_zero=False), module)  # type: ignore[arg-type]
    assert read(tmp_path, started) is not None
    for _ in range(2):
        progress.on_fit_end(trainer(9), module)  # type: ignore[arg-type]
        assert read(tmp_path, started) is None
    Progress(tmp_path / "missing" / FILE).on_train_batch_end(trainer(0), module, None, None, 0)  # type: ignore[arg-type]


def test_the_line_of_a_running_stage(tmp_path: Path) -> None:
    watch, now = Watch(), time.time()
    watch.begin("avid seed 0", tmp_path)
    (tmp_path / FILE).write_text(json.dumps({"step": 300, "share": 0.3, "loss": 4.25, "left": 200.0}))
    assert watch.lines() == ["  avid seed 0: step 300, 30 %, loss 4.25, 3.3 min left"]
    os.utime(tmp_path / FILE, (now - 1.5, now - 1.5))
    assert (read(tmp_path, now - 0.9) is None, read(tmp_path, now)) == (False, None)
    assert [duration(seconds) for seconds in (89, 90, 5399, 5400)] == ["89 s", "1.5 min", "90.0 min", "1.5 h"]
    (tmp_path / FILE).write_text('{"step": ')
    assert watch.lines()[0].endswith(" s")
    watch.end("avid seed 0")
    assert watch.lines() == []


def test_a_terminal_shows_all_stages_at_once_and_clears_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setattr("rich.live.Live", lambda **options: shown.update(options) or nullcontext())
    with Watch() as watch:
        for name in ("avid", "cma"):
            watch.begin(name, tmp_path)
        assert str(shown["get_renderable"]()) == "  avid: 0 s\n  cma: 0 s"
    assert (shown["transient"], shown["refresh_per_second"]) == (True, 1)


@pytest.mark.usefixtures("project")
def test_a_table_is_printed_when_its_last_cell_is_there_and_once(
    tmp_path: Path,
    make_record: Callable[..., Record],  # noqa: F811
    save: Callable[[Record], Path],  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = Selection(scale="mini", seeds=(0, 1), runs=tmp_path / "project" / "runs")
    printed: set[str] = set()
    stages = ["base", "better", "ucf_1@base", "esc@base", "ucf_1@better", "esc@better"]
    cells = [(stage, seed) for seed in (0, 1) for stage in stages]
    for number, (stage, seed) in enumerate(cells):
        save(make_record(stage, seed, 50.0, metrics={"test/top1": 50.0, "test/loss": 1.0}))
        print_filled("mct", stage, wanted, printed)
        assert bool(printed) == (number == len(cells) - 1)
    assert "Transfer (mini)" in capsys.readouterr().out
    print_filled("mct", "esc@better", wanted, printed)
    assert capsys.readouterr().out == ""


def test_a_table_does_not_wait_for_rows_by_request(
    project: Path,  # noqa: F811
    make_record: Callable[..., Record],  # noqa: F811
    save: Callable[[Record], Path],  # noqa: F811
) -> None:
    tables = project / "papers/mct/tables.yaml"
    text = tables.read_text(encoding="utf-8")
    assert "model: better," in text
    tables.write_text(text.replace("model: better,", "model: better, by_request: [mini],"), encoding="utf-8")
    for everything in (True, False):
        wanted = Selection(scale="mini", runs=project / "runs", everything=everything)
        printed: set[str] = set()
        for stage in ("base", "ucf_1@base", "esc@base"):
            save(make_record(stage, 0, 50.0, metrics={"test/top1": 50.0, "test/loss": 1.0}))
            print_filled("mct", stage, wanted, printed)
        assert bool(printed) is not everything


def test_stages_wait_for_their_parents_and_for_a_worker() -> None:
    def stage(name: str, *parents: str) -> Any:
        named = {parent: SimpleNamespace(key=(0, parent)) for parent in parents}
        return SimpleNamespace(request=SimpleNamespace(stage=name, key=(0, name), parents=named))

    known = {"avid": 100.0, "cma": 60.0, "probe": 20.0}
    chain = [stage("avid"), stage("cma", "avid"), stage("probe", "avid"), stage("probe@cma", "cma")]
    assert seconds_left(known, chain, 1) == 100 + 60 + 20 + 60  # a stage without records takes the mean
    assert seconds_left(known, chain, 2) == 100 + 60 + 60
    assert seconds_left(known, chain[1:], 2) == 60 + 60
    assert seconds_left(known, [stage("probe")], 2) == 20
    assert seconds_left(known, [], 2) == 0
    assert seconds_left({}, [stage("new")], 2) is None


def test_the_longest_chains_start_first_in_each_seed() -> None:
    def stage(name: str, *parents: str, seed: int = 0) -> Any:
        named = {parent: SimpleNamespace(key=(seed, parent)) for parent in parents}
        return SimpleNamespace(request=SimpleNamespace(stage=name, key=(seed, name), parents=named))

    known = {"short": 10.0, "probe": 1.0, "long": 50.0, "start": 20.0, "end": 20.0}
    planned = [stage("short"), stage("probe", "short"), stage("start"), stage("end", "start"), stage("long")]
    ordered = [item.request.stage for item in start_order(planned, known, 2)]
    assert ordered == ["long", "start", "end", "short", "probe"]
    assert seconds_left(known, planned, 2) == 51  # in the plan's order, 80
    assert start_order(planned, known, 1) == start_order(planned, {}, 2) == planned
    seeds = start_order([stage("short"), stage("long", seed=1)], known, 2)
    assert [item.request.stage for item in seeds] == ["short", "long"]
