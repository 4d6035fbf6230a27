"""`evaluate`: measures an encoder on images by a protocol."""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from barlow.environment import environment
from barlow.errors import UserError
from barlow.evaluation.result import Result, json_values
from barlow.run import Run

log = logging.getLogger(__name__)

# For each protocol, the module of this package that has the function of its name.
PROTOCOLS = {"linear": "probes", "knn": "probes", "finetune": "finetune", "health": "health"}

# Options that say where things run or are stored, which does not affect what is measured.
_NOT_SETTINGS = ("out", "cache", "accelerator", "devices")


def evaluate(
    encoder: str | Path | nn.Module,
    train: str,
    test: str | None = None,
    protocol: str = "linear",
    **options: Any,
) -> Result:
    """Evaluate an encoder on a source of images.

    Args:
        encoder: a run, a checkpoint, a timm folder, anything else that `load_encoder` takes, or a
            module with a `preprocess` attribute.
        train: source of the training images; labelled, except for "health".
        test: source of the test images, which influence no choice. Default: the training source.
        protocol: how to evaluate: "linear", a linear classifier on the frozen encoder; "knn",
            weighted nearest neighbours; "finetune", training of the whole network; or "health",
            which needs no labels and no test images.
        **options: options of the protocol, such as `baseline="random"`: the arguments of
            `barlow.evaluation.probes.linear` and `.knn`, `.finetune.finetune`, `.health.health`.

    Returns:
        The result. If `encoder` is a run, it is also saved in `RUN/evaluation/`.

    Raises:
        UserError: if the sources or their labels do not fit, or an option is unknown or out of
            range.
    """
    function = protocol_named(protocol)
    takes = inspect.signature(function).parameters
    given = {"train": train, **options}
    if test is not None or "test" in takes:
        given["test"] = train if test is None else test
    if unknown := [name for name in given if name not in takes]:
        others = ", ".join(name for name in takes if name not in ("encoder", "train"))
        raise UserError(f"protocol {protocol} has no option {unknown[0]}: its options are {others}")
    for name in ("batch_size", "devices"):
        if given.get(name, 1) < 1:
            raise UserError(f"{name.replace('_', ' ')} is {given[name]}: it must be at least 1")
    found = function(encoder, **given)
    defaults = {name: p.default for name, p in takes.items() if p.default is not p.empty}
    asked = {k: v for k, v in {**defaults, **given}.items() if k not in _NOT_SETTINGS}
    encoder_name = type(encoder).__name__ if isinstance(encoder, nn.Module) else str(encoder)
    settings = {"encoder": encoder_name, "protocol": protocol, **asked, **found.settings}
    result = replace(found, settings=json_values(settings), environment=environment())
    save_in_run(result, encoder)
    return result


def protocol_named(name: str) -> Callable[..., Result]:
    """The function of a protocol; its parameters are the options of the protocol.

    Raises:
        UserError: if there is no such protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}: use one of {', '.join(PROTOCOLS)}")
    found: Callable[..., Result] = getattr(
        import_module(f"barlow.evaluation.{PROTOCOLS[name]}"), name
    )
    return found


def save_in_run(result: Result, encoder: str | Path | nn.Module) -> Path | None:
    """Save a result in its run, if the encoder is given as a run.

    Repeating the same evaluation replaces its file.

    Returns:
        The file, or None; if the file cannot be written, a warning is logged.
    """
    if isinstance(encoder, nn.Module) or not (run := Run(Path(encoder))).config_file.exists():
        return None
    identity = json.dumps({"settings": result.settings, "data": result.data}, sort_keys=True)
    name = f"{result.protocol}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}.json"
    path = run.evaluation_folder / name
    try:
        result.save(path)
    except OSError as error:  # another user's run, or a full disk, must not cost the evaluation
        log.warning("could not save the result in %s: %s", encoder, error)
        return None
    return path
