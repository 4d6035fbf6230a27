"""LARS, parameter groups, and the learning-rate schedule of the paper."""

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_Tensors = list[Tensor] | tuple[Tensor, ...]

_NORMS = (
    nn.modules.batchnorm._NormBase,  # every BatchNorm and InstanceNorm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def parameter_groups(
    model: nn.Module, *, lr: float, lr_bias_norm: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into weights, and biases and norms.

    A parameter is a bias or norm if it belongs to a normalisation layer or has fewer than two
    dimensions, whatever its name.

    Args:
        model: any module.
        lr: learning rate of the weights.
        lr_bias_norm: learning rate of biases and normalisation parameters.
        weight_decay: weight decay of the weights; biases and norms have none (paper, section 2.2).

    Returns:
        Two groups for an optimiser. `lars_exclude` tells `LARS` to leave out layer-wise scaling.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 3), lr=0.2, lr_bias_norm=0.0048, weight_decay=0)
        >>> [tuple(p.shape) for g in groups for p in g["params"]]
        [(3, 2), (3,)]
    """
    in_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    weights: list[nn.Parameter] = []
    biases_and_norms: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim > 1 and id(parameter) not in in_norms
            (weights if is_weight else biases_and_norms).append(parameter)
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay, "lars_exclude": False},
        {"params": biases_and_norms, "lr": lr_bias_norm, "weight_decay": 0.0, "lars_exclude": True},
    ]


class LARS(Optimizer):
    """LARS, layer-wise adaptive rate scaling (You et al. 2017), as used by Barlow Twins.

    For each weight `w` with gradient `g`, the update `d = g + weight_decay * w` is scaled by
    `eta * |w| / |d|` and added to the momentum. Groups with `lars_exclude=True` are not scaled.

    Args:
        params: parameters, or groups from `parameter_groups`.
        lr: learning rate; the paper's is 0.2 for weights and 0.0048 for biases and norms, times
            batch size / 256.
        weight_decay: added to the gradient before the norm is taken. Default 0; the paper uses
            1.5e-6, its code 1e-6 by default.
        momentum: default 0.9 (paper).
        eta: trust coefficient. Default 0.001 (paper).
        clip: cap the rate of each weight at that of SGD: it is then the smaller of `lr` and
            `eta * |w| / |d|` instead of their product. Default False; solo-learn trains with it,
            at an eta of 0.02.

    Raises:
        ValueError: if a number is negative.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> optimizer = LARS(layer.parameters(), lr=0.2)
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        clip: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"LARS: {name} is {value}; it must not be negative")
        super().__init__(params, {**defaults, "clip": clip, "lars_exclude": False})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load a state, with `clip` off if it was saved before that option existed."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("clip", False)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            # One call for all parameters of a group, so that a step takes a handful of kernels.
            updates: _Tensors = [p.grad for p in params if p.grad is not None]
            if group["weight_decay"]:
                updates = torch._foreach_add(updates, params, alpha=group["weight_decay"])
            if not group["lars_exclude"]:
                limit = max(group["lr"], 1e-12) if group["clip"] else None
                trust = _trust(params, updates, group["eta"], limit)
                updates = torch._foreach_mul(updates, trust)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])
        return loss


def _trust(
    params: list[Tensor], updates: _Tensors, eta: float, limit: float | None = None
) -> list[Tensor]:
    """The trust ratio `eta * |w| / |d|` of each parameter; 1 where either norm is zero.

    With a `limit`, the ratio is divided by it and capped at 1.
    """
    found = []
    for w, d in zip(torch._foreach_norm(params), torch._foreach_norm(updates), strict=True):
        rate = eta * w / d
        if limit is not None:
            rate = (rate / limit).clamp(max=1)
        found.append(torch.where((w > 0) & (d > 0), rate, torch.ones_like(w)))
    return found


def warmup_cosine(step: float, *, steps: float, warmup: float, final: float = 0.001) -> float:
    """The factor on the learning rate at a step: linear warm-up, then half a cosine.

    Args:
        step: 0-based step. The three lengths may be in any common unit, such as seconds.
        steps: length of the whole training.
        warmup: length of the warm-up (paper: 10 of its 1000 epochs).
        final: factor at the end (paper's code: 0.001).

    Returns:
        A factor in [0, 1].

    Example:
        >>> [round(warmup_cosine(s, steps=10, warmup=2, final=0), 2) for s in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return cosine + final * (1 - cosine)
