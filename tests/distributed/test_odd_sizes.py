"""Sizes that the number of processes does not divide: every sample once, or an error before training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader

from common.training.callbacks import SamplesForAll


class Sized(pl.LightningDataModule):
    """So many samples to test, and to validate."""

    def __init__(self, test: int, validation: int = 9) -> None:
        super().__init__()
        self.sizes = {"test": test, "val": validation}

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(range(9)), DataLoader(range(self.sizes["test"]))]  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(range(self.sizes["val"]))  # type: ignore[arg-type]


class Validating(pl.LightningModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


@pytest.mark.parametrize(
    ("data", "stage", "told"),
    [
        (Sized(1), "fit", "the test set has 1 "),
        (Sized(2), "test", "the test set has 2 "),
        (Sized(3, 2), "fit", "the validation set has 2 "),
        (Sized(3, 2), "validate", "the validation set has 2 "),
        (Sized(3, 2), "test", None),
        (Sized(3), "fit", None),
        (Sized(2), "validate", None),
        (pl.LightningDataModule(), "fit", None),
    ],
)
def test_a_process_without_a_sample_is_told_before_training(data: Any, stage: str, told: str | None) -> None:
    trainer: Any = SimpleNamespace(world_size=3, datamodule=data, limit_val_batches=1.0)
    if told is None:
        SamplesForAll().setup(trainer, Validating(), stage)
    else:
        with pytest.raises(ValueError, match=rf"^trainer\.devices: {told}"):
            SamplesForAll().setup(trainer, Validating(), stage)
    trainer.world_size = 1
    SamplesForAll().setup(trainer, Validating(), stage)
