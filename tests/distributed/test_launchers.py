"""The same stage through torchrun, through srun, and as a plan that sbatch takes: one record, equal weights."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from common.commands.main import main
from common.reporting.papers import existing_papers, project_root
from tests.distributed.small_mct import small_layer
from tests.distributed.stages import over, train
from tests.stages import request

MODULE = "common.commands.main"


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _srun(command: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """What `srun` would start on one node with two tasks."""
    task = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "stage", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(),
    }  # fmt: skip
    return [
        (
            [sys.executable, "-m", MODULE, *command],
            _environment(**task, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
        )
        for rank in range(2)
    ]


def _torchrun(command: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", _free_port(), "-m", MODULE]
    return [([sys.executable, *launcher, *command], _environment())]


@pytest.mark.timeout(600)
def test_torchrun_and_srun_equal_one_process(tmp_path: Path) -> None:
    one = train(request("mct/mct_tag", tmp_path / "one", layer=over(small_layer({"queue_size": 64}), 1)))
    layer = tmp_path / "two.yaml"
    layer.write_text(yaml.safe_dump(over(small_layer({"queue_size": 64}), 2)), encoding="utf-8")
    for launcher in (_torchrun, _srun):
        runs = tmp_path / launcher.__name__
        options = ["--scale", "smoke", "--runs", str(runs), "--config", str(layer)]
        started = [
            subprocess.Popen(
                line, env=environment, cwd=project_root(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for line, environment in launcher(["fit", "mct/mct_tag", *options])
        ]
        outputs = [process.communicate(timeout=280)[0] for process in started]
        assert [process.returncode for process in started] == [0] * len(started), outputs
        assert "".join(outputs).count("record: ") == 1  # one process speaks
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


def _options(line: str) -> dict[str, str]:
    words = shlex.split(line.split("=$(", 1)[1].removesuffix(")"))
    return dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])


@pytest.mark.parametrize("paper", [paper.name for paper in existing_papers()])
def test_every_stage_is_submitted_with_what_it_can_use(
    paper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = ("0", "1") if paper == "xmc_gan" else ("0",)
    selected = ["--scale", "paper", "--hardware", "slurm", "--runs", str(tmp_path), "--seeds", *seeds]
    script = _plan(paper, *selected, capsys=capsys)
    lines = [line for line in script.splitlines() if "$(sbatch " in line]
    known: dict[str, str] = {}
    for line in lines:
        variable, options = line.split("=", 1)[0], _options(line)
        seed = options["job-name"].rpartition("-s")[2]
        for parent in re.findall(r"\$(\w+)", options["dependency"]):
            assert known[parent] == seed  # submitted before, and of the same seed
        known[variable] = seed
        assert options["dependency"].endswith("singleton")
        assert options["signal"] == "USR1@120"
        assert options["kill-on-invalid-dep"] == "yes"
        assert {"requeue", "parsable"} <= options.keys()
        assert options["gres"] == f"gpu:{options['ntasks-per-node']}"
        assert f"--seed {seed} " in options["wrap"]
        assert options["wrap"].startswith(f"srun --cpus-per-task={options['cpus-per-task']} --kill-on-bad-exit=1 ")
        if re.search(r"(esc|dcase|voc07_svm)@|-(esc|dcase|voc07_svm)", options["job-name"]):
            assert options["ntasks-per-node"] == "1"
    names = [_options(line)["job-name"] for line in lines]
    assert len(set(names)) == len(names) > 1
    assert len({_options(line)["output"].replace("%x", name) for line, name in zip(lines, names)}) == len(names)
    four = {name for name, line in zip(names, lines) if _options(line)["nodes"] == "4"}
    if paper in {"avid_cma", "xmc_gan"}:
        assert four
    if paper in {"m3p", "mct", "vx2text"}:
        assert not four
    assert not [name for name in four if "@" in name]  # what is measured on top of a model takes one node


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


@pytest.mark.timeout(600)
def test_a_submitted_plan_runs_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    output = (tmp_path / "log.out").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stderr + output
    submitted = log.read_text(encoding="utf-8").splitlines()
    names = [re.search(r"--job-name=(\S+)", line)[1] for line in submitted]  # type: ignore[index]
    assert names == ["avid_cma-avid-smoke-s0", "avid_cma-esc@avid-smoke-s0"]
    found = [re.search(r"--dependency=(\S+)", line)[1] for line in submitted]  # type: ignore[index]
    assert found == ["singleton", "afterok:101,singleton"]
    assert (runs / "avid_cma" / "smoke" / "slurm").is_dir()
    assert len(list(runs.rglob("record.json"))) == 2
    assert "sbatch" not in _plan("avid", *selected, capsys=capsys)  # nothing is left
