"""Batch norm on CPU, synchronised over processes, with accurate sums in float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# torch's kernels add row after row in float32. Over a whole batch of feature maps this loses two
# digits, over a block of at most this many rows almost none; a block also stays in the cache. If
# each rank holds a multiple of a block's images, the blocks are the same on any number of ranks,
# and so is their sum, to the last bit.
_ROWS, _IMAGES = 4096, 64


@contextmanager
def exact_batch_norm(on: bool, *, over_ranks: bool) -> Iterator[None]:
    """Within it, batch norm in training mode uses exact statistics, of one process or of all.

    It is for CPU tensors: `nn.SyncBatchNorm` refuses them, and torch's own sums are so inexact
    there that a gradient may be wrong by a hundredth. It replaces the function that every
    batch-norm module calls, so the modules, their classes and their state stay as they are.

    Args:
        on: if false, nothing changes.
        over_ranks: compute the statistics over the batches of all ranks, which must be equally
            large.

    Example:
        >>> with exact_batch_norm(True, over_ranks=False):
        ...     y = nn.BatchNorm1d(2)(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> [round(value, 3) for value in y.flatten().tolist()]
        [-1.0, -1.0, 1.0, 1.0]
    """
    if not on:
        yield
        return
    with _ExactBatchNorm(dist.get_world_size() if over_ranks else 1):
        yield


class _ExactBatchNorm(TorchFunctionMode):
    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm and kwargs.get("training"):
            return _batch_norm(self.ranks, *args, **kwargs)
        return func(*args, **kwargs)


def _batch_norm(
    ranks: int,
    x: Tensor,  # (N, C) or (N, C, H, W)
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    total = x.numel() // x.shape[1] * ranks
    if total == 1:
        raise ValueError(
            f"batch norm in training needs more than one value per channel, got {x.shape}"
        )
    with torch.no_grad():
        mean, var = _statistics(x, ranks)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * total / (total - 1)).to(running_var.dtype), momentum)
        exact = torch.promote_types(x.dtype, torch.float32)
        mean, var = mean.to(exact), var.to(exact)
    normalised: Tensor = _Normalise.apply(x, mean, var, weight, bias, eps, total, ranks)
    return normalised


def _statistics(x: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over all ranks, in float64: (C,), (C,)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    blocks = _blocks(x)
    each = [torch.batch_norm_update_stats(b.to(exact), None, None, 0.0) for b in blocks]
    share = torch.tensor([len(b) for b in blocks], dtype=torch.float64)[:, None] / len(x)
    means, variances = (torch.stack(s).double() for s in zip(*each, strict=True))  # (blocks, C)
    mean, var = _joined(means, variances, share)
    if ranks == 1:
        return mean, var
    own = torch.stack([mean, var])
    every = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(every, own)
    means, variances = torch.stack(every).unbind(1)  # (ranks, C) each
    return _joined(means, variances, torch.full((ranks, 1), 1 / ranks, dtype=torch.float64))


def _joined(means: Tensor, variances: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Combine the statistics of parts: the variance within the parts plus that between them."""
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    pixels = x[0, 0].numel()
    return torch.split(x, max(1, min(_IMAGES, _ROWS // pixels)))


class _Normalise(torch.autograd.Function):
    """Batch norm with given global statistics, and its gradient through those statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> Tensor:
        weight, bias, eps, total, ranks = rest
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps, ctx.total, ctx.ranks = eps, total, ranks
        return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, var, weight = ctx.saved_tensors
        pairs = list(zip(_blocks(x), _blocks(grads[0]), strict=True))
        each = [
            torch.ops.aten.native_batch_norm_backward(
                dy, block, weight, mean, var, None, None, False, ctx.eps, [False, True, True]
            )[1:]
            for block, dy in pairs
        ]
        # (2, C): sum(dy * x_hat), sum(dy)
        own = torch.stack([torch.stack(part).double().sum(0) for part in zip(*each, strict=True)])
        sums = own.clone()
        if ctx.ranks > 1:
            dist.all_reduce(sums)
        inverse = (var.double() + ctx.eps).rsqrt()  # (C,)
        scale = inverse if weight is None else inverse * weight
        slope = -scale * inverse * sums[0] / ctx.total
        shift = -scale * sums[1] / ctx.total - slope * mean
        scale, slope, shift = (_row(values.to(x.dtype), x) for values in (scale, slope, shift))
        dx = torch.empty_like(x)
        for (block, dy), part in zip(pairs, _blocks(dx), strict=True):
            torch.addcmul(shift, block, slope, out=part).addcmul_(dy, scale)
        if weight is None:
            return dx, *[None] * 7
        dweight, dbias = own.to(weight.dtype)
        return dx, None, None, dweight, dbias, None, None, None


def _row(values: Tensor, x: Tensor) -> Tensor:
    """The channels' values, shaped to broadcast over `x`: (C,), (C, 1), or (C, 1, W)."""
    if x.ndim < 4:
        return values.view([-1] + [1] * (x.ndim - 2))
    # Repeated over a row of pixels, laid out as channels-last: kernels loop over W * C at once.
    return values.repeat(x.shape[-1]).view(1, x.shape[-1], -1).permute(2, 0, 1)
