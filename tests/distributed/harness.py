"""Run a function in several connected processes on this machine."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.machine import LONG, group_runs, until


def run_distributed(function: Callable[..., Any], world_size: int = 2, *args: Any) -> list[Any]:
    """Call `function(rank, *args)` in `world_size` forked processes joined by gloo.

    Args:
        function: a module-level function or a closure. The processes are forked, so the arguments aren't pickled.
        world_size: number of processes.
        *args: passed on.

    Returns:
        The results of the processes in rank order. Tensors are converted to NumPy arrays.

    Raises:
        AssertionError: when a process raises (with its traceback), dies or is late.
    """
    context = multiprocessing.get_context("fork")
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(sender, rank, world_size, f"file://{folder}/store", function, args)
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
            while waiting:
                ready = wait(list(waiting), LONG)
                if not ready:
                    raise AssertionError(f"rank(s) {sorted(waiting.values())} gave no answer within {LONG} s")
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    try:
                        succeeded, value = pipes[rank].recv()
                    except EOFError:
                        processes[rank].join(LONG)
                        raise AssertionError(f"rank {rank} died with code {processes[rank].exitcode}") from None
                    if not succeeded:
                        raise AssertionError(f"rank {rank} raised:\n{value}")
                    results[rank] = value
        finally:
            for process in processes:
                process.join(1 if len(results) == world_size else 0)
                if process.is_alive():
                    process.kill()
                    process.join()
    return [results[rank] for rank in range(world_size)]


def _child(sender: Connection, rank: int, world_size: int, store: str, function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the machine's name may not resolve
    try:
        dist.init_process_group("gloo", store, timedelta(seconds=LONG), world_size, rank)
        value = _plain(function(rank, *args))
        dist.barrier()  # wait until no process needs another one
        sender.send((True, value))
        dist.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)  # a forked test process must not run the parent's exit hooks


def _plain(value: Any) -> Any:
    # A tensor would be sent as shared memory, which is freed when the child process ends.
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@contextmanager
def ending_as_a_group(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Check that all processes of a session end after the block, and kill the rest."""
    try:
        yield
        until(lambda: not group_runs(process.pid), "a process is left")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


#: Each pytest worker has its own range of two thousand ports, and uses no port twice.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.count(10_000 + 2_000 * (_WORKER % 10) + os.getpid() % 1_000)


def free_port() -> str:
    """Return a port below the system's range of temporary ports, so that no other process takes the port meanwhile."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return str(port)
    raise AssertionError
