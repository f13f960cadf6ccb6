"""Check that a stage stopped by a signal saves after the step, says so, and resumes as if never interrupted."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from assemble.commands.main import main
from assemble.reporting import code
from assemble.reporting.records import read
from assemble.stages import folder, run, stopping, training
from assemble.stages import preempt as preemption
from assemble.stages.request import StageRequest
from assemble.stages.run import run_stage
from common.errors import STOP, Preempted
from common.training import data_module
from papers.avid_cma.module import AVIDModule
from tests.distributed.harness import free_port
from tests.distributed.stages import over
from tests.m3p.stages import region_network
from tests.machine import LONG, descendants, group_runs, runs, until
from tests.resume.killing import compare
from tests.stages import callbacks, request
from tests.vx2text import stages as vx2text
from tests.xmc_gan import stages as xmc_gan

#: The variables that `srun` sets for a job with one task.
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "stage", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow a slow machine more time to reach the next check or checkpoint, and to end loaders, which hold the lock."""
    monkeypatch.setattr(folder, "LOCK_PATIENCE", LONG)
    monkeypatch.setattr(stopping, "PATIENCE", LONG)
    monkeypatch.setattr(preemption, "SAVING", 20 * LONG)


def _layer(parts: int = 1) -> dict[str, Any]:
    """Make a layer with seven batches per epoch, and no checkpoint except the one after the signal."""
    trainer = {"max_epochs": 2, "limit_train_batches": 1.0, "log_every_n_steps": 1, "accumulate_grad_batches": parts}
    return {"trainer": {**trainer, "callbacks": callbacks(1000)}}


def _signal_at(number: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal to this process in the middle of a training step. `batch` counts over all epochs."""
    original = AVIDModule.training_step

    def training_step(self: AVIDModule, inputs: Any, batch_idx: int) -> Any:
        if self.trainer.fit_loop.total_batch_idx == batch:
            os.kill(os.getpid(), number)
        return original(self, inputs, batch_idx)

    monkeypatch.setattr(AVIDModule, "training_step", training_step)


def test_the_end_does_not_wait_for_a_forked_process() -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    with stopping.listening():
        child.start()
    child.kill()


def _run_in_child(stage: StageRequest) -> int:
    """Run a stage in a new process, and return the exit status that the command would return."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_stage(stage)
            status = 0
        except Preempted as stop:
            status = stop.status
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a SLURM job with one task. The returned file logs the calls of `scontrol`."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.log\n', encoding="utf-8")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    return tmp_path / "scontrol.log"


def test_stopped_requeued_and_resumed_equals_uninterrupted(
    tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = (request("avid/avid_joint", tmp_path / name, layer=_layer(2)) for name in ("whole", "resumed"))
    with monkeypatch.context() as patch:
        _signal_at(signal.SIGUSR1, 2, patch)
        assert _run_in_child(resumed) == 128 + signal.SIGUSR1
    path = resumed.directory / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 2
    output = capfd.readouterr().out
    assert "avid_joint" in output
    assert f"stopped by SIGUSR1 after step 2 and saved in {path}; rerun the command to resume" in output
    assert not (resumed.directory / "record.json").exists()
    assert job.read_text(encoding="utf-8") == "requeue 4711\n"
    assert "job 4711 was requeued" in output
    records = [run_stage(stage) for stage in (whole, resumed)]
    compare(whole.directory, resumed.directory)
    assert records[0].metrics == records[1].metrics
    # The wall time continues from the saved value.
    assert state["wall_seconds"] > 0
    last = torch.load(path, weights_only=True)["wall_seconds"]
    assert state["wall_seconds"] < last < records[1].wall_seconds + 0.1


def test_a_stage_of_edited_code_is_asked_about_then_resumed_or_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "avid", "--scale", "smoke", "--runs", str(tmp_path), "--stages", "avid_continued"]
    command += ["--jobs", "1"]
    parent, child = (request(f"avid/{name}", tmp_path) for name in ("avid", "avid_continued"))
    with monkeypatch.context() as patch:
        _signal_at(signal.SIGTERM, 0, patch)
        assert main(command) == 143
    identity = parent.directory / "identity.json"
    loss, now = "papers/avid_cma/loss.py", code.fingerprint(["papers.avid_cma.loss"])
    identity.write_text(identity.read_text(encoding="utf-8").replace(now[loss], "edited:since"), encoding="utf-8")
    assert main(command) == 1
    assert f"trained by other code: {loss} changed" in capfd.readouterr().err
    assert main([*command, "--keep"]) == 0
    printed = capfd.readouterr()
    assert f"avid: continues a run that other code began: {loss} changed" in printed.err
    assert "avid: resumes from step 1" in printed.out
    # Two versions of the code trained the stage, so the command asks again.
    assert main(command) == 1
    assert main([*command, "--rerun"]) == 0
    printed = capfd.readouterr()
    assert "resumes" not in printed.out
    before, after = (
        [read(next(tmp_path.rglob(f"{stage.stage}{end}/record.json"))) for stage in (parent, child)]
        for end in (".previous-*", "")
    )
    assert [code.changed(record.code) for record in (*before, *after)] == [[loss], [], [], []]
    assert after[1].parents["model.init_args.warm_start"]["digest"] == after[0].checkpoints["last"]
    assert before[0].checkpoints["last"] != after[0].checkpoints["last"]
    assert main(command) == 0
    assert "2 done, 0 to run" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("avid/avid", signal.SIGUSR1),
        ("mct/moco_v2", signal.SIGTERM),
        ("xmc_gan/xmc_gan", signal.SIGINT),
        ("m3p/english", signal.SIGHUP),
        ("vx2text/avsd", signal.SIGTERM),
    ],
)
def test_a_stage_with_loaders_is_saved_when_every_process_gets_the_signal(
    name: str,
    number: signal.Signals,
    tmp_path: Path,
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Send the signal to every process, as SLURM does."""
    layer = {**_layer(), "data": {"init_args": {"num_workers": 1}}}
    layer["trainer"]["max_epochs"] = 2 if name == "avid/avid" else 1
    without = {
        "vx2text/avsd": vx2text.WITHOUT_PARENTS,
        "xmc_gan/xmc_gan": xmc_gan.WITHOUT_PARENTS,
        "m3p/english": ["--data.region_network", str(region_network(tmp_path)), "--model.pretrained", "null"],
    }.get(name, [])
    whole, resumed = (request(name, tmp_path / folder, *without, layer=layer) for folder in ("whole", "resumed"))
    original, batches = preemption.Preemption.on_train_batch_end, []

    def on_train_batch_end(self: preemption.Preemption, *args: Any) -> None:
        batches.append(1)
        if len(batches) == 2:
            loaders = descendants(os.getpid())
            assert loaders
            # Send the signals from another process, because a loader ends on a signal from its own parent.
            subprocess.run(["sh", "-c", f"kill -{number} $0 $@", *map(str, [*loaders, os.getpid()])], check=True)
            time.sleep(0.3)  # if a loader died, torch would raise an error meanwhile
            assert all(map(runs, loaders))
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(preemption.Preemption, "on_train_batch_end", on_train_batch_end)
        assert _run_in_child(resumed) == 128 + number
    assert f"stopped by {number.name} after step " in capfd.readouterr().out
    assert job.exists() == (number == signal.SIGUSR1)
    record = run_stage(resumed)
    assert "resumes from step" in capfd.readouterr().out
    if name == "avid/avid":
        assert run_stage(whole).metrics == record.metrics
        compare(whole.directory, resumed.directory)


def _hang(worker: int) -> None:
    data_module.outlive_signals(worker)
    time.sleep(LONG)


def _hang_as_an_orphan(worker: int) -> None:
    starter = multiprocessing.parent_process()
    until(lambda: starter is not None and os.getppid() != starter.pid)
    _hang(worker)


@pytest.mark.parametrize(("killed", "hang"), [(False, _hang), (True, _hang), (True, _hang_as_an_orphan)])
def test_a_loader_that_hangs_ends_with_its_parent(killed: bool, hang: Callable[[int], None]) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        batches = iter(DataLoader(list(range(2)), num_workers=1, worker_init_fn=hang))  # type: ignore[arg-type]
        sender.send(descendants(os.getpid()))
        if killed:
            time.sleep(LONG)
        batches._workers[0].terminate()
        batches._workers[0].join()
        os._exit(0)
    (loader,) = receiver.recv()
    if killed:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    until(lambda: not runs(loader))


@pytest.mark.parametrize(
    ("epochs", "share", "stops"),
    # An epoch has seven or three steps. Stop after the last step of an epoch, then within the next epoch.
    [
        (2, 1.0, (7, 8, 10)),
        (2, 0.5, (3, 5)),
        pytest.param(15, 1.0, range(1, 105), marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_stopped_again_and_again_under_clocks_that_jump(
    epochs: int, share: float, stops: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop a stage after each of `stops`. It must leave the same files as an uninterrupted stage."""
    layer = _layer()
    layer["trainer"] |= {"max_epochs": epochs, "limit_train_batches": share}
    whole, resumed = (request("avid/avid", tmp_path / name, layer=layer) for name in ("whole", "resumed"))
    records = [run_stage(whole)]
    original, now = AVIDModule.training_step, time.time
    hours = np.random.default_rng(0)

    def training_step(self: AVIDModule, inputs: Any, batch_idx: int) -> Any:
        if self.trainer.global_step + 1 in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, inputs, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AVIDModule, "training_step", training_step)
        for _ in stops:
            shift = 3600 * int(hours.integers(-48, 49))
            patch.setattr(time, "time", lambda shift=shift: now() + shift)
            with pytest.raises(Preempted):
                run_stage(resumed)
            for path in resumed.directory.rglob("*"):
                os.utime(path, (now() - shift, now() - shift))
    records.append(run_stage(resumed))
    compare(whole.directory, resumed.directory)
    assert records[0].metrics == records[1].metrics
    assert 0 < records[1].wall_seconds < 3600


def test_a_signal_during_the_test_ends_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = request("avid/avid", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(AVIDModule, "test_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert _run_in_child(stage) == 143
    assert torch.load(stage.directory / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert not (stage.directory / "record.json").exists()


#: The signal comes after rank 0 began the first call and rank 1 finished the second call.
MOMENTS: dict[str, tuple[tuple[Any, str], tuple[Any, str]]] = {
    "joining": ((torch.distributed, "init_process_group"), (run, "prepare_folder")),
    "training": ((pl.Trainer, "fit"), (preemption.Preemption, "on_train_batch_start")),
    "trained": ((pl.Trainer, "test"), (pl.Trainer, "save_checkpoint")),
    "testing": ((preemption.Preemption, "on_test_epoch_end"), (preemption.Preemption, "on_test_start")),
}


def _run_rank(rank: int, stage: StageRequest, moment: str, port: str) -> None:
    """Run a rank as Lightning starts it. Send SIGTERM at `moment` to both ranks, or in training to rank 1 only."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    owner, name = MOMENTS[moment][rank]
    original, reached = getattr(owner, name), stage.runs / "reached"

    def begun(*args: Any, **named: Any) -> Any:
        reached.touch()
        return original(*args, **named)

    def ended(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        until(reached.exists)
        os.kill(os.getpid() if moment == "training" else 0, signal.SIGTERM)
        return result

    setattr(owner, name, ended if rank else begun)
    run_stage(stage)


def _start_rank(rank: int, stage: StageRequest, moment: str, port: str) -> int:
    """Run a rank in a new process, and return the ID of this process."""
    if process := os.fork():
        return process
    status = 1
    try:
        _run_rank(rank, stage, moment, port)
    except (Preempted, SystemExit) as stop:
        status = stop.status if isinstance(stop, Preempted) else stop.code
    finally:
        os._exit(status)


@pytest.mark.parametrize(
    ("name", "moment", "step"),
    [
        ("avid/avid_joint", "joining", None),
        ("avid/avid_joint", "training", 1),
        ("avid/avid_joint", "trained", 14),
        ("avid/avid_joint", "testing", 14),
        ("vx2text/avsd", "joining", None),
    ],
)
def test_two_ranks_end_soon_after_the_same_step(
    name: str, moment: str, step: int | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both ranks must end, even if one waits for the other, which has already ended."""
    without = vx2text.WITHOUT_PARENTS if name == "vx2text/avsd" else []
    stage, port = request(name, tmp_path, *without, layer=over(_layer(), 2)), free_port()
    group = os.fork()
    if group == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, lambda *_: None)  # ranks would keep ignoring a signal that is ignored here
        # If one rank started the other and ended first, the other would end with it.
        processes = [_start_rank(rank, stage, moment, port) for rank in range(2)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        (tmp_path / "statuses").write_text(str(statuses), encoding="utf-8")
        os._exit(0)
    try:
        until((tmp_path / "reached").exists)
        until(lambda: not group_runs(group), "a rank waits", LONG / 2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        os.waitpid(group, 0)
    # If rank 1 returned an error, the launcher would kill rank 0 before rank 0 saved the checkpoint.
    assert (tmp_path / "statuses").read_text(encoding="utf-8") == str([128 + signal.SIGTERM, 0])
    assert "Traceback" not in capfd.readouterr().out
    last = stage.directory / "checkpoints" / "last.ckpt"
    assert (torch.load(last, weights_only=True)["global_step"] if last.exists() else None) == step


@pytest.mark.parametrize(
    ("own", "answers", "expected"),
    [
        (None, [True, False], signal.SIGTERM),  # another rank got the signal
        (signal.SIGINT, [True, False], signal.SIGINT),
        (signal.SIGUSR1, [True, True], signal.SIGUSR1),
        (None, [False], None),
    ],
)
def test_ranks_agree_on_a_signal(
    own: int | None, answers: list[bool], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, deadlines = Path("last.ckpt"), Mock()
    monkeypatch.setattr(STOP, "received", own)
    monkeypatch.setattr(stopping, "allow", deadlines)
    trainer = Mock(world_size=2, global_step=10)
    trainer.fit_loop._should_accumulate.return_value = False
    decide = trainer.strategy.reduce_boolean_decision
    decide.side_effect = answers
    callback, done = preemption.Preemption(path), expected is not None
    callback.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    mine = [call(own is not None, all=False), call(own == signal.SIGUSR1, all=False)]
    assert decide.call_args_list == mine[: len(answers)]
    assert (callback.signal, callback.saved_step) == ((expected, 10) if done else (None, None))
    assert trainer.save_checkpoint.call_args_list == [call(path)] * done
    assert deadlines.call_args_list == [call(20 * LONG), call(60.0)] * done


def test_a_job_is_requeued_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pending = "Job is pending execution for job 4711"
    outcomes = [
        Mock(returncode=1, stderr=" no\n"),
        OSError("gone"),
        Mock(returncode=0),
        Mock(returncode=1, stderr=pending),
    ]
    run = Mock(side_effect=outcomes)
    monkeypatch.setattr(preemption.subprocess, "run", run)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    requeue = preemption._requeue.__wrapped__
    for _ in outcomes:
        requeue()
    failed = "  job 4711 could not be requeued ({}); submit it again to resume"
    requeued = "  job 4711 was requeued"  # SLURM's answer if another process already requeued the job
    assert capsys.readouterr().out.splitlines() == [failed.format("no"), failed.format("gone"), requeued, requeued]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "47")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    run.side_effect = [Mock(returncode=0)]
    requeue()
    assert capsys.readouterr().out == "  job 47_3 was requeued\n"
    assert run.call_args.args == (["scontrol", "requeue", "47_3"],)


def _of_rank(started: Any, gone: Any) -> None:
    stopping.end_with_parent(0.05)
    started.set()
    gone.wait()  # simulates a collective that no other rank enters


def _of_launcher(started: Any, gone: Any, rank: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=_of_rank, args=(started, gone))
    process.start()
    rank.send(process.pid)
    process.join()


def test_a_rank_ends_with_the_process_that_started_it(capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("fork")
    started, gone = context.Event(), context.Event()
    receiver, sender = context.Pipe(duplex=False)
    launcher = context.Process(target=_of_launcher, args=(started, gone, sender))
    launcher.start()
    rank = receiver.recv()
    assert started.wait(LONG)
    launcher.kill()
    launcher.join()
    until(lambda: not runs(rank))
    assert capfd.readouterr() == ("", "rank ? stops: its parent process died\n")


def test_a_run_is_closed_before_its_job_is_requeued(tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close the W&B run before requeuing, since SLURM ends W&B's process with the job."""
    order: list[str] = []
    monkeypatch.setattr(preemption, "_requeue", lambda: order.append("requeue"))
    logger = Mock(**{"finish.side_effect": lambda *_, **__: order.append("finish")})
    monkeypatch.setattr(training, "_wandb_of", lambda *_: logger)
    _signal_at(signal.SIGUSR1, 2, monkeypatch)
    with pytest.raises(Preempted):
        run_stage(request("avid/avid_joint", tmp_path, layer=_layer(1)))
    assert order[:2] == ["finish", "requeue"]
