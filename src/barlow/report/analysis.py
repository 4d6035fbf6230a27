"""Analysis of images by a run's encoder: neighbours, map, spectrum, correlation matrix."""

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

_BANK, _QUERIES = 2_000, 1_000  # at most: training images to search, images to analyse
_K, _TEMPERATURE = 20, 0.07
_ROWS, _COLUMNS = 8, 8  # of the table of neighbours
_VIEWED = 6
_LARGE, _SMALL = 96, 40  # side of a picture and of a thumbnail, in pixels
_BATCH = 256  # images for the matrix, at most
_FEWEST = 10  # images that a map needs
_ROOM = 8 * 2**30  # free bytes that a GPU must have to be used


@dataclass(frozen=True)
class ShownImage:
    """An image on the page: its picture, its name, and its class where it has one."""

    picture: Image
    name: str
    label: str | None = None


_Show = Callable[[int, int], ShownImage]  # (row, side in pixels) -> the image of that row


@dataclass(frozen=True)
class Analysis:
    """The analysis of images by an encoder, as plain data.

    Attributes:
        parameters: number of parameters of the encoder.
        width: width of the representation.
        features: width of the embedding.
        bank: number of training images that are searched.
        held_out: whether the images below are held out, or training images themselves.
        views: names of images, the images and their two views.
        matrices: the cross-correlation matrices at the start and now, `(d, d)` each.
        matrix_images: number of images that these were computed from.
        spectra: shares of the variance, largest first, of the untrained and the trained encoder.
        rankmes: RankMe of the untrained and the trained encoder.
        neighbours: images, each with the most similar training images and their similarities.
        map: positions of the images in a plane, `(N, 2)`.
        mapped: the images at those positions, with thumbnails.
        classes: names of the classes of these images; empty without labels.
        confusion: `(classes, classes)`, numbers of images by true class and the class by k-NN.
        knn: k-NN accuracy of the untrained and the trained encoder; None without labels.
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
        run: a run with a checkpoint.

    Returns:
        The analysis, which is the same every time.

    Raises:
        UserError: if there is no checkpoint yet, or the images are not available.
    """
    settings = run.settings()
    state = load_last(run.last_checkpoint)
    if state is None:
        raise UserError(f"{run.path} has no checkpoint yet")
    bank, queries, are_held_out = _images(settings)
    model = initial_model(settings)
    preprocess = model.encoder.preprocess
    assert isinstance(preprocess, Preprocess)
    # Use a GPU only if plenty of its memory is free, because a training may need the rest.
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
    """The k-NN accuracy of both encoders, and the confusion matrix of the trained one.

    Args:
        untrained: the untrained encoder's representations of bank and queries.
        trained: the same of the trained encoder.
        labels: the labels of bank and queries, -1 where unknown.
        classes: the number of classes.

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
    """The bank of training images, the query images, and whether the latter are held out."""
    train, new = training_images(settings), validation_images(settings)
    for images in filter(None, (train, new)):
        # Training has already judged whether too many images are broken.
        images.max_broken = 1.0
    bank = train.spread(_BANK)
    if new:
        return bank, new.spread(_QUERIES), True
    asked = range(0, len(bank), 5)
    return bank.part(sorted({*range(len(bank))} - {*asked})), bank.part(asked), False


def _views(
    images: Source, settings: Settings, preprocess: Preprocess
) -> list[tuple[str, Image, Image, Image]]:
    """Names, images and their two views, made one image at a time because they may be large."""
    two_views, drawn = build_views(settings, preprocess), []
    for row in range(len(images)):
        key = address.key(settings.seed, address.REPORT_VIEWS, row)
        ((image, *views),) = with_views([images[row]], two_views, key)
        one, two = (picture(view, _LARGE) for view in views)
        drawn.append((images.ids[row], picture(image, _LARGE), one, two))
    return drawn


def _small(images: Source, row: int, side: int) -> Image:
    """An image that fits a square of `side`; a JPEG is decoded no larger than necessary."""
    opened = images.open(row)
    whole = torch.tensor([[0, 0, *opened.size]])
    return picture(opened.decode(reduction_for(whole, side) if opened.reducible else 1), side)


def _classes(source: Source) -> dict[int, str]:
    """The classes that the images of a source have, by number."""
    numbers = [] if source.labels is None else torch.unique(source.labels).tolist()
    return {n: source.classes[n] if source.classes else str(n) for n in numbers if n >= 0}


def _labels(source: Source, classes: list[str]) -> Tensor:
    """The labels of a source as positions in `classes`, -1 where unknown: `(N,)`."""
    if source.labels is None:
        return torch.full((len(source),), -1)
    place, names = {name: i for i, name in enumerate(classes)}, _classes(source)
    numbers, at = torch.unique(source.labels, return_inverse=True)
    return torch.tensor([place[names[n]] if n >= 0 else -1 for n in numbers.tolist()])[at]


def _knn(bank: Tensor, queries: Tensor, targets: Tensor, classes: int) -> Tensor:
    """The class that each query's nearest neighbours vote for, `(Q,)`."""
    scores = knn_scores(queries, bank, targets, (_K,), (_TEMPERATURE,), classes)
    return scores[_K, _TEMPERATURE].argmax(1)


def _map(x: Tensor, seed: int) -> list[tuple[float, float]]:
    """Positions in a plane, close together for similar representations; empty for too few."""
    from sklearn.manifold import TSNE

    if len(x) < _FEWEST:
        return []
    perplexity = min(30, (len(x) - 1) // 3)
    plane = TSNE(perplexity=perplexity, random_state=seed).fit_transform(F.normalize(x).numpy())
    return [(float(a), float(b)) for a, b in plane]
