"""The same stage through torchrun, through srun, and as a plan that sbatch takes: one record, equal weights."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
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
from tests.machine import LONG
from tests.stages import request

MODULE = "assemble.commands.main"


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "GLOO_SOCKET_IFNAME": "lo", **more}


def _task(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints, in a process that is its own."""
    os.environ.update(environment)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command) == 0
    return printed.getvalue()


def _srun(command: list[str]) -> str:
    """What `srun` would start on one node with two tasks; as forks, since they need not import all again."""
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
        assert printed.count("record: ") == 1  # one process speaks
        (record,) = runs.rglob("record.json")
        state = torch.load(next(runs.rglob("last.ckpt")), weights_only=True)["state_dict"]
        for name, expected in one["state"].items():
            # Rows of a batch stand in another order in the queues.
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


SBATCH = """#!/bin/sh
# Runs a job at once, as its dependencies are done by then, and prints a number for it.
id=$(($(wc -l < "$LOG") + 101))
printf '%s\\n' "$*" >> "$LOG"
for word in "$@"; do case "$word" in --wrap=*) job=${word#--wrap=};; esac; done
SLURM_JOB_ID=$id SLURM_JOB_NAME=stage sh -c "$job" >> "$LOG.out" 2>&1 || exit 1
echo "$id"
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
export SLURM_NODELIST=localhost
exec "$@"
"""


def test_a_submitted_plan_runs_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log"
    selected = ["--scale", "smoke", "--runs", str(runs), "--stages", "esc@avid"]
    script = _plan("avid", *selected, capsys=capsys)
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    log.touch()
    done = subprocess.run(
        ["sh", "-c", script], env=_environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", LOG=str(log)),
        capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    output = (tmp_path / "log.out").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stderr + output
    submitted = log.read_text(encoding="utf-8").splitlines()
    names = [re.search(r"--job-name=(\S+)", line)[1] for line in submitted]  # type: ignore[index]
    assert names == ["avid_cma-avid-smoke-s0", "avid_cma-esc@avid-smoke-s0"]
    for line in submitted:  # what a job needs to be stopped, queued again, and never to wait for one that failed
        assert {"--requeue", "--signal=USR1@120", "--kill-on-invalid-dep=yes"} <= set(line.split())
    found = [re.search(r"--dependency=(\S+)", line)[1] for line in submitted]  # type: ignore[index]
    assert found == ["singleton", "afterok:101,singleton"]
    assert (runs / "avid_cma" / "smoke" / "slurm").is_dir()
    assert len(list(runs.rglob("record.json"))) == 2
    assert "sbatch" not in _plan("avid", *selected, capsys=capsys)  # nothing is left
