"""Files of weights from any project: tensors and their names are read, nothing is executed."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from barlow.checkpoint import load_checkpoint
from barlow.errors import UserError

# Settings and notes that other projects pickle beside their weights. They are replaced by an object
# that does nothing. A file that refers to any other global is refused.
_NOTES = re.compile(
    r"__main__\.exclude_bias_and_norm"  # in the optimiser's state of facebookresearch/barlowtwins
    r"|argparse\.Namespace|omegaconf\.[\w.]+|pathlib\.\w+|typing\.Any"
    r"|builtins\.(?:bool|dict|float|int|list|set|str|tuple)"
)
# Subclasses of dict that the unpickler fills; plain dictionaries can take their place.
_DICTIONARY = re.compile(r"collections\.defaultdict|(?:pytorch_)?lightning\.[\w.]+\.AttributeDict")

# Keys under which a file may keep its weights, if it holds other things too.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
# Counters that thop leaves in a model that it has measured.
_COUNTERS = re.compile(r"(?:^|\.)total_(?:ops|params)$")
# What DistributedDataParallel and torch.compile add to the names of a module's weights.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+|_orig_mod\.")


@dataclass(frozen=True)
class WeightsFile:
    """The weights in a file.

    Attributes:
        tensors: the weights by name, without what wrappers add to the names.
        container: the key under which the file kept them, or None if there is no such key.
        state: everything in the file.
        metadata: strings in the header of a safetensors file.
    """

    tensors: dict[str, Tensor]
    container: str | None
    state: dict[str, Any]
    metadata: dict[str, str]


def read_weights(path: Path) -> WeightsFile:
    """Read a safetensors file or a checkpoint; nothing in it is executed.

    Raises:
        UserError: if the file is damaged, has no weights, or would have to execute code.
    """
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    else:
        with torch.serialization.safe_globals(_stand_ins(path)):
            state = load_checkpoint(path)
    container = next((c for c in _CONTAINERS if isinstance(state.get(c), dict)), None)
    found = state if container is None else state[container]
    tensors = {
        _WRAPPERS.sub("", str(name)): value
        for name, value in found.items()
        if isinstance(value, Tensor) and not _COUNTERS.search(str(name))
    }
    if not tensors:
        raise UserError(f"{path} holds no weights: its keys are {', '.join(map(str, state))[:200]}")
    return WeightsFile(tensors, container, state, metadata)


class _Nothing:
    """Stands in for an object that is not needed: accepts any arguments and state, keeps none."""

    def __new__(cls, *_: object) -> "_Nothing":
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _dictionary(*_: object) -> dict[Any, Any]:
    return {}


def _stand_ins(path: Path) -> list[Any]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file, or damaged: load_checkpoint reports what is wrong
        return []
    notes = [(_Nothing, name) for name in names if _NOTES.fullmatch(name)]
    return notes + [(_dictionary, name) for name in names if _DICTIONARY.fullmatch(name)]
