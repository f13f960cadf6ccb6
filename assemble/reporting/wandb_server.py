"""Find the Weights & Biases server, check for a key, and check that the server answers."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import build_opener

from common.errors import ReportingError, nearest

_T = TypeVar("_T")

PATIENCE_SECONDS = 3.0
"""Timeout of a request."""

NO_KEY = "no key (WANDB_API_KEY or `wandb login`)"


#: Values that the client accepts. For other values, it prints pages of text and logs nothing.
_SWITCH = ("true", "false", "1", "0")
_VALUES = {
    "WANDB_MODE": ("online", "offline", "disabled"), "WANDB_SILENT": _SWITCH, "WANDB_QUIET": _SWITCH,
}  # fmt: skip


def check_environment() -> None:
    """Refuse settings that W&B's client cannot handle. An empty variable counts as unset."""
    for name in [name for name, value in os.environ.items() if name.startswith("WANDB_") and not value.strip()]:
        del os.environ[name]
    for name, valid in _VALUES.items():
        if (value := os.environ.get(name, valid[0]).strip().lower()) not in valid:
            raise ReportingError(f"{name}={value}: {nearest(value, valid)}")


def project() -> str:
    """Return the project of runs and reports: `WANDB_PROJECT`, or our default."""
    return os.environ.get("WANDB_PROJECT") or "representation-assemble"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def server() -> str:
    """Return the server's address, as set by `WANDB_BASE_URL` or `wandb login --host`."""
    # Set this before the import, since the client would report its own errors to another server.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    try:
        return str(wandb.setup().settings.base_url)
    except Exception as error:  # For settings that the user has to fix, the client raises exceptions of any class.
        raise ReportingError(one_line(error)) from None


def why_no_key() -> str:
    """Say why there is no usable key, without sending a request. Return an empty text if there is a key."""
    try:
        host = server()
        from wandb.sdk.lib import wbauth

        session = wbauth.authenticate_session(host=host, source="assemble", prompt=False, update_session=False)
    except Exception as error:  # For example, the key is too short.
        return one_line(error)
    return NO_KEY if session is None else ""


def why_unreachable() -> str:
    """Say within seconds why the server cannot be used. Return an empty text if a key exists and the server answers."""
    if missing := why_no_key():
        return missing
    try:
        within(2 * PATIENCE_SECONDS, _knock)
    except ReportingError as error:
        return f"{urlsplit(server()).hostname} does not answer ({error})"
    return ""


def _knock() -> None:
    """Send any request through the environment's proxy. A refusal counts as an answer."""
    try:
        build_opener().open(server(), timeout=PATIENCE_SECONDS).close()
    except HTTPError as error:
        if error.code in (502, 503, 504):  # The answer is from a proxy that can't reach the server.
            raise
    except URLError as error:
        if "CERTIFICATE" not in str(error.reason):  # The client uses other certificates.
            raise


def within(seconds: float, function: Callable[[], _T]) -> _T:
    """Call a function of W&B's client with a time limit, because the client retries for minutes."""
    try:
        with ThreadPool(1) as pool:  # The thread is a daemon, so a call that hangs does not keep the process alive.
            return pool.apply_async(function).get(seconds)
    except multiprocessing.TimeoutError:
        raise ReportingError(f"W&B did not answer within {seconds:.0f} seconds") from None
    except Exception as error:
        raise ReportingError(f"W&B refused: {type(error).__name__}: {one_line(error)}") from None
