"""Bridges between frozen encoders: are two modalities easier to join if they were trained together?

A small bridge maps the features of two frozen encoders into a common space. We train one for encoders that were trained
together, and one for encoders that were not. Then we compare the retrieval accuracy and the number of training steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.data.datasets.coco import COCO
from common.data.datasets.coco_karpathy import COCOKarpathy
from common.data.datasets.folder import FolderOfImages
from common.data.images import ImageItems
from common.data.text import CaptionTokenizer, text_numbers
from common.encoders.checkpoint_files import load_encoder
from common.encoders.heads import ProjectionHead
from common.encoders.text import BertEncoder
from common.losses.info_nce import at_least_float32, info_nce_per_anchor
from common.memory.collective import all_gather_rows
from common.metrics.retrieval import caption_retrieval
from common.protocols.base import PREFIXES, Batch, EncoderModule, PairRows, log_results
from common.protocols.captions import CaptionRows, PairData, check_vocabulary
from common.protocols.data import hold_out
from common.types import PartialFraction, PositiveFloat, PositiveInt

Modality = Literal["image", "text"]


class Bridge(nn.Module):
    """Maps features of two frozen encoders into a common space. Each learning rate of a sweep has its own copy.

    First, the bridge standardizes the features without learned parameters: in training with the statistics of the
    batch, in the test with those of all training batches. Otherwise, the scale of the features would decide how fast a
    projection learns.
    """

    def __init__(self, widths: dict[Modality, int], embedding_dim: int, hidden_dim: int | None, copies: int) -> None:
        super().__init__()
        layers, hidden = 1 if hidden_dim is None else 2, hidden_dim or embedding_dim
        self.norms = nn.ModuleDict({m: nn.BatchNorm1d(w, momentum=None, affine=False) for m, w in widths.items()})
        self.projections = nn.ModuleList(
            nn.ModuleDict({m: ProjectionHead(w, hidden, embedding_dim, layers) for m, w in widths.items()})
            for _ in range(copies)
        )

    def forward(self, modality: Modality, features: Tensor) -> Tensor:
        """Map features [B, width] to unit vectors [copies, B, embedding_dim], in at least float32."""
        features = self.norms[modality](features.to(next(self.parameters()).dtype))
        projected = [projection[modality](features) for projection in self.projections]  # type: ignore[index]
        return F.normalize(at_least_float32(torch.stack(projected)), dim=2)


class BridgedRetrieval(EncoderModule):
    """Image-text retrieval through a bridge between frozen encoders.

    The bridge learns by symmetric InfoNCE over the global batch; captions with the same tokens aren't negatives of each
    other. The learning rate is constant. The test measures the bridge after each number of steps in `lengths`, so one
    run shows shorter runs, too. For each length, the learning rate is the best one on held-out pairs of the training
    split.

    The test takes four loaders: images and captions to choose the learning rate, then images and captions to test on.
    Captions with equal tokens match the same images. Logs

    - `test/i2t_...` (image queries) and `test/t2i_...` (caption queries) of `caption_retrieval` after the last step;
    - `test/r10`, the mean of both R@10, and `test/r10_after_<steps>` for every length;
    - `test/area` and `test/steps_to_90`, see `convergence`;
    - `test/learning_rate` for the longest training; `test/encoder_parameters` and `test/bridge_parameters`.

    Args:
        image_encoder, text_encoder: encoders with the attribute `feature_dim`. `text_encoder` takes tokens [B, L].
        pretrained: checkpoint with both encoders. None keeps the initial weights.
        hidden_dim: units of the bridge's hidden layer; None for a linear bridge.
        learning_rates: learning rates of Adam. Each trains a separate bridge.
        lengths: ascending numbers of steps after which to save the bridge. Training ends after the last.

    Shapes:
        Training batch: `image` [B, 3, H, W], `tokens` [B, L], `lengths` [B], `image_index` [B]. Batch of
        images: `image`, `index` [B]. Batch of captions: `tokens`, `lengths`, `index`, `image_index` [B].
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        pretrained: str | None = None,
        encoder_prefixes: Sequence[str] = PREFIXES,
        text_encoder_prefixes: Sequence[str] = ("text_encoder.",),
        embedding_dim: PositiveInt = 256,
        hidden_dim: PositiveInt | None = None,
        temperature: PositiveFloat = 0.1,
        learning_rates: Sequence[PositiveFloat] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        lengths: Sequence[PositiveInt] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    ) -> None:
        super().__init__(image_encoder, pretrained, encoder_prefixes)
        self.save_hyperparameters(ignore=["image_encoder", "text_encoder"])
        if not lengths or sorted(set(lengths)) != list(lengths):
            raise ValueError(f"lengths: expected ascending numbers of steps, got {list(lengths)}")
        self.text_encoder = text_encoder.requires_grad_(False)
        widths: dict[Modality, int] = {"image": image_encoder.feature_dim, "text": text_encoder.feature_dim}  # type: ignore[dict-item]
        self.bridge = Bridge(widths, embedding_dim, hidden_dim, len(learning_rates))
        self.kept = nn.ModuleDict({str(k): copy.deepcopy(self.bridge).requires_grad_(False) for k in lengths})

    # -- training ------------------------------------------------------------------------------------------------------

    def load_pretrained(self, path: str) -> None:
        super().load_pretrained(path)
        load_encoder(self.text_encoder, path, self.hparams["text_encoder_prefixes"])

    def frozen(self) -> dict[str, nn.Module]:
        return {**super().frozen(), "text_encoder": self.text_encoder}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if isinstance(self.text_encoder, BertEncoder) and stage == "fit":
            self.text_encoder.require_weights()
        check_vocabulary(self, self.text_encoder)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Compute the features [B, feature_dim] of images [B, 3, H, W]."""
        return self.encoder(images)

    @torch.no_grad()
    def text_features(self, tokens: Tensor) -> Tensor:
        """Compute the features [B, feature_dim] of captions [B, L]."""
        return self.text_encoder(tokens)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # Features have no gradient, so every process can compute the whole loss and its gradient.
        image, text, words, owner = all_gather_rows(
            self.features(batch["image"]),
            self.text_features(batch["tokens"]),
            text_numbers(batch["tokens"], batch["lengths"]),
            batch["image_index"],
        )
        with torch.autocast(image.device.type, enabled=False):
            scores = self.bridge("image", image) @ self.bridge("text", text).mT / self.hparams["temperature"]
            other = (words[:, None] != words) & (owner[:, None] != owner)
            matched = scores.diagonal(dim1=1, dim2=2)[:, :, None]
            losses = info_nce_per_anchor(matched, scores, other) + info_nce_per_anchor(matched, scores.mT, other)
            losses = losses.mean(1) / 2
        self.log_dict({f"train/loss_lr_{rate:g}": loss for rate, loss in zip(self.hparams["learning_rates"], losses)})
        return losses.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": list(projection.parameters()), "lr": rate}
            for projection, rate in zip(self.bridge.projections, self.hparams["learning_rates"])
        ]
        return torch.optim.Adam(groups)

    # -- the bridge after so many steps --------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        super().on_train_start()
        steps, last = int(self.trainer.estimated_stepping_batches), self.hparams["lengths"][-1]
        if steps != last:
            raise ValueError(f"model.lengths ends with {last}, but trainer.max_steps is {steps}; make the two equal")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Keep it before the next step, because a step's checkpoint is written before the step ends.
        self._keep()

    def on_train_end(self) -> None:
        self._keep()
        super().on_train_end()

    def _keep(self) -> None:
        if str(self.global_step) in self.kept:
            self.kept[str(self.global_step)].load_state_dict(self.bridge.state_dict())

    # -- test ----------------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        self.pairs = PairRows(), PairRows()  # to choose the learning rate, and to test on

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        features = self.text_features(batch["tokens"]) if "tokens" in batch else self.features(batch["image"])
        self.pairs[dataloader_idx // 2].update(batch, features.float())

    def on_test_epoch_end(self) -> None:
        selection, test = (pairs.compute(self.device) for pairs in self.pairs)
        curve: dict[int, Tensor] = {}
        for length in self.hparams["lengths"]:
            bridge = self.kept[str(length)]
            scores = [float(found["r10"]) for found in searched(bridge, *selection)]
            chosen = scores.index(max(scores))
            results = searched(bridge, *test)[chosen]
            curve[length] = results["r10"]
        metrics = {
            **results,
            **{f"r10_after_{length}": value for length, value in curve.items()},
            **convergence(curve),
            "learning_rate": torch.tensor(self.hparams["learning_rates"][chosen]),
            "encoder_parameters": _size(*self.frozen().values()),
            "bridge_parameters": _size(self.bridge.projections[0]),
        }
        log_results(self, {f"test/{name}": value for name, value in metrics.items()})
        for logger in self.loggers:
            for length, value in curve.items():
                logger.log_metrics({"bridge/r10": float(value)}, length)


def searched(bridge: nn.Module, images: Tensor, captions: Tensor, row: Tensor, text: Tensor) -> list[dict[str, Tensor]]:
    """Evaluate retrieval with every copy of a bridge. `r10` is the mean over both directions."""
    found = [
        caption_retrieval(image, caption, row, equal_text=text)
        for image, caption in zip(bridge("image", images), bridge("text", captions))
    ]
    return [{**results, "r10": (results["i2t_r10"] + results["t2i_r10"]) / 2} for results in found]


def convergence(curve: dict[int, Tensor]) -> dict[str, Tensor]:
    """Measure how soon a curve reaches its last value. `curve` maps ascending steps to values.

    Returns:
        `area`, the mean of the curve over the logarithm of the steps; `steps_to_90`, the number of steps after which
        the curve first reaches 90 % of the last value, interpolated in the logarithm.
    """
    steps = torch.tensor(list(curve), dtype=torch.float64).log2()
    values = torch.stack(list(curve.values())).double().cpu()
    if len(curve) == 1:
        area = values[0]
    else:
        area = torch.trapezoid(values, steps) / (steps[-1] - steps[0])
    goal = 0.9 * values[-1]
    place = int((values >= goal).nonzero()[0])
    reached = steps[place]
    if place:
        part = (goal - values[place - 1]) / (values[place] - values[place - 1])
        reached = steps[place - 1] + part * (steps[place] - steps[place - 1])
    return {"area": area, "steps_to_90": 2**reached}


def _size(*modules: nn.Module) -> Tensor:
    return torch.tensor(float(sum(parameter.numel() for module in modules for parameter in module.parameters())))


class BridgeData(PairData):
    """Pairs to train a bridge, to choose its learning rate, and to test it.

    Use the split and tokenizer of pre-training. A fraction `held_out_fraction` of the images in `split`, evenly spaced,
    is used to choose the learning rate.
    """

    def __init__(
        self,
        dataset: COCO | COCOKarpathy | FolderOfImages,
        tokenizer: CaptionTokenizer,
        held_out_fraction: PartialFraction = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, tokenizer, **kwargs)
        self.held_out_fraction = held_out_fraction

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.selection_listing, self.listing = hold_out(self.listing, self.held_out_fraction, required=True)
        self.annotations = self.dataset.annotations(self.split, self.listing)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        listing = self.selection_listing
        images = ImageItems(listing, **self.options(training=False))
        captions = CaptionRows(self.dataset.annotations(self.split, listing).captions, self.words)
        return [*self.gallery(images, captions, "selection"), *super().test_dataloader()]
