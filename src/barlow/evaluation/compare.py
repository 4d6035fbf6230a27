"""Is one encoder better than another? Two results, image by image on the same test images."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from barlow.checkpoint import write_text
from barlow.errors import UserError
from barlow.evaluation.result import Result, Row, text_table, unpack

if TYPE_CHECKING:
    from rich.table import Table

_Z = 1.96  # 95 % of a normal distribution
_SURE = 0.05


@dataclass(frozen=True)
class Difference:
    """One number of two results.

    Attributes:
        protocol: "linear", "knn", ...
        row: name of the row that both results have.
        metric: for example "val_top1".
        a: the first result's number.
        b: the second's.
        low: lower end of the 95 % interval of b - a over the choice of test images, or None where
            the results do not say which images were right.
        high: upper end.
        p: of McNemar's exact test, two-sided: how often chance alone would divide the images that
            only one of the two gets right as unevenly; or None.
        spread: standard deviation of b - a over seeds, or None where there was one seed.
    """

    protocol: str
    row: str
    metric: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    spread: float | None = None

    @property
    def verdict(self) -> str:
        """Which is better, "A" or "B", or "no difference"; empty where nothing can tell."""
        if self.p is None and self.spread is None:
            return ""
        difference = self.b - self.a
        by_images = self.p is None or self.p < _SURE
        by_seeds = self.spread is None or abs(difference) > 2 * self.spread
        if not (by_images and by_seeds and difference):
            return "no difference"
        lower_is_better = "loss" in self.metric
        return "B" if (difference > 0) != lower_is_better else "A"


@dataclass(frozen=True)
class Comparison:
    """Two encoders side by side.

    Attributes:
        a: name of the first.
        b: name of the second.
        differences: a line for each number that both have.
    """

    a: str
    b: str
    differences: tuple[Difference, ...]

    def cells(self) -> list[list[str]]:
        """The table as text: headings, then a line a number."""
        headings = ["", "A", "B", "B - A", "95 % interval", "p", "seeds' spread", "better"]
        return [headings, *(_cells(d) for d in self.differences)]

    def table(self) -> "Table":
        """The table for a terminal."""
        from rich.table import Table

        headings, *lines = self.cells()
        table = Table(caption=f"A: {self.a}\nB: {self.b}", caption_justify="left")
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        for line in lines:
            table.add_row(*line)
        return table

    def __str__(self) -> str:
        return f"A: {self.a}\nB: {self.b}\n{text_table(self.cells())}"

    def to_json(self) -> str:
        """Everything, as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON beside its place, then rename it there."""
        write_text(Path(path), self.to_json())


def compare(run_a: str, run_b: str) -> Comparison:
    """Compare two encoders that were evaluated alike on the same test images.

    Args:
        run_a: a run that was evaluated, or a JSON file of a result.
        run_b: another.

    Returns:
        The numbers that both have, their difference, and whether it is more than chance: by
        McNemar's exact test on the images that one gets right and the other wrong, and by twice
        the spread over seeds where there were several.

    Raises:
        UserError: if a run was not evaluated, or the two not in the same way on the same images.
    """
    of_a, of_b = _results(run_a), _results(run_b)
    if Path(run_a).is_file() and Path(run_b).is_file():
        # Who names two files means these two: only what makes them incomparable is refused.
        _require_same_images(of_a[0], of_b[0])
        pairs = [(of_a[0], of_b[0])]
    else:
        by_key = {_key(result): result for result in of_b}
        pairs = [(result, by_key[_key(result)]) for result in of_a if _key(result) in by_key]
    if not pairs:
        raise UserError(
            f"{run_a} and {run_b} were not evaluated alike: {run_a} by {_told(of_a)}, {run_b} by "
            f"{_told(of_b)}; evaluate both with the same sources and options"
        )
    differences = tuple(d for a, b in pairs for d in differences_of(a, b))
    if not differences:
        raise UserError(f"{run_a} and {run_b} have no row in common: evaluate both alike")
    return Comparison(run_a, run_b, differences)


def differences_of(a: Result, b: Result) -> list[Difference]:
    """The numbers that two results have in common, baselines included."""
    of_b = {row.name: row for row in b.rows}
    number = int((a.data.get("test") or {}).get("images", 0))
    return [
        _difference(a.protocol, row, of_b[row.name], metric, number)
        for row in a.rows
        if row.name in of_b
        for metric in row.values
        # How well the training images are fitted says nothing about which encoder is better.
        if metric in of_b[row.name].values and not metric.startswith("train_")
    ]


def mcnemar(only_a: int, only_b: int) -> float:
    """McNemar's exact test, two-sided (McNemar 1947).

    Args:
        only_a: images that only the first gets right.
        only_b: images that only the second gets right.

    Returns:
        How often fair coins divide `only_a + only_b` images as unevenly or more.

    Example:
        >>> mcnemar(1, 9), mcnemar(5, 5)
        (0.021484375, 1.0)
    """
    number = only_a + only_b
    # Whole numbers: no tail is so thin that it is rounded away, no sum so long that it drifts.
    ways, tail = 1, 0
    for i in range(min(only_a, only_b) + 1):
        tail += ways
        ways = ways * (number - i) // (i + 1)  # of choosing i + 1 of them
    return float(min(1.0, 2 * tail / 2**number))


def paired_interval(right_a: Tensor, right_b: Tensor) -> tuple[float, float]:
    """The 95 % interval of the difference of two accuracies on the same images.

    Args:
        right_a: `(N,)` bool, whether the first classifies each image correctly.
        right_b: `(N,)` bool, the second.

    Returns:
        Ends of the interval of mean(right_b) - mean(right_a), by its normal approximation.
    """
    each = right_b.double() - right_a.double()  # (N,): -1, 0 or 1
    error = _Z * float(each.std(correction=0)) / len(each) ** 0.5
    return float(each.mean()) - error, float(each.mean()) + error


def _difference(protocol: str, a: Row, b: Row, metric: str, number: int) -> Difference:
    spread = None
    if metric in a.spread and metric in b.spread:
        spread = (a.spread[metric] ** 2 + b.spread[metric] ** 2) ** 0.5
    low = high = p = None
    if metric == "val_top1" and a.correct and b.correct and number:
        right_a, right_b = unpack(a.correct, number), unpack(b.correct, number)
        low, high = paired_interval(right_a, right_b)
        p = mcnemar(int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum()))
    return Difference(
        protocol, a.name, metric, a.values[metric], b.values[metric], low, high, p, spread
    )


def _cells(d: Difference) -> list[str]:
    # Accuracies are fractions, told in percent; their differences in points of it.
    written, signed = ("{:.2%}", "{:+.2%}") if "top" in d.metric else ("{:.4g}", "{:+.4g}")
    known = d.low is not None and d.high is not None
    return [
        f"{d.protocol}, {d.row}, {d.metric.replace('_', ' ')}",
        written.format(d.a),
        written.format(d.b),
        signed.format(d.b - d.a),
        f"{signed.format(d.low)} to {signed.format(d.high)}" if known else "",
        "" if d.p is None else f"{d.p:.2g}",
        "" if d.spread is None else written.format(d.spread),
        d.verdict,
    ]


def _results(run: str) -> list[Result]:
    path = Path(run)
    if path.is_file():
        return [Result.load(path)]
    if not path.is_dir():
        raise UserError(f"{run} is neither a run nor a JSON file of a result")
    files = sorted((path / "evaluation").glob("*.json"))
    if not files:
        raise UserError(
            f"{run} was not evaluated yet: run `barlow evaluate {run} --train SOURCE` first"
        )
    return [Result.load(file) for file in files]


def _key(result: Result) -> str:
    """Equal for two evaluations that differ in nothing but the encoder."""
    settings = {k: v for k, v in result.settings.items() if k not in ("encoder", "batch_size")}
    return json.dumps([result.protocol, settings, result.data], sort_keys=True)


def _require_same_images(a: Result, b: Result) -> None:
    test_a, test_b = a.data.get("test") or {}, b.data.get("test") or {}
    if a.protocol != b.protocol:
        raise UserError(
            f"one result is of protocol {a.protocol!r}, the other of {b.protocol!r}: "
            "evaluate both by the same"
        )
    if test_a.get("fingerprint") != test_b.get("fingerprint"):
        raise UserError(
            f"the test images differ ({test_a.get('images')} of {test_a.get('name')}, "
            f"{test_b.get('images')} of {test_b.get('name')}): evaluate both on the same"
        )


def _told(results: Iterable[Result]) -> str:
    told = []
    for result in results:
        part = result.data.get("train") or {}
        told.append(f"{result.protocol} on {part.get('images')} images of {part.get('name')}")
    return ", ".join(dict.fromkeys(told))
