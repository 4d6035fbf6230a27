"""The loss of a large batch in the memory of a small one (GradCache, Gao et al. 2021)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def accumulate(
    model: nn.Module,
    wrapped: Callable[..., Tensor],
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    *,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Accumulate the exact gradient of the loss of all micro-batches taken together.

    The first pass computes the embeddings of all micro-batches without keeping activations. The
    loss of all embeddings then gives a gradient with respect to each of them. The second pass runs
    each micro-batch again, with the same random numbers, and back-propagates these gradients. Batch
    norm, in the encoder or the projector, sees one micro-batch at a time, as it sees one device's
    batch without synchronisation, and updates its running statistics once.

    Args:
        model: has `embed(view)`, `(n, C, H, W) -> (n, D)`, and `criterion(z1, z2) -> ()`.
        wrapped: the model itself, or DDP's or Fabric's wrapper of it. `wrapped(view1, view2)` is
            the loss, `wrapped(view1, view2, grad1, grad2)` is
            `(grad1 * z1).sum() + (grad2 * z2).sum()`.
        micro_batches: pairs of views, each `(n, C, H, W)`; read twice, once in each pass.
        backward: back-propagates a loss. Default `Tensor.backward`; Fabric's scales it.
        no_sync: within it, the wrapper does not all-reduce gradients. Every micro-batch but the
            last runs within it. Default does nothing, which is right for one process.
        autocast: the precision that `wrapped` enters by itself, as Fabric's wrapper does; the first
            pass enters it here because it calls `model`. Default does nothing, which is right
            without mixed precision and inside the caller's own autocast.

    Returns:
        The loss, `()`, detached; its terms are in `model.criterion.terms`.

    Example:
        >>> import barlow
        >>> model = barlow.BarlowTwins(barlow.create_encoder("resnet18", image_size=32), (16, 16))
        >>> views = torch.randn(1, 2, 4, 3, 32, 32)
        >>> accumulate(model, model, [(view1, view2) for view1, view2 in views]).shape
        torch.Size([])
    """
    if len(micro_batches) == 1:
        loss = wrapped(*micro_batches[0])
        backward(loss)
        return loss.detach()

    states, embeddings = [], []
    with torch.no_grad(), autocast(), _running_statistics_kept(model):
        for view1, view2 in micro_batches:
            states.append(_random_state(view1.device))
            # Same order as in the second pass, so that each view meets the same random numbers.
            embeddings.append((model.embed(view1), model.embed(view2)))  # type: ignore[operator]
    # Inside the caller's autocast, torch 2.9 would reuse the weights that were cast here under
    # no_grad, and they would get no gradient in the second pass.
    torch.clear_autocast_cache()

    loss, gradients = _embedding_gradients(model.criterion, embeddings)  # type: ignore[arg-type]
    del embeddings

    last = len(micro_batches) - 1
    for k, (view1, view2) in enumerate(micro_batches):
        _set_random_state(view1.device, states[k])
        with nullcontext() if k == last else no_sync():
            backward(wrapped(view1, view2, *gradients[k]))
    return loss


def split_micro_batches(view1: Tensor, view2: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """Split a batch of two views into pairs of equal parts.

    Args:
        view1: `(N, C, H, W)`.
        view2: `(N, C, H, W)`.
        count: how many parts; divides `N`.

    Returns:
        `count` pairs, each part `(N / count, C, H, W)`.
    """
    return list(zip(view1.chunk(count), view2.chunk(count), strict=True))


def _embedding_gradients(
    criterion: Callable[[Tensor, Tensor], Tensor], embeddings: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The loss of all embeddings together, and its gradient with respect to each."""
    z1, z2 = (torch.cat(z) for z in zip(*embeddings, strict=True))  # (N, D)
    if z1.dtype != torch.float64:
        # Gradients are small numbers, some of which would underflow in float16.
        z1, z2 = z1.float(), z2.float()
    loss = criterion(z1.requires_grad_(), z2.requires_grad_())
    grad1, grad2 = torch.autograd.grad(loss, (z1, z2))
    sizes = [len(z) for z, _ in embeddings]
    pairs = zip(torch.split(grad1, sizes), torch.split(grad2, sizes), strict=True)
    return loss.detach(), list(pairs)


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Within it, batch norm in training mode works as usual but updates no running statistics."""
    norms = [m for m in model.modules() if getattr(m, "track_running_stats", False) and m.training]
    for norm in norms:
        norm.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True  # type: ignore[assignment]


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])
