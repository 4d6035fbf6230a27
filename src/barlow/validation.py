"""What a training measures between its epochs: the loss and health metrics on held-out images."""

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from barlow.data import Loader, Preprocess, Source, eval_batches
from barlow.data.source import spread
from barlow.evaluation.knn import nearest, vote
from barlow.evaluation.spectrum import effective_rank, mean_off_diagonal, rankme
from barlow.loss_terms import Means
from barlow.model import BarlowTwins
from barlow.ranks import all_gather

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)

HEALTH = (
    "knn_top1",
    "effective_rank",
    "rankme_representation",
    "rankme_embedding",
    "mean_abs_off_diagonal",
)
_EMBEDDINGS = 1024, 2048  # at most this many images and features of the embedding are used
_VOTES = 512  # images whose votes for every class are in memory at a time
_COLLAPSED = 2.0  # an effective rank below this is a collapse


def epochs_between_validations(images: int, validated: int) -> int:
    """Epochs between validations so that they take about 3 % of the time.

    Args:
        images: images in an epoch; each takes two forward and two backward passes, which cost as
            much as six forward passes.
        validated: held-out images; each takes four forward passes.

    Example:
        >>> epochs_between_validations(50_000, 2048), epochs_between_validations(4_000, 1000)
        (1, 6)
    """
    return -(-23 * validated // images)


@torch.no_grad()
def validate(
    fabric: "Fabric",
    model: BarlowTwins,
    wrapped: nn.Module,
    loader: Loader | None,
    images: Source,
    preprocess: Preprocess,
) -> dict[str, float]:
    """The loss on held-out images, always with the same views, and the network's health.

    Args:
        fabric: the ranks that share the work.
        model: is in evaluation mode meanwhile.
        wrapped: the model, or Fabric's wrapper of it, which sets the precision.
        loader: two views of held-out images, if there are any.
        images: those whose outputs are measured, without augmentation.
        preprocess: prepares them for the encoder.

    Returns:
        `val_loss` and its terms, means over the loader's first epoch; and the metrics in `HEALTH`,
        `knn_top1` only if there are labels.
    """
    model.eval()
    row: dict[str, float] = {}
    if loader:
        means = Means()
        for view1, view2 in loader.epoch(0):
            wrapped(view1, view2)
            means.add(model.criterion.terms)
        row |= {f"val_{name}": value for name, value in means.pop().items()}
    y, z, labels = _outputs(fabric, model, images, preprocess)
    if y.isfinite().all() and z.isfinite().all():
        row |= health_metrics(y, z, labels) if fabric.is_global_zero else {}
    else:
        log.warning("outputs for held-out images are not finite: skipping their health metrics")
    model.train()
    return row


def health_metrics(y: Tensor, z: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Health metrics of a network, from its outputs for images without augmentation.

    Args:
        y: representations, `(N, F)`.
        z: embeddings of some of the same images, `(M, D)`.
        labels: `(N,)`, -1 where unknown, or None.

    Returns:
        By the names in `HEALTH`: if there are labels, the accuracy of a weighted vote of the 20
        images nearest to each (Wu et al. 2018; temperature 0.07); the effective rank of the
        representation (Roy and Vetterli 2007); RankMe of representation and embedding (Garrido et
        al. 2023); the mean absolute correlation between two features of the embedding.

    Example:
        >>> found = health_metrics(torch.eye(4), torch.eye(4), None)
        >>> round(found["rankme_embedding"], 2)
        4.0
    """
    found = {
        "effective_rank": effective_rank(y),
        "rankme_representation": rankme(y),
        "rankme_embedding": rankme(z),
        "mean_abs_off_diagonal": mean_off_diagonal(z),
    }
    if labels is not None and int((labels >= 0).sum()) > 1:
        found["knn_top1"] = _leave_one_out(y[labels >= 0], labels[labels >= 0])
    return found


def collapse_warning(row: dict[str, float]) -> str | None:
    """A warning if representation or embedding has collapsed to a line or a point."""
    for what, name in (("representation", "effective_rank"), ("embedding", "rankme_embedding")):
        if not (rank := row.get(name, float("inf"))) >= _COLLAPSED:  # NaN if collapsed to a point
            return (
                f"the {what} has collapsed: its effective rank is {rank:.2f}; try a lower --lr, "
                "a longer --warmup-epochs, a larger --batch-size or another --lambd"
            )
    return None


def _leave_one_out(y: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07) -> float:
    similarity, rows = nearest(y, y, min(k + 1, len(y)))
    itself = rows == torch.arange(len(y)).unsqueeze(1)
    similarity, order = similarity.masked_fill(itself, -torch.inf).sort(1, descending=True)
    classes = torch.unique(labels, return_inverse=True)[1]
    number, k = int(classes.max()) + 1, min(k, len(y) - 1)
    of_class = classes[rows.gather(1, order[:, :k])]
    found = []
    for s, c in zip(torch.split(similarity, _VOTES), torch.split(of_class, _VOTES), strict=True):
        found.append(vote(s, c, temperature, k, number).argmax(1))
    return float((torch.cat(found) == classes).float().mean())


def _outputs(
    fabric: "Fabric", model: BarlowTwins, images: Source, preprocess: Preprocess
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Representation of every readable image, embedding of some, and labels, on every rank."""
    mine = images.part(range(fabric.global_rank, len(images), fabric.world_size))
    mine.max_broken = 1.0  # the loaders judge whether too many are broken
    dtype = next(model.parameters()).dtype
    found = []
    for batch, rows in eval_batches(mine, preprocess, 256, device=fabric.device):
        with fabric.autocast():
            y = model.encoder(batch.to(dtype))
            z = model.embed(batch.to(dtype))[:, : _EMBEDDINGS[1]]
        place = rows * fabric.world_size + fabric.global_rank
        found.append((place, y.float().cpu(), z.float().cpu()))
    found = all_gather(fabric, found)
    place, y, z = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = place.argsort()
    labels = None if images.labels is None else images.labels[place[order]]
    return y[order], z[order[spread(len(order), _EMBEDDINGS[0])]], labels
