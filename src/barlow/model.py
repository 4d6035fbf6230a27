"""The method on one screen: encoder, projector, loss."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from barlow.encoders import pooled_forward_and_width
from barlow.loss import BarlowTwinsLoss


def create_projector(in_features: int, widths: Sequence[int]) -> nn.Sequential:
    """Create the projector: the MLP from representation to embedding (paper, section 2.2).

    Args:
        in_features: width `F` of the representation.
        widths: output width of each linear layer; the last is the width `D` of the embedding. All
            but the last are followed by batch normalisation and ReLU; none has a bias.

    Returns:
        A module `(N, F) -> (N, D)`.

    Example:
        >>> len(create_projector(512, [2048, 2048, 2048]))
        7
    """
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise([in_features, *widths]):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.BatchNorm1d(n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


class BarlowTwins(nn.Module):
    """Barlow Twins (Zbontar et al. 2021): takes two views, returns the loss.

    Args:
        encoder: `(N, C, H, W) -> (N, F)` with the attribute `num_features`, for example from
            `barlow.create_encoder`.
        projector: widths of the projector's layers. Default 8192 three times (paper).
        lambd: weight of the redundancy-reduction term. Default 0.0051 (paper).
        criterion: the loss, `(N, D), (N, D) -> ()`. Default `BarlowTwinsLoss(lambd)`; if given,
            `lambd` is not used.

    Raises:
        ValueError: if `projector` is empty.

    Example:
        >>> import torch, barlow
        >>> encoder = barlow.create_encoder("resnet18", image_size=32)
        >>> model = BarlowTwins(encoder, projector=(64, 64))
        >>> views = torch.randn(2, 4, 3, 32, 32)
        >>> model(*views).shape
        torch.Size([])
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: Sequence[int] = (8192, 8192, 8192),
        lambd: float = 0.0051,
        criterion: BarlowTwinsLoss | None = None,
    ) -> None:
        super().__init__()
        if not projector:
            raise ValueError(
                "the projector has no layers: give at least one width, such as (2048,)"
            )
        self.encoder = encoder
        self.projector = create_projector(pooled_forward_and_width(encoder)[1], projector)
        self.criterion = criterion or BarlowTwinsLoss(lambd)

    def embed(self, view: Tensor) -> Tensor:
        """The embedding of one view: `(N, C, H, W) -> (N, D)`."""
        forward, _ = pooled_forward_and_width(self.encoder)
        embedding: Tensor = self.projector(forward(view))
        return embedding

    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        grad1: Tensor | None = None,
        grad2: Tensor | None = None,
    ) -> Tensor:
        """The loss of two views of the same images.

        Args:
            view1: `(N, C, H, W)`.
            view2: `(N, C, H, W)`, of the same images.
            grad1: `(N, D)`, gradient of a larger batch's loss with respect to the first
                embedding; set by `accumulate`.
            grad2: the same for the second embedding.

        Returns:
            The loss, a scalar; its terms are in `criterion.terms`. With `grad1` and `grad2`: a
            scalar whose gradients with respect to the embeddings are these.
        """
        # One pass per view, as in the paper: batch normalisation sees one distribution at a time.
        z1, z2 = self.embed(view1), self.embed(view2)  # (N, D)
        if grad1 is not None and grad2 is not None:
            return (grad1 * z1).sum() + (grad2 * z2).sum()
        loss: Tensor = self.criterion(z1, z2)
        return loss
