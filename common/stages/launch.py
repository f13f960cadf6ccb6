"""Who started this process, and whether the number of processes matches the configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from common.errors import StageError

#: Names of SLURM jobs in which Lightning still starts its processes itself.
_INTERACTIVE = ("bash", "interactive")


def is_main_process() -> bool:
    """Whether this process is rank 0 and manages folders; torchrun's rank counts before SLURM's, which differs."""
    names = ("RANK",) if "TORCHELASTIC_RUN_ID" in os.environ else ("LOCAL_RANK", "RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)


def require_processes(trainer: Mapping[str, Any]) -> None:
    """Refuse a stage whose launcher started a number of processes other than `devices` times `num_nodes`.

    Otherwise eight independent processes would write into one folder, or a single one would leave seven GPUs idle. A
    SLURM batch script that starts a one-node stage without `srun` is no launcher: Lightning then starts the processes,
    for which `SLURM_NTASKS` is removed from the environment.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if not isinstance(devices, int) or not isinstance(nodes, int) or devices < 1:
        return  # "auto", or a list of cards: Lightning counts
    wanted, interactive = devices * nodes, os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = int(os.environ["WORLD_SIZE"])
    elif "SLURM_NTASKS" in os.environ and not interactive:
        # A batch script is one process, whatever its number of tasks.
        started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if nodes == 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
            os.environ.pop("SLURM_NTASKS")
            return
    elif interactive and os.environ.get("SLURM_PROCID", "0") != "0" and "LOCAL_RANK" not in os.environ:
        raise StageError(
            "srun started several processes of a program called bash, which Lightning takes for a shell in which it "
            "starts the processes itself: give srun --job-name"
        )
    elif nodes == 1:
        return
    else:
        started = 1
    if started != wanted:
        raise StageError(
            f"{started} process{'es were' if started > 1 else ' was'} started, and the configuration wants {wanted}: "
            f"--trainer.devices {devices} on each of --trainer.num_nodes {nodes}. Start as many, with srun or torchrun "
            "(docs/cluster.md), or give these two as they are; --hardware names a file with both"
        )
