"""Which split of a source is meant: the usual names for train, validation and test."""

from collections.abc import Sequence
from typing import Protocol

from barlow.errors import UserError


class SplitChooser(Protocol):
    """Given the available splits (none if the source has none), returns those to read."""

    def __call__(self, available: Sequence[str], beside: str = "", /) -> list[str]:
        """`beside`: names of the images that are in no split, if no split is for training."""
        ...


ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing", "eval"),
}
WANTED = {
    "train": ("train",),
    "test": ("test", "validation"),
    "held_out": ("validation", "test"),
}
NAMES = frozenset(name for names in ALIASES.values() for name in names)


class NoSuchSplit(UserError):
    """The source has splits, but not the one asked for."""


def role_of(name: str) -> str:
    """What a split is for: "train", "validation", "test", or its own name."""
    for role, names in ALIASES.items():
        if name.lower() in names:
            return role
    return name


def is_held_out(name: str) -> bool:
    """Whether a split is for validation or test."""
    return role_of(name) in WANTED["held_out"]


def split_chooser(source: str, split: str | None, *, explicit: bool) -> SplitChooser:
    """The rule that picks splits of a source.

    Args:
        source: what the user wrote, for the message.
        split: "train", "test", "held_out", any name of a split, or None for everything.
        explicit: whether the user named the split, so that a source without splits is a mistake.
    """

    def choose(available: Sequence[str], beside: str = "", /) -> list[str]:
        if beside and not explicit and split in (None, "train"):
            raise UserError(
                f"{source} has {beside} beside {', '.join(available)}, but no training split: "
                f"move them into {source}/train, with metadata if {available[0]} has any, "
                f"or use {source}::{available[0]}"
            )
        if split is None:
            return list(available)
        if not available and not explicit and split != "held_out":
            return []
        if split in available:
            return [split]
        wanted: tuple[str, ...] = WANTED.get(split, (role_of(split),))
        if len(available) == 1 and not explicit:  # it is for training, whatever its name
            if split == "train":
                return list(available)
            if split == "held_out":
                wanted = ()
        for role in wanted:
            for name in available:
                if role_of(name) == role:
                    return [name]
        found = f"found: {', '.join(available)}" if available else "it has no splits"
        raise NoSuchSplit(f"{source} has no split {split!r}; {found}")

    return choose
