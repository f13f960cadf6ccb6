"""What `assemble answer` and `assemble caption` run: a trained model on a clip of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from papers.vx2text.model import VX2Text


def answer(checkpoint: str | Path, clip: str | Path, question: str, *, device: str = "cpu", **more: Any) -> str:
    """Answer a question about a clip.

    Args:
        checkpoint: of a stage that answers, AVSD, or TVQA together with five options; or an export of one.
        clip, question, more: see `VX2Text.answer`.
        device: where it runs.

    Raises:
        StageError: there is no question, or the checkpoint cannot answer it.
        MediaError: the clip cannot be read.
    """
    return VX2Text.from_export(checkpoint, device).answer(clip, question, **more)


def caption(checkpoint: str | Path, clip: str | Path, *, device: str = "cpu", **more: Any) -> str:
    """Describe a clip.

    Args:
        checkpoint: of a stage that describes, TVC; or an export of one.
        clip, more: see `VX2Text.caption`.
        device: where it runs.

    Raises:
        StageError: the checkpoint cannot describe.
        MediaError: the clip cannot be read.
    """
    return VX2Text.from_export(checkpoint, device).caption(clip, **more)
