"""Test VirTex: the names in its checkpoints, the decoders' masks, the loss, training and testing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from common.data.datasets.coco import COCO
from common.data.image_transforms import ImageTransform
from common.data.text import WordVocabulary, pad_tokens
from common.encoders.image import ImageResNet
from common.training.optimizers import Lookahead
from papers.mct.baselines.virtex import (
    BicaptioningData,
    CaptionDecoder,
    VirTex,
    token_losses,
)
from tests.distributed.harness import run_distributed
from tests.protocols.parts import attached, trainer
from tests.protocols.test_captions import coco

GOLDEN = Path(__file__).parents[1] / "golden" / "mct"
SMALL: dict[str, Any] = {
    "vocabulary_size": 20, "hidden_size": 16, "layers": 2, "attention_heads": 4, "feedforward_size": 32,
    "max_tokens": 10,
}  # fmt: skip
COLORS = ("red", "green", "blue")


def small_module(**options: Any) -> VirTex:
    torch.manual_seed(0)
    encoder = ImageResNet(
        layers=(1, 1, 1, 1), bottleneck=False, channels=(4, 4, 8, 8), stem_channels=4, stem_kernel=3, stem_pool=False
    )
    return VirTex(encoder, **{**SMALL, "layers": 1, **options})


def some_captions() -> Tensor:
    tokens = torch.randint(3, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    for row in range(3):
        tokens[row, 6 - row :] = 0
        tokens[row, 0], tokens[row, 6 - row] = 1, 2
    return tokens


GRID = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(2))


# -- network -----------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_those_of_virtex() -> None:
    layout = json.loads((GOLDEN / "ckpt_layout.json").read_text())["virtex_bicaptioning_R50_L1_H1024"]
    with torch.device("meta"):
        module = VirTex(
            ImageResNet(zero_init_residual=True), hidden_size=1024, attention_heads=16, feedforward_size=4096
        )
    expected = {row[0]: row[3] for row in layout["visual"]} | layout["text"]
    assert {name: list(value.shape) for name, value in module.state_dict().items()} == expected
    assert len(expected) == 318 + len(layout["text"])


def test_directions_share_all_but_the_transformer() -> None:
    module = small_module()
    one, other = module.textual, module.backward_textual
    for shared in ("visual_projection", "embedding", "output"):
        assert getattr(one, shared) is getattr(other, shared)
    assert one.output.weight is one.embedding.words.weight
    own, twins = dict(one.transformer.named_parameters()), dict(other.transformer.named_parameters())
    assert all(own[name] is not twins[name] and torch.equal(own[name], twins[name]) for name in own)


def test_explicit_padding_masks_would_change_nothing_that_counts() -> None:
    """Compare with VirTex, which masks future and padding keys, and computes all positions at once."""
    decoder = CaptionDecoder(8, **SMALL, dropout=0.0).eval()
    for parameter in decoder.parameters():
        # The weights are larger than at initialization, so that each input has an effect.
        nn.init.normal_(parameter, std=0.3)
    tokens = some_captions()
    counts = tokens != 0
    future = torch.full((7, 7), float("-inf")).triu(1)
    with torch.no_grad():
        image = decoder.visual_projection(GRID.reshape(3, 8, 4).permute(0, 2, 1))
        words = decoder.embedding.words(tokens) + decoder.embedding.positions(torch.arange(7))
        embedded = F.layer_norm(
            words, (16,), decoder.embedding.layer_norm.weight, decoder.embedding.layer_norm.bias, 1e-8
        )
        hidden = decoder.transformer(
            embedded * counts[..., None], image, tgt_mask=future,
            tgt_key_padding_mask=torch.zeros(3, 7).masked_fill(~counts, float("-inf")),
        )  # fmt: skip
        expected = hidden @ decoder.embedding.words.weight.T + decoder.output.bias
        torch.testing.assert_close(decoder(GRID, tokens)[counts], expected[counts])
        losses = F.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
        mine = token_losses(decoder, GRID, tokens)
    torch.testing.assert_close(mine.sum() / counts[:, 1:].sum(), losses)


def test_padding_never_changes_the_loss() -> None:
    module = small_module().eval()
    batch = {"image": torch.randn(3, 3, 16, 16), "tokens": some_captions(), "index": torch.arange(3)}
    batch["tokens_reversed"] = pad_tokens([row[row != 0].flip(0).tolist() for row in batch["tokens"]])
    wider = {**batch, **{name: F.pad(batch[name], (0, 3)) for name in ("tokens", "tokens_reversed")}}
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        loss = module.training_step(batch, 0)
        torch.testing.assert_close(module.training_step(wider, 0), loss)
        # Add the losses of both directions. Each loss is a mean over all real tokens of the batch.
        grid = module.visual["cnn"].forward_map(batch["image"])  # type: ignore[operator]
        parts = [
            torch.cat([
                token_losses(decoder, grid[row : row + 1], own[row][own[row] != 0][None])[0] for row in range(3)
            ]).mean()
            for decoder, own in ((module.textual, batch["tokens"]), (module.backward_textual, batch["tokens_reversed"]))
        ]  # fmt: skip
    torch.testing.assert_close(loss, parts[0] + parts[1])


# -- training ----------------------------------------------------------------------------------------------------------


class Squares(Dataset[dict[str, Any]]):
    """Images of one color. The caption names the color, and adds `thing` if the lower half is bright."""

    def __init__(self, size: int, tokenizer: WordVocabulary) -> None:
        self.size, self.tokenizer = size, tokenizer

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item: int) -> dict[str, Any]:
        image = 0.1 * torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(item))
        image[item % 3] += 1.0
        image[:, 8:] += item % 2
        extra = " thing" * (item % 2)
        tokens = self.tokenizer.encode(f"a {COLORS[item % 3]} square{extra}")
        return {"image": image, "tokens": tokens, "index": item}


def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "tokens": pad_tokens([sample["tokens"] for sample in samples]),
        "tokens_reversed": pad_tokens([sample["tokens"][::-1] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }


class SquareData(pl.LightningDataModule):
    def __init__(self, max_tokens: int = 8) -> None:
        super().__init__()
        self.tokenizer = WordVocabulary(min_count=1, max_tokens=max_tokens)
        self.batch_size = 6

    def setup(self, stage: str) -> None:
        self.tokenizer.prepare(f"a {color} square thing" for color in COLORS)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Squares(24, self.tokenizer), batch_size=self.batch_size, collate_fn=collate)


def quick(**options: Any) -> VirTex:
    return small_module(
        **{"image_learning_rate": 0.1, "learning_rate": 0.1, "warmup_steps": 4, "dropout": 0.0, **options}
    )


def test_the_test_weighs_tokens_and_counts_a_repeated_caption_once(tmp_path: Path) -> None:
    module, data = quick().eval(), SquareData()
    data.setup("test")
    dataset = Squares(7, data.tokenizer)
    with torch.no_grad():
        batch = collate([dataset[item] for item in range(7)])
        grid = module.visual["cnn"].forward_map(batch["image"])  # type: ignore[operator]
        losses = token_losses(module.textual, grid, batch["tokens"])
        expected = losses.sum() / (batch["tokens"][:, 1:] != 0).sum()
    repeated = DataLoader([dataset[item] for item in (0, 1, 2, 2, 3, 4, 5, 6, 6)], batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    (metrics,) = trainer(tmp_path, max_steps=1).test(module, repeated, verbose=False)
    assert metrics["test/captions"] == 7
    assert metrics["test/forward_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_groups_of_the_optimizer(tmp_path: Path) -> None:
    module = small_module(warmup_steps=10)
    module._trainer = SimpleNamespace(estimated_stepping_batches=50)  # type: ignore[assignment]
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"]
    assert isinstance(optimizer, Lookahead)
    assert (optimizer.k, optimizer.alpha) == (5, 0.5)
    names = {parameter: name for name, parameter in module.named_parameters()}
    undecayed = re.compile(r"(backward_)?textual\.(embedding|transformer).*(norm.*|bias)")
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.append(name)
            assert group["initial_lr"] == (0.2 if name.startswith("visual.") else 1e-3)
            assert group["weight_decay"] == (0.0 if undecayed.fullmatch(name) else 1e-4)
            assert group["momentum"] == 0.9
    assert sorted(seen) == sorted(names.values())
    assert "textual.output.bias" in seen
    assert "textual.output.weight" not in seen
    factor = configured["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [factor(0), factor(9), factor(30)] == pytest.approx([0.1, 1.0, 0.5])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    norms = []

    class Watcher(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer(tmp_path, max_steps=3, callbacks=[Watcher()]).fit(
        quick(clip_norm=0.01, warmup_steps=0), datamodule=SquareData()
    )
    assert norms
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def _trained_on(rank: int, rows: list[list[int]]) -> list[Any]:
    """Return the loss and the gradients of a step on some rows."""
    module, data = quick(), SquareData()
    data.setup("fit")
    module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    module.visual.eval()  # batch statistics would differ per process
    squares = Squares(4, data.tokenizer)
    loss = module.training_step(collate([squares[row] for row in rows[rank]]), 0)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in module.parameters())]


def test_captions_of_two_processes_weigh_by_their_tokens() -> None:
    """Give one process longer captions than the other."""
    whole = _trained_on(0, [[0, 1, 2, 3]])
    parts = run_distributed(_trained_on, 2, [[0, 2], [1, 3]])
    for expected, *found in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(map(torch.as_tensor, found)) / 2, expected, rtol=1e-4, atol=1e-6)


# -- data --------------------------------------------------------------------------------------------------------------


def test_bicaptioning_reads_forwards_and_backwards(tmp_path: Path) -> None:
    coco(tmp_path)
    options: dict[str, Any] = {"image": ImageTransform(crop=8, resize=8), "num_workers": 0}
    data = BicaptioningData(COCO(tmp_path), WordVocabulary(min_count=1), batch_size=6, held_out_batch_size=2, **options)
    (batch,) = attached(data).train_dataloader()
    assert torch.equal(batch["lengths"], batch["lengths_reversed"])
    for row, other, length in zip(batch["tokens"], batch["tokens_reversed"], batch["lengths"]):
        assert row[:length].tolist() == other[:length].flip(0).tolist()
        assert (row[0], other[0]) == (1, 2)
    held_out = data.test_dataloader().dataset
    # The held-out caption is always the first one, and the image is not flipped.
    assert held_out[1]["tokens"] == held_out[1]["tokens"] == data.words.encode("Image 5007, caption 0.")
