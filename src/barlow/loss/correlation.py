"""The cross-correlation matrix, and the regulariser of Mixed Barlow Twins."""

from typing import Any

import torch
from torch import Tensor

from barlow.loss.batch import batch_sizes, check, check_batch, gather, rows_of, wide


def cross_correlation(
    z1: Tensor, z2: Tensor, *, eps: float = 1e-5, process_group: Any = None
) -> Tensor:
    """The cross-correlation matrix of two batches of embeddings, over the batch of all ranks.

    Args:
        z1: embeddings of the first views, `(N, D)`.
        z2: embeddings of the second views, `(N, D)`.
        eps: added to the variance of each feature. Default 1e-5 (as in `nn.BatchNorm1d`).
        process_group: ranks that share a batch. Default: all ranks.

    Returns:
        `(D, D)`, float32 (float64 for float64 input), the same on every rank. Like
        `BarlowTwinsLoss`, it is differentiable, for gradients that are averaged over ranks (DDP).

    Raises:
        UserError: if the shapes or types differ, the shape is not `(N, D)`, the type is not
            floating, or the global batch has fewer than 2 samples.

    Example:
        >>> z = torch.randn(64, 3)
        >>> cross_correlation(z, -z).diagonal().round(decimals=3)
        tensor([-1., -1., -1.])
    """
    check(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        a, b = (_normalised(z, eps, process_group) for z in (z1, z2))  # (N, D)
        return a.T @ b / len(a)


def mixed_barlow_twins_regulariser(
    z1: Tensor,
    z2: Tensor,
    mixed: Tensor,
    order: Tensor,
    mix: float,
    *,
    lambd: float = 0.0051,
    eps: float = 1e-5,
    process_group: Any = None,
) -> Tensor:
    """The regulariser of Mixed Barlow Twins (Bandara et al. 2023), over the batch of all ranks.

    Add it to the loss. It asks mixed images to have mixed embeddings: with `M` the normalised
    embedding of `mix * view1 + (1 - mix) * view2[order]`, it pulls the correlations `M^T A` and
    `M^T B` to those of `mix * A + (1 - mix) * B[order]`. It never costs more than the loss.

    Args:
        z1: embeddings of the first views, `(N, D)`.
        z2: embeddings of the second views, `(N, D)`.
        mixed: embeddings of the mixed views, `(N, D)`.
        order: the second view that each first view was mixed with, `(N,)`, a permutation of this
            rank's samples.
        mix: share of the first view, from 0 to 1, the same on every rank.
        lambd: weight. Default 0.0051; the authors' code uses 5 times the `lambd` of the loss.
        eps: added to the variance of each feature. Default 1e-5 (as in `nn.BatchNorm1d`).
        process_group: ranks that share a batch. Default: all ranks.

    Returns:
        A scalar, float32 (float64 for float64 input), the same on every rank. Like
        `BarlowTwinsLoss`, it is differentiable, for gradients that are averaged over ranks (DDP).

    Raises:
        UserError: if the shapes or types differ, the shape is not `(N, D)`, the type is not
            floating, or the global batch has fewer than 2 samples.

    Example:
        >>> z1, z2, mixed = torch.randn(3, 16, 64)
        >>> float(mixed_barlow_twins_regulariser(z1, z2, mixed, torch.randperm(16), 0.5)) > 0
        True
    """
    check(z1, z2)
    check(z1, mixed)
    with torch.autocast(z1.device.type, enabled=False):
        a, b, m = (_normalised(z, eps, process_group) for z in (z1, z2, mixed))  # (N, D)
        sizes = batch_sizes(z1, process_group)
        if len(sizes) > 1:
            order = gather(order + rows_of(sizes, process_group).start, sizes, process_group)
        # Both differences of correlations contain this factor: residual^T A and residual^T B.
        residual = m - mix * a - (1 - mix) * b[order]  # (N, D)
        n, d = a.shape
        if n < d:
            squares = (residual @ residual.T * (a @ a.T + b @ b.T)).sum()
        else:
            squares = (residual.T @ torch.cat([a, b], 1)).square().sum()
        return lambd * squares / n**2


def _normalised(z: Tensor, eps: float, group: Any) -> Tensor:
    """The embeddings of all ranks, `(N, D)`, each feature normalised over them."""
    every = wide(_EverySample.apply(z, group))
    check_batch(len(every))
    centred = every - every.mean(0)
    return centred * (centred.square().mean(0) + eps).rsqrt()


class _EverySample(torch.autograd.Function):
    """The samples of all ranks, `(N, D)`, from which every rank then computes the same."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, group: Any) -> Tensor:
        sizes = batch_sizes(z, group)
        ctx.rows, ctx.ranks = rows_of(sizes, group), len(sizes)
        return gather(z, sizes, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank has the whole gradient of its samples. DDP averages over ranks what should be a
        # sum, so multiply by the number of ranks.
        return grads[0][ctx.rows] * ctx.ranks, None
