"""Turns a modality into word tokens: a classifier picks categories, whose embeddings get places in the prompt."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.data.text import pad_tokens
from common.files import open_regular, parsing
from papers.vx2text.gumbel import Estimator, choose, draws_of
from papers.vx2text.language_model import LanguageModel
from papers.vx2text.prompt import PLACES, Modality

#: Kinds of tokens: an estimator of `papers.vx2text.gumbel`, which trains the classifier; `frozen`, the most probable
#: categories of a frozen classifier; `nondifferentiable`, sampled like `st_topk` but without a gradient; or
#: `continuous`, projected features of a trained encoder instead of categories, which the paper argues against.
Tokenization = Literal[Estimator, "frozen", "nondifferentiable", "continuous"]
#: Category embeddings: `tied` is the mean of the name's word embeddings; `learned` only starts from this mean.
Table = Literal["learned", "tied"]


def category_names(categories: Sequence[str] | str | None) -> list[str]:
    """Read the lower-cased category names from a list or from AudioSet's `class_labels_indices.csv`.

    None returns Kinetics' 400 actions in the order of torchvision's weights.
    """
    if categories is None:
        from torchvision.models.video import R2Plus1D_18_Weights

        names = R2Plus1D_18_Weights.KINETICS400_V1.meta["categories"]
    elif isinstance(categories, str):
        path = Path(categories)
        with parsing(path, ValueError), open_regular(path, "r", encoding="utf-8", newline="") as file:
            names = [row["display_name"] for row in csv.DictReader(file)]
    else:
        names = categories
    names = [name.lower() for name in names]
    if not names or len(set(names)) != len(names):
        raise ValueError("model categories: give a classifier at least one name, and no name twice")
    return names


class ModalityClassifier(nn.Module):
    """A classifier whose categories are words (see `category_names`), on an encoder with `feature_dim` features.

    Source: [3].
    """

    def __init__(self, encoder: nn.Module, categories: Sequence[str] | str | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = category_names(categories)
        self.fc = nn.Linear(int(encoder.feature_dim), len(self.names))  # type: ignore[arg-type]

    def forward(self, clip: Tensor) -> Tensor:
        return self.scores(self.encoder(clip))

    def scores(self, features: Tensor) -> Tensor:
        """Map features [B, feature_dim] to category scores [B, C], before any softmax."""
        return self.fc(features)


class SigmoidClassifier(ModalityClassifier):
    """A classifier trained with a sigmoid per category, like PANNs.

    The probability of a category is its sigmoid divided by the sum of all sigmoids. `ModalityClassifier` instead uses
    the softmax of the scores. Parameters are the same in both.

    Source: [3].
    """

    def scores(self, features: Tensor) -> Tensor:
        """Return the logarithms [B, C] of the sigmoids in float32; their softmax divides each sigmoid by the sum."""
        return F.logsigmoid(self.fc(features).float())


# -- tokens ------------------------------------------------------------------------------------------------------------


class ModalityTokens(nn.Module):
    """A modality's classifier, and embeddings of its categories, which the language model reads like words.

    The classifier's batch normalization never updates its statistics. A frozen classifier is always in evaluation mode.

    Args:
        tokens: K, the tokens per clip.
        table: see `Table`. A learned table is zero until `VX2Text.start_tables` or a checkpoint sets it.

    Source: [4], [8] and [9].
    """

    pieces: Tensor

    def __init__(
        self,
        classifier: ModalityClassifier,
        width: int,
        tokens: int,
        tokenization: Tokenization = "st_topk",
        temperature: float = 1.0,
        table: Table = "learned",
    ) -> None:
        super().__init__()
        categories = len(classifier.names)
        self.classifier = classifier
        self.tokens = tokens
        self.temperature = temperature
        self.learns = tokenization not in ("frozen", "nondifferentiable")
        self.sampled = tokenization not in ("frozen", "continuous")
        self.estimator: Estimator = tokenization if tokenization in get_args(Estimator) else "st_topk"  # type: ignore[assignment]
        self.table: nn.Embedding | None = None
        self.projection: nn.Linear | None = None
        # Word pieces [C, P] of the category names; `VX2Text.read_names` sets them.
        self.register_buffer("pieces", None, persistent=False)
        self.tied = tokenization != "continuous" and table == "tied"
        if tokenization == "continuous":
            self.projection = nn.Linear(int(classifier.encoder.feature_dim), tokens * width)  # type: ignore[arg-type]
            # Freeze the unused layer, because distributed training rejects a trainable parameter without a gradient.
            classifier.fc.requires_grad_(False)
        elif not self.tied:
            self.table = nn.Embedding.from_pretrained(torch.zeros(categories, width), freeze=False)
        if not self.learns:
            classifier.requires_grad_(False)
        # Lightning doesn't change the mode of modules, so set it here.
        self.train()

    def train(self, mode: bool = True) -> ModalityTokens:
        super().train(mode)
        if not self.learns:
            self.classifier.eval()
        for module in self.classifier.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def noise_shape(self, clips: int) -> tuple[int, int, int] | None:
        """Return the shape [clips, draws, C] of a sample's Gumbel noise, or None if the tokens need no noise."""
        return (clips, draws_of(self.estimator, self.tokens), len(self.classifier.names)) if self.sampled else None

    def scores(self, clips: Tensor) -> Tensor:
        """Score the categories [B, S, C] of clips [B, S, ...]."""
        return self.classifier(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])

    def forward(
        self, clips: Tensor, noise: Tensor | None = None, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings, categories and scores of each sample's clips [B, S, ...], in the order of the clips.

        Without Gumbel noise, choose the most probable categories. If category embeddings are tied to the language
        model's words, `table` holds them.

        Shapes:
            noise [B, S, draws, C]; table [C, D] -> [B, S * K, D], [B, S * K] (empty if continuous), [B, S, C]
        """
        batch, count = clips.shape[:2]
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            features = self.classifier.encoder(clips.flatten(0, 1))
            scores = self.classifier.scores(features)
        if self.projection is not None:
            embeddings = self.projection(features)
            chosen = torch.zeros(len(features), 0, dtype=torch.int64, device=features.device)
        else:
            rows = table if self.table is None else self.table.weight
            assert rows is not None
            flat = None if noise is None else noise.flatten(0, 1)
            embeddings, chosen = choose(scores, rows, self.tokens, self.estimator, self.temperature, flat)
        return (
            embeddings.reshape(batch, count * self.tokens, -1),
            chosen.reshape(batch, -1),
            scores.view(batch, count, -1),
        )


def place(embeddings: Tensor, ids: Tensor, tokens: Tensor, modality: Modality) -> Tensor:
    """Put modality tokens [B, T, D] at the places of their reserved ids [B, N] among the embeddings [B, N, D]."""
    number = PLACES[modality] - ids
    here = (number >= 0) & (number < tokens.shape[1])
    row = number.clamp(0, tokens.shape[1] - 1)[:, :, None].expand(-1, -1, tokens.shape[2])
    return torch.where(here[:, :, None], tokens.to(embeddings.dtype).gather(1, row), embeddings)


def pieces_of(names: Sequence[str], tokenizer: Any) -> Tensor:
    """Return the word pieces of every name, padded with -1: [C, P]."""
    return pad_tokens([tokenizer.encode(name) for name in names], -1)


def table_of(pieces: Tensor, language_model: LanguageModel) -> Tensor:
    """Average the embeddings of the word pieces [C, P] of each category name, with a gradient: [C, D].

    Source: [4].
    """
    counted = (pieces >= 0)[:, :, None]
    return (language_model.embed(pieces) * counted).sum(1) / counted.sum(1)
