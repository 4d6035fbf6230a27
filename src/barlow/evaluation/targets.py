"""An encoder measured on labels from a file: classes, tags or numbers."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from barlow.address import key, permutation
from barlow.data import Source, open_source
from barlow.errors import UserError
from barlow.evaluation.features import cache_folder, features_of
from barlow.evaluation.knn import knn_scores
from barlow.evaluation.labels import Labels, read_labels
from barlow.evaluation.linear import logistic_probe
from barlow.evaluation.metrics import classification, right
from barlow.evaluation.protocols import WITH, WITHOUT, save_in_run
from barlow.evaluation.regression import mean_average_precision, r2, ridge_probe, tag_probe
from barlow.evaluation.result import Result, Row, environment, pack, plain
from barlow.evaluation.subsets import split

_TEST_SHARE = 0.2
_DIVISION = 110  # stream of random numbers
_DEFAULT_K, _DEFAULT_T = 20, 0.07


def evaluate_labels(
    encoder: str | nn.Module,
    source: str,
    labels: str,
    test: str | None = None,
    test_labels: str | None = None,
    *,
    protocol: Literal["linear", "knn"] = "linear",
    kind: Literal["auto", "classes", "tags", "numbers"] = "auto",
    baseline: Literal["random"] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    limit: int | None = None,
    cache: bool = True,
) -> Result:
    """Measure what a frozen encoder is worth on labels from a CSV file.

    Args:
        encoder: a run, a checkpoint, a timm folder, or a module with its `preprocess`.
        source: images of a folder or any other source; its own labels are not looked at.
        labels: CSV file: file name, then a class, tags with | between them, or numbers.
        test: source of the test images; default a fifth of `source`, the same ones every time.
        test_labels: CSV file of their labels; default `labels`.
        protocol: "linear" (logistic or ridge regression) or "knn" (k = 20, t = 0.07).
        kind: what the file holds: "classes", "tags" (several an image) or "numbers"; "auto" tells.
        baseline: "random" adds the same architecture, not trained.
        seed: divides for the choice of the penalty, initialises the random baseline.
        batch_size: images at a time through the encoder.
        limit: use only the first so many images of each source.
        cache: keep features for the next time.

    Returns:
        The result: for classes as `evaluate` gives it, for tags the mean average precision, for
        numbers R2, of training and test images. For an encoder from a run it is also saved in
        `RUN/evaluation/`.

    Raises:
        UserError: if the labels do not fit the images, or an option is out of range.
    """
    settings = {
        k: v for k, v in locals().items() if k not in ("encoder", "cache") and v is not None
    }
    if protocol not in ("linear", "knn"):
        raise UserError(f"no protocol {protocol!r} for labels from a file: there are linear, knn")
    if baseline not in (None, "random"):
        raise UserError(f"no baseline {baseline!r} for labels from a file: there is random")
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give 1 or more")
    module = _load(encoder)
    in_chans = int(getattr(getattr(module, "preprocess", None), "in_chans", 3))
    first = open_source(source, None, in_chans=in_chans, limit=limit)
    known = read_labels(labels, first.ids, kind)
    if test is None:
        second = first
        known, held_out = _divide(known)
    else:
        second = open_source(test, None, in_chans=in_chans, limit=limit)
        held_out = _aligned(known, read_labels(test_labels or labels, second.ids, known.kind), test)
    from barlow.encoders import fresh_copy

    rows = []
    kept = cache_folder() if cache else None
    for name in [WITHOUT, WITH] if baseline else [WITH]:
        network = module if name == WITH else fresh_copy(module, seed)
        x, found = _features(network, first, known, batch_size, kept)
        x_test, found_test = _features(network, second, held_out, batch_size, kept)
        rows.append(_row(name, protocol, x, found, x_test, found_test, seed))
    result = Result(
        protocol,
        tuple(rows),
        plain({"encoder": encoder if isinstance(encoder, str) else "module", **settings}),
        {
            "train": _describe(first, known),
            "test": _describe(second, held_out),
            "kind": known.kind,
            known.kind: known.names,
        },
        environment(),
    )
    save_in_run(result, encoder)
    return result


def _row(
    name: str, protocol: str, x: Tensor, known: Labels, x_test: Tensor, held_out: Labels, seed: int
) -> Row:
    y, y_test = known.values, held_out.values
    chosen: dict[str, Any]
    if protocol == "knn":
        bank = F.one_hot(y, len(known.names)).float() if known.kind == "classes" else y
        k = min(_DEFAULT_K, len(bank))
        scores = knn_scores(x_test, x, bank, (k,), (_DEFAULT_T,))[k, _DEFAULT_T]
        fitted, chosen = None, {"k": k, "temperature": _DEFAULT_T}
    else:
        probe: Any
        if known.kind == "classes":
            probe, penalty = logistic_probe(x, y, len(known.names), seed=seed)
            chosen = {"penalty": penalty}
        elif known.kind == "tags":
            probe, penalties = tag_probe(x, y, seed)
            chosen = {"penalties": penalties}
        else:
            probe, penalty = ridge_probe(x, y)
            chosen = {"penalty": penalty}
        scores, fitted = probe(x_test), probe(x)
    if known.kind == "classes":
        values = {} if fitted is None else classification(fitted, y, "train")
        values |= classification(scores, y_test, "val", loss=fitted is not None)
        return Row(name, values, chosen=chosen, correct=pack(right(scores, y_test)))
    metric, measure = ("map", mean_average_precision) if known.kind == "tags" else ("r2", r2)
    values = {} if fitted is None else {f"train_{metric}": measure(fitted, y)}
    return Row(name, {**values, f"val_{metric}": measure(scores, y_test)}, chosen=chosen)


def _divide(known: Labels) -> tuple[Labels, Labels]:
    """Training and test, the same for every seed: another division is another test."""
    if known.kind == "classes":
        kept, held_out = split(known.values, _TEST_SHARE)
    else:
        order = permutation(len(known.rows), key(0, _DIVISION))
        number = round(_TEST_SHARE * len(order))
        held_out, kept = order[:number].sort().values, order[number:].sort().values
    if not len(held_out):
        raise UserError(
            f"{len(known.rows)} labelled images are too few to hold any out for a test: "
            "label more, or give a test source"
        )
    return known.take(kept), known.take(held_out)


def _aligned(known: Labels, test: Labels, name: str) -> Labels:
    """The test labels, numbered and ordered as those of training."""
    place = {name: i for i, name in enumerate(known.names)}
    if unknown := [n for n in test.names if n not in place]:
        what = {"classes": "class", "tags": "tag", "numbers": "column"}[known.kind]
        raise UserError(
            f"the labels of test source {name} have {what} {unknown[0]!r}, which the training "
            "labels do not have: give labels of the same kind"
        )
    at = torch.tensor([place[n] for n in test.names])
    if known.kind == "classes":
        return replace(test, names=known.names, values=at[test.values])
    if known.kind == "numbers" and len(test.names) < len(known.names):
        missing = next(n for n in known.names if n not in test.names)
        raise UserError(f"the labels of test source {name} miss column {missing!r}")
    values = torch.zeros(len(test.values), len(known.names))
    values[:, at] = test.values
    return replace(test, names=known.names, values=values)


def _features(
    encoder: nn.Module, source: Source, known: Labels, batch_size: int, kept: Path | None
) -> tuple[Tensor, Labels]:
    """Features `(M, F)` and the labels of the images that could be read."""
    x, rows = features_of(encoder, source, known.rows, batch_size=batch_size, cache=kept)
    return x, known.take(torch.isin(known.rows, rows).nonzero().flatten())


def _describe(source: Source, known: Labels) -> dict[str, Any]:
    chosen = hashlib.sha256(known.rows.numpy().tobytes() + known.values.numpy().tobytes())
    return {
        "name": source.name,
        "images": len(known.rows),
        "fingerprint": f"{source.fingerprint}-{chosen.hexdigest()[:8]}",
    }


def _load(encoder: str | nn.Module) -> nn.Module:
    if isinstance(encoder, nn.Module):
        return encoder
    from barlow.share import load_encoder

    return load_encoder(encoder)
