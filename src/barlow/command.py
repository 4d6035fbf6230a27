"""The command line that makes a run with given settings, and the one that evaluates a run."""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import fields
from json import dumps
from typing import TYPE_CHECKING

from barlow.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor


def command(
    settings: Settings,
    out: str,
    exclude: Iterable[str] = (),
    format_path: Callable[[str], str] = str,
) -> str:
    """The command that makes a run with these settings, even if recipes have changed since.

    Args:
        settings: those that differ from their defaults are written.
        out: folder of the run.
        exclude: names of settings to leave out.
        format_path: formats a value given as text, which may be a path.

    Returns:
        A line for a shell.

    Example:
        >>> command(Settings("cifar10", projector=[512, 512], compile=True), "runs/a")
        'barlow pretrain cifar10 --out runs/a --projector 512 512 --compile'
    """
    parts = ["barlow", "pretrain", format_path(settings.source), "--out", out]
    usual = Settings(settings.source)
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if field.name in {"source", *exclude} or value == getattr(usual, field.name):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            parts.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            parts += [flag, dumps(value)]
        elif value and isinstance(value, list) and isinstance(value[0], str):
            parts += [flag, ",".join(value)]
        elif isinstance(value, list):
            parts += [flag, *map(str, value)]
        else:
            parts += [flag, format_path(str(value))]
    return shlex.join(parts)


def evaluate_command(encoder: str, train: str, labels: "Tensor | None") -> str:
    """The command that evaluates an encoder beside random weights, with labels if there are any.

    Args:
        encoder: a run.
        train: source of the training images.
        labels: of those images, if known; with fewer than two classes, the protocol is `health`.

    Returns:
        A line for a shell.

    Example:
        >>> evaluate_command("runs/a", "photos/", None)
        'barlow evaluate runs/a --train photos/ --protocol health --baseline random'
    """
    parts = ["barlow", "evaluate", encoder, "--train", train]
    if labels is None or int(labels.max()) < 1:
        parts += ["--protocol", "health"]
    return shlex.join([*parts, "--baseline", "random"])
