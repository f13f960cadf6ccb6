"""The towers of MCT: a backbone with its projection heads, the momentum copy, and the shuffled key batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.encoders.heads import ProjectionHead
from common.losses.info_nce import at_least_float32
from common.memory.collective import all_gather_concat, broadcast_from_rank_zero, is_distributed, rank, world_size
from common.memory.momentum import MomentumPair


class Tower(nn.Module):
    """Backbone of one modality, with a projection head for each kind of contrast.

    A head that no loss uses is left out, not left idle: distributed training refuses parameters without gradient.

    Separate heads (the method) are two-layer perceptrons on the backbone's feature. Shared heads (the ablation) have
    the hidden layer in common. With equal widths the output layer is common too, and one embedding serves both kinds
    of contrast; with different widths each has its own output layer on the common hidden one. That reading of "shared"
    is ours: the paper's text, which we could not read, may define it otherwise.

    Args:
        backbone: from inputs to features [B, feature_dim].
        intra_dim: width of the embedding for contrast within the modality; None for no such head.
        inter_dim: width of the embedding for contrast across modalities; None for no such head.
        shared: share the hidden layer between both heads.
        hidden_dim: units of the hidden layer; `feature_dim` of the backbone by default.
        batch_norm: normalise the hidden layer over the batch; the method does not.

    Raises:
        ValueError: when there is no head at all.

    Source: specification 2; two layers without batch normalisation as in MoCo v2.
    """

    def __init__(
        self,
        backbone: nn.Module,
        intra_dim: int | None = 128,
        inter_dim: int | None = 1024,
        shared: bool = False,
        hidden_dim: int | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = {name: dim for name, dim in (("intra", intra_dim), ("inter", inter_dim)) if dim is not None}
        if not widths or min(widths.values()) < 1:
            raise ValueError(
                "a tower needs a head: give intra_dim or inter_dim a positive width, got "
                f"intra_dim={intra_dim}, inter_dim={inter_dim}"
            )
        self.backbone = backbone
        self.feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
        hidden = self.feature_dim if hidden_dim is None else hidden_dim
        self.trunk = nn.Sequential()
        self.heads = nn.ModuleDict()
        shared = shared and len(widths) == 2
        if shared and intra_dim == inter_dim:
            self.heads["both"] = ProjectionHead(self.feature_dim, hidden, widths["intra"], 2, batch_norm)
        elif shared:
            normalisation = [nn.BatchNorm1d(hidden)] if batch_norm else []
            self.trunk.extend([nn.Linear(self.feature_dim, hidden), *normalisation, nn.ReLU()])
            for name, dim in widths.items():
                self.heads[name] = nn.Linear(hidden, dim)
        else:
            for name, dim in widths.items():
                self.heads[name] = ProjectionHead(self.feature_dim, hidden, dim, 2, batch_norm)

    def features(self, *inputs: Tensor) -> Tensor:
        """What transfers to other tasks, [B, feature_dim]."""
        return self.backbone(*inputs)

    def project(self, features: Tensor) -> dict[str, Tensor]:
        """Embeddings of features [B, feature_dim]; as `forward`."""
        hidden = self.trunk(features)
        embeddings = {name: _unit(head(hidden)) for name, head in self.heads.items()}
        if "both" in embeddings:
            return {"intra": embeddings["both"], "inter": embeddings["both"]}
        return embeddings

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Embeddings of a batch.

        Returns:
            `intra` [B, intra_dim] and `inter` [B, inter_dim], those that have a head; unit vectors in float32 or more.
        """
        return self.project(self.features(*inputs))


class MomentumTower(MomentumPair):
    """A tower and its moving average, which makes the keys.

    Source: specification 2 and 6.
    """

    query: Tower
    key: Tower

    def __init__(self, tower: Tower) -> None:
        super().__init__(tower)

    @torch.no_grad()
    def keys(
        self, *inputs: Tensor, shuffle: bool = True, groups: int = 1, permutation: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Keys of a batch, without gradient.

        The batch normalisation of a query and of its key should not see the same samples, or the network recognises
        the positive by its batch. Several processes exchange their rows at random; a single one encodes its batch in
        random groups, each normalised by itself. Only an encoder with batch normalisation needs either.

        Args:
            *inputs: of the tower; all have the same number of rows.
            shuffle: encode the rows in random order, over all ranks. One process with one group keeps its order, which
                makes no difference to it.
            groups: parts of this rank's rows that are encoded one after the other.
            permutation: order to use instead of a random one, int64, over the rows of all ranks; the same on each.

        Returns:
            As `Tower.forward`, in the order of the inputs.

        Raises:
            ValueError: when the batch cannot be divided into the groups.
        """
        rows = len(inputs[0])
        if groups < 1 or rows % groups:
            raise ValueError(
                f"key_bn_groups={groups} does not divide the {rows} rows that a device gets: choose a divisor, or "
                "another batch size"
            )
        if not shuffle or (groups == 1 and not is_distributed()):
            return self._in_groups(inputs, groups)
        first, permutation = batch_shuffle(inputs[0], permutation)
        shuffled = (first, *(batch_shuffle(other, permutation)[0] for other in inputs[1:]))
        return {name: batch_unshuffle(keys, permutation) for name, keys in self._in_groups(shuffled, groups).items()}

    def _in_groups(self, inputs: tuple[Tensor, ...], groups: int) -> dict[str, Tensor]:
        if groups == 1:
            return self.key(*inputs)
        parts = [self.key(*group) for group in zip(*(rows.chunk(groups) for rows in inputs))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def batch_shuffle(rows: Tensor, permutation: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Exchange the rows of all ranks in a random order.

    Args:
        rows: this rank's batch; every rank must pass the same shape.
        permutation: the order; by default rank 0 draws one from the global generator and sends it to all.

    Shapes:
        rows [N, ...]; permutation [W * N]

    Returns:
        (this rank's part of the permuted joint batch [N, ...], the permutation).

    Raises:
        ValueError: when the permutation has another length than the joint batch.

    Source: specification 6.
    """
    joint = all_gather_concat(rows)
    if permutation is None:
        permutation = torch.randperm(len(joint), device=rows.device)
        broadcast_from_rank_zero(permutation)
    elif permutation.shape != (len(joint),):
        raise ValueError(
            f"the permutation must have one entry for each of the {len(joint)} rows of all ranks, got "
            f"{tuple(permutation.shape)}"
        )
    shuffled = joint.index_select(0, _own_part(permutation))
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        shuffled = shuffled.contiguous(memory_format=torch.channels_last)  # gathering loses the layout
    return shuffled, permutation


@torch.no_grad()
def batch_unshuffle(rows: Tensor, permutation: Tensor) -> Tensor:
    """Give every rank its own rows back, in their order before `batch_shuffle`.

    Args:
        rows: what was computed from this rank's shuffled rows.
        permutation: as `batch_shuffle` returned it.

    Shapes:
        rows [N, ...]; permutation [W * N] -> [N, ...]
    """
    return all_gather_concat(rows).index_select(0, _own_part(permutation.argsort()))


def _own_part(order: Tensor) -> Tensor:
    return order.view(world_size(), -1)[rank()]


def _unit(embeddings: Tensor) -> Tensor:
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.normalize(at_least_float32(embeddings), dim=1)
