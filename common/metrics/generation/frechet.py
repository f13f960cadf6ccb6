"""Frechet distance between two sets of features, modeled as normal distributions. With Inception features, this is FID.

Source: M. Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.files import write_whole
from common.metrics.gathering import Seen, gather_objects

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """The number of samples, their mean [d] and their covariance [d, d] with divisor n - 1."""

    count: int
    mean: Floats
    covariance: Floats

    @classmethod
    def of(cls, features: Tensor | Floats) -> Moments:
        """Compute the moments of features [N, d]."""
        values = torch.as_tensor(features, dtype=torch.float64).detach().cpu().numpy()
        _require_two(len(values))
        covariance = np.atleast_2d(np.cov(values, rowvar=False))
        return cls(len(values), values.mean(axis=0), covariance)

    def save(self, path: str | Path) -> None:
        write_whole(path, lambda partial: np.savez(partial, **vars(self)))

    @classmethod
    def load(cls, path: str | Path) -> Moments:
        try:
            with np.load(path) as file:
                return cls(int(file["count"]), file["mean"], file["covariance"])
        except Exception as error:  # reading a damaged archive can raise anything
            raise ValueError(f"{path}: no feature statistics ({error}); delete it to recompute them") from error


def frechet_distance(one: Moments, other: Moments) -> float:
    """Compute `|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2))`.

    Let R be the square root of C1. The symmetric matrix `R C2 R` has the same eigenvalues as C1 C2, and the sum of
    their square roots is the trace of (C1 C2)^(1/2). For 2,048 features, this is ten times faster than computing the
    root of C1 C2, and has no imaginary part even with fewer samples than features. Rounding can give a value just below
    0.

    Examples:
        >>> real = torch.eye(4)
        >>> round(frechet_distance(Moments.of(real), Moments.of(real + 1)), 6)
        4.0

    Source: XMC-GAN's official `tf_inception_utils.py` (docs/papers/xmc_gan.md [9.1]), which computes the root of C1 C2.
    """
    if not all(np.isfinite(part).all() for moments in (one, other) for part in (moments.mean, moments.covariance)):
        raise ValueError("the features are not finite, so the images probably are not either")
    values, vectors = np.linalg.eigh(one.covariance)
    root = vectors * np.sqrt(values.clip(min=0))  # R up to a rotation, which keeps the eigenvalues
    overlap = np.linalg.eigvalsh(root.T @ other.covariance @ root)
    difference = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance) - 2 * np.sqrt(overlap.clip(min=0)).sum()
    return float(difference @ difference + traces)


class FeatureStatistics:
    """Mean and covariance over all batches and processes. Sums are float64, of differences to the first row."""

    def __init__(self) -> None:
        self._seen = Seen()
        # The first row; the sums of the rows [d] and of their products [d, d], both relative to the first row.
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._count = 0

    def update(self, index: Tensor, features: Tensor) -> None:
        """Add samples [B] with features [B, d]. Skip samples that were added before."""
        chosen = self._seen.fresh(index).to(features.device)
        if not len(chosen):
            return
        rows = features.detach()[chosen].double()
        if self._sums is None:
            self._sums = rows[0].clone(), torch.zeros_like(rows[0]), rows.new_zeros(rows.shape[1], rows.shape[1])
        origin, total, products = self._sums
        rows = rows - origin
        total += rows.sum(0)
        products.addmm_(rows.T, rows)
        self._count += len(rows)

    def compute(self) -> Moments:
        """Return the moments over the samples of all processes, the same on every process."""
        self._seen.require_disjoint()
        own = []
        if self._sums is not None:
            origin, total, products = self._sums
            shifted = total / self._count
            squares = products - self._count * torch.outer(shifted, shifted)
            own.append(Moments(self._count, (origin + shifted).cpu().numpy(), squares.cpu().numpy()))
        # An entry per process with samples; `covariance` is the sum of squares around that process's mean.
        parts: list[Moments] = gather_objects(own)
        count = sum(part.count for part in parts)
        _require_two(count)
        mean = sum(part.count * part.mean for part in parts) / count
        # The squares within processes, plus those of the process means around the common mean.
        scatter = sum(part.covariance + part.count * np.outer(part.mean - mean, part.mean - mean) for part in parts)
        return Moments(count, np.asarray(mean), np.asarray(scatter) / (count - 1))


def _require_two(count: int) -> None:
    if count < 2:
        raise ValueError(f"a covariance needs at least two samples, got {count}")
