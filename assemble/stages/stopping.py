"""Stop a command on a signal at the next `STOP.check`. Raising in a handler could interrupt an import or C code."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from assemble.stages.launch import is_main_process
from common.errors import STOP

#: SLURM sends this signal before a job ends (`sbatch --signal`). The job then requeues itself.
REQUEUE_SIGNAL = signal.SIGUSR1
#: Seconds from a signal to the next `STOP.check`. After that, the process ends without saving.
PATIENCE = 45.0


class _Listener:
    """Forwards signals to child processes, in a thread that runs even while C code blocks the main thread."""

    def __init__(self) -> None:
        self.children: list[Callable[[int], object]] = []
        self.last_calls: list[Callable[[int], object]] = []
        self.patience, self.deadline = PATIENCE, 0.0
        wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        wanted += [REQUEUE_SIGNAL] if "SLURM_JOB_ID" in os.environ else []
        # Ignored signals stay ignored, as under nohup.
        self._before = {number: was for number in wanted if (was := signal.getsignal(number)) != signal.SIG_IGN}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self._before:
            signal.signal(number, self._note)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)
        STOP.received = None

    def forget(self) -> None:
        """Detach the listener in a forked child (a loader process), which must not write into its parent's pipe."""
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        STOP.received = None
        with suppress(OSError):  # else the parent's `close` would wait for this process
            os.close(self._writer)
            os.close(self._reader)

    def _note(self, number: int, frame: object) -> None:
        STOP.received = STOP.received or number

    def _watch(self) -> None:
        poll, first = select.poll(), True
        poll.register(self._reader)
        while True:
            numbers = os.read(self._reader, 64) if poll.poll(500 if self.deadline else None) else None
            if numbers == b"":
                return
            for number in numbers or b"":
                if number in self._before and first:
                    first = False
                    STOP.received = STOP.received or number
                    # The main thread may have extended the deadline.
                    self.deadline = max(self.deadline, time.monotonic() + self.patience)
                    # A child that gets SIGINT twice would end without saving.
                    self._tell(signal.SIGTERM if number == signal.SIGINT else number)
                    if number == signal.SIGINT and is_main_process() and os.isatty(2):
                        os.write(2, b"\nstopping; Ctrl-C again stops at once\n")
                elif number == signal.SIGINT:
                    self._end()
            if self.deadline and not self.children and time.monotonic() > self.deadline:
                self._end()

    def _tell(self, number: int) -> None:
        for tell in list(self.children):
            with suppress(OSError):
                tell(number)

    def _end(self) -> None:
        self._tell(signal.SIGKILL)
        # Print in a thread: the main thread may hold the lock of a stream.
        last = threading.Thread(target=self._last_words, daemon=True)
        last.start()
        last.join(30.0 if STOP.received == REQUEUE_SIGNAL else 10.0)
        # If a rank fails, its launcher kills rank 0, which may be requeueing.
        os._exit(128 + (STOP.received or signal.SIGTERM) if is_main_process() else 0)

    def _last_words(self) -> None:
        for call in reversed(self.last_calls):
            call(STOP.received or signal.SIGTERM)
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a live display hides the cursor
        print("stopped at once; rerun the command to resume from the last checkpoints", flush=True)


_listener: _Listener | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Note SIGTERM, Ctrl-C, SIGHUP and, under SLURM, SIGUSR1, then raise `Preempted`. A nested call does nothing."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = _Listener()
    try:
        yield
        STOP.check()
    except Exception as error:
        STOP.check(error)
        raise
    finally:
        _listener.close()
        _listener = None


def allow(seconds: float) -> None:
    """Allow `seconds` from a signal to the next `STOP.check`. If a signal already came, count the seconds from now."""
    if _listener is not None:
        _listener.patience = seconds
        if STOP.received is not None:
            _listener.deadline = time.monotonic() + seconds


@contextmanager
def waiting_for(child: Callable[[int], object]) -> Iterator[None]:
    """Forward signals to child processes by calling `child`, Ctrl-C as SIGTERM. Children die with this process."""
    listener = _listener
    if listener is None:
        yield
        return
    listener.children.append(child)
    try:
        yield
    finally:
        allow(PATIENCE)
        listener.children.remove(child)


def at_end(call: Callable[[int], object]) -> None:
    """Register `call`, to be called with the signal if this process ends without saving. Run later calls first."""
    if _listener is not None:
        _listener.last_calls.append(call)


def end_with_parent(seconds: float = 1.0, by: signal.Signals = signal.SIGKILL) -> None:
    """End this process, a rank or a worker, soon after its parent dies.

    Otherwise a rank waits half an hour for the other ranks and keeps its memory and device. A rank blocked in a
    collective only responds to SIGKILL. With `by=SIGTERM`, a training stage saves before it ends.
    """
    from multiprocessing import parent_process

    starter = parent_process()  # known even if it has died
    parent = os.getppid() if starter is None else starter.pid

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        print(f"rank {os.environ.get('LOCAL_RANK', '?')} stops: its parent process died", file=sys.stderr)
        os.kill(os.getpid(), by)

    threading.Thread(target=watch, name="parent-observer", daemon=True).start()


def _in_forked_child() -> None:
    global _listener
    if _listener is not None:
        _listener.forget()
        _listener = None


os.register_at_fork(after_in_child=_in_forked_child)
