"""One encoder on several labelled sources: how well does the representation transfer?"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from barlow.errors import UserError
from barlow.evaluation.protocols import evaluate, save_in_run
from barlow.evaluation.result import Result, Row
from barlow.evaluation.task import open_task


def transfer(
    encoder: str | nn.Module,
    sources: Sequence[str],
    protocol: Literal["linear", "knn"] = "linear",
    *,
    labels_per_class: int | None = None,
    label_fraction: float | None = None,
    baseline: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    limit: int | None = None,
    cache: bool = True,
    accelerator: str = "auto",
    devices: int = 1,
) -> Result:
    """Evaluate one encoder on several labelled sources, in one table.

    As in Zbontar et al. 2021, section 3.3, each source gets its own classifier on the same frozen
    encoder.

    Args:
        encoder: a run, a checkpoint, a timm folder, anything else that `load_encoder` takes, or a
            module with a `preprocess` attribute.
        sources: labelled sources. One without a test or validation split is divided as in
            `evaluate`.
        protocol: "linear" or "knn", as in `evaluate`.
        labels_per_class: use this many training labels of every class.
        label_fraction: use this share of the training labels of every class.
        baseline: also evaluate, on every source: "random", "pixels", "supervised", or several,
            separated by commas.
        seed: random seed: chooses the labels, initialises the random baseline.
        batch_size: images per batch through the encoder.
        limit: use only the first N images of each source.
        cache: cache features in $BARLOW_CACHE (default: ~/.cache/barlow/features).
        accelerator: device type of the encoder: auto, cpu, cuda or mps. A module stays on its
            device. Everything else runs on the CPU.
        devices: processes on this machine that share the images, one per device.

    Returns:
        A row for each source and encoder, named "SOURCE, ENCODER"; with several sources also their
        mean, each source with equal weight. If `encoder` is a run, the result is saved in
        `RUN/evaluation/`, beside those of the single sources.

    Raises:
        UserError: if there is no source, one is given twice, or one cannot be evaluated on. All
            are checked before the first is evaluated.
    """
    names = list(sources)
    if isinstance(sources, str) or not names:
        raise UserError(f"sources is {sources!r}: give a list of one or more labelled sources")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"source {twice[0]} is given twice: give each one once")
    for name in names:  # so that a misspelt last source is not found only after an hour
        open_task(name, name, limit=limit)
    shared: dict[str, Any] = {
        "labels_per_class": labels_per_class,
        "label_fraction": label_fraction,
        "baseline": baseline,
        "seed": seed,
        "batch_size": batch_size,
        "limit": limit,
        "cache": cache,
        "accelerator": accelerator,
        "devices": devices,
    }
    results = [evaluate(encoder, n, n, protocol, **shared) for n in names]
    rows = [
        replace(row, name=f"{name}, {row.name}")
        for name, result in zip(names, results, strict=True)
        for row in result.rows
    ]
    first = results[0]
    settings = {k: v for k, v in first.settings.items() if k not in ("train", "test")}
    found = Result(
        "transfer",
        tuple(rows + (_means(results) if len(results) > 1 else [])),
        {**settings, "protocol": protocol, "sources": names},
        {name: result.data for name, result in zip(names, results, strict=True)},
        first.environment,
    )
    save_in_run(found, encoder)
    return found


def _means(results: Sequence[Result]) -> list[Row]:
    """For each encoder that every source has, the mean of the numbers that every source has."""
    named = [{row.name: row.values for row in result.rows} for result in results]
    rows = []
    for name in named[0]:
        if not all(name in rows_of for rows_of in named):
            continue  # k-NN leaves out a k above the number of training images
        values = [rows_of[name] for rows_of in named]
        keys = [key for key in values[0] if all(key in v for v in values)]
        mean = {key: sum(v[key] for v in values) / len(values) for key in keys}
        rows.append(Row(f"mean, {name}", mean))
    return rows
