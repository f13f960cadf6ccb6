"""Test MCT's training: every choice of losses, the averages, the queues, and the end of the schedule."""

from __future__ import annotations

import inspect
import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from papers.mct.loss import MultimodalContrast
from papers.mct.module import MCTModule
from papers.mct.networks import Heads
from tests.protocols.parts import trainer

QUEUE, BATCH, TAGS, VOCABULARY = 64, 16, 4, 20
# Weights of J_ii, J_tag, J_cc and the two image-caption losses.
CHOICES = [(1, 0, 0, 0), (0, 1, 0, 0), (1, 0, 1, 0), (0, 0, 0, 1), (1, 1, 1, 1)]


class Images(nn.Module):
    """An image encoder with batch normalization, small enough for hundreds of runs."""

    feature_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, 2)
        self.normalization = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.normalization(self.convolution(images)).relu().mean((2, 3))


class Texts(nn.Module):
    feature_dim = 6
    vocabulary_size = VOCABULARY

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.normalization = nn.LayerNorm(6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.normalization(self.embedding(tokens).mean(1))


class Data(pl.LightningDataModule):
    """Random samples in the format of the paper's data module. The last sample has no tag."""

    vocabulary_size, batch_size = VOCABULARY, BATCH

    def __init__(self, images: int = 64) -> None:
        super().__init__()
        self.tag_names = [f"tag {number}" for number in range(TAGS)]
        self.tokenizer = object()
        draw = torch.Generator().manual_seed(1)
        pictures = torch.randn(images, 3, 9, 9, generator=draw)
        tokens = torch.randint(1, VOCABULARY, (images, 5), generator=draw)
        given = torch.rand(images, TAGS, generator=draw) < 0.4
        given[-1] = False
        self.rows = {
            "image_query": pictures + 0.1 * torch.randn(pictures.shape, generator=draw),
            "image_key": pictures + 0.1 * torch.randn(pictures.shape, generator=draw),
            "tokens_query": tokens,
            "tokens_key": tokens.flip(1),
            "tags": given,
            "image_id": torch.arange(images),
            "index": torch.arange(images),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        samples: Any = [dict(zip(self.rows, values)) for values in zip(*self.rows.values())]
        return DataLoader(samples, batch_size=BATCH)


def module(**fields: Any) -> MCTModule:
    torch.manual_seed(0)
    # The loss must not use the generator that initializes the encoders.
    loss = {
        "weight_tag": 1.0,
        "intra_dim": 5,
        "inter_dim": 7,
        "tag_count": TAGS,
        "queue_size": QUEUE,
        "temperature": 0.2,
    }
    of_loss = inspect.signature(MultimodalContrast).parameters
    loss |= {name: fields.pop(name) for name in list(fields) if name in of_loss}
    small: dict[str, Any] = {"momentum": 0.75, "image_learning_rate": 0.05, "text_learning_rate": 0.01}
    text = fields.pop("text_encoder", Texts())
    return MCTModule(Images(), MultimodalContrast(**loss), text, **{**small, **fields})


class Watch(Callback):
    """Record the losses and learning rates of every batch, and check the averages after every batch."""

    def __init__(self) -> None:
        self.terms: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.loss.register_forward_hook(self._keep)

    def _keep(self, objective: nn.Module, given: Any, out: dict[str, Tensor]) -> None:
        self.terms.append({name: value.detach() for name, value in out.items()})

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        self.before = {
            name: [[p.detach().clone() for p in part.parameters()] for part in tower]
            for name, tower in _towers(pl_module)
        }

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        for name, tower in _towers(pl_module):
            query, key = self.before[name]
            share = 1 - pl_module.hparams["momentum"]
            for (parameter, value), old_query, old_key in zip(tower[1].named_parameters(), query, key):
                moved = old_key + share * (old_query - old_key)
                torch.testing.assert_close(value, moved, rtol=1e-6, atol=1e-7, msg=f"{name} {parameter}")
                assert value.grad is None
                assert not value.requires_grad


def _towers(pl_module: MCTModule) -> list[tuple[str, tuple[nn.Module, nn.Module]]]:
    """Return each tower with its momentum average."""
    named = ((name, getattr(pl_module.model, name), getattr(pl_module.average, name)) for name in ("image", "text"))
    return [(name, (query, key)) for name, query, key in named if query is not None]


def train(model: MCTModule, data: Data | None = None, epochs: int = 1, **fields: Any) -> Watch:
    watch = Watch()
    trainer(None, max_epochs=epochs, callbacks=[watch], **fields).fit(model, datamodule=data or Data())
    return watch


# -- which losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", CHOICES, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_every_choice_of_losses(weights: tuple[float, ...], shared: bool) -> None:
    ii, tag, cc, cross = weights
    fields = dict(zip(("weight_ii", "weight_tag", "weight_cc", "weight_cross"), weights))
    text = Texts() if cc or cross else None
    model = module(**fields, heads=Heads(shared=shared), inter_reduction="sum", text_encoder=text)
    names = set(model.state_dict())
    # A disabled loss has no parameters, since distributed training rejects parameters without a gradient.
    assert any(name.startswith("model.text.") for name in names) == bool(cc or cross)
    queues = {name.split(".")[2] for name in names if name.startswith("loss.queues.")}
    assert queues == {n for n, on in (("ii", ii or tag), ("cc", cc), ("ic", cross), ("ci", cross)) if on}
    assert ("loss.queues.ii.tags" in names) == bool(tag)
    for tower, intra in (("image", ii or tag), ("text", cc)):
        assert any(name.startswith(f"model.{tower}.heads.intra") for name in names) == bool(intra)
        built = any(name.startswith(f"model.{tower}.heads.inter") for name in names)
        assert built == bool(cross)

    watch = train(model, limit_train_batches=3)
    assert len(watch.terms) == 3
    bounds = {name: math.log(QUEUE + 1) + 2 / 0.2 for name in ("ii", "tag", "cc")}
    bounds |= dict.fromkeys(("ic", "ci"), QUEUE * (0.2 + 2))
    on = {n for n, weight in (("ii", ii), ("tag", tag), ("cc", cc), ("ic", cross), ("ci", cross)) if weight}
    for terms in watch.terms:
        assert on == set(terms) & set(bounds)
        for name in on:
            assert 0 <= float(terms[name]) <= bounds[name]
        weighted = sum(float(terms[name]) for name in on)
        assert float(terms["loss"]) == pytest.approx(weighted, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == name.startswith("model.")
        assert (parameter.grad is not None) == name.startswith("model."), name


# -- the step ----------------------------------------------------------------------------------------------------------


def test_statistics_of_the_keys_are_their_own() -> None:
    model = module()
    query, key = (tower.backbone.normalization for tower in (model.model.image, model.average.image))
    for layer in (query, key):
        assert isinstance(layer, nn.BatchNorm2d)
    query.running_mean.fill_(1e6)
    query.running_var.fill_(1e6)
    train(model)
    assert key.running_mean.abs().max() < 10
    assert key.running_var.max() < 10
    assert key.num_batches_tracked == query.num_batches_tracked == 4
    assert query.running_mean.min() > 1e5
    assert model.average.image.training


def test_the_queue_has_the_newest_keys_after_any_number_of_steps() -> None:
    model = module(weight_tag=0.0, weight_cc=0.0, weight_cross=0.0)
    train(model, epochs=6, max_steps=22)
    queue, (rows, last) = model.loss.queues["ii"], (slice(BATCH, 2 * BATCH), 21 % 4)
    assert int(queue.pointer) == 22 * BATCH % QUEUE == rows.stop
    batch = {name: values[last * BATCH : (last + 1) * BATCH] for name, values in Data().rows.items()}
    torch.testing.assert_close(queue.vectors[rows], model.train().keys(batch)["ii"])


def test_the_rate_falls_to_the_end_also_within_an_epoch() -> None:
    rates = train(module(), Data(images=4 * BATCH), epochs=3, max_steps=5).rates
    assert rates[-1][0] == pytest.approx(0.05 * 0.25)
