"""Means of the loss's terms over steps, without making any step wait for the device."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from barlow.errors import TrainingError
from barlow.loss import Terms


def check_weights(model: nn.Module, step: int) -> None:
    """Raise TrainingError if a weight is not finite, which a non-finite gradient causes."""
    named = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]
    norms = torch.stack([n.float() for n in torch._foreach_norm([p.detach() for _, p in named])])
    if norms.isfinite().all():
        return
    name = next(name for (name, _), norm in zip(named, norms, strict=True) if not norm.isfinite())
    raise TrainingError(
        f"the gradient of {name} was not finite before step {step}: training stopped without "
        "touching the checkpoint; try a lower --lr, a longer --warmup-epochs or --precision 32"
    )


class Means:
    """Means of the loss's terms over the steps since the last `pop`.

    The sums stay on the device, so that no step waits for the one before to finish.

    Example:
        >>> means = Means()
        >>> for loss in (1.0, 3.0):
        ...     means.add((torch.tensor(loss),) * 5)
        >>> means.pop()["loss"]
        2.0
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (5,), in the order of `Terms`
        self._first: Tensor | None = None  # (6,): index and terms of the first non-finite step
        self._count = 0

    def add(self, terms: tuple[Tensor, ...]) -> None:
        """Add one step's terms, in the order of `Terms`, each `()`."""
        values = torch.stack([t.detach().float() for t in terms])
        here = torch.cat([values.new_full((1,), self._count), values])
        if self._sums is None or self._first is None:
            self._sums, self._first = values, here
        else:
            first = self._first.to(values.device)
            self._sums = self._sums.to(values.device) + values
            self._first = torch.where(first.isfinite().all(), here, first)
        self._count += 1

    def check(self, step: int) -> None:
        """Raise TrainingError if a term was not finite; `step` is that of the last added."""
        if self._first is None:
            return
        count, *values = self._first.tolist()
        for name, value in zip(Terms._fields, values, strict=True):
            if not math.isfinite(value):
                at = step - (self._count - 1 - int(count))
                raise TrainingError(
                    f"{name} is {value} at step {at}: training stopped without touching the "
                    "checkpoint; try a lower --lr, a longer --warmup-epochs or --precision 32"
                )

    def pop(self) -> dict[str, float]:
        """Return the means by name, and start new ones."""
        assert self._sums is not None
        means = dict(zip(Terms._fields, (self._sums / self._count).tolist(), strict=True))
        self._sums, self._first, self._count = None, None, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps for a resumed training."""
        return {"sums": self._sums, "first": self._first, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._sums, self._first, self._count = state["sums"], state["first"], state["count"]
