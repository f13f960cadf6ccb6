"""Check that a stage gives one record and the same weights with torchrun and srun, and as a plan for sbatch."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from assemble.commands.main import main
from assemble.reporting.papers import project_root
from tests.distributed.harness import free_port
from tests.distributed.small_mct import small_layer
from tests.distributed.stages import over, train
from tests.machine import LONG, promised, until
from tests.stages import request

MODULE = "assemble"


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **more}


def _task(command: list[str], environment: dict[str, str]) -> str:
    """Run a command in a new process, and return its output."""
    os.environ.update(environment)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(command)
    assert status == 0, printed.getvalue()
    return printed.getvalue()


def _srun(command: list[str]) -> str:
    """Run a command as `srun` does with two tasks on one node. The tasks are forks, which saves the imports."""
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "stage", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    tasks = [{**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as processes:
        return "".join(processes.map(_task, [command] * 2, tasks, timeout=LONG))


def _torchrun(command: list[str]) -> str:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "-m", MODULE]
    done = subprocess.run(
        [sys.executable, *launcher, *command], env=_environment(), cwd=project_root(), text=True, timeout=LONG,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_torchrun_and_srun_equal_one_process(tmp_path: Path) -> None:
    one = train(request("mct/mct_tag", tmp_path / "one", layer=over(small_layer({"queue_size": 64}), 1)))
    layer = tmp_path / "two.yaml"
    layer.write_text(yaml.safe_dump(over(small_layer({"queue_size": 64}), 2)), encoding="utf-8")
    for launcher in (_torchrun, _srun):
        runs = tmp_path / launcher.__name__
        options = ["--scale", "smoke", "--runs", str(runs), "--config", str(layer)]
        printed = launcher(["fit", "mct/mct_tag", *options])
        assert printed.count("record: ") == 1  # only one process prints
        (record,) = runs.rglob("record.json")
        state = torch.load(next(runs.rglob("last.ckpt")), weights_only=True)["state_dict"]
        for name, expected in one["state"].items():
            # With two processes, the rows of a batch enter the queues in another order.
            if isinstance(expected, Tensor) and not name.startswith("loss."):
                torch.testing.assert_close(
                    state[name], expected, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert json.loads(record.read_text(encoding="utf-8"))["metrics"].keys() == one["metrics"].keys()


# -- sbatch ------------------------------------------------------------------------------------------------------------


def _plan(paper: str, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["plan", paper, "--format", "slurm", *options]) == 0
    return capsys.readouterr().out


# -- a real SLURM ------------------------------------------------------------------------------------------------------

CONFIGURATION = """ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
AuthType=auth/munge
AuthInfo=socket={folder}/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
MessageTimeout=100
BatchStartTimeout=500
KillWait=500
UnkillableStepTimeout=500
MailProg=/bin/true
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000
PartitionName=tests Nodes={host} Default=YES
"""
DAEMONS = ("munged", "slurmctld", "slurmd")


class Cluster:
    """Run SLURM with one node on the loopback device, for these tests only."""

    def __init__(self, folder: Path) -> None:
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key, self.file = folder / "key", folder / "slurm.conf"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        text = CONFIGURATION.format(host=host, control=free_port(), node=free_port(), folder=folder)
        self.file.write_text(text, encoding="utf-8")
        munge = {"key": "key", "socket": "munge", "pid": "munge.pid", "log": "munge.log", "seed": "seed"}
        files = [f"--{name}-file={folder / path}" for name, path in munge.items() if name != "socket"]
        commands = [
            ["munged", "--force", "--foreground", f"--socket={folder / 'munge'}", *files],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D"],
        ]
        self.address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}  # the host's name may not resolve
        self.daemons = []
        for command in commands:
            with (folder / f"{command[0]}.out").open("wb") as out:
                self.daemons.append(subprocess.Popen(command, env=self.environment(), stdout=out, stderr=out))
            until((folder / "munge").exists)
        until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"))

    def environment(self, **more: str) -> dict[str, str]:
        return _environment(SLURM_CONF=str(self.file), **self.address, **more)

    def ask(self, *command: str, **more: str) -> str:
        done = subprocess.run(
            command, env=self.environment(**more), capture_output=True, text=True, timeout=LONG, check=False
        )
        return (done.stdout + done.stderr).strip()

    def state(self, job: str) -> str:
        return until(lambda: re.search(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job)))[1]

    def close(self) -> None:
        self.ask("scancel", "--user=root", "--full", "--signal=KILL")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(LONG)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not promised("slurm") and not (all(map(shutil.which, DAEMONS)) and os.getuid() == 0):
        pytest.skip("needs slurmctld, slurmd, munged and root")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    yield made
    made.close()


def _submitted(cluster: Cluster, script: str) -> list[str]:
    """Submit a printed plan, and return the job numbers."""
    variables = re.findall(r"^(stage_\d+)=", script, re.MULTILINE)
    return cluster.ask("sh", "-c", "\n".join([script, f"echo {' '.join(f'${name}' for name in variables)}"])).split()


def test_slurm_runs_a_plan_and_cancels_what_waits_for_a_failed_stage(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A percent sign in the folder's name must not count as a placeholder in SLURM's file name pattern.
    selected = ["--scale", "smoke", "--stages", "esc@avid"]
    scripts = {
        name: _plan("avid", *selected, "--seeds", str(seed), "--runs", str(tmp_path / f"{name} 5%x"), capsys=capsys)
        for seed, name in enumerate(("whole", "broken"))
    }
    whole = _submitted(cluster, scripts["whole"])
    wrong = scripts["broken"].replace("fit avid_cma/avid ", "fit avid_cma/avid --trainer.devices 2 ")
    broken = _submitted(cluster, wrong)
    assert len(whole) == len(broken) == 2
    until(lambda: not cluster.ask("squeue", "-h"))
    logs = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("slurm/*.log")}
    assert [cluster.state(job) for job in whole] == ["COMPLETED"] * 2, logs
    assert [cluster.state(job) for job in broken] == ["FAILED", "CANCELLED"], logs
    assert {path.parents[4].name for path in tmp_path.rglob("record.json")} == {"whole 5%x"}
    (log,) = (tmp_path / "broken 5%x").rglob("*.log")
    assert "1 process was started, but the configuration needs 2" in log.read_text(encoding="utf-8")


def test_slurm_requeues_and_cancels_a_stage_with_loaders(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM sends each signal to every process, including the data loaders and W&B's process."""
    layer, log = tmp_path / "long.yaml", tmp_path / "log"
    long = {"trainer": {"max_epochs": 10_000, "log_every_n_steps": 1}, "data": {"init_args": {"num_workers": 1}}}
    layer.write_text(yaml.safe_dump(long), encoding="utf-8")
    fit = f"{sys.executable} -m {MODULE} fit avid/avid --scale smoke --runs {tmp_path} --config {layer}"
    options = ["--requeue", "--signal=USR1@120", "--open-mode=append", f"--output={log}", "--cpus-per-task=2"]
    job = cluster.ask("sbatch", "--parsable", *options, f"--wrap=srun --cpus-per-task=2 {fit}", WANDB_MODE="offline")

    def trains(after: int) -> bool:
        (curves,) = list(tmp_path.rglob("metrics.csv")) or [None]
        return curves is not None and f"\n{after}," in curves.read_text(encoding="utf-8")

    until(lambda: trains(3))
    cluster.ask("scancel", "--signal=USR1", job)
    until(lambda: cluster.state(job) == "PENDING")
    text = log.read_text(encoding="utf-8")
    saved = re.search(r"stopped by SIGUSR1 after step (\d+) and saved", text)
    assert saved is not None, text
    assert text.count(f"job {job} was requeued") == 1, text
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # by default, SLURM waits for two minutes
    until(lambda: trains(int(saved[1]) + 3))
    cluster.ask("scancel", job)
    until(lambda: cluster.state(job) == "CANCELLED" and "stopped by SIGTERM" in log.read_text(encoding="utf-8"))
    text = log.read_text(encoding="utf-8")
    assert f"resumes from step {saved[1]}" in text
    assert "stopped by SIGTERM after step " in text, text
    assert "Traceback" not in text, text
    runs = [path.stem for path in tmp_path.rglob("run-*.wandb")]
    assert len(runs) == 2
    assert len(set(runs)) == 1


def test_slurm_runs_a_stage_with_two_tasks(cluster: Cluster, tmp_path: Path) -> None:
    layer, log = tmp_path / "two.yaml", tmp_path / "log"
    layer.write_text(yaml.safe_dump(over(small_layer({"queue_size": 64}), 2)), encoding="utf-8")
    fit = f"{sys.executable} -m {MODULE} fit mct/mct_tag --scale smoke --runs {tmp_path} --config {layer}"
    options = ["--parsable", "--nodes=1", "--ntasks-per-node=2", f"--output={log}"]
    job = cluster.ask("sbatch", *options, f"--wrap=srun --kill-on-bad-exit=1 {fit}")
    until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"))
    text = log.read_text(encoding="utf-8")
    assert text.count("record: ") == 1, text
    assert len(list(tmp_path.rglob("record.json"))) == 1
