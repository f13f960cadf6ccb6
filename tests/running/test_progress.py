"""Progress: what a stage says of itself while it trains, how that is shown, and tables as they fill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from common.commands.run import print_filled
from common.reporting.progress import FILE, Watch, read
from common.reporting.records import Record
from common.stages.plan import seconds_left
from common.stages.request import Selection
from common.training.callbacks import MissedCheckpoints, Progress
from tests.reporting.conftest import make_record, project, save  # noqa: F401 - fixtures


def trainer(batch: int, max_steps: int = -1, **fields: Any) -> Any:
    given = {"is_global_zero": True, "max_steps": max_steps, "max_epochs": 2, "num_training_batches": 10}
    given["accumulate_grad_batches"] = 1
    loop = SimpleNamespace(total_batch_idx=batch)
    return SimpleNamespace(fit_loop=loop, global_step=2 * (batch + 1), **(given | fields))


def test_a_stage_says_how_far_it_is(tmp_path: Path) -> None:
    progress, module = Progress(tmp_path / FILE, every=0.0), SimpleNamespace(automatic_optimization=True)
    started = time.time()

    def after(at: Any, loss: float = 2.5) -> dict[str, Any] | None:
        progress.on_train_batch_end(at, module, {"loss": torch.tensor(loss)}, None, 0)  # type: ignore[arg-type]
        return read(tmp_path, started)

    assert after(trainer(0)) == {"step": 2, "share": 0.05, "loss": 2.5, "left": None}
    time.sleep(0.02)
    told = after(trainer(9))
    assert told is not None
    assert (told["step"], told["share"]) == (20, 0.5)
    # Nine of ten steps that are left took 0.02 s or a little more.
    assert 0.02 <= told["left"] < 2 * (time.time() - started)
    # Two optimizers step in every batch, as its record counts them: 14 of the 20 steps that end the training.
    assert after(trainer(6, max_steps=20))["share"] == pytest.approx(0.7)  # type: ignore[index]
    # A share of the batch's loss is what Lightning hands out where several batches make a step.
    assert after(trainer(7, max_steps=20, accumulate_grad_batches=4))["loss"] == 10.0  # type: ignore[index]
    assert after(trainer(9, is_global_zero=False))["step"] == 16  # type: ignore[index]
    assert read(tmp_path, time.time() + 60) is None  # of an earlier session
    progress.every = 60.0  # the loss is not read at every step
    assert [after(trainer(batch))["step"] for batch in (1, 2)] == [4, 4]  # type: ignore[index]
    progress.on_fit_end(trainer(9), module)  # type: ignore[arg-type]
    assert read(tmp_path, started) is None


def test_a_log_gets_a_line_at_a_quarter_and_not_more_than_one_a_minute(tmp_path: Path) -> None:
    lines: list[str] = []
    watch = Watch(lines.append)
    watch.begin("avid seed 0", tmp_path)
    now = time.time()

    def reach(share: float, seconds: float) -> None:
        told = {"step": int(1000 * share), "share": share, "loss": 4.25, "left": 200.0}
        (tmp_path / FILE).write_text(json.dumps(told))
        watch.tell(now + seconds)

    reach(0.3, 10)
    assert not lines
    reach(0.3, 70)
    reach(0.4, 200)
    reach(0.55, 201)
    assert lines == [
        "  avid seed 0: step 300, 30 %, loss 4.25, 3.3 min left",
        "  avid seed 0: step 550, 55 %, loss 4.25, 3.3 min left",
    ]
    assert watch.lines() == lines[1:]
    (tmp_path / FILE).write_text('{"step": ')
    assert watch.lines()[0].endswith(" s")
    watch.end("avid seed 0")
    assert watch.lines() == []


def test_a_terminal_shows_all_stages_at_once_and_clears_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("rich.live.Live", lambda **options: shown.update(options) or nullcontext())
    with Watch(print) as watch:
        for name in ("avid", "cma"):
            watch.begin(name, tmp_path)
        assert str(shown["get_renderable"]()) == "  avid: 0 s\n  cma: 0 s"
    assert shown["transient"]


@pytest.mark.parametrize(
    ("steps", "epochs", "step", "due"),
    [(3, 0, 6, True), (3, 0, 7, False), (3, 0, 8, False), (0, 2, 8, True), (0, 2, 4, False), (0, 2, 7, False)],
)
def test_a_missed_checkpoint_is_written(tmp_path: Path, steps: int, epochs: int, step: int, due: bool) -> None:
    """A run of four batches an epoch resumes at a step whose permanent checkpoint is missing."""
    kept = ModelCheckpoint(tmp_path, every_n_train_steps=steps, every_n_epochs=epochs, save_top_k=-1)
    epoch, batch = divmod(step - 1, 4)
    loop = SimpleNamespace(
        epoch_progress=SimpleNamespace(current=SimpleNamespace(ready=epoch + 1)),
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(is_last_batch=batch == 3)),
    )
    saved: list[str] = []
    run: Any = SimpleNamespace(global_step=step, fit_loop=loop, checkpoint_callbacks=[kept])
    run.strategy, run.save_checkpoint = SimpleNamespace(broadcast=bool), lambda path, weights: saved.append(path)
    MissedCheckpoints().on_train_start(run, None)  # type: ignore[arg-type]
    assert bool(saved) == due


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
        named = {parent: SimpleNamespace(stage=parent) for parent in parents}
        return SimpleNamespace(request=SimpleNamespace(stage=name, seed=0, parents=named))

    known = {"avid": 100.0, "cma": 60.0, "probe": 20.0}
    chain = [stage("avid"), stage("cma", "avid"), stage("probe", "avid"), stage("probe@cma", "cma")]
    assert seconds_left(known, chain, 1) == 100 + 60 + 20 + 60  # without records: the mean
    assert seconds_left(known, chain, 2) == 100 + 60 + 60
    assert seconds_left(known, chain[1:], 2) == 60 + 60
    assert seconds_left(known, [stage("probe")], 2) == 20
    assert seconds_left(known, [], 2) == 0
    assert seconds_left({}, [stage("new")], 2) is None
