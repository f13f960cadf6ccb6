"""Where Weights & Biases is, whether there is a key for it, and whether it answers; without importing it."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse

PROJECT = "representation-assemble"

PATIENCE_SECONDS = 3.0
"""How long a server that does not answer may hold anything up."""


def server() -> tuple[str, int]:
    """Host and port of the server, from `WANDB_BASE_URL`."""
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    return address.hostname or "", address.port or (80 if address.scheme == "http" else 443)


def has_key() -> bool:
    """Whether there is a key, in `WANDB_API_KEY` or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        import netrc

        found = netrc.netrc()
    except (OSError, ValueError):
        return False
    return any(found.authenticators(host) is not None for host in (server()[0], "api.wandb.ai"))


def why_unreachable() -> str:
    """Why the server cannot be reached, found out within `PATIENCE_SECONDS`; empty when it can."""
    host, port = server()
    try:
        with socket.create_connection((host, port), timeout=PATIENCE_SECONDS):
            return ""
    except OSError as error:
        return f"{host} does not answer ({error})"
