"""How fast training samples are made here, and what a card wants of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import StageError
from common.stages.configuration import resolve
from common.stages.reading import Reading, kept_reading, measure_reading, reads_as, wanted


def test_samples_are_read_and_the_measurement_is_kept(tmp_path: Path) -> None:
    run = resolve("avid_cma", "avid", scale="smoke")
    found = measure_reading(run, tmp_path, seconds=0.1)
    assert found.samples >= 4
    assert 0 < found.seconds < 1
    assert kept_reading(run) == found
    assert "samples a second on a core" in found.describe()


def test_what_is_read_in_the_same_way_is_measured_once() -> None:
    def digest(recipe: str, *arguments: str) -> str:
        return reads_as(resolve("avid_cma", recipe, scale="paper", arguments=arguments))

    assert digest("avid") == digest("avid", "--data.batch_size", "64", "--data.num_workers", "2") == digest("cma")
    assert digest("avid") != digest("avid", "--data.video.crop", "112")


def test_a_plan_says_how_many_cores_a_card_wants_and_when_loaders_are_too_few() -> None:
    run = resolve("avid_cma", "avid", scale="paper", hardware="gpu8")
    reading = Reading(1 / 20, 40_000.0, 100, "a processor", "2026-01-01")
    text = wanted(run, {"A100": 625.0, "H100": 2000.0}, reading)
    assert "A100 625; H100 2,000" in text
    assert "20 samples a second on a core, 0.04 MB read for each (a processor, 2026-01-01)" in text
    assert "at most 100 cores of this kind and 80 MB/s of files" in text
    assert "its 64 loader processes make 1,280: raise data.num_workers" in text
    assert "loader" not in wanted(run, {"A100": 100.0}, reading)
    assert wanted(run, {"A100": 625.0}, None).endswith("all devices together: A100 625")


def test_data_that_need_their_model_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asks_the_model(self: object) -> None:
        self.trainer.lightning_module.vocabulary  # type: ignore[attr-defined]  # noqa: B018

    monkeypatch.setattr("papers.avid_cma.data.PretrainingData.train_dataloader", asks_the_model)
    with pytest.raises(StageError, match="cannot be read without its model"):
        measure_reading(resolve("avid_cma", "avid", scale="smoke"), tmp_path, seconds=0.1)
