"""Metrics of scores: accuracy and loss for classes, mAP for tags, R2 for numbers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow.errors import UserError
from barlow.evaluation.labels import Kind


def compute_metrics(
    kind: Kind, scores: Tensor, y: Tensor, prefix: str, loss: bool = True
) -> dict[str, float]:
    """The metrics for a kind of labels.

    Args:
        kind: "classes", "tags" or "numbers".
        scores: `(N, T)`.
        y: labels of that kind.
        prefix: put before the names of the metrics: "train" or "val".
        loss: whether the scores of classes are logits.

    Returns:
        As `classification_metrics`, or the mean average precision of tags, or the R2 of numbers.
    """
    if kind == "classes":
        return classification_metrics(scores, y, prefix, loss)
    if kind == "tags":
        return {f"{prefix}_map": mean_average_precision(scores, y)}
    return {f"{prefix}_r2": r2(scores, y)}


def classification_metrics(
    scores: Tensor, y: Tensor, prefix: str, loss: bool = True
) -> dict[str, float]:
    """Cross-entropy and top-1; top-5 for more than five classes; mean recall for unequal classes.

    Args:
        scores: `(N, C)` logits; only their order matters without `loss`.
        y: `(N,)` int64.
        prefix: put before the names of the metrics: "train" or "val".
        loss: whether the scores are logits, so that cross-entropy means something.

    Returns:
        For example `{"val_loss": ..., "val_top1": ..., "val_top5": ...}`; accuracies in 0 to 1.
        For "val", if the largest class has more than twice the images of the smallest, also
        `val_recall`: the share of each class's images that are right, averaged over the classes.

    Example:
        >>> import torch
        >>> classification_metrics(torch.eye(2), torch.tensor([0, 0]), "val", loss=False)
        {'val_top1': 0.5}
    """
    found = {f"{prefix}_loss": float(F.cross_entropy(scores, y))} if loss else {}
    correct = is_correct(scores, y)
    found[f"{prefix}_top1"] = float(correct.float().mean())
    if scores.shape[1] > 5:
        top = scores.topk(5).indices  # (N, 5)
        found[f"{prefix}_top5"] = float((top == y[:, None]).any(1).float().mean())
    _, place, images = torch.unique(y, return_inverse=True, return_counts=True)
    if prefix == "val" and images.max() > 2 * images.min():
        found["val_recall"] = float((torch.bincount(place, correct.double()) / images).mean())
    return found


def is_correct(scores: Tensor, y: Tensor) -> Tensor:
    """Whether the highest score is at the label: boolean `(N,)`."""
    return scores.argmax(1) == y


def r2(found: Tensor, y: Tensor) -> float:
    """Share of the variance explained, averaged over columns: 1 is perfect, the mean gives 0.

    Args:
        found: `(N, T)`.
        y: `(N, T)`; a column whose values are all the same is left out.

    Raises:
        UserError: if all columns are left out.

    Example:
        >>> r2(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        0.5
    """
    y = y.double()
    unexplained = (found.double() - y).square().sum(0)
    total = (y - y.mean(0)).square().sum(0)
    varies = total > 0
    if not bool(varies.any()):
        raise UserError("the numbers are the same for all test images: R2 needs two different ones")
    return float((1 - unexplained[varies] / total[varies]).mean())


def mean_average_precision(scores: Tensor, y: Tensor) -> float:
    """Average precision of each tag, averaged over the tags that some image has.

    Precision is averaged over the steps of recall; images of equal score are taken together.

    Args:
        scores: `(N, T)`.
        y: `(N, T)`, 0 or 1.

    Example:
        >>> y = torch.tensor([[1.0], [0.0], [1.0]])
        >>> round(mean_average_precision(torch.tensor([[3.0], [2.0], [1.0]]), y), 4)
        0.8333
    """
    found = [_average_precision(s, has) for s, has in zip(scores.T, y.T, strict=True) if has.any()]
    return sum(found) / len(found) if found else float("nan")


def _average_precision(scores: Tensor, has: Tensor) -> float:
    scores, order = scores.sort(descending=True)
    hits = has[order].double().cumsum(0)  # (N,)
    last = torch.ones(len(scores), dtype=torch.bool)  # of a run of equal scores
    last[:-1] = scores[:-1] != scores[1:]
    at = last.nonzero().flatten()
    precision = hits[at] / (at + 1)
    recall = hits[at] / hits[-1]
    steps = torch.diff(recall, prepend=recall.new_zeros(1))
    return float((precision * steps).sum())
