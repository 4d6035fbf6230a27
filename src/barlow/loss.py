"""The Barlow Twins loss, exact for any batch, width and number of ranks.

With `A` and `B` the two embeddings, each feature normalised over the global batch, and
`C = A^T B / N` their cross-correlation (Zbontar et al. 2021, Algorithm 1):

    loss = scale * (sum_i (1 - C_ii)^2  +  lambd * sum_{i != j} C_ij^2)
                    invariance                     redundancy

`sum_ij C_ij^2` equals `<A A^T, B B^T> / N^2`, so that a batch with fewer samples than features
never needs the `(D, D)` matrix. Both forms give the same number; the cheaper one is taken.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from barlow.errors import UserError

Form = Literal["auto", "features", "samples"]


class Terms(NamedTuple):
    """The parts of a loss, each `()` and detached: `scale * (invariance + lambd * redundancy)`."""

    loss: Tensor
    invariance: Tensor  # sum of (1 - C_ii)^2
    redundancy: Tensor  # sum of (C_ij - target)^2 over i != j
    diagonal_error: Tensor  # mean of (1 - C_ii)^2
    off_diagonal_rms: Tensor  # root of the mean of C_ij^2 over i != j


class BarlowTwinsLoss(nn.Module):
    """The Barlow Twins loss (Zbontar et al. 2021), over the batch of all ranks.

    Args:
        lambd: weight of the redundancy term. Default 0.0051 (paper, section 2.2).
        scale: factor on the whole loss. Default 1 (paper); solo-learn's CIFAR-10 recipe has 0.1.
        off_diagonal_target: where off-diagonal correlations are pulled. Default 0 (paper); -1 is
            the HSIC variant (Tsai et al. 2021).
        form: "features" `(D, D)`, "samples" `(N, N)`, or "auto", the cheaper of the two.
        eps: added to each feature's variance. Default 1e-5 (as `nn.BatchNorm1d`).
        process_group: the ranks that share a batch. Default all.

    Attributes:
        terms: the parts of the last loss, read without waiting for the device.

    Raises:
        UserError: if an argument cannot be.

    Example:
        >>> z1, z2 = torch.randn(2, 32, 128, requires_grad=True)
        >>> criterion = BarlowTwinsLoss()
        >>> criterion(z1, z2).backward()
        >>> bool(criterion.terms.diagonal_error > 0)
        True
    """

    terms: Terms

    def __init__(
        self,
        lambd: float = 0.0051,
        *,
        scale: float = 1.0,
        off_diagonal_target: float = 0.0,
        form: Form = "auto",
        eps: float = 1e-5,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if form not in ("auto", "features", "samples"):
            raise UserError(f"form {form!r} is none: use 'auto', 'features' or 'samples'")
        self.lambd = lambd
        self.scale = scale
        self.off_diagonal_target = off_diagonal_target
        self.form: Form = form
        self.eps = eps
        self.process_group = process_group

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two batches of embeddings.

        Args:
            z1: embeddings of the first views, `(N, D)`, of any floating type and layout.
            z2: embeddings of the second views, `(N, D)`.

        Returns:
            `()`, float32 (float64 for float64 input), the same on every rank.

        Raises:
            UserError: if the shapes differ or are not `(N, D)`, or the global batch is below 2.
        """
        _check(z1, z2)
        options = (self.lambd, self.scale, self.off_diagonal_target, self.eps, self.form)
        with torch.autocast(z1.device.type, enabled=False):
            outputs = _Loss.apply(z1, z2, *options, self.process_group)
        self.terms = Terms(*(value.detach() for value in outputs))
        loss: Tensor = outputs[0]
        return loss

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"lambd={self.lambd}, scale={self.scale}, form={self.form!r}"


def cross_correlation(z1: Tensor, z2: Tensor, *, eps: float = 1e-5) -> Tensor:
    """The cross-correlation matrix of two batches of embeddings, on this process's batch.

    Args:
        z1: embeddings of the first views, `(N, D)`.
        z2: embeddings of the second views, `(N, D)`.
        eps: added to each feature's variance. Default 1e-5 (as `nn.BatchNorm1d`).

    Returns:
        `(D, D)`, float32 (float64 for float64 input), differentiable.

    Raises:
        UserError: if the shapes differ or are not `(N, D)`, or there are fewer than 2 samples.

    Example:
        >>> z = torch.randn(64, 3)
        >>> cross_correlation(z, -z).diagonal().round(decimals=3)
        tensor([-1., -1., -1.])
    """
    _check(z1, z2)
    _check_batch(len(z1))
    with torch.autocast(z1.device.type, enabled=False):
        a, b = _batch_norm(z1, eps), _batch_norm(z2, eps)
        return a.T @ b / len(z1)


def mixed_barlow_twins_regulariser(
    z1: Tensor,
    z2: Tensor,
    mixed: Tensor,
    order: Tensor,
    mix: float,
    *,
    lambd: float = 0.0051,
    eps: float = 1e-5,
) -> Tensor:
    """What Mixed Barlow Twins adds to the loss (Bandara et al. 2023), on this process's batch.

    Mixed images should have mixed embeddings: with `M` the normalised embedding of
    `mix * view1 + (1 - mix) * view2[order]`, the correlations `M^T A` and `M^T B` are pulled to
    those of `mix * A + (1 - mix) * B[order]`. Never costs more than the loss.

    Args:
        z1: embeddings of the first views, `(N, D)`.
        z2: embeddings of the second views, `(N, D)`.
        mixed: embeddings of the mixed views, `(N, D)`.
        order: which second view each first view was mixed with, `(N,)`, a permutation.
        mix: the first view's share, from 0 to 1.
        lambd: weight. The authors' code has 5 times the loss's `lambd`. Default 0.0051.
        eps: added to each feature's variance. Default 1e-5 (as `nn.BatchNorm1d`).

    Returns:
        `()`, float32 (float64 for float64 input), differentiable.

    Raises:
        UserError: if the shapes differ or are not `(N, D)`, or there are fewer than 2 samples.

    Example:
        >>> z1, z2, mixed = torch.randn(3, 16, 64)
        >>> float(mixed_barlow_twins_regulariser(z1, z2, mixed, torch.randperm(16), 0.5)) > 0
        True
    """
    _check(z1, z2)
    _check(z1, mixed)
    _check_batch(len(z1))
    n, d = z1.shape
    with torch.autocast(z1.device.type, enabled=False):
        a, b, m = (_batch_norm(z, eps) for z in (z1, z2, mixed))
        # Both differences of correlations share this factor: (M - target)^T A and (...)^T B.
        residual = m - mix * a - (1 - mix) * b[order]  # (N, D)
        if n < d:
            squares = (residual @ residual.T * (a @ a.T + b @ b.T)).sum()
        else:
            squares = (residual.T @ torch.cat([a, b], 1)).square().sum()
        return lambd * squares / n**2


class _Loss(torch.autograd.Function):
    """The loss and its gradient, written out.

    The normalised embeddings exist only a block at a time: in blocks of features for the
    `samples` form, of samples for the `features` form. What is kept for the gradient is the
    embeddings themselves, their statistics, and the matrices of one form.
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
    ) -> tuple[Tensor, ...]:
        sizes, (mean1, inverse1), (mean2, inverse2) = _global_statistics(z1, z2, eps, group)
        n, d = sum(sizes), z1.shape[1]
        # Products of both passes: 4 N^2 D multiply-adds against 3 N D^2.
        samples = form == "samples" or (form == "auto" and 4 * n < 3 * d)
        every1, every2, rows = z1, z2, slice(0, len(z1))
        if samples and len(sizes) > 1:
            every1, every2 = _gather(z1, sizes, group), _gather(z2, sizes, group)  # (N, D)
            first = sum(sizes[: dist.get_rank(group)])
            rows = slice(first, first + len(z1))
        kept: tuple[Tensor, ...]

        if samples:
            gram1, gram2 = mean1.new_zeros(2, len(z1), n)  # rows of A A^T and B B^T
            sum1, sum2 = mean1.new_zeros(2, n, 1)  # of each sample's features
            diagonal = torch.empty_like(mean1)  # (D,)
            step, (space1, space2) = _blocks(d, n, mean1, len(sizes))
            for j in _slices(d, step):
                a = _normalise(every1[:, j], mean1[j], inverse1[j], space1)  # (N, block)
                b = _normalise(every2[:, j], mean2[j], inverse2[j], space2)
                _add_gram(gram1, a, rows)
                _add_gram(gram2, b, rows)
                if target:
                    sum1 += a.sum(1, keepdim=True)
                    sum2 += b.sum(1, keepdim=True)
                diagonal[j] = a.mul_(b).sum(0) / n
            if len(gram1) == n:  # `_add_gram` left the upper triangle out
                for gram in (gram1, gram2):
                    gram.tril_().add_(gram.tril(-1).T)
            squares = _sum_over_ranks((gram1 * gram2).sum() / n**2, sizes, group)
            squares = squares - diagonal.square().sum()  # of C, off the diagonal
            total = (sum1 * sum2).sum() / n - diagonal.sum()
            redundancy = squares - 2 * target * total + target**2 * d * (d - 1)
            kept = (gram1, gram2, sum1[rows], sum2[rows], diagonal)
        else:
            c = mean1.new_zeros(d, d)
            step, (space1, space2) = _blocks(len(z1), d, mean1, len(sizes))
            for i in _slices(len(z1), step):
                a = _normalise(z1[i], mean1, inverse1, space1)  # (block, D)
                b = _normalise(z2[i], mean2, inverse2, space2)
                c.addmm_(a.T, b, alpha=1 / n)
            _sum_over_ranks(c, sizes, group)
            diagonal = c.diagonal().clone()
            c.sub_(target).fill_diagonal_(0)
            squares1, squares2 = (torch.linalg.vector_norm(c, dim=k).square() for k in (1, 0))
            sum1, sum2 = c.sum(1), c.sum(0)
            redundancy = squares1.sum()
            squares = redundancy + 2 * target * sum1.sum() + target**2 * d * (d - 1)
            # From here on c is dL/dC, and each slope sum_j dL/dC_ij C_ij.
            pull = 2 * (diagonal - 1)
            c.mul_(2 * lambd).diagonal().copy_(pull)
            slope1 = 2 * lambd * (squares1 + target * sum1) + pull * diagonal
            slope2 = 2 * lambd * (squares2 + target * sum2) + pull * diagonal
            kept = (c, slope1, slope2)

        invariance = (1 - diagonal).square().sum()
        loss = scale * (invariance + lambd * redundancy)
        diagonal_error = invariance / d
        off_diagonal_rms = (squares / max(d * (d - 1), 1)).clamp(min=0).sqrt()
        ctx.mark_non_differentiable(invariance, redundancy, diagonal_error, off_diagonal_rms)
        ctx.save_for_backward(every1, every2, mean1, inverse1, mean2, inverse2, *kept)
        ctx.constants = (lambd, scale, target, sizes, rows, samples, group)
        return loss, invariance, redundancy, diagonal_error, off_diagonal_rms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The matrices are kept as constants: a second derivative would be silently wrong.
            raise RuntimeError(
                "BarlowTwinsLoss has no second derivative: take its gradient without "
                "create_graph, or write the loss with barlow.cross_correlation"
            )
        lambd, scale, target, sizes, rows, samples, group = ctx.constants
        z1, z2, mean1, inverse1, mean2, inverse2, *kept = ctx.saved_tensors
        n, d = sum(sizes), z1.shape[1]
        # DDP averages over ranks what should be a sum.
        factor = grads[0] * (scale * len(sizes) / n)
        dz1 = torch.empty_like(z1[rows], dtype=mean1.dtype)
        dz2 = torch.empty_like(z2[rows], dtype=mean1.dtype)

        if samples:
            gram1, gram2, sum1, sum2, diagonal = kept
            gram1, gram2 = (k * (factor * (2 * lambd / n)) for k in (gram1, gram2))
            shift1, shift2 = (s * (factor * (2 * lambd * target)) for s in (sum1, sum2))
            pull = factor * (2 * (diagonal - 1) - 2 * lambd * (diagonal - target))
            step, (space1, space2) = _blocks(d, n, mean1, len(sizes))
            for j in _slices(d, step):
                a = _normalise(z1[:, j], mean1[j], inverse1[j], space1)  # (N, block)
                b = _normalise(z2[:, j], mean2[j], inverse2[j], space2)
                # Products straight into their places: beta=0 overwrites what is there.
                da = dz1[:, j].addmm_(gram2, a, beta=0).addcmul_(b[rows], pull[j])  # (n, block)
                db = dz2[:, j].addmm_(gram1, b, beta=0).addcmul_(a[rows], pull[j])
                if target:
                    da -= shift2
                    db -= shift1
                a, b = a[rows], b[rows]
                slopes = torch.stack([(da * a).sum(0), (db * b).sum(0)]) / n
                slope1, slope2 = _sum_over_ranks(slopes, sizes, group)
                da.addcmul_(a, slope1, value=-1).mul_(inverse1[j])
                db.addcmul_(b, slope2, value=-1).mul_(inverse2[j])
        else:
            dc, slope1, slope2 = kept
            scale1, scale2 = factor * inverse1, factor * inverse2
            step, (space1, space2) = _blocks(len(z1), d, mean1, len(sizes))
            for i in _slices(len(z1), step):
                a = _normalise(z1[i], mean1, inverse1, space1)  # (block, D)
                b = _normalise(z2[i], mean2, inverse2, space2)
                dz1[i].addmm_(b, dc.T, beta=0).addcmul_(a, slope1, value=-1).mul_(scale1)
                dz2[i].addmm_(a, dc, beta=0).addcmul_(b, slope2, value=-1).mul_(scale2)
        return dz1.to(z1.dtype), dz2.to(z2.dtype), None, None, None, None, None, None


def _add_gram(gram: Tensor, a: Tensor, rows: slice) -> None:
    """Add the rows of `a @ a.T`; when all rows are asked for, only their lower triangle."""
    n = len(a)
    if len(gram) < n or n < 256:
        gram.addmm_(a[rows], a.T)
        return
    # Four strips are 10/16 of the product: 2.9 ms for 3.8 ms at (256, 8192).
    for k in range(0, n, -(-n // 4)):
        end = min(k + -(-n // 4), n)
        gram[k:end, :end].addmm_(a[k:end], a[:end].T)


def _blocks(
    length: int, width: int, like: Tensor, ranks: int = 1, least: int = 256
) -> tuple[int, Tensor]:
    """How much of `length` is a block, so that two of this `width` stay in a processor's cache.

    And room for the two, `(2, block * width)`: fresh memory each time costs as much as the sums.
    """
    elements = 2**18 if like.device.type == "cpu" and ranks == 1 else 2**26
    # A block meets a whole matrix in a product: thin ones would spend their time on reading it.
    step = min(max(least, elements // width // 64 * 64), length)
    return step, like.new_empty(2, step * width)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(k, k + step) for k in range(0, length, max(step, 1)))


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _batch_norm(z: Tensor, eps: float) -> Tensor:
    return nn.functional.batch_norm(_wide(z), None, None, training=True, eps=eps)


def _normalise(z: Tensor, mean: Tensor, inverse: Tensor, space: Tensor) -> Tensor:
    return space[: z.numel()].view(z.shape).copy_(z).sub_(mean).mul_(inverse)


def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each feature, `(D,)` each."""
    # In two passes: as exact as torch.var_mean, and ten times as fast on a CPU.
    n, d = z.shape
    mean = _wide(z.new_empty(d))
    var = torch.empty_like(mean)
    step, (space, _) = _blocks(d, max(n, 1), mean, least=64)
    for j in _slices(d, step):
        block = space[: z[:, j].numel()].view(z[:, j].shape).copy_(z[:, j])  # (N, block)
        mean[j] = block.sum(0) / max(n, 1)
        var[j] = block.sub_(mean[j]).square_().sum(0) / max(n, 1)
    return mean, var


def _global_statistics(
    z1: Tensor, z2: Tensor, eps: float, group: Any
) -> tuple[list[int], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """How many samples each rank holds; mean and 1 / deviation of each feature over all."""
    moments = torch.stack([*_statistics(z1), *_statistics(z2)])  # (4, D)
    sizes = [len(z1)]
    ranks = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        counts = moments.new_full((1, moments.shape[1]), len(z1))
        mine = torch.cat([moments, counts])  # (5, D)
        every = mine.new_empty(ranks, *mine.shape)
        dist.all_gather(list(every.unbind(0)), mine, group)
        sizes = [int(count) for count in every[:, 4, 0].tolist()]
        weights = (every[:, 4] / sum(sizes)).unsqueeze(1)  # (ranks, 1, D)
        means, variances = every[:, 0:4:2], every[:, 1:4:2]  # (ranks, 2, D)
        mean = (weights * means).sum(0)  # (2, D)
        # The variance within ranks plus the variance between them.
        var = (weights * (variances + (means - mean).square())).sum(0)
        moments = torch.stack([mean[0], var[0], mean[1], var[1]])
    _check_batch(sum(sizes))
    mean1, var1, mean2, var2 = moments
    return sizes, (mean1, (var1 + eps).rsqrt()), (mean2, (var2 + eps).rsqrt())


def _gather(z: Tensor, sizes: list[int], group: Any) -> Tensor:
    """The samples of all ranks, `(N, D)`."""
    # Ranks may hold unequally many; a collective wants equal shapes.
    padded = z.new_zeros(max(sizes), z.shape[1])
    padded[: len(z)] = z
    every = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(every, padded, group)
    return torch.cat([part[:size] for part, size in zip(every, sizes, strict=True)])


def _sum_over_ranks(x: Tensor, sizes: list[int], group: Any) -> Tensor:
    if len(sizes) > 1:
        dist.all_reduce(x, group=group)
    return x


def _check(z1: Tensor, z2: Tensor) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape or z1.shape[1] == 0:
        raise UserError(
            f"embeddings of shapes {tuple(z1.shape)} and {tuple(z2.shape)}: "
            "give two of the same shape (N, D), samples by features"
        )
    if not z1.is_floating_point() or z1.dtype != z2.dtype:
        raise UserError(
            f"embeddings of types {z1.dtype} and {z2.dtype}: give two of the same floating type"
        )


def _check_batch(n: int) -> None:
    if n < 2:
        raise UserError(
            f"a batch of {n} over all ranks has no correlations: give at least 2 samples"
        )
