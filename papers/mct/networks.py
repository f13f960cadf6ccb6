"""The networks of MCT: image and text encoder with projection heads, and the encoding of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.heads import ProjectionHead
from common.losses.info_nce import at_least_float32
from common.memory.collective import is_distributed
from common.memory.momentum import batch_shuffle, batch_unshuffle, order_over_groups
from common.training.batch_norm import GroupedBatchNorm


@dataclass(frozen=True)
class Heads:
    """Configuration of a tower's projection heads.

    Separate heads (the method) are two-layer perceptrons on the backbone's feature. Shared heads (the ablation) share
    the hidden layer and, if their widths are equal, the output layer. The paper doesn't define the shared heads.
    `hidden_dim` defaults to the backbone's `feature_dim`.
    """

    shared: bool = False
    hidden_dim: int | None = None
    batch_norm: bool = False


class Tower(nn.Module):
    """The backbone of one modality, with features [B, feature_dim], and a projection head for each kind of contrast.

    `intra_dim` is the width of the head for contrast within the modality, `inter_dim` across modalities. None builds no
    head: a head without a loss would get no gradient, and distributed training would fail.

    Source: [2].
    """

    def __init__(
        self,
        backbone: nn.Module,
        intra_dim: int | None = 128,
        inter_dim: int | None = 1024,
        heads: Heads = Heads(),
    ) -> None:
        super().__init__()
        widths = {name: dim for name, dim in (("intra", intra_dim), ("inter", inter_dim)) if dim is not None}
        if not widths:
            raise ValueError(
                "no loss trains this tower: one of weight_ii, weight_tag, weight_cc, weight_cross must not be 0"
            )
        self.backbone = backbone
        self.feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        hidden = self.feature_dim if heads.hidden_dim is None else heads.hidden_dim
        self.embeds = tuple(widths)
        self.trunk = nn.Sequential()
        self.heads = nn.ModuleDict()
        if heads.shared and len(widths) == 2:
            norm = [nn.BatchNorm1d(hidden)] if heads.batch_norm else []
            self.trunk.extend([nn.Linear(self.feature_dim, hidden), *norm, nn.ReLU()])
            outputs = {"both": widths["intra"]} if intra_dim == inter_dim else widths
            self.heads.update({name: nn.Linear(hidden, dim) for name, dim in outputs.items()})
        else:
            for name, dim in widths.items():
                self.heads[name] = ProjectionHead(self.feature_dim, hidden, dim, 2, heads.batch_norm)

    def features(self, inputs: Tensor) -> Tensor:
        """Compute the features for transfer, [B, feature_dim]."""
        return self.backbone(inputs)

    def project(self, features: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(features)
        if "both" in self.heads:
            return dict.fromkeys(("intra", "inter"), _unit(self.heads["both"](hidden)))
        return {name: _unit(head(hidden)) for name, head in self.heads.items()}

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the heads' unit vectors `intra` [B, intra_dim] and `inter` [B, inter_dim], in at least float32."""
        return self.project(self.features(inputs))


class MCT(nn.Module):
    """An image tower and a caption tower. The caption tower is None if the stage uses no captions."""

    def __init__(self, image: Tower, text: Tower | None = None) -> None:
        super().__init__()
        self.image, self.text = image, text


@torch.no_grad()
def encode_keys(encoder: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Compute the keys of a batch without gradient; see `Tower.forward` for the result.

    If a query and its key share batch statistics, the network can recognize the positive key by its batch. So shuffle
    the rows of all processes before encoding and restore the order afterwards. If one process normalizes all rows
    together, don't shuffle.

    Source: [6].
    """
    grouped = any(isinstance(layer, GroupedBatchNorm) for layer in encoder.modules())
    if not (grouped or is_distributed()):
        return encoder(rows)
    permutation = order_over_groups(rows)
    keys = encoder(batch_shuffle(rows, permutation))
    return {name: batch_unshuffle(key, permutation) for name, key in keys.items()}


def _unit(embeddings: Tensor) -> Tensor:
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(at_least_float32(embeddings), dim=1)
