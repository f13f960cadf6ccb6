"""Recognize rank 0, and check that the number of processes matches the configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from common.errors import StageError

#: In SLURM jobs with these names, Lightning starts the processes itself.
_INTERACTIVE = ("bash", "interactive")


def is_main_process() -> bool:
    """Check whether this is rank 0, which manages folders. Torchrun's rank takes precedence over SLURM's."""
    names = ("RANK",) if "TORCHELASTIC_RUN_ID" in os.environ else ("LOCAL_RANK", "RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name, "0")) == 0 for name in names)


def require_processes(trainer: Mapping[str, Any]) -> None:
    """Refuse a number of processes other than `devices` times `num_nodes`.

    Otherwise eight processes could write into one folder, or one process could leave seven GPUs idle. In a SLURM batch
    script without `srun`, remove `SLURM_NTASKS`, since Lightning starts all processes of a stage on one node.
    """
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if not isinstance(devices, int) or not isinstance(nodes, int) or devices < 1:
        return  # Lightning counts the devices for "auto" or a list
    wanted, interactive = devices * nodes, os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = int(os.environ["WORLD_SIZE"])
    elif "SLURM_NTASKS" in os.environ and not interactive:
        # A batch script is one process, regardless of its tasks.
        started = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if nodes == 1 and "SLURM_STEP_NUM_TASKS" not in os.environ:
            os.environ.pop("SLURM_NTASKS")
            return
    elif interactive and os.environ.get("SLURM_PROCID", "0") != "0" and "LOCAL_RANK" not in os.environ:
        raise StageError(
            "srun started several processes of a job named bash, which Lightning takes for an interactive shell: "
            "give srun another --job-name"
        )
    elif nodes == 1:
        return
    else:
        started = 1
    if started != wanted:
        raise StageError(
            f"{started} process{'es were' if started > 1 else ' was'} started, but the configuration needs {wanted}: "
            f"--trainer.devices {devices} on each of --trainer.num_nodes {nodes}. Start that many with srun or "
            "torchrun (docs/cluster.md), or change these two, for example in a file for --hardware"
        )
