"""Is one encoder better than another? Two results, image by image on the same test images."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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
        a: the first result's number, a mean where there were several seeds.
        b: the second's.
        low: lower end of the 95 % interval of b - a over the choice of test images, of those that
            both could read, or None where the results do not say which images were right.
        high: upper end.
        p: of McNemar's exact test, two-sided: how often chance alone would divide the images that
            only one of the two gets right as unevenly; None where that is not known or there were
            several seeds, of which an image may be right with some.
        p_seeds: of Student's t-test over seeds, two-sided: how often as many seeds of encoders
            that do not differ would differ as much; of the pairs, where both had as many seeds,
            else Welch's. None where one of the two had one seed, or its seeds are all alike.
    """

    protocol: str
    row: str
    metric: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_seeds: float | None = None

    @property
    def verdict(self) -> str:
        """Which is better, "A" or "B", or "no difference"; empty where nothing can tell.

        One is better if p is below 0.05 (where there is no p, if 0 is outside the interval), and
        that over seeds is too: as far as these are known.
        """
        if self.p is None and self.low is None and self.p_seeds is None:
            return ""
        difference = self.b - self.a
        by_images = self.low is None or self.high is None or not self.low <= 0 <= self.high
        if self.p is not None:
            by_images = self.p < _SURE
        by_seeds = self.p_seeds is None or self.p_seeds < _SURE
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
        headings = ["", "A", "B", "B - A", "95 % interval", "p", "p over seeds", "better"]
        return [headings, *(_cells(d) for d in self.differences)]

    def table(self) -> "Table":
        """The table for a terminal."""
        from rich.table import Table
        from rich.text import Text

        headings, *lines = self.cells()
        # Text, or rich would take brackets in a name for markup.
        caption = Text(f"A: {self.a}\nB: {self.b}", "table.caption")
        table = Table(caption=caption, caption_justify="left")
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
        for line in lines:
            table.add_row(*map(Text, line))
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
        McNemar's exact test on the images that one gets right and the other wrong; where there
        were several seeds, by the interval of the mean difference over the images and by
        Student's t-test over the seeds.

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
        right_a: `(N,)`, how often the first classifies each image correctly, 0 or 1 for one seed.
        right_b: `(N,)`, the second.

    Returns:
        Ends of the interval of mean(right_b) - mean(right_a), by its normal approximation.
    """
    each = right_b.double() - right_a.double()  # (N,): -1 to 1
    error = _Z * float(each.std(correction=0)) / len(each) ** 0.5
    return float(each.mean()) - error, float(each.mean()) + error


def _difference(protocol: str, a: Row, b: Row, metric: str, number: int) -> Difference:
    low = high = p = None
    right_a, right_b = _right(a, number), _right(b, number)
    if metric == "val_top1" and right_a is not None and right_b is not None:
        both = (right_a + right_b).isfinite()
        right_a, right_b = right_a[both], right_b[both]
        low, high = paired_interval(right_a, right_b)
        if a.seeds == b.seeds == 1:
            p = mcnemar(int((right_a > right_b).sum()), int((right_b > right_a).sum()))
    p_seeds = _p_over_seeds(a, b, metric)
    return Difference(
        protocol, a.name, metric, a.values[metric], b.values[metric], low, high, p, p_seeds
    )


def _right(row: Row, number: int) -> Tensor | None:
    """How often each of the test images is right, `(number,)`, if that is known of every seed.

    Not a number for an image that could not be read.
    """
    if not number or len(row.correct) != row.seeds:
        return None
    right = torch.stack([unpack(bits, number) for bits in row.correct]).double().mean(0)
    return right.where(unpack(row.read, number), torch.nan) if row.read else right


def _p_over_seeds(a: Row, b: Row, metric: str) -> float | None:
    from scipy import stats

    spread_a, spread_b = a.spread.get(metric, 0.0), b.spread.get(metric, 0.0)
    if a.seeds == 1 or b.seeds == 1 or not (spread_a or spread_b):
        return None
    of_a, of_b = a.by_seed.get(metric, []), b.by_seed.get(metric, [])
    if of_a and len(of_a) == len(of_b):
        pairs = [second - first for first, second in zip(of_a, of_b, strict=True)]
        deviation = statistics.stdev(pairs)
        if deviation <= 1e-9 * max(map(abs, pairs)):  # equal but for rounding
            return None
        t = statistics.fmean(pairs) / (deviation / math.sqrt(len(pairs)))
        return float(2 * stats.t.sf(abs(t), len(pairs) - 1))
    of_each = [(r.values[metric], r.spread[metric], r.seeds) for r in (a, b)]
    return float(stats.ttest_ind_from_stats(*of_each[0], *of_each[1], equal_var=False).pvalue)


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
        "" if d.p_seeds is None else f"{d.p_seeds:.2g}",
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
    # How many images a frozen encoder takes at a time changes nothing; a training's batch does.
    free = ("encoder",) if result.protocol == "finetune" else ("encoder", "batch_size")
    settings = {k: v for k, v in result.settings.items() if k not in free}
    return json.dumps([result.protocol, settings, result.data], sort_keys=True)


def _require_same_images(a: Result, b: Result) -> None:
    if a.protocol != b.protocol:
        raise UserError(
            f"one result is of protocol {a.protocol!r}, the other of {b.protocol!r}: "
            "evaluate both by the same"
        )
    of_a, of_b = _measured_on(a), _measured_on(b)
    if {part.get("fingerprint") for part in of_a} != {part.get("fingerprint") for part in of_b}:
        told = (f"{part.get('images')} of {part.get('name')}" for part in [*of_a, *of_b])
        raise UserError(f"the images differ ({', '.join(told)}): evaluate both on the same")


def _measured_on(result: Result) -> list[dict[str, Any]]:
    """The images that its numbers are of: each source's test, the test, or those of its health."""
    parts = result.data.values() if result.protocol == "transfer" else [result.data]
    return [part.get("test") or part.get("train") or {} for part in parts]


def _told(results: Iterable[Result]) -> str:
    told = []
    for result in results:
        part = result.data.get("train") or {}
        told.append(f"{result.protocol} on {part.get('images')} images of {part.get('name')}")
    return ", ".join(dict.fromkeys(told))
