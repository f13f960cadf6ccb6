"""How fast training samples are read here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.errors import StageError
from common.stages.configuration import resolve
from common.stages.loading import measure_loading


def test_samples_are_read(tmp_path: Path) -> None:
    told = measure_loading(resolve("avid_cma", "avid", scale="smoke"), tmp_path, seconds=0.1)
    assert re.match(r"\d.* samples a second on a core, .* MB read for each", told)


def test_data_that_need_their_model_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks_the_model(self: object) -> None:
        self.trainer.lightning_module.vocabulary  # type: ignore[attr-defined]  # noqa: B018

    monkeypatch.setattr("papers.avid_cma.data.PretrainingData.train_dataloader", asks_the_model)
    with pytest.raises(StageError, match="cannot be read without its model"):
        measure_loading(resolve("avid_cma", "avid", scale="smoke"), tmp_path, seconds=0.1)
