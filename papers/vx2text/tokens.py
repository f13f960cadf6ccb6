"""Word tokens of a modality: a classifier, embeddings of its most probable categories, their places in a prompt."""

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
#: categories of a frozen classifier; `nondifferentiable`, sampled as by `st_topk` without a gradient; or `continuous`,
#: projected features of a trained encoder without categories, which the paper argues against.
Tokenization = Literal[Estimator, "frozen", "nondifferentiable", "continuous"]
#: Category embeddings: a parameter initialized with the mean of their names' word embeddings, or that mean itself.
Table = Literal["learned", "tied"]


def category_names(categories: Sequence[str] | str | None) -> list[str]:
    """Lower-cased category names, from a list or AudioSet's `class_labels_indices.csv`.

    None means the 400 actions of Kinetics, in the order of torchvision's weights.
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
        raise ValueError("model categories: a classifier needs at least one category, and no name twice")
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
        """Scores [B, C] of the categories before any softmax, from features [B, feature_dim]."""
        return self.fc(features)


class SigmoidClassifier(ModalityClassifier):
    """A classifier trained with a sigmoid per category, like PANNs.

    A category's probability is its sigmoid's share of the sum; `ModalityClassifier` uses the softmax of the scores.
    Weights and parameters are the same.

    Source: [3].
    """

    def scores(self, features: Tensor) -> Tensor:
        """Logarithms [B, C] of the sigmoids, float32: their softmax is each one's share."""
        return F.logsigmoid(self.fc(features).float())


# -- tokens ------------------------------------------------------------------------------------------------------------


class ModalityTokens(nn.Module):
    """A modality's classifier, and embeddings of its categories that the language model reads as words.

    Batch normalization of the classifier keeps its statistics, even in training. A frozen classifier is always in
    evaluation mode.

    Args:
        tokens: per clip, K.
        table: see `Table`; a learned one is zero until `start_table` or a checkpoint fills it.

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
        # Word pieces of the categories' names [C, P], once `VX2Text.read_names` has looked them up.
        self.register_buffer("pieces", None, persistent=False)
        self.tied = tokenization != "continuous" and table == "tied"
        if tokenization == "continuous":
            self.projection = nn.Linear(int(classifier.encoder.feature_dim), tokens * width)  # type: ignore[arg-type]
            # Unused here; distributed training refuses a parameter without gradient.
            classifier.fc.requires_grad_(False)
        elif not self.tied:
            self.table = nn.Embedding.from_pretrained(torch.zeros(categories, width), freeze=False)
        if not self.learns:
            classifier.requires_grad_(False)
        # Lightning keeps the mode of a module, so it must be set here.
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
        """Shape of the Gumbel noise of one sample, [clips, draws, C]; None if it needs none."""
        return (clips, draws_of(self.estimator, self.tokens), len(self.classifier.names)) if self.sampled else None

    def scores(self, clips: Tensor) -> Tensor:
        """Scores of the categories [B, S, C] for clips [B, S, ...]."""
        return self.classifier(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])

    def forward(
        self, clips: Tensor, noise: Tensor | None = None, table: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, categories and scores of the clips [B, S, ...] of every sample, in the order of the clips.

        Without Gumbel noise, the most probable categories are chosen; `table` holds tied embeddings of categories.

        Shapes:
            noise [B, S, draws, C]; table [C, D] -> [B, S * K, D], [B, S * K] (empty when continuous), [B, S, C]
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
    """Put modality tokens [B, T, D] into their reserved ids' places among embeddings [B, N, D] of ids [B, N]."""
    number = PLACES[modality] - ids
    here = (number >= 0) & (number < tokens.shape[1])
    row = number.clamp(0, tokens.shape[1] - 1)[:, :, None].expand(-1, -1, tokens.shape[2])
    return torch.where(here[:, :, None], tokens.to(embeddings.dtype).gather(1, row), embeddings)


def pieces_of(names: Sequence[str], tokenizer: Any) -> Tensor:
    """Word pieces of every name, padded with -1 [C, P]."""
    return pad_tokens([tokenizer.encode(name) for name in names], -1)


def table_of(pieces: Tensor, language_model: LanguageModel) -> Tensor:
    """Mean embedding [C, D] of the word pieces [C, P] of every category's name, with a gradient.

    Source: [4].
    """
    counted = (pieces >= 0)[:, :, None]
    return (language_model.embed(pieces) * counted).sum(1) / counted.sum(1)
