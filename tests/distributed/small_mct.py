"""Make MCT with tiny encoders for speed, and without any random numbers, so that two processes equal one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

STEPS = 8


class PooledImages(nn.Module):
    """An image encoder without batch statistics, since the halves of a batch would have different statistics."""

    def __init__(self, feature_dim: int = 6) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.linear = nn.Linear(3 * 16, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.linear(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)))


class MeanOfWords(nn.Module):
    """A text encoder without dropout, since two processes would drop different units."""

    def __init__(self, vocabulary_size: int = 256, feature_dim: int = 5) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, feature_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        # Average over words and not over padding, because the padding depends on the other captions of a process.
        words = (tokens != 0)[:, :, None]
        return (self.embedding(tokens) * words).sum(1) / words.sum(1)


def small_layer(loss: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {
        "trainer": {"max_epochs": 2, "limit_train_batches": STEPS // 2, "log_every_n_steps": 1},
        "model": {
            "init_args": {
                "image_encoder": {"class_path": f"{__name__}.PooledImages", "init_args": {"feature_dim": 6}},
                "text_encoder": {"class_path": f"{__name__}.MeanOfWords", "init_args": {"feature_dim": 5}},
                "text_learning_rate": 0.01,
                "image_learning_rate": 0.01,
                "momentum": 0.7,
                "batch_norm_group": None,  # the encoders have no batch normalization
                "loss": {"init_args": loss},
                **model,
            }
        },
    }
