"""Provide a pretrained encoder for the tests of the protocols."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.protocols.parts import checkpoint, image_encoder


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """Write a checkpoint with the weights of `image_encoder(7)`."""
    return checkpoint(tmp_path / "pretrained.ckpt", encoder=image_encoder(7))
