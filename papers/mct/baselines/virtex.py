"""VirTex, the captioning baseline: its network, its data and its training.

A convolutional network computes a grid of features. From it, two transformer decoders predict the caption, one forward
and one backward. Evaluations use only the convolutional network.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.data.annotations import ImageAnnotations
from common.data.images import ImageItems, require_captions
from common.data.item_dataset import Item, Sample
from common.data.listing import Listing
from common.data.text import CaptionTokenizer, normalize_caption, swap_left_right
from common.memory.collective import mean_over_ranks
from common.metrics.gathering import OncePerSample
from common.protocols.captions import CaptionData
from common.training.examples import Example, RandomTensors, batches_of_epoch
from common.training.optimizers import Lookahead, refuse_clip_value, warm_up_then_cosine
from common.types import Fraction, Momentum, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

#: Token id of padding and of unknown pieces; the loss ignores both ([11]).
PAD = 0


class CaptionEmbedding(nn.Module):
    """Embeds tokens as the normalized sum of word and position embeddings [B, L, hidden_size]. Padding is zero."""

    def __init__(self, vocabulary_size: int, hidden_size: int, max_tokens: int, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, hidden_size, padding_idx=PAD)
        self.positions = nn.Embedding(max_tokens, hidden_size)
        self.layer_norm = nn.LayerNorm(hidden_size, eps=1e-8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        embeddings = self.words(tokens) + self.positions.weight[: tokens.shape[1]]
        embeddings = self.dropout(self.layer_norm(embeddings))
        return embeddings * (tokens != PAD).unsqueeze(-1)


class CaptionDecoder(nn.Module):
    """Transformer that predicts every token of a caption from the image and the tokens before it.

    Shapes:
        grid [B, feature_dim, h, w], tokens int64 [B, L] -> logits of the next token [B, L, vocabulary_size]

    Source: [11]; parameter names are those of VirTex.
    """

    def __init__(
        self,
        feature_dim: int,
        vocabulary_size: int,
        hidden_size: int,
        layers: int,
        attention_heads: int,
        feedforward_size: int,
        dropout: float,
        max_tokens: int,
    ) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.visual_projection = nn.Linear(feature_dim, hidden_size)
        self.embedding = CaptionEmbedding(vocabulary_size, hidden_size, max_tokens, dropout)
        layer = nn.TransformerDecoderLayer(
            hidden_size, attention_heads, feedforward_size, dropout, activation=F.gelu, batch_first=True
        )
        self.transformer = nn.TransformerDecoder(layer, layers)
        self.output = nn.Linear(hidden_size, vocabulary_size)
        self.output.weight = self.embedding.words.weight
        self.apply(self._initialize)

    @staticmethod
    @torch.no_grad()
    def _initialize(module: nn.Module) -> None:
        """Draw weights from N(0, 0.02) as in BERT; biases keep torch's defaults (VirTex)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, 0.02)
        elif isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.normal_(0.0, 0.02)
        elif isinstance(module, CaptionDecoder):
            module.embedding.words.weight[PAD].zero_()

    def forward(self, grid: Tensor, tokens: Tensor) -> Tensor:
        # Padding is at the end, so it needs no mask.
        image = self.visual_projection(grid.flatten(2).transpose(1, 2))
        length = tokens.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        hidden = self.transformer(self.embedding(tokens), image, tgt_mask=future, tgt_is_causal=True)
        return self.output(hidden)


def token_losses(decoder: CaptionDecoder, grid: Tensor, tokens: Tensor) -> Tensor:
    """Compute the cross entropy [B, L - 1] of every token given the tokens before it. Padding gets 0."""
    logits, targets = decoder(grid, tokens[:, :-1]), tokens[:, 1:]
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets.flatten(), ignore_index=PAD, reduction="none")
    return losses.view_as(targets)


class BicaptionedImages(ImageItems):
    """An image with one of its captions, forward and backward, as in VirTex ([11])."""

    def __init__(
        self, listing: Listing, annotations: ImageAnnotations, tokenizer: CaptionTokenizer, **options: Any
    ) -> None:
        super().__init__(listing, **options)
        self.annotations = annotations
        self.tokenizer = tokenizer

    def read(self, item: Item, rng: np.random.Generator) -> Sample:
        captions = self.annotations.captions[item.file]
        draws = self.image_transform.draw(rng)
        text = normalize_caption(captions[int(rng.integers(len(captions))) if self.training else 0])
        tokens = self.tokenizer.encode(swap_left_right(text) if self.image_transform.flips(draws) else text)
        return {"image": (self.image(item.file), draws), "tokens": tokens, "tokens_reversed": tokens[::-1]}


class BicaptioningData(CaptionData):
    """Images with a forward and a backward caption, to pre-train VirTex ([11])."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        require_captions(self.held_out_listing, self.held_out_annotations)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.training_loader(self._images(self.listing, self.annotations, True), collate_fn=self.collate)

    def test_dataloader(self) -> Any:
        images = self._images(self.held_out_listing, self.held_out_annotations, False)
        return self.evaluation_loader(images, self.held_out_batch_size, collate_fn=self.collate)

    def example_batch(self, module: Any, size: int, draw: RandomTensors) -> Example:
        batch = self.example_images(size, draw)
        batch |= {name: self.example_captions(size, draw) for name in ("tokens", "tokens_reversed")}
        batches = batches_of_epoch(self.dataset.published_count(self.split), self.batch_size)
        return Example(batch, batches, {"tokenizer": None})

    def _images(self, listing: Listing, annotations: ImageAnnotations, training: bool) -> BicaptionedImages:
        return BicaptionedImages(listing, annotations, self.words, **self.options(training))


class VirTex(pl.LightningModule):
    """Pre-trains an image encoder by bicaptioning ([11]). Parameters have the names of VirTex's checkpoints.

    The loss is the cross entropy of the forward captions plus the cross entropy of the backward ones. Both are means
    over the non-padding tokens of all processes. The test computes the loss on held-out captions.

    Args:
        image_encoder: backbone with `forward_map` and `feature_dim`; evaluations use this part.
        hidden_size: width of the decoders; 2048 in the paper's tables. VirTex's usual 1024 has 16 heads and 4096 units.
        max_tokens: longest caption, including boundary tokens.
        image_learning_rate, learning_rate: SGD's rates for the image encoder and for everything else.
        weight_decay: not applied to normalizations and biases in the decoders' embeddings and transformers.
        lookahead_steps, lookahead_alpha: settings of the Lookahead optimizer; 0 steps gives plain SGD.
        warmup_steps: steps with linear warm-up, before cosine decay to zero.
        samples: has no effect; recorded runs have it in their configuration.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        vocabulary_size: PositiveInt = 10000,
        hidden_size: PositiveInt = 2048,
        layers: PositiveInt = 1,
        attention_heads: PositiveInt = 32,
        feedforward_size: PositiveInt = 8192,
        dropout: Fraction = 0.1,
        max_tokens: PositiveInt = 30,
        image_learning_rate: PositiveFloat = 0.2,
        learning_rate: PositiveFloat = 1e-3,
        momentum: Momentum = 0.9,
        weight_decay: NonNegativeFloat = 1e-4,
        lookahead_steps: NonNegativeInt = 5,
        lookahead_alpha: Fraction = 0.5,
        warmup_steps: NonNegativeInt = 10000,
        clip_norm: PositiveFloat = 10.0,
        samples: NonNegativeInt = 8,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["image_encoder"], logger=False)
        width: Any = image_encoder.feature_dim
        self.visual = nn.ModuleDict({"cnn": image_encoder})
        self.textual = CaptionDecoder(
            width, vocabulary_size, hidden_size, layers, attention_heads, feedforward_size, dropout, max_tokens
        )
        # Both directions share everything but the transformer. The copy starts from the same weights.
        twin = self.backward_textual = copy.deepcopy(self.textual)
        twin.visual_projection, twin.embedding = self.textual.visual_projection, self.textual.embedding
        twin.output = self.textual.output

    def setup(self, stage: str) -> None:
        refuse_clip_value(self, "model.clip_norm")
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        for name in ("vocabulary_size", "max_tokens"):
            needed = getattr(tokenizer, name, 0)
            if needed > self.hparams[name]:
                raise ValueError(f"model.{name} is {self.hparams[name]}, but the tokenizer's is {needed}; increase it")

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the token losses [B, L - 1] of the forward captions, then those of the backward captions."""
        grid = self.visual["cnn"].forward_map(batch["image"])  # type: ignore[operator]
        forward = token_losses(self.textual, grid, batch["tokens"])
        return forward, token_losses(self.backward_textual, grid, batch["tokens_reversed"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        tokens, tokens_reversed = batch["tokens"], batch["tokens_reversed"]
        forward, backward = self(batch)
        # Captions differ in length, so each process divides by the mean token count per process. Averaging gradients
        # then gives the mean over all tokens.
        words = torch.stack([predicted(tokens).sum(), predicted(tokens_reversed).sum()]).float()
        forward_loss, backward_loss = torch.stack([forward.sum(), backward.sum()]) / mean_over_ranks(words).clamp(min=1)
        loss = forward_loss + backward_loss
        parts = {"loss": loss, "forward_loss": forward_loss, "backward_loss": backward_loss}
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()}, batch_size=len(tokens))
        return loss

    def configure_optimizers(self) -> Any:
        h: Any = self.hparams
        groups: dict[str, list[nn.Parameter]] = {"image": [], "decayed": [], "undecayed": []}
        for name, parameter in self.named_parameters():
            tower, part, *_ = name.split(".")
            # Biases and normalization weights are one-dimensional.
            spared = part in {"embedding", "transformer"} and parameter.ndim == 1
            groups["image" if tower == "visual" else "undecayed" if spared else "decayed"].append(parameter)
        parameters: list[dict[str, Any]] = [
            {"params": groups["image"], "lr": h.image_learning_rate},
            {"params": groups["decayed"]},
            {"params": groups["undecayed"], "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters, h.learning_rate, h.momentum, weight_decay=h.weight_decay
        )
        if h.lookahead_steps:
            optimizer = Lookahead(optimizer, h.lookahead_steps, h.lookahead_alpha)
        factor = warm_up_then_cosine(h.warmup_steps, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, self.hparams["clip_norm"], "norm")

    # -- evaluation after training -------------------------------------------------------------------------------------

    def on_test_start(self) -> None:
        self._meter = OncePerSample("forward", "forward_tokens", "backward", "backward_tokens")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        forward, backward = self(batch)
        self._meter.update(
            batch["index"], forward=forward.sum(1), forward_tokens=predicted(batch["tokens"]).sum(1),
            backward=backward.sum(1), backward_tokens=predicted(batch["tokens_reversed"]).sum(1),
        )  # fmt: skip

    def on_test_epoch_end(self) -> None:
        means = self._meter.compute(self.device)
        # Weight captions by their number of tokens, as the loss of a batch does.
        forward, backward = (means[side] / means[f"{side}_tokens"] for side in ("forward", "backward"))
        metrics = {
            "caption_loss": forward + backward, "forward_loss": forward, "backward_loss": backward,
            "perplexity": forward.exp(), "captions": means["count"],
        }  # fmt: skip
        self.log_dict({f"test/{name}": value.float().to(self.device) for name, value in metrics.items()})


def predicted(tokens: Tensor) -> Tensor:
    """Mark the valid targets of a decoder: bool [B, L - 1] for tokens [B, L]."""
    return tokens[:, 1:] != PAD
