"""Heads that map features to embeddings."""

from torch import Tensor, nn

from common.types import PositiveInt


class ProjectionHead(nn.Module):
    """Multi-layer perceptron from features to an embedding. The embedding is not normalized.

    Args:
        hidden_dim: units of every hidden layer.
        layers: number of linear layers. The linear head of the ablations has 1 (65,664 parameters).
        batch_norm: normalize before every ReLU. If False, parameter names equal those of the released AVID-CMA
            checkpoints (`projection.0`, `.2`, `.4`).
        output_batch_norm: center and scale the embedding over the batch, without learned parameters.

    Shapes:
        [B, in_dim] -> [B, out_dim]

    Examples:
        >>> ProjectionHead()(torch.randn(2, 512)).shape
        torch.Size([2, 128])

    Source: docs/papers/avid_cma.md [3.3]; 590,976 parameters by default.
    """

    def __init__(
        self,
        in_dim: PositiveInt = 512,
        hidden_dim: PositiveInt = 512,
        out_dim: PositiveInt = 128,
        layers: PositiveInt = 3,
        batch_norm: bool = False,
        output_batch_norm: bool = False,
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        width = in_dim
        for _ in range(layers - 1):
            modules.append(nn.Linear(width, hidden_dim))
            if batch_norm:
                modules.append(nn.BatchNorm1d(hidden_dim))
            modules.append(nn.ReLU())
            width = hidden_dim
        modules.append(nn.Linear(width, out_dim))
        if output_batch_norm:
            modules.append(nn.BatchNorm1d(out_dim, affine=False))
        self.projection = nn.Sequential(*modules)
        self.out_dim = out_dim

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(features)
