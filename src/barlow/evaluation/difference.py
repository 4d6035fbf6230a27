"""The difference between two results in one number, and whether it is more than chance."""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from barlow.evaluation.result import Result, Row, unpack

_Z = 1.96  # 95 % of a normal distribution
_SURE = 0.05


@dataclass(frozen=True)
class Difference:
    """One number of two results.

    Attributes:
        protocol: "linear", "knn", ...
        row: name of the row that both results have.
        metric: for example "val_top1".
        a: the first result's number, a mean where there were several runs or seeds.
        b: the second result's number.
        low: lower end of the 95 % interval of b - a over the choice of test images, from those that
            both could read; None if the results do not say which images were right.
        high: upper end of that interval.
        p: p-value of McNemar's exact test, two-sided: how often chance alone would divide the
            images that only one of the two gets right as unevenly. None if these are not known, or
            if there were several runs or seeds, as an image may be right with only some of them.
        p_seeds: p-value of a t-test over seeds, two-sided: how often as many seeds would differ as
            much if the two were equally good. Over several runs, each of them one seed, it is
            Welch's test, as the seeds of two ways to pretrain are not pairs. Over the fine-tunings
            of single runs it is Student's test on pairs if both had as many, else Welch's. None if
            one of the two had a single seed, if the seeds of neither differ, or if all pairs differ
            by the same amount.
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
        """Which is better, "A" or "B", or "no difference"; empty if that cannot be decided.

        A number of the features alone, such as RankMe, cannot decide it.

        One is better if p is below 0.05 (without p, if 0 is outside the interval) and `p_seeds` is
        below 0.05 too; whichever of these is not known is not required.
        """
        if not self.metric.startswith("val_"):
            return ""
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


def differences_of(a: Result, b: Result) -> list[Difference]:
    """The numbers that two results have in common, baselines included."""
    of_b = {row.name: row for row in b.rows}
    number = images_tested(a)
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
        How often fair coins would divide `only_a + only_b` images as unevenly or more.

    Example:
        >>> mcnemar(1, 9), mcnemar(5, 5)
        (0.021484375, 1.0)
    """
    number = only_a + only_b
    # With integers, a thin tail is not rounded to zero and a long sum accumulates no errors.
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
        Ends of the interval of mean(right_b) - mean(right_a), by the normal approximation.
    """
    each = right_b.double() - right_a.double()  # (N,): -1 to 1
    error = _Z * float(each.std(correction=0)) / len(each) ** 0.5
    return float(each.mean()) - error, float(each.mean()) + error


def _difference(protocol: str, a: Row, b: Row, metric: str, number: int) -> Difference:
    low = high = p = None
    of_a, of_b = a.values[metric], b.values[metric]
    right_a, right_b = _right(a, number), _right(b, number)
    if metric == "val_top1" and right_a is not None and right_b is not None:
        both = (right_a + right_b).isfinite()
        if bool(both.any()):
            right_a, right_b = right_a[both], right_b[both]
            if not bool(both.all()):  # take the same images as for the interval and p
                of_a, of_b = float(right_a.mean()), float(right_b.mean())
            low, high = paired_interval(right_a, right_b)
            if a.seeds == b.seeds == 1:
                p = mcnemar(int((right_a > right_b).sum()), int((right_b > right_a).sum()))
    p_seeds = _p_over_seeds(a, b, metric)
    return Difference(protocol, a.name, metric, of_a, of_b, low, high, p, p_seeds)


def _right(row: Row, number: int) -> Tensor | None:
    """How often each test image is classified correctly, `(number,)`; None if a seed is unknown.

    NaN for an image that could not be read. A seed that is a run may comprise several trainings.
    """
    if not number or not row.correct or len(row.correct) % row.seeds:
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


def images_tested(result: Result) -> int:
    """How many test images a result was measured on; 0 if it does not say."""
    return int((result.data.get("test") or {}).get("images", 0))
