"""The loss as a module, with its parts to read."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from barlow.errors import UserError
from barlow.loss.batch import check
from barlow.loss.gradient import Form, Loss


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
        equal_batches: whether every rank is known to hold as many samples. Then a step does not
            wait for the device to tell their numbers; a GPU runs ahead. Default False.

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
        equal_batches: bool = False,
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
        self.equal_batches = equal_batches

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
        check(z1, z2)
        options = (self.lambd, self.scale, self.off_diagonal_target, self.eps, self.form)
        with torch.autocast(z1.device.type, enabled=False):
            outputs = Loss.apply(z1, z2, *options, self.process_group, self.equal_batches)
        self.terms = Terms(*(value.detach() for value in outputs))
        loss: Tensor = outputs[0]
        return loss

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"lambd={self.lambd}, scale={self.scale}, "
            f"off_diagonal_target={self.off_diagonal_target}, form={self.form!r}"
        )
