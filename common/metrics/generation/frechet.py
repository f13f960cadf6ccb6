"""Frechet distance between two sets of features, each taken for a normal distribution (FID when they are Inception's).

Source: M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.metrics.gathering import gather_objects
from common.metrics.generation.seen import Seen

Floats = npt.NDArray[np.float64]

# What rounding may leave of an eigenvalue that is zero, as a share of the largest.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Moments:
    """Number of samples, mean [d] and covariance [d, d] with divisor n - 1."""

    count: int
    mean: Floats
    covariance: Floats

    @classmethod
    def of(cls, features: Tensor | Floats) -> Moments:
        """Of features [N, d]; N at least 2."""
        values = np.asarray(features.detach().cpu() if isinstance(features, Tensor) else features, dtype=np.float64)
        _require_two(len(values))
        covariance = np.atleast_2d(np.cov(values, rowvar=False, ddof=1))
        return cls(len(values), values.mean(axis=0), covariance)

    def save(self, path: str | Path) -> None:
        """Write an `.npz` file, whole or not at all."""
        from common.files import write_whole

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.savez(file, count=self.count, mean=self.mean, covariance=self.covariance)

        write_whole(path, write)

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        """Read what `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = cls(int(file["count"]), file["mean"], file["covariance"])
        except Exception as error:  # a damaged archive makes its reader raise whatever it meets
            raise ValueError(
                f"{path}: no statistics of features ({error}); delete the file to have it made anew"
            ) from (error)
        if found.mean.ndim != 1 or found.covariance.shape != (len(found.mean), len(found.mean)):
            raise ValueError(f"{path}: mean and covariance do not fit each other; delete the file to have it made anew")
        return found


def frechet_distance(one: Moments, other: Moments) -> float:
    """`|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))`.

    Only the trace of the root is needed, the sum of the roots of the eigenvalues of C1 C2. These are those of `R C2 R`
    with R the root of C1, which is symmetric: a tenth of the time for 2,048 features, and no imaginary part where there
    are fewer samples than features.

    Args:
        one, other: of features from the same network.

    Returns:
        The distance, from 0 up; rounding can leave a value just below 0.

    Source: XMC-GAN's official `tf_inception_utils.py` (docs/papers/xmc_gan.md [9.1]), which takes the whole root.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features of {len(one.mean)} and of {len(other.mean)} values cannot be compared")
    if not all(np.isfinite(part).all() for moments in (one, other) for part in (moments.mean, moments.covariance)):
        raise ValueError("the features are not finite: the images that they are of are probably not, either")
    values, vectors = np.linalg.eigh(one.covariance)
    root = vectors * np.sqrt(values.clip(min=0))  # R up to a rotation, which changes no eigenvalue
    overlap = np.linalg.eigvalsh(root.T @ other.covariance @ root)
    largest = abs(values).max()
    for found, scale in ((values, largest), (overlap, largest * abs(np.trace(other.covariance)))):
        if found[0] < -_ROUNDING * scale:
            raise ValueError(f"one of the two is no covariance: it has a negative variance ({found[0]:.3g})")
    difference = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance) - 2 * np.sqrt(overlap.clip(min=0)).sum()
    return float(difference @ difference + traces)


class FeatureStatistics:
    """Mean and covariance of features over all batches and processes, from float64 sums: no row is kept.

    The sums are taken about the first row that a process sees, so that a large mean does not drown a small variance.

    Examples:
        >>> statistics = FeatureStatistics()
        >>> statistics.update(torch.tensor([0, 1, 1]), torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 1.0]]))
        >>> statistics.compute().mean.tolist()
        [1.0, 1.0]
    """

    def __init__(self) -> None:
        self._seen = Seen()
        self._origin: Tensor | None = None
        self._sum: Tensor | None = None
        self._products: Tensor | None = None
        self._count = 0

    def update(self, index: Tensor, features: Tensor) -> None:
        """Add a batch.

        Args:
            index: which samples [B]; a sample that was there before is left out.
            features: [B, d].
        """
        chosen = self._seen.fresh(index).to(features.device)
        if not len(chosen):
            return
        rows = features.detach()[chosen].double()
        if self._origin is None:
            self._origin = rows[0].clone()
            self._sum = torch.zeros_like(self._origin)
            self._products = rows.new_zeros(rows.shape[1], rows.shape[1])
        assert self._sum is not None
        assert self._products is not None
        rows = rows - self._origin
        self._sum += rows.sum(0)
        self._products.addmm_(rows.T, rows)
        self._count += len(rows)

    def compute(self) -> Moments:
        """The moments over the samples of all processes; the same on every process."""
        self._seen.require_disjoint(None if self._origin is None else self._origin.device)
        parts = [part for part in self._parts() if part.count]
        count = sum(part.count for part in parts)
        _require_two(count)
        mean = sum(part.count * part.mean for part in parts) / count
        # Sums of squares about the own mean of every process, and of the means about the common one.
        scatter = sum(part.covariance + part.count * np.outer(part.mean - mean, part.mean - mean) for part in parts)
        return Moments(count, np.asarray(mean), np.asarray(scatter) / (count - 1))

    def _parts(self) -> Sequence[Moments]:
        """What every process saw; the covariance is not yet divided."""
        if self._origin is None:
            own = Moments(0, np.zeros(0), np.zeros((0, 0)))
        else:
            assert self._sum is not None
            assert self._products is not None
            shifted = self._sum / self._count
            scatter = self._products - self._count * torch.outer(shifted, shifted)
            own = Moments(self._count, (self._origin + shifted).cpu().numpy(), scatter.cpu().numpy())
        return gather_objects([own])


def _require_two(count: int) -> None:
    if count < 2:
        raise ValueError(f"a covariance needs at least two samples, there are {count}")
