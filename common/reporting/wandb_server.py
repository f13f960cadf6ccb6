"""Where Weights & Biases is, whether there is a key for it, and whether it answers: all asked of its own client."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener, getproxies

from common.errors import ReportingError

_T = TypeVar("_T")

PATIENCE_SECONDS = 3.0
"""How long one question waits for a server that does not answer; whether there is one takes a few of them."""

REFUSED = "W&B refused: "

NO_KEY = "no key (WANDB_API_KEY or `wandb login`)"


def project() -> str:
    """Name of the project that runs and reports belong to: `WANDB_PROJECT`, or ours."""
    return os.environ.get("WANDB_PROJECT") or "representation-assemble"


def entity() -> str:
    """User or team that owns the project: `WANDB_ENTITY`, or nobody named, which is the key's own."""
    return os.environ.get("WANDB_ENTITY", "")


def _settings() -> Any:
    """The client's settings, from the environment and the files that `wandb login` writes."""
    # Before the import: the client would report its own errors to another server.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb.setup().settings


def one_line(error: Exception) -> str:
    """What an error of the client says, in one line; of a setting that it cannot take, which one and its value."""
    wrong = getattr(error, "errors", None)  # of pydantic, which words it for programmers, over four lines
    if not callable(wrong):
        return " ".join(str(error).split())
    said = []
    for found in wrong():
        name = ".".join(map(str, found["loc"]))
        value = "" if "key" in name else f" is {found['input']!r}"
        said.append(f"W&B's setting {name}{value}: {found['msg']} (WANDB_{name.upper()}, or the file of `wandb login`)")
    return "; ".join(said)


def server() -> str:
    """Address of the server's interface, as `WANDB_BASE_URL` or `wandb login --host` set it.

    Raises:
        ReportingError: the client cannot take its settings.
    """
    try:
        return str(_settings().base_url)
    except Exception as error:  # of several kinds; all are the user's to fix
        raise ReportingError(one_line(error)) from None


def _credentials() -> Any:
    """The client's own key or identity token for the server, or None.

    Raises:
        ReportingError: the client cannot take its settings.
        AuthenticationError: there is one that cannot be right, such as a key that is too short.
    """
    host = server()
    from wandb.sdk.lib import wbauth

    return wbauth.authenticate_session(host=host, source="assemble", prompt=False, update_session=False)


def why_no_key() -> str:
    """Why there is no key that could be used; empty when there is one. Asks no server."""
    try:
        return "" if _credentials() is not None else NO_KEY
    except ReportingError as error:
        return str(error)
    except Exception as error:  # as above
        return f"no usable key: {one_line(error)}"


def why_unreachable() -> str:
    """Why the server cannot be used, found out within seconds; empty when it answers and takes the key.

    A proxy, such as that of `HTTPS_PROXY`, is used as the client uses it.
    """
    if missing := why_no_key():
        return missing
    address = server()
    host = urlsplit(address).hostname
    try:
        within(2 * PATIENCE_SECONDS, lambda: _knock(address))
    except ReportingError as error:
        return f"{host} does not answer ({str(error).removeprefix(REFUSED)})"
    try:
        within(4 * PATIENCE_SECONDS, lambda: _credentials().verify())
    except ReportingError as error:
        if not str(error).startswith(REFUSED):
            return f"{host} does not say whether it takes the key ({error})"
        return f"{host}: {str(error).removeprefix(REFUSED)}; `wandb login --relogin` takes another key"
    return ""


def _knock(address: str) -> None:
    """Ask for anything: whatever comes back, a refusal too, is an answer."""
    settings = _settings()
    own = {"http": settings.http_proxy, "https": settings.https_proxy}
    opener = build_opener(ProxyHandler({**getproxies(), **{name: proxy for name, proxy in own.items() if proxy}}))
    try:
        opener.open(address, timeout=PATIENCE_SECONDS).close()
    except HTTPError as error:
        if error.code in (502, 503, 504):  # of a proxy or a gate whose server is gone
            raise
    except URLError as error:
        import ssl

        # The client has certificates of its own, and its check of the key follows.
        if not isinstance(error.reason, ssl.SSLError):
            raise


def within(seconds: float, function: Callable[[], _T]) -> _T:
    """Call a function of the client, which by itself tries again for minutes.

    Raises:
        ReportingError: when it raises, or has not returned in time.
    """
    found: list[_T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            found.append(function())
        except Exception as error:  # whatever the client raises is to be one line for the user
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise ReportingError(f"{REFUSED}{type(errors[0]).__name__}: {one_line(errors[0])}")
    if not found:
        raise ReportingError(f"W&B did not answer within {seconds:.0f} seconds")
    return found[0]
