"""Is one encoder, or one way to train it, better than another, on the same test images?"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from barlow.atomic import write_text
from barlow.errors import UserError
from barlow.evaluation.difference import Difference, differences_of, images_tested
from barlow.evaluation.result import Result, Row, pack, unpack
from barlow.run import Run
from barlow.tables import rich_table, text_table

if TYPE_CHECKING:
    from rich.table import Table

_TWO_ENCODERS = (
    "p and interval describe these encoders only; other seeds of the same settings differ too: "
    "give several runs per side, as A,B,C"
)

_Runs = dict[str, dict[str, Result]]  # for each run, its results by `_key`


@dataclass(frozen=True)
class Comparison:
    """Two encoders, or several seeds of each, side by side.

    Attributes:
        a: name of the first.
        b: name of the second.
        differences: one for each number that both have.
        notes: remarks on how to read them.
    """

    a: str
    b: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def cells(self) -> list[list[str]]:
        """The table as text: headings, then a line for each number."""
        headings = ["", "A", "B", "B - A", "95 % interval", "p", "p over seeds", "better"]
        return [headings, *(_cells(d) for d in self.differences)]

    def table(self) -> "Table":
        """The table for a terminal."""
        return rich_table(self.cells(), self.caption(), others={"justify": "right"})

    def caption(self) -> str:
        """The names of A and B, and the notes."""
        return "\n".join([f"A: {self.a}", f"B: {self.b}", *self.notes])

    def __str__(self) -> str:
        return f"{self.caption()}\n{text_table(self.cells())}"

    def to_json(self) -> str:
        """Everything, as indented JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON atomically."""
        write_text(Path(path), self.to_json())


def compare(run_a: str, run_b: str) -> Comparison:
    """Compare two encoders, or several seeds of each, evaluated alike on the same test images.

    Args:
        run_a: an evaluated run, or a JSON file of a result; or several that differ in the seed of
            their pretraining, separated by commas.
        run_b: the run or runs to compare with, given in the same way.

    Returns:
        The numbers that all runs have, their difference, and whether it is more than chance:

        - One run a side: by McNemar's exact test on the images that only one of them classifies
          correctly.
        - Several runs a side, or several seeds of fine-tuning: by the interval of the mean
          difference over the images, and by a t-test over the seeds. Over runs it is Welch's, with
          the mean of a run's fine-tunings as one seed. Over the fine-tunings of single runs it is
          Student's on pairs, or Welch's if the numbers of seeds differ.

    Raises:
        UserError: if a run was not evaluated, or not in the same way on the same images.
    """
    names_a, names_b = _named(run_a), _named(run_b)
    given = names_a + names_b
    several = len(given) > 2
    places = [Path(run).resolve() for run in given]
    twice = [run for run, place in zip(given, places, strict=True) if places.count(place) > 1]
    if several and twice:
        raise UserError(f"{twice[-1]} is given twice: give each run once")
    a, b = ({run: _results(run) for run in names} for names in (names_a, names_b))
    if all(place.is_file() for place in places):
        # The user named these files, so the sides may differ in anything but protocol and images.
        keys = [(_common(a)[0], _common(b)[0])]
    else:
        keys = [(key, key) for key in _common(a | b)]
    differences = list[Difference]()
    for key_a, key_b in keys:
        of_a, of_b = [of[key_a] for of in a.values()], [of[key_b] for of in b.values()]
        _require_same_images(of_a[0], of_b[0])
        both = (_merged(of_a), _merged(of_b)) if several else (of_a[0], of_b[0])
        differences += differences_of(*both)
    if not differences:
        raise UserError(f"{run_a} and {run_b} have no rows in common: evaluate both the same way")
    notes = _left_out(a, b)
    if min(len(a), len(b)) == 1 and any(d.verdict for d in differences):
        notes = [_TWO_ENCODERS, *notes]
    return Comparison(run_a, run_b, tuple(differences), tuple(notes))


def _cells(d: Difference) -> list[str]:
    # Accuracies are fractions, written in percent; their differences are in percentage points.
    share = "top" in d.metric or "recall" in d.metric
    written, signed = ("{:.2%}", "{:+.2%}") if share else ("{:.4g}", "{:+.4g}")
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


def _named(runs: str) -> list[str]:
    """Split runs at the commas, unless the whole text is a path that exists."""
    parts = [part.strip() for part in runs.split(",") if part.strip()]
    if len(parts) < 2:
        return parts or [runs]
    try:
        whole = Path(runs).exists()
    except OSError:  # too long for a file name
        whole = False
    return [runs] if whole else parts


def _results(run: str) -> dict[str, Result]:
    """Results of a run by `_key`; where several have the same key, newer rows replace older."""
    path = Path(run)
    if not path.exists():
        raise UserError(f"{run} is neither a run nor a JSON result file")
    files = [path] if path.is_file() else Run(path).evaluation_files()
    if not files:
        raise UserError(
            f"{run} has not been evaluated yet: run `barlow evaluate {run} --train SOURCE` first"
        )
    found = dict[str, Result]()
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, file.name)):
        result = Result.load(file)
        older = found[_key(result)].rows if _key(result) in found else ()
        rows = {row.name: row for row in (*older, *result.rows)}
        found[_key(result)] = replace(result, rows=tuple(rows.values()))
    return found


def _merged(results: Sequence[Result]) -> Result:
    """Merge several runs into one result, in which each run is one seed."""
    by_name = [{row.name: row for row in result.rows} for result in results]
    number = images_tested(results[0])
    rows = [
        _mean([of[name] for of in by_name], number)
        for name in by_name[0]
        if all(name in of for of in by_name)
    ]
    return replace(results[0], rows=tuple(rows))


def _mean(rows: Sequence[Row], number: int) -> Row:
    """A row whose seeds are runs; it has no `by_seed`, so that runs of A and B are not paired."""
    columns = {
        metric: [row.values[metric] for row in rows]
        for metric in rows[0].values
        if all(math.isfinite(row.values.get(metric, math.nan)) for row in rows)
    }
    read = [unpack(row.read, number) for row in rows if row.read]
    return Row(
        rows[0].name,
        {metric: statistics.fmean(each) for metric, each in columns.items()},
        {metric: statistics.stdev(each) for metric, each in columns.items() if len(rows) > 1},
        chosen={"seeds": len(rows)},
        correct=[bits for row in rows for bits in row.correct]
        if all(len(row.correct) == row.seeds for row in rows)
        else [],
        read=pack(torch.stack(read).all(0)) if read else "",
    )


def _key(result: Result) -> str:
    """A key that is equal for evaluations that differ only in the encoder and the baselines."""
    return json.dumps(_asked(result), sort_keys=True)


def _asked(result: Result) -> dict[str, Any]:
    """Protocol, settings and data as one flat dictionary."""
    # The batch size of a frozen encoder does not change the result; that of a training does.
    free = ["encoder", "baseline", *([] if result.protocol == "finetune" else ["batch_size"])]
    settings = {k: v for k, v in result.settings.items() if k not in free}
    return {"protocol": result.protocol} | _flat(settings) | _flat(result.data)


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat = dict[str, Any]()
    for name, value in values.items():
        key = before + name
        flat |= _flat(value, f"{key} ") if isinstance(value, dict) else {key: value}
    return flat


def _common(runs: _Runs) -> list[str]:
    """Keys of the evaluations that all of the runs have.

    Raises:
        UserError: if there is none; the message says which run lacks which evaluation.
    """
    every = _every(runs)
    if common := [key for key in every if not _lacking(runs, key)]:
        return common

    def nearest(key: str) -> list[str]:
        others = runs[_lacking(runs, key)[0]].values()
        return min((_differing(other, every[key]) for other in others), key=len)

    key = min(every, key=lambda key: (len(_lacking(runs, key)), len(nearest(key))))
    lacking = _lacking(runs, key)
    having = next(run for run in runs if run not in lacking)
    raise UserError(
        f"the runs were not evaluated alike: {having} has {_describe(every[key])}, which is "
        f"missing from {' and '.join(lacking)}; {lacking[0]} differs in "
        f"{', '.join(nearest(key))}: evaluate all with the same sources and options"
    )


def _left_out(a: _Runs, b: _Runs) -> list[str]:
    """Notes on the evaluations left out because both sides have them, but not every run does."""
    both = _every(a).keys() & _every(b).keys()
    lacking = {key: _lacking(a | b, key) for key in both}
    return [
        f"not compared: {_describe(result)}, missing from {', '.join(lacking[key])}"
        for key, result in _every(a).items()
        if lacking.get(key)
    ]


def _every(runs: _Runs) -> dict[str, Result]:
    return {key: result for of in runs.values() for key, result in of.items()}


def _lacking(runs: _Runs, key: str) -> list[str]:
    return [run for run, of in runs.items() if key not in of]


def _differing(a: Result, b: Result) -> list[str]:
    """The settings and data in which the first evaluation differs from the second."""
    of_a, of_b = _asked(a), _asked(b)
    return [
        # The value of a fingerprint would tell the user nothing.
        name if "fingerprint" in name else f"{name} ({of_a.get(name)}, not {of_b.get(name)})"
        for name in dict.fromkeys([*of_b, *of_a])
        if of_a.get(name) != of_b.get(name)
    ]


def _require_same_images(a: Result, b: Result) -> None:
    if a.protocol != b.protocol:
        raise UserError(
            f"one result is from protocol {a.protocol!r}, the other from {b.protocol!r}: "
            "evaluate both with the same protocol"
        )
    of_a, of_b = _measured_on(a), _measured_on(b)
    if {part.get("fingerprint") for part in of_a} != {part.get("fingerprint") for part in of_b}:
        descriptions = (f"{part.get('images')} of {part.get('name')}" for part in [*of_a, *of_b])
        raise UserError(
            f"the images differ ({', '.join(descriptions)}): evaluate both on the same images"
        )


def _measured_on(result: Result) -> list[dict[str, Any]]:
    """The images that a result was measured on: test images (of each source) or health's own."""
    parts = result.data.values() if result.protocol == "transfer" else [result.data]
    return [part.get("test") or part.get("train") or {} for part in parts]


def _describe(result: Result) -> str:
    if result.protocol == "transfer":
        return f"transfer on {', '.join(result.data)}"
    part = result.data.get("train") or {}
    return f"{result.protocol} on {part.get('images')} images of {part.get('name')}"
