"""Settings as the command that makes a run with them."""

import shlex
from collections.abc import Callable, Iterable
from dataclasses import fields
from json import dumps

from barlow.settings import Settings


def command(
    settings: Settings,
    out: str,
    leave_out: Iterable[str] = (),
    shown: Callable[[str], str] = str,
) -> str:
    """The command that makes a run with these settings, whatever a recipe's values are by then.

    Args:
        settings: those that differ from their defaults are written.
        out: folder of the run.
        leave_out: names of settings that are not told.
        shown: what is told of a text, which may be a place.

    Returns:
        A line for a shell.

    Example:
        >>> command(Settings("cifar10", projector=[512, 512], compile=True), "runs/a")
        'barlow pretrain cifar10 --out runs/a --projector 512 512 --compile'
    """
    parts = ["barlow", "pretrain", shown(settings.source), "--out", out]
    usual = Settings(settings.source)
    for field in fields(Settings):
        value = getattr(settings, field.name)
        if field.name in {"source", *leave_out} or value == getattr(usual, field.name):
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
            parts += [flag, shown(str(value))]
    return shlex.join(parts)
