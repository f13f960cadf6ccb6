"""Who started this process, and whether as many were started as the configuration spreads a stage over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from common.errors import StageError

#: Names of jobs in which Lightning starts its processes itself, SLURM or not.
_INTERACTIVE = ("bash", "interactive")


def is_main_process() -> bool:
    """Whether this is the process that manages folders: not one that Lightning, torchrun or SLURM started beside it.

    torchrun numbers the processes of a job of SLURM in an order of its own, so that its number alone counts.
    """
    names = ("RANK",) if "TORCHELASTIC_RUN_ID" in os.environ else ("LOCAL_RANK", "RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)


def require_processes(trainer: Mapping[str, Any]) -> None:
    """Refuse a stage whose launcher started other than `devices` times `num_nodes` processes.

    Eight that know nothing of each other would write into one folder, and one that takes itself for all of a job of
    SLURM would leave seven GPUs idle. A batch script that starts a stage of one node without `srun` is no launcher:
    Lightning then starts the processes, for which `SLURM_NTASKS` is taken out of this process's environment.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if not isinstance(devices, int) or not isinstance(nodes, int) or devices < 1:
        return  # "auto", or a list of cards: Lightning counts
    wanted, interactive = devices * nodes, os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = int(os.environ["WORLD_SIZE"])
    elif "SLURM_NTASKS" in os.environ and not interactive:
        # A batch script is one process, however many tasks it may start.
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
