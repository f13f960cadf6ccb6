"""Errors that end a stage with a message for its user and not a traceback."""

from __future__ import annotations


class StageError(RuntimeError):
    """A stage cannot run or go on; the message says why and what to do."""


class NonFiniteLossError(StageError):
    """The loss became infinite or not a number."""


class Preempted(KeyboardInterrupt):
    """A signal asked the process to end; the stage goes on where it was when it is started again.

    Args:
        signal: number of the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal

    @property
    def status(self) -> int:
        """Exit status that shells give to such an end."""
        return 128 + self.signal


def is_ours(error: BaseException) -> bool:
    """Whether an error is of a class of this suite, whose message is worded for its user: then where adds nothing."""
    return type(error).__module__.partition(".")[0] in ("common", "papers")
