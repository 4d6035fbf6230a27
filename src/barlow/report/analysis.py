"""What a run's encoder makes of images: neighbours, a map, a spectrum, the matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from barlow import address
from barlow.assembly import build_views, training_images, validation_images
from barlow.checkpoint import load_last
from barlow.correlation_matrices import initial_and_current, initial_model
from barlow.data import Preprocess, Source
from barlow.data.source import spread
from barlow.data.streaming import reduction_for
from barlow.errors import UserError
from barlow.evaluation.features import extract
from barlow.evaluation.knn import knn_scores, nearest
from barlow.evaluation.spectrum import rankme, spectrum
from barlow.run import Run
from barlow.settings import Settings
from barlow.views.draw import picture, with_views

_BANK, _QUERIES = 2_000, 1_000  # images looked among, images looked at
_K, _TEMPERATURE = 20, 0.07
_ROWS, _COLUMNS = 8, 8  # of the table of neighbours
_VIEWED = 6
_LARGE, _SMALL = 96, 40  # pixels of a picture, of a thumbnail
_BATCH = 256  # images for the matrix, at most
_FEWEST = 10  # images that a map needs
_ROOM = 8 * 2**30  # bytes free on a GPU


@dataclass(frozen=True)
class ShownImage:
    """An image on the page: its picture, its name, and its class where it has one."""

    picture: Image
    name: str
    label: str | None = None


_Show = Callable[[int, int], ShownImage]  # the image of a row, in a square of so many pixels


@dataclass(frozen=True)
class Analysis:
    """What the encoder makes of images, as plain data.

    Attributes:
        parameters: of the encoder.
        width: of the representation.
        features: of the embedding.
        bank: training images looked among.
        held_out: whether the images below are held out, or training images themselves.
        views: images, each with its two views.
        matrices: at the start and now, `(d, d)` each.
        matrix_images: how many images they are of.
        spectra: shares of the variance, largest first: untrained and trained.
        rankmes: RankMe of the same.
        neighbours: an image, and the most similar training images with their similarity.
        map: `(N, 2)`, places in a plane.
        mapped: the images at those places, with thumbnails.
        classes: names of the classes of these images; empty without labels.
        confusion: `(classes, classes)`, true class by k-NN's.
        knn: accuracy of k-NN untrained and trained; None without labels.
    """

    parameters: int
    width: int
    features: int
    bank: int
    held_out: bool
    views: list[tuple[str, Image, Image, Image]]
    matrices: tuple[Tensor, Tensor]
    matrix_images: int
    spectra: tuple[list[float], list[float]]
    rankmes: tuple[float, float]
    neighbours: list[tuple[ShownImage, list[tuple[ShownImage, float]]]]
    map: list[tuple[float, float]]
    mapped: list[ShownImage]
    classes: list[str]
    confusion: Tensor | None
    knn: tuple[float, float] | None


def analyse(run: Run) -> Analysis:
    """Run the encoder of a run's last checkpoint over images of its source.

    Args:
        run: with a checkpoint.

    Returns:
        What it makes of them; the same every time.

    Raises:
        UserError: if there is no checkpoint yet, or the images are not at hand.
    """
    settings = run.settings()
    state = load_last(run.last_checkpoint)
    if state is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    bank, queries, are_held_out = _images(settings)
    model = initial_model(settings)
    preprocess = model.encoder.preprocess
    assert isinstance(preprocess, Preprocess)
    # Not where a training beside it may need the rest.
    roomy = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > _ROOM
    model.encoder.to("cuda" if roomy else "cpu")
    untrained = [extract(model.encoder, images)[0] for images in (bank, queries)]
    model.load_state_dict(state["model"])
    (x_bank, bank_rows), (x_queries, query_rows) = (
        extract(model.encoder, images) for images in (bank, queries)
    )
    bank, queries = bank.part(bank_rows.tolist()), queries.part(query_rows.tolist())
    numbered = sorted({*_classes(bank).items(), *_classes(queries).items()})
    classes = list(dict.fromkeys(name for _, name in numbered))
    labels = (_labels(bank, classes), _labels(queries, classes))
    knn, confusion = _knn_confusion(untrained, (x_bank, x_queries), labels, len(classes))
    show_bank, show_query = (
        partial(_shown_image, images, labels_of, classes)
        for images, labels_of in zip((bank, queries), labels, strict=True)
    )
    sample = queries if are_held_out else bank
    sample = sample.part(spread(len(sample), min(_BATCH, settings.batch_size)))
    return Analysis(
        parameters=sum(p.numel() for p in model.encoder.parameters()),
        width=x_bank.shape[1],
        features=settings.projector[-1],
        bank=len(x_bank),
        held_out=are_held_out,
        views=_views(bank.part(spread(len(bank), _VIEWED)), settings, preprocess),
        matrices=initial_and_current(settings, state, sample),
        matrix_images=len(sample),
        spectra=(spectrum(untrained[1]).tolist(), spectrum(x_queries).tolist()),
        rankmes=(rankme(untrained[1]), rankme(x_queries)),
        neighbours=_neighbour_rows(x_queries, x_bank, show_query, show_bank),
        map=_map(x_queries, settings.seed),
        mapped=[show_query(i, _SMALL) for i in range(len(x_queries))],
        classes=classes,
        confusion=confusion,
        knn=knn,
    )


def _knn_confusion(
    untrained: Sequence[Tensor], trained: Sequence[Tensor], labels: Sequence[Tensor], classes: int
) -> tuple[tuple[float, float] | None, Tensor | None]:
    """Accuracy of k-NN untrained and trained, and the confusion matrix of the latter.

    Args:
        untrained: representations of bank and queries.
        trained: the same, of the trained encoder.
        labels: of bank and queries, -1 where unknown.
        classes: how many.

    Returns:
        `Analysis.knn` and `Analysis.confusion`; None and None if either has no labels.
    """
    bank_labels, query_labels = labels
    known, asked = bank_labels >= 0, query_labels >= 0
    if not (bool(known.any()) and bool(asked.any())):
        return None, None
    truth, targets = query_labels[asked], bank_labels[known]
    before, after = (
        _knn(bank[known], queries[asked], targets, classes)
        for bank, queries in (untrained, trained)
    )
    pairs = torch.bincount(truth * classes + after, minlength=classes**2)
    accuracy = (float((before == truth).float().mean()), float((after == truth).float().mean()))
    return accuracy, pairs.view(classes, classes)


def _neighbour_rows(
    queries: Tensor, bank: Tensor, show_query: _Show, show_bank: _Show
) -> list[tuple[ShownImage, list[tuple[ShownImage, float]]]]:
    """Some queries, each with its nearest neighbours in the bank and their similarities."""
    similarity, rows = nearest(queries, bank, min(_COLUMNS, len(bank)))
    return [
        (
            show_query(i, _LARGE),
            [
                (show_bank(j, _LARGE), s)
                for s, j in zip(similarity[i].tolist(), rows[i].tolist(), strict=True)
            ],
        )
        for i in spread(len(queries), _ROWS)
    ]


def _shown_image(
    images: Source, labels: Tensor, classes: list[str], row: int, side: int
) -> ShownImage:
    label = int(labels[row])
    name = classes[label] if label >= 0 else None
    return ShownImage(_small(images, row, side), images.ids[row], name)


def _images(settings: Settings) -> tuple[Source, Source, bool]:
    """Images to look among, images to look at, and whether the latter are held out."""
    train, new = training_images(settings), validation_images(settings)
    for images in filter(None, (train, new)):
        # Whether too many are broken was judged in the training.
        images.max_broken = 1.0
    bank = train.spread(_BANK)
    if new:
        return bank, new.spread(_QUERIES), True
    asked = range(0, len(bank), 5)
    return bank.part(sorted({*range(len(bank))} - {*asked})), bank.part(asked), False


def _views(
    images: Source, settings: Settings, preprocess: Preprocess
) -> list[tuple[str, Image, Image, Image]]:
    """Names, images and their two views; one image at a time, as they may be large."""
    two_views, drawn = build_views(settings, preprocess), []
    for row in range(len(images)):
        key = address.key(settings.seed, address.REPORT_VIEWS, row)
        ((image, *views),) = with_views([images[row]], two_views, key)
        one, two = (picture(view, _LARGE) for view in views)
        drawn.append((images.ids[row], picture(image, _LARGE), one, two))
    return drawn


def _small(images: Source, row: int, side: int) -> Image:
    """An image that fits a square of `side`; a JPEG is decoded no larger than that needs."""
    opened = images.open(row)
    whole = torch.tensor([[0, 0, *opened.size]])
    return picture(opened.decode(reduction_for(whole, side) if opened.reducible else 1), side)


def _classes(source: Source) -> dict[int, str]:
    """The classes that its images have, by number."""
    numbers = [] if source.labels is None else torch.unique(source.labels).tolist()
    return {n: source.classes[n] if source.classes else str(n) for n in numbers if n >= 0}


def _labels(source: Source, classes: list[str]) -> Tensor:
    """The labels, numbered as `classes` are, -1 where unknown: `(N,)`."""
    if source.labels is None:
        return torch.full((len(source),), -1)
    place, names = {name: i for i, name in enumerate(classes)}, _classes(source)
    numbers, at = torch.unique(source.labels, return_inverse=True)
    return torch.tensor([place[names[n]] if n >= 0 else -1 for n in numbers.tolist()])[at]


def _knn(bank: Tensor, queries: Tensor, targets: Tensor, classes: int) -> Tensor:
    """The class that the nearest neighbours vote for, `(Q,)`."""
    scores = knn_scores(queries, bank, targets, (_K,), (_TEMPERATURE,), classes)
    return scores[_K, _TEMPERATURE].argmax(1)


def _map(x: Tensor, seed: int) -> list[tuple[float, float]]:
    """Places in a plane, near each other where representations are; none for too few."""
    from sklearn.manifold import TSNE

    if len(x) < _FEWEST:
        return []
    perplexity = min(30, (len(x) - 1) // 3)
    plane = TSNE(perplexity=perplexity, random_state=seed).fit_transform(F.normalize(x).numpy())
    return [(float(a), float(b)) for a, b in plane]
