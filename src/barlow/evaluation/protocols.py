"""`evaluate`: an encoder, labelled images and a protocol become a result."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from barlow.data import Preprocess
from barlow.errors import UserError
from barlow.evaluation.features import cache_folder, features_of, pixels_of
from barlow.evaluation.knn import knn_scores
from barlow.evaluation.linear import LinearClassifier, logistic_probe
from barlow.evaluation.metrics import classification, right
from barlow.evaluation.result import Result, Row, environment, pack, plain
from barlow.evaluation.sgd import sgd_probe
from barlow.evaluation.task import Part, Task, few_labels, open_task

WITH, WITHOUT = "with pretraining", "without pretraining"

# Gives features and the rows they belong to, for the training or the test part of a task.
Extract = Callable[[Part], tuple[Tensor, Tensor]]


def evaluate(
    encoder: str | Path | nn.Module,
    train: str,
    test: str,
    protocol: str = "linear",
    *,
    epochs: int | None = None,
    label_fraction: float | None = None,
    labels_per_class: int | None = None,
    baseline: str | Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    limit: int | None = None,
    augment: bool = False,
    cache: bool = True,
) -> Result:
    """Measure what an encoder is worth on labelled images.

    Args:
        encoder: a run, a checkpoint, a timm folder, or a module with its `preprocess`.
        train: source of the labelled training images (its training split).
        test: source of the test images (its test or validation split); they are measured on and
            have no say in any choice.
        protocol: "linear", a linear classifier on the frozen encoder; or "knn", weighted nearest
            neighbours.
        epochs: for "linear": that many epochs of SGD (Zbontar et al. 2021, appendix A, with 100)
            instead of the exact optimum of logistic regression.
        label_fraction: use this share of the training labels, of each class alike.
        labels_per_class: use this many training labels of each class.
        baseline: compared with in the same table: "random" (the same architecture, not trained),
            "pixels", "supervised" (timm's weights, downloaded), or several, separated by commas.
        seed: chooses the labels, orders the images, initialises the random baseline.
        batch_size: images at a time through the encoder.
        limit: use only the first so many images of each source.
        augment: for "linear": SGD on crops and flips drawn anew every epoch, as the papers do, by
            default 100 epochs; every epoch runs the encoder over all training images.
        cache: keep features in $BARLOW_CACHE, by default ~/.cache/barlow/features.

    Returns:
        The result; for an encoder from a run it is also saved in `RUN/evaluation/`.

    Raises:
        UserError: if the sources have no labels or other classes, or an option is out of range.
    """
    settings = {k: v for k, v in locals().items() if k not in ("encoder", "train", "test", "cache")}
    if protocol not in PROTOCOLS:
        raise UserError(f"no protocol {protocol!r}: there are {', '.join(PROTOCOLS)}")
    if batch_size < 1:
        raise UserError(f"batch size is {batch_size}: give 1 or more")
    baselines = _baselines(baseline)
    if augment and (protocol != "linear" or "pixels" in baselines):
        raise UserError("augment is for the protocol linear, of encoders: leave it or pixels out")
    module = module_of(encoder)
    task = open_task(train, test, _in_chans(module), limit)
    task = Task(
        few_labels(task.train, label_fraction, labels_per_class, task.classes, seed),
        task.test,
        task.classes,
    )
    kept = cache_folder() if cache else None
    rows: list[Row] = []
    for name, one, extract in _encoders(module, baselines, seed, batch_size, kept):
        x_train, y_train = _labelled(extract, task.train)
        x_test, y_test = _labelled(extract, task.test)
        shared = (x_train, y_train, x_test, y_test, len(task.classes))
        if augment:
            rows += _augmented(name, one, task.train, *shared, epochs, seed, view_preset(encoder))
        else:
            rows += PROTOCOLS[protocol](name, *shared, epochs, seed)
    result = Result(
        protocol,
        tuple(rows),
        plain({"encoder": _name(encoder), "train": train, "test": test, **settings}),
        _data(task),
        environment(),
    )
    save_in_run(result, encoder)
    return result


def _linear(
    name: str,
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    classes: int,
    epochs: int | None,
    seed: int,
) -> list[Row]:
    chosen: dict[str, Any]
    if epochs is None:
        classifier, penalty = logistic_probe(x_train, y_train, classes, seed=seed)
        chosen = {"penalty": penalty}
    else:
        classifier, rate = sgd_probe(x_train, y_train, classes, epochs, seed=seed)
        chosen = {"rate": rate}
    return [_measured(name, classifier, x_train, y_train, x_test, y_test, chosen)]


def _augmented(
    name: str,
    encoder: nn.Module,
    part: Part,
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    classes: int,
    epochs: int | None,
    seed: int,
    views: str,
) -> list[Row]:
    from barlow.evaluation.augmented import augmented_probe

    epochs = 100 if epochs is None else epochs  # Zbontar et al. 2021, appendix A
    classifier, rate = augmented_probe(encoder, part, classes, epochs, seed=seed, views=views)
    return [_measured(name, classifier, x_train, y_train, x_test, y_test, {"rate": rate})]


def _measured(
    name: str,
    classifier: LinearClassifier,
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    chosen: dict[str, Any],
) -> Row:
    scores = classifier(x_test)
    values = classification(classifier(x_train), y_train, "train")
    values |= classification(scores, y_test, "val")
    return Row(name, values, chosen=chosen, correct=pack(right(scores, y_test)))


def _knn(
    name: str,
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    classes: int,
    epochs: int | None,
    seed: int,
) -> list[Row]:
    if epochs is not None:
        raise UserError("knn is not trained: leave epochs out")
    ks = tuple(k for k in (20, 200) if k <= len(x_train)) or (len(x_train),)
    scores = knn_scores(x_test, x_train, F.one_hot(y_train, classes).float(), ks)
    return [
        Row(
            f"{name}, k = {k}, t = {t}",
            classification(s, y_test, "val", loss=False),
            correct=pack(right(s, y_test)),
        )
        for (k, t), s in scores.items()
    ]


PROTOCOLS: dict[str, Callable[..., list[Row]]] = {"linear": _linear, "knn": _knn}


def _encoders(
    encoder: nn.Module, baselines: list[str], seed: int, batch_size: int, kept: Path | None
) -> list[tuple[str, nn.Module, Extract]]:
    """A name, the encoder and a way to features for each line of the table, baselines first."""
    from barlow.encoders import fresh_copy

    def of(module: nn.Module) -> Extract:
        return lambda part: features_of(
            module, part.source, part.rows, batch_size=batch_size, cache=kept
        )

    def pixels(part: Part) -> tuple[Tensor, Tensor]:
        preprocess = encoder.preprocess
        assert isinstance(preprocess, Preprocess)
        return pixels_of(part.source, part.rows, preprocess, batch_size)

    found: list[tuple[str, nn.Module, Extract]] = []
    for baseline in baselines:
        if baseline == "random":
            fresh = fresh_copy(encoder, seed)
            found.append((WITHOUT, fresh, of(fresh)))
        elif baseline == "supervised":
            supervised = _supervised(encoder)
            found.append(("supervised weights", supervised, of(supervised)))
        else:
            found.append(("raw pixels", nn.Flatten(), pixels))
    return [*found, (WITH, encoder, of(encoder))]


def _labelled(extract: Extract, part: Part) -> tuple[Tensor, Tensor]:
    x, rows = extract(part)
    return x, part.known(rows)


def _supervised(encoder: nn.Module) -> nn.Module:
    from barlow.encoders import spec_of

    spec = spec_of(encoder)
    try:
        module = spec.build(pretrained=True)
    except Exception as error:  # timm and the hub raise what they like without a network
        raise UserError(
            f"no supervised weights of {spec.name!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    module.preprocess = encoder.preprocess
    return module


def module_of(encoder: str | Path | nn.Module) -> nn.Module:
    """The encoder itself, loaded if a place is given."""
    if isinstance(encoder, nn.Module):
        return encoder
    from barlow.share import load_encoder

    return load_encoder(encoder)


def view_preset(encoder: str | Path | nn.Module) -> str:
    """The preset of views a run was trained with: it knows whether a mirrored image is the same."""
    from barlow.run import Run

    if not isinstance(encoder, nn.Module) and (run := Run(Path(encoder))).config_file.exists():
        return run.settings().view_preset
    return "small"


def _in_chans(encoder: nn.Module) -> int:
    return int(getattr(getattr(encoder, "preprocess", None), "in_chans", 3))


def _name(encoder: str | Path | nn.Module) -> str:
    return type(encoder).__name__ if isinstance(encoder, nn.Module) else str(encoder)


def _baselines(baseline: str | Sequence[str] | None) -> list[str]:
    names = baseline.split(",") if isinstance(baseline, str) else list(baseline or [])
    names = list(dict.fromkeys(name.strip() for name in names))
    for name in names:
        if name not in ("random", "pixels", "supervised"):
            raise UserError(f"no baseline {name!r}: there are random, pixels, supervised")
    return names


def _data(task: Task) -> dict[str, Any]:
    def describe(part: Part) -> dict[str, Any]:
        chosen = hashlib.sha256(part.rows.numpy().tobytes() + part.y.numpy().tobytes())
        return {
            "name": part.source.name,
            "images": len(part.rows),
            "fingerprint": f"{part.source.fingerprint}-{chosen.hexdigest()[:8]}",
        }

    return {
        "train": describe(task.train),
        "test": describe(task.test),
        "classes": len(task.classes),
    }


def save_in_run(result: Result, encoder: str | Path | nn.Module) -> Path | None:
    """Save a result in the run its encoder is from, if it is from one.

    The same evaluation again replaces its file.

    Returns:
        The file, or None.
    """
    if isinstance(encoder, nn.Module) or not (Path(encoder) / "config.yaml").exists():
        return None
    told = json.dumps({"settings": result.settings, "data": result.data}, sort_keys=True)
    name = f"{result.protocol}-{hashlib.sha256(told.encode()).hexdigest()[:8]}.json"
    path = Path(encoder) / "evaluation" / name
    result.save(path)
    return path
