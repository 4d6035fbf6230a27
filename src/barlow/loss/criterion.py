"""The loss as a module that also keeps its terms."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from barlow.errors import UserError
from barlow.loss.batch import check
from barlow.loss.gradient import BarlowTwinsFunction, Form


class Terms(NamedTuple):
    """The terms of a loss, detached scalars: `loss = scale * (invariance + lambd * redundancy)`."""

    loss: Tensor
    invariance: Tensor  # sum of (1 - C_ii)^2
    redundancy: Tensor  # sum of (C_ij - target)^2 over i != j
    diagonal_error: Tensor  # mean of (1 - C_ii)^2
    off_diagonal_rms: Tensor  # root of the mean of C_ij^2 over i != j


class BarlowTwinsLoss(nn.Module):
    """The Barlow Twins loss (Zbontar et al. 2021), over the batch of all ranks.

    Args:
        lambd: weight of the redundancy-reduction term. Default 0.0051 (paper, section 2.2).
        scale: factor on the whole loss. Default 1 (paper); solo-learn's CIFAR-10 recipe uses 0.1.
        off_diagonal_target: target of the off-diagonal correlations. Default 0 (paper); -1 gives
            the HSIC variant (Tsai et al. 2021).
        form: matrix to compute with: "features" `(D, D)`, "samples" `(N, N)`, or "auto", the
            cheaper of the two. All give the same loss.
        eps: added to the variance of each feature. Default 1e-5 (as in `nn.BatchNorm1d`).
        process_group: ranks that share a batch. Default: all ranks.
        equal_batches: set to True if every rank always holds the same number of samples. Batch
            sizes are then not read back from the device, which saves waiting for a GPU. Default
            False.

    Attributes:
        terms: the terms of the last loss; reading them does not wait for the device.

    Raises:
        UserError: if `form` is invalid.

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
            raise UserError(f"unknown form {form!r}: use 'auto', 'features' or 'samples'")
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
            z1: embeddings of the first views, `(N, D)`, of any floating type and memory layout.
            z2: embeddings of the second views, `(N, D)`.

        Returns:
            A scalar, float32 (float64 for float64 input), the same on every rank.

        Raises:
            UserError: if the shapes or types differ, the shape is not `(N, D)`, the type is not
                floating, or the global batch has fewer than 2 samples.
        """
        check(z1, z2)
        options = (self.lambd, self.scale, self.off_diagonal_target, self.eps, self.form)
        with torch.autocast(z1.device.type, enabled=False):
            outputs = BarlowTwinsFunction.apply(
                z1, z2, *options, self.process_group, self.equal_batches
            )
        self.terms = Terms(*(value.detach() for value in outputs))
        loss: Tensor = outputs[0]
        return loss

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"lambd={self.lambd}, scale={self.scale}, "
            f"off_diagonal_target={self.off_diagonal_target}, form={self.form!r}"
        )
