"""XMC-GAN trains with every text side: stored features, BERT as it goes, frozen n-grams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from common.data.text import WordPieceTokenizer
from common.data.worlds.two_objects import TwoObjectsWorld
from papers.xmc_gan.data import TextToImageData
from papers.xmc_gan.loss import XMCGANLoss
from papers.xmc_gan.miniature import NGramText
from papers.xmc_gan.module import XMCGANModule
from papers.xmc_gan.networks import Discriminator, Generator
from papers.xmc_gan.text import BertText
from tests.xmc_gan.test_data import T, bert, mini, stored, world  # noqa: F401 - fixtures


def trained(data: TextToImageData, encoder: nn.Module | None) -> dict[str, float]:
    """Losses of the last of three iterations."""
    torch.manual_seed(0)
    sizes = {"width": 4, "cond_size": 8, "embedding_dim": 8}
    generator = Generator(channels=[4, 4, 2, 1], z_dim=4, **sizes)  # type: ignore[arg-type]
    discriminator = Discriminator(channels=[1, 2, 4, 4], **sizes)  # type: ignore[arg-type]
    module = XMCGANModule(generator, discriminator, XMCGANLoss(weight_image_net=0.0), encoder)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    trainer = pl.Trainer(**options, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
    trainer.fit(module, datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


def test_stored_features_train_as_bert_itself(world: TwoObjectsWorld, bert: Path, tmp_path: Path) -> None:  # noqa: F811
    options = stored(world, bert, tmp_path)
    with_store = trained(mini(world, **options), None)
    online = trained(mini(world, tokenizer=WordPieceTokenizer(str(bert), max_tokens=T)), BertText(str(bert)))
    assert with_store.keys() == online.keys()
    assert with_store["train/discriminator_loss"] == pytest.approx(online["train/discriminator_loss"], rel=5e-3)
    assert with_store["train/generator_loss"] == pytest.approx(online["train/generator_loss"], rel=5e-3)


def test_ngrams_train_the_networks_and_stay(world: TwoObjectsWorld) -> None:  # noqa: F811
    encoder = NGramText(256, 8)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    losses = trained(mini(world), encoder)
    assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_tokens_without_an_encoder_are_refused(world: TwoObjectsWorld) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"model\.text_encoder is null: give it a class"):
        trained(mini(world), None)
