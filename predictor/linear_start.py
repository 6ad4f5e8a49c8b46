"""The best linear low-rank stand-in for a layer's gate, and the MLP that starts as it.

With C the covariance of the inputs and R R^T = C, the rank-r matrix closest to W on those inputs comes from the
truncated SVD of W R: W is projected on its r leading left singular vectors U, so fc2 = U and fc1 = U^T W. Without R
rank is spent on directions in which no input varies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from predictor.samples import FFNWeights, batches

# A hidden unit starts this many standard deviations above its kink, so that the MLP starts linear.
_LINEAR_RANGE = 3.0
_FEW = 16  # ranks below one in so many of the dimensions are few
# Logits start as probit-like scores of unit noise times 1.7, which is a logistic's slope, and stay within this spread.
_LOGISTIC_SLOPE = 1.7
_MAX_LOGIT_SPREAD = 8.0


@dataclass(frozen=True, eq=False)
class LinearStart:
    """Leading directions of one layer's gate over its inputs.

    fc1: f32 [r, d], unit variance over the inputs each; fc2: f32 [f, r]; mean: [d] of the inputs; center: [f], the
    gate at the mean; variance: [f], of each gate over the inputs.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    mean: torch.Tensor
    center: torch.Tensor
    variance: torch.Tensor

    def residual(self, rank: int) -> torch.Tensor:
        """f32 [f], the standard deviation of what a rank leaves unexplained of each gate."""
        explained = self.fc2[:, :rank].square().sum(dim=1)
        return (self.variance - explained).clamp_min(0).sqrt()

    def logit_scale(self, rank: int) -> torch.Tensor:
        """f32 [f], what turns approximate gates into log-odds of firing."""
        spread = self.variance.sqrt()
        noise = torch.maximum(self.residual(rank), spread * (_LOGISTIC_SLOPE / _MAX_LOGIT_SPREAD))
        return torch.where(spread > 0, _LOGISTIC_SLOPE / noise, torch.ones_like(noise))

    def mlp(
        self, rank: int, linear_range: float = _LINEAR_RANGE
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """fc1, b1, fc2, b2 whose logits are `logit_scale` times the rank-`rank` gate within the linear range."""
        fc1, fc2 = self.fc1[:rank], self.fc2[:, :rank]
        scale = self.logit_scale(rank)
        b1 = linear_range - fc1 @ self.mean
        # A gate that never moves, such as that of a zero row, is decided by its sign alone.
        still = torch.where(self.center > 0, _MAX_LOGIT_SPREAD, -_MAX_LOGIT_SPREAD)
        center = torch.where(self.variance > 0, scale * self.center, still)
        fc2 = fc2 * scale[:, None]
        return fc1.clone(), b1, fc2, center - linear_range * fc2.sum(dim=1)


def _right_vectors(whitened: torch.Tensor, rank: int, seed: int) -> torch.Tensor:
    """The leading right singular vectors of a matrix [f, d], f64 [d, rank].

    Exact ones are eigenvectors of d x d. Where few are wanted, random projections find them sooner (Halko et al. 2011).
    Of half of d, which 8% of a model's bytes give, these took four times as long.
    """
    d = whitened.shape[1]
    if _FEW * rank >= d:
        _, vectors = torch.linalg.eigh((whitened.T @ whitened).double())  # in ascending order
        return vectors.flip(1)[:, :rank]
    # Imported here: it takes 0.8 s, and a chat that reads predictors trains none.
    from sklearn.utils.extmath import randomized_svd

    with threadpool_limits(torch.get_num_threads(), "blas"):
        _, _, vectors = randomized_svd(whitened.numpy(), n_components=rank, random_state=seed)
    return torch.from_numpy(vectors.T.copy()).double()


def covariance(inputs: np.ndarray, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [d] and covariance [d, d] in f64, shrunk towards a multiple of the identity when tokens are few."""
    dims = inputs.shape[1]
    total, second = torch.zeros(dims, dtype=torch.float64), torch.zeros(dims, dims, dtype=torch.float64)
    for x in batches(inputs, rows):
        total += x.sum(dim=0)
        second += x.T @ x
    mean = total / len(rows)
    cov = second / len(rows) - torch.outer(mean, mean)
    shrinkage = dims / (dims + 10 * len(rows))
    average = cov.diagonal().mean().clamp_min(1e-12)
    return mean, (1 - shrinkage) * cov + shrinkage * average * torch.eye(dims, dtype=torch.float64)


def linear_start(weights: FFNWeights, inputs: np.ndarray, rows: np.ndarray, rank: int, seed: int) -> LinearStart:
    """Directions up to `rank` for f32 weights and inputs [n, d], of which only `rows` are read."""
    mean64, cov = covariance(inputs, rows)
    root, mean, weight = torch.linalg.cholesky(cov), mean64.float(), weights.firing_weight
    whitened = weight @ root.float()
    leading = _right_vectors(whitened, rank, seed)
    return LinearStart(
        fc1=torch.linalg.solve_triangular(root.T, leading, upper=True).T.float().contiguous(),
        fc2=whitened @ leading.float(),
        mean=mean,
        center=weight @ mean + weights.firing_bias,
        variance=whitened.square().sum(dim=1),
    )
