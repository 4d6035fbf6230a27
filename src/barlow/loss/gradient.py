"""The loss and its gradient, written out, in both forms."""

from typing import Any, Literal

import torch
from torch import Tensor

from barlow.loss.batch import (
    blocks,
    gather,
    global_statistics,
    normalise,
    rows_of,
    slices,
    sum_over_ranks,
)

Form = Literal["auto", "features", "samples"]


Statistics = tuple[Tensor, Tensor]  # of each feature: mean and 1 / deviation, (D,) each
Sums = tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]


class BarlowTwinsFunction(torch.autograd.Function):
    """The loss and its gradient, written out instead of left to autograd.

    The normalised embeddings exist only a block at a time: in blocks of features for the
    `samples` form, of samples for the `features` form. Only the embeddings themselves, their
    statistics and the matrices of one form are saved for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,  # (n, D): this rank's samples, of N in all
        z2: Tensor,  # (n, D)
        lambd: float,
        scale: float,
        target: float,
        eps: float,
        form: Form,
        group: Any,
        equal: bool,
    ) -> tuple[Tensor, ...]:
        """The loss, and the other parts of `Terms`."""
        sizes, statistics1, statistics2 = global_statistics(z1, z2, eps, group, equal)
        n, d = sum(sizes), z1.shape[1]
        # Multiply-adds of both passes: 4 N^2 D in the samples form, 3 N D^2 in the features form.
        samples = form == "samples" or (form == "auto" and 4 * n < 3 * d)
        rows = slice(0, len(z1))
        if samples:
            z1, z2 = gather(z1, sizes, group), gather(z2, sizes, group)  # (N, D)
            rows = rows_of(sizes, group)
            sums = _forward_samples(z1, z2, statistics1, statistics2, rows, target, sizes, group)
        else:
            sums = _forward_features(z1, z2, statistics1, statistics2, lambd, target, sizes, group)
        diagonal, squares, redundancy, matrices = sums

        invariance = (1 - diagonal).square().sum()
        loss = scale * (invariance + lambd * redundancy)
        diagonal_error = invariance / d
        off_diagonal_rms = (squares / max(d * (d - 1), 1)).clamp(min=0).sqrt()
        ctx.mark_non_differentiable(invariance, redundancy, diagonal_error, off_diagonal_rms)
        ctx.save_for_backward(z1, z2, *statistics1, *statistics2, *matrices)
        ctx.constants = (lambd, scale, target, sizes, rows, samples, group)
        return loss, invariance, redundancy, diagonal_error, off_diagonal_rms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to the embeddings."""
        if torch.is_grad_enabled():
            # The matrices are saved as constants: a second derivative would be silently wrong.
            raise RuntimeError(
                "BarlowTwinsLoss does not support second derivatives: compute its gradient "
                "without create_graph, or write the loss with barlow.cross_correlation"
            )
        lambd, scale, target, sizes, rows, samples, group = ctx.constants
        z1, z2, mean1, inverse1, mean2, inverse2, *matrices = ctx.saved_tensors
        # DDP averages over ranks what should be a sum, so multiply by the number of ranks.
        factor = grads[0] * (scale * len(sizes) / sum(sizes))
        dz1 = torch.empty_like(z1[rows], dtype=mean1.dtype)
        dz2 = torch.empty_like(z2[rows], dtype=mean1.dtype)
        given = (z1, z2, (mean1, inverse1), (mean2, inverse2), matrices, factor)
        if samples:
            _backward_samples(dz1, dz2, *given, rows, lambd, target, sizes, group)
        else:
            _backward_features(dz1, dz2, *given, sizes)
        return dz1.to(z1.dtype), dz2.to(z2.dtype), *[None] * 7


def _forward_samples(
    z1: Tensor,  # (N, D), of all ranks
    z2: Tensor,
    statistics1: Statistics,
    statistics2: Statistics,
    rows: slice,
    target: float,
    sizes: list[int],
    group: Any,
) -> Sums:
    """Compute the terms from two Gram matrices; each rank computes the rows of its samples.

    Returns:
        The diagonal of `C`, the sum of the squares off it, the redundancy-reduction term, and what
        the gradient needs.
    """
    (mean1, inverse1), (mean2, inverse2) = statistics1, statistics2
    n, d = z1.shape
    gram1, gram2 = mean1.new_zeros(2, rows.stop - rows.start, n)  # rows of A A^T and B B^T
    sum1, sum2 = mean1.new_zeros(2, n, 1)  # sum of each sample's features
    diagonal = torch.empty_like(mean1)  # (D,)
    step, (space1, space2) = blocks(d, n, mean1, count=2, ranks=len(sizes))
    for j in slices(d, step):
        a = normalise(z1[:, j], mean1[j], inverse1[j], space1)  # (N, block)
        b = normalise(z2[:, j], mean2[j], inverse2[j], space2)
        _add_gram(gram1, a, rows)
        _add_gram(gram2, b, rows)
        if target:
            sum1 += a.sum(1, keepdim=True)
            sum2 += b.sum(1, keepdim=True)
        diagonal[j] = a.mul_(b).sum(0) / n
    if _is_triangular(gram1):
        for gram in (gram1, gram2):
            gram.tril_().add_(gram.tril(-1).T)
    squares = sum_over_ranks((gram1 * gram2).sum() / n**2, sizes, group)
    squares = squares - diagonal.square().sum()
    redundancy = squares
    if target:
        total = (sum1 * sum2).sum() / n - diagonal.sum()
        redundancy = squares - 2 * target * total + target**2 * d * (d - 1)
    return diagonal, squares, redundancy, (gram1, gram2, sum1[rows], sum2[rows], diagonal)


def _forward_features(
    z1: Tensor,  # (n, D), this rank's
    z2: Tensor,
    statistics1: Statistics,
    statistics2: Statistics,
    lambd: float,
    target: float,
    sizes: list[int],
    group: Any,
) -> Sums:
    """Compute the terms from `C`, `(D, D)`; returns the same as `_forward_samples`."""
    (mean1, inverse1), (mean2, inverse2) = statistics1, statistics2
    d = z1.shape[1]
    c = mean1.new_zeros(d, d)
    step, space = blocks(len(z1), d, mean1, count=2, ranks=len(sizes), least=1024)
    for i in slices(len(z1), step):
        a = normalise(z1[i], mean1, inverse1, space[0])  # (block, D)
        b = normalise(z2[i], mean2, inverse2, space[1])
        c.addmm_(a.T, b, alpha=1 / sum(sizes))
    sum_over_ranks(c, sizes, group)
    diagonal = c.diagonal().clone()
    if target:
        c -= target
    c.fill_diagonal_(0)
    squares1, squares2 = _sums_of_squares(c)
    squares = redundancy = squares1.sum()
    # From here on c becomes dL/dC; the slopes sum dL/dC_ij C_ij over each row and each column.
    grad_diagonal = 2 * (diagonal - 1)
    slope1, slope2 = (2 * lambd * k + grad_diagonal * diagonal for k in (squares1, squares2))
    if target:
        sum1, sum2 = c.sum(1), c.sum(0)
        squares = redundancy + 2 * target * sum1.sum() + target**2 * d * (d - 1)
        slope1 += 2 * lambd * target * sum1
        slope2 += 2 * lambd * target * sum2
    c.mul_(2 * lambd).diagonal().copy_(grad_diagonal)
    return diagonal, squares, redundancy, (c, slope1, slope2)


def _backward_samples(
    dz1: Tensor,  # (n, D), to be filled
    dz2: Tensor,
    z1: Tensor,  # (N, D), of all ranks
    z2: Tensor,
    statistics1: Statistics,
    statistics2: Statistics,
    matrices: list[Tensor],
    factor: Tensor,
    rows: slice,
    lambd: float,
    target: float,
    sizes: list[int],
    group: Any,
) -> None:
    (mean1, inverse1), (mean2, inverse2) = statistics1, statistics2
    gram1, gram2, sum1, sum2, diagonal = matrices
    n, d = z1.shape
    gram1, gram2 = (k * (factor * (2 * lambd / n)) for k in (gram1, gram2))
    shift1, shift2 = (s * (factor * (2 * lambd * target)) for s in (sum1, sum2))
    pull = factor * (2 * (diagonal - 1) - 2 * lambd * (diagonal - target))
    step, (space1, space2, space3) = blocks(d, n, mean1, count=3, ranks=len(sizes))
    for j in slices(d, step):
        a = normalise(z1[:, j], mean1[j], inverse1[j], space1)  # (N, block)
        b = normalise(z2[:, j], mean2[j], inverse2[j], space2)
        # The products go straight into the gradients: beta=0 overwrites what is there.
        da = dz1[:, j].addmm_(gram2, a, beta=0).addcmul_(b[rows], pull[j])  # (n, block)
        db = dz2[:, j].addmm_(gram1, b, beta=0).addcmul_(a[rows], pull[j])
        if target:
            da -= shift2
            db -= shift1
        a, b = a[rows], b[rows]
        product = space3[: a.numel()].view(a.shape)
        slopes = torch.stack([torch.mul(x, y, out=product).sum(0) for x, y in ((da, a), (db, b))])
        slope1, slope2 = sum_over_ranks(slopes.div_(n), sizes, group)
        # Backward through the normalisation.
        da.addcmul_(a, slope1, value=-1).mul_(inverse1[j])
        db.addcmul_(b, slope2, value=-1).mul_(inverse2[j])


def _backward_features(
    dz1: Tensor,  # (n, D), to be filled
    dz2: Tensor,
    z1: Tensor,  # (n, D), this rank's
    z2: Tensor,
    statistics1: Statistics,
    statistics2: Statistics,
    matrices: list[Tensor],
    factor: Tensor,
    sizes: list[int],
) -> None:
    (mean1, inverse1), (mean2, inverse2) = statistics1, statistics2
    dc, slope1, slope2 = matrices
    scale1, scale2 = factor * inverse1, factor * inverse2
    step, (space,) = blocks(len(z1), z1.shape[1], mean1, count=1, ranks=len(sizes), least=512)
    for i in slices(len(z1), step):
        # The first embedding is normalised in the place of its gradient, which saves a buffer.
        a = torch.sub(z1[i], mean1, out=dz1[i]).mul_(inverse1)  # (block, D)
        b = normalise(z2[i], mean2, inverse2, space)
        dz2[i].addmm_(a, dc, beta=0).addcmul_(b, slope2, value=-1).mul_(scale2)
        dz1[i].mul_(-slope1).addmm_(b, dc.T).mul_(scale1)


def _sums_of_squares(c: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of squares of each row and of each column, `(D,)` each."""
    # torch.linalg.vector_norm takes 21 ms for the rows alone at D = 2048, this 4 ms for both.
    d = len(c)
    rows, columns = c.new_zeros(2, d)
    step, (space,) = blocks(d, d, c, count=1)
    for i in slices(d, step):
        squares = torch.square(c[i], out=space[: c[i].numel()].view(-1, d))
        torch.sum(squares, 1, out=rows[i])
        columns += squares.sum(0)
    return rows, columns


def _is_triangular(gram: Tensor) -> bool:
    """Whether only the lower triangle is computed: if all rows are needed, and they are many."""
    return len(gram) == gram.shape[1] >= 256


def _add_gram(gram: Tensor, a: Tensor, rows: slice) -> None:
    """Add the given rows of `a @ a.T`; of a triangular one, only strips up to the diagonal."""
    n = len(a)
    if not _is_triangular(gram):
        gram.addmm_(a[rows], a.T)
        return
    # Four strips are 10/16 of the product: 2.9 ms instead of 3.8 ms at (256, 8192).
    for k in range(0, n, -(-n // 4)):
        end = min(k + -(-n // 4), n)
        gram[k:end, :end].addmm_(a[k:end], a[:end].T)
