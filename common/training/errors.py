"""Errors that end a stage with a message for its user and not a traceback."""

from __future__ import annotations


class StageError(RuntimeError):
    """A stage cannot run or go on; the message says why and what to do."""


class NonFiniteLossError(StageError):
    """The loss became infinite or not a number."""
