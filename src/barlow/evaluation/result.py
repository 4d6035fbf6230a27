"""The result of an evaluation: numbers, settings, environment and data, as a table and as JSON."""

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from barlow.atomic import write_text
from barlow.errors import UserError
from barlow.tables import rich_table, text_table

if TYPE_CHECKING:
    from rich.table import Table

# Key in the JSON: heading in the table, and how a number is written.
_COLUMNS = {
    "images": ("images", "{:.0f}"),
    "train_loss": ("training loss", "{:.4f}"),
    "train_top1": ("training top-1", "{:.2%}"),
    "train_top5": ("training top-5", "{:.2%}"),
    "val_loss": ("validation loss", "{:.4f}"),
    "val_top1": ("validation top-1", "{:.2%}"),
    "val_top5": ("validation top-5", "{:.2%}"),
    "val_recall": ("validation mean recall", "{:.2%}"),
    "train_map": ("training mAP", "{:.4f}"),
    "val_map": ("validation mAP", "{:.4f}"),
    "train_r2": ("training R2", "{:.4f}"),
    "val_r2": ("validation R2", "{:.4f}"),
}
_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One row of the table: an encoder, or one setting of it.

    Attributes:
        name: for example "with pretraining", "without pretraining", "raw pixels" or "supervised
            weights".
        values: the numbers, as fractions where the table shows percent; means over the seeds.
        spread: standard deviation over the seeds, if there are several.
        by_seed: each number for each seed, if there are several.
        chosen: what was chosen on held-out training images, such as the penalty.
        correct: for each seed, whether each test image, in order, was classified correctly; packed
            bits in base64, so that two results can be compared image by image.
        read: whether each test image could be read, packed likewise; empty if all could.
    """

    name: str
    values: dict[str, float]
    spread: dict[str, float] = field(default_factory=dict)
    by_seed: dict[str, list[float]] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    correct: list[str] = field(default_factory=list)
    read: str = ""

    @property
    def seeds(self) -> int:
        """Number of trainings that the numbers are means of."""
        return int(self.chosen.get("seeds", 1))


@dataclass(frozen=True)
class Result:
    """The result of an evaluation.

    Attributes:
        protocol: "linear", "knn", "finetune", "health" or "transfer".
        rows: the table, baselines first.
        settings: the arguments of the evaluation.
        data: names, sizes and fingerprints of training and test images.
        environment: versions and machine.

    Example:
        >>> row = Row("with pretraining", {"val_top1": 0.9103})
        >>> print(Result("linear", (row,)))
        linear            validation top-1
        with pretraining            91.03%
    """

    protocol: str
    rows: tuple[Row, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Row:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}: use one of {', '.join(row.name for row in self.rows)}")

    def cells(self) -> list[list[str]]:
        """The table as text: headings, then a line for each row."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row.values))
        known = [key for key in _COLUMNS if key in keys]
        keys = known + [key for key in keys if key not in known]
        lines = [[self.protocol, *(_COLUMNS.get(key, (key,))[0] for key in keys)]]
        lines += [[row.name, *(_cell(row, key) for key in keys)] for row in self.rows]
        return lines

    def table(self) -> "Table":
        """The table for a terminal."""
        first, others = {"no_wrap": True}, {"justify": "right"}
        return rich_table(self.cells(), self.caption(), first=first, others=others)

    def caption(self) -> str:
        """One line about the data."""
        train, test = self.data.get("train"), self.data.get("test")
        if self.protocol == "transfer" or not train or not test:  # transfer's keys are source names
            return ""
        return (
            f"{train['images']} training images of {train['name']}, "
            f"{test['images']} test images of {test['name']}"
        )

    def __str__(self) -> str:
        return text_table(self.cells())

    def to_json(self) -> str:
        """Everything, as indented JSON."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON atomically."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read what `save` wrote.

        Raises:
            UserError: if the file is missing or is not a result.
        """
        try:
            values = json.loads(Path(path).read_text())
            rows = tuple(_row(row) for row in values.pop("rows"))
            if values.pop("version") != _VERSION:
                raise UserError(f"{path} was written by another version of barlow: evaluate again")
            return cls(rows=rows, **values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a result of barlow evaluate: {error}") from error


def _row(values: dict[str, Any]) -> Row:
    correct = values.pop("correct", None) or []
    # Results of older versions have, instead of a list, the bits of the first seed.
    return Row(**values, correct=[correct] if isinstance(correct, str) else correct)


def _cell(row: Row, key: str) -> str:
    if key not in row.values:
        return ""
    written = _COLUMNS.get(key, (key, "{:.4g}"))[1]
    text = written.format(row.values[key])
    return f"{text} ± {written.format(row.spread[key])}" if key in row.spread else text


def pack(correct: Tensor) -> str:
    """A boolean `(N,)` as text: packed bits in base64."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def unpack(text: str, number: int) -> Tensor:
    """The inverse of `pack`: a boolean `(number,)`."""
    bits = np.frombuffer(base64.b64decode(text), np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=number).astype(bool))


def json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON values, without those that are None."""
    return {
        k: v if isinstance(v, int | float) else str(v) for k, v in settings.items() if v is not None
    }
