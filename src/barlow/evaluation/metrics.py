"""Loss and accuracy of a classifier's scores."""

from torch import Tensor
from torch.nn import functional as F


def classification(scores: Tensor, y: Tensor, name: str, loss: bool = True) -> dict[str, float]:
    """Cross-entropy, top-1 and, with more than five classes, top-5.

    Args:
        scores: `(N, C)` logits; only their order matters without `loss`.
        y: `(N,)` int64.
        name: put before the names of the numbers: "train" or "val".
        loss: whether the scores are logits, so that cross-entropy means something.

    Returns:
        For example `{"val_loss": ..., "val_top1": ..., "val_top5": ...}`; accuracies in 0 to 1.

    Example:
        >>> import torch
        >>> classification(torch.eye(2), torch.tensor([0, 0]), "val", loss=False)
        {'val_top1': 0.5}
    """
    found = {f"{name}_loss": float(F.cross_entropy(scores, y))} if loss else {}
    found[f"{name}_top1"] = float(right(scores, y).float().mean())
    if scores.shape[1] > 5 and name == "val":
        top = scores.topk(5).indices  # (N, 5)
        found[f"{name}_top5"] = float((top == y[:, None]).any(1).float().mean())
    return found


def right(scores: Tensor, y: Tensor) -> Tensor:
    """Whether the highest score is at the label: boolean `(N,)`."""
    return scores.argmax(1) == y
