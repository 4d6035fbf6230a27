import io
import json
import os
import statistics
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from scipy import stats

import barlow
from barlow.errors import UserError
from barlow.evaluation.compare import Comparison, _key, compare
from barlow.evaluation.difference import (
    Difference,
    _p_over_seeds,
    differences_of,
    mcnemar,
    paired_interval,
)
from barlow.evaluation.result import Result, Row, pack, unpack


@pytest.mark.parametrize("counts", [(0, 0), (0, 6), (3, 3), (12, 31), (700, 611), (4000, 4210)])
def test_mcnemar_is_scipys_binomial_test(counts):
    scipy_stats = pytest.importorskip("scipy.stats")
    expected = scipy_stats.binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(*counts) == mcnemar(*counts[::-1])


def test_chance_is_taken_for_more_in_five_of_a_hundred_at_most():
    torch.manual_seed(0)
    found = 0
    for _ in range(400):
        only_a, only_b = torch.rand(2, 300).lt(0.1).sum(1).tolist()
        found += mcnemar(only_a, only_b) < 0.05
    assert found <= 28  # an exact test errs on the careful side; 20 ± 4.4 if it did not


def test_the_interval_covers_the_true_difference_in_95_of_100():
    torch.manual_seed(0)
    covered = 0
    for _ in range(400):
        a, b = torch.rand(2, 500).lt(torch.tensor([[0.70], [0.75]]))
        low, high = paired_interval(a, b)
        covered += low <= 0.05 <= high
    assert 360 <= covered <= 396  # 380 ± 4.4


def _result(right, loss=1.0, name="digits"):
    right = torch.tensor(right)
    values = {"train_top1": 1.0, "val_loss": loss, "val_top1": float(right.float().mean())}
    row = Row("with pretraining", values, correct=[pack(right)])
    test = {"name": name, "images": len(right), "fingerprint": name}
    return Result("linear", (row,), {"encoder": "x", "seed": 0}, {"train": test, "test": test})


def test_an_encoder_right_on_more_of_the_same_images_is_better(tmp_path):
    _result([True] * 60 + [False] * 40).save(tmp_path / "a" / "evaluation" / "linear.json")
    _result([True] * 75 + [False] * 25).save(tmp_path / "b" / "evaluation" / "linear.json")
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    loss, top1 = found.differences
    assert (loss.metric, loss.verdict) == ("val_loss", "")
    assert (top1.metric, top1.verdict) == ("val_top1", "B")
    assert top1.p == mcnemar(0, 15)
    assert "+15.00%" in str(found)
    assert compare(str(tmp_path / "b"), str(tmp_path / "a")).differences[1].verdict == "A"


def test_fifteen_images_won_and_ten_lost_are_no_difference(tmp_path):
    first = [True] * 60 + [False] * 40
    second = [False] * 10 + [True] * 65 + [False] * 25
    for name, right in (("a", first), ("b", second)):
        _result(right).save(tmp_path / f"{name}.json")
    found = compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert found.differences[1].verdict == "no difference"


@pytest.mark.parametrize(
    ("difference", "verdict"),
    [
        (Difference("finetune", "x", "val_top1", 0.8, 0.9, 0.02, 0.18, p_seeds=0.02), "B"),
        (Difference("finetune", "x", "val_top1", 0.8, 0.9, 0.02, 0.18), "B"),
        (
            Difference("finetune", "x", "val_top1", 0.8, 0.9, -0.02, 0.22, p_seeds=0.02),
            "no difference",
        ),
        (
            Difference("finetune", "x", "val_top1", 0.8, 0.9, 0.02, 0.18, p_seeds=0.06),
            "no difference",
        ),
        (Difference("finetune", "x", "val_loss", 0.8, 0.9, p_seeds=0.02), "A"),
        (Difference("health", "x", "rankme", 10.0, 12.0), ""),
    ],
)
def test_a_difference_that_images_or_seeds_explain_is_none(difference, verdict):
    assert difference.verdict == verdict


def _finetuned(accuracies, seed=0):
    """A fine-tuning whose seeds have these shares of 1,000 test images right, loss half of each."""
    random = torch.Generator().manual_seed(seed)
    right = [torch.rand(1000, generator=random) < accuracy for accuracy in accuracies]
    top1 = [float(r.float().mean()) for r in right]
    by_seed = {"val_loss": [value / 2 for value in top1], "val_top1": top1}
    row = Row(
        "with pretraining",
        {name: statistics.fmean(each) for name, each in by_seed.items()},
        {name: statistics.stdev(each) for name, each in by_seed.items()},
        by_seed,
        {"seeds": len(right)},
        [pack(r) for r in right],
    )
    test = {"name": "digits", "images": 1000, "fingerprint": "digits"}
    return Result("finetune", (row,), data={"train": test, "test": test})


def _differences(tmp_path, a, b):
    for name, result in (("a", a), ("b", b)):
        result.save(tmp_path / f"{name}.json")
    return compare(str(tmp_path / "a.json"), str(tmp_path / "b.json")).differences


def test_of_several_seeds_interval_and_p_are_those_of_the_mean_difference(tmp_path):
    # The first seed alone would say the opposite.
    a, b = _finetuned([0.80, 0.60, 0.61]), _finetuned([0.75, 0.80, 0.82], seed=1)
    loss, top1 = _differences(tmp_path, a, b)
    assert (top1.low + top1.high) / 2 == pytest.approx(top1.b - top1.a)
    assert 0.02 < top1.high - top1.low < 0.09
    assert top1.p is None
    pairs = [r.rows[0].by_seed["val_top1"] for r in (a, b)]
    assert top1.p_seeds == pytest.approx(stats.ttest_rel(*pairs).pvalue)
    assert loss.p_seeds == pytest.approx(top1.p_seeds)
    assert top1.verdict == "no difference", "two seeds up, one down"
    assert "p over seeds" in str(Comparison("a", "b", (top1,)))


def test_seeds_that_move_both_alike_do_not_hide_a_difference(tmp_path):
    _, top1 = _differences(
        tmp_path, _finetuned([0.6, 0.7, 0.8]), _finetuned([0.65, 0.75, 0.85], seed=1)
    )
    assert top1.p_seeds < 0.05
    assert top1.verdict == "B"


def test_other_numbers_of_seeds_compare_by_welchs_test(tmp_path):
    a, b = _finetuned([0.6, 0.7, 0.8]), _finetuned([0.65, 0.75], seed=1)
    _, top1 = _differences(tmp_path, a, b)
    seeds = [r.rows[0].by_seed["val_top1"] for r in (a, b)]
    assert top1.p_seeds == pytest.approx(stats.ttest_ind(*seeds, equal_var=False).pvalue)
    assert top1.low < top1.b - top1.a < top1.high


def test_results_from_before_the_numbers_of_each_seed_were_kept_are_read(tmp_path):
    seeds = []
    for name, accuracies in (("a", [0.6, 0.62, 0.64]), ("b", [0.8, 0.82, 0.84])):
        content = json.loads(_finetuned(accuracies).to_json())
        (row,) = content["rows"]
        seeds.append(row.pop("by_seed")["val_top1"])
        row["correct"] = row["correct"][0]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    _, top1 = compare(str(tmp_path / "a.json"), str(tmp_path / "b.json")).differences
    assert (top1.low, top1.p) == (None, None), "the bits are those of the first seed alone"
    assert top1.p_seeds == pytest.approx(stats.ttest_ind(*seeds, equal_var=False).pvalue)
    assert top1.verdict == "B"
    content["rows"] = [{"name": "x", "values": {"val_top1": 1.0}, "correct": None}]
    (tmp_path / "b.json").write_text(json.dumps(content))
    assert Result.load(tmp_path / "b.json").rows[0].correct == []


def test_results_on_other_images_are_refused(tmp_path):
    _result([True, False]).save(tmp_path / "a.json")
    _result([True, False, True], name="letters").save(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"the images differ .2 of digits, 3 of letters"):
        compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"))


def _health(name, fingerprint):
    data = {"train": {"name": name, "images": 9, "fingerprint": fingerprint}}
    return Result("health", (Row("with pretraining", {"RankMe": 3.0}),), data=data)


def _transfer(name, fingerprint):
    data = {
        source: {"test": {"name": source, "images": 9, "fingerprint": f}}
        for source, f in (("digits", "digits"), (name, fingerprint))
    }
    return Result("transfer", (Row("mean, with pretraining", {"val_top1": 0.5}),), data=data)


@pytest.mark.parametrize("made", [_health, _transfer])
def test_without_a_test_of_their_own_results_are_of_the_same_images_too(tmp_path, made):
    a = made("photos", "one")
    assert _differences(tmp_path, a, made("/elsewhere/photos", "one"))
    with pytest.raises(UserError, match=r"the images differ .*9 of photos.*evaluate both on the"):
        _differences(tmp_path, a, made("photos", "two"))


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    _result([True, False], name="[raw]/[/x]").save(tmp_path / "[raw].json")
    a = str(tmp_path / "[raw].json")
    found, result = compare(a, a), Result.load(a)
    written = io.StringIO()
    for table in (found.table(), result.table()):
        Console(file=written, width=400).print(table)
    assert f"A: {a}" in written.getvalue()
    assert "2 test images of [raw]/[/x]" in written.getvalue()


def test_sources_may_be_called_train_and_test():
    data = {name: {"test": {"images": 9, "name": name}} for name in ("train", "test")}
    assert Result("transfer", (Row("mean", {"val_top1": 0.5}),), data=data).caption() == ""


def test_runs_evaluated_in_other_ways_are_refused(tmp_path):
    _result([True, False]).save(tmp_path / "a" / "evaluation" / "x.json")
    _result([True, False], name="letters").save(tmp_path / "b" / "evaluation" / "x.json")
    with pytest.raises(UserError, match=r"not evaluated alike: .* linear on 2 images of digits"):
        compare(str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_run_without_results_and_a_place_that_is_none_are_named(tmp_path):
    with pytest.raises(UserError, match="not been evaluated yet: run `barlow evaluate"):
        compare(str(tmp_path), str(tmp_path))
    with pytest.raises(UserError, match="neither a run nor a JSON result file"):
        compare(str(tmp_path / "none"), str(tmp_path))


def test_two_real_evaluations_compare(encoder, tmp_path):
    for name, labels in (("few", 2), ("many", 40)):
        barlow.evaluate(encoder, "mnist5k", "mnist5k", limit=1000, labels_per_class=labels).save(
            tmp_path / f"{name}.json"
        )
    found = compare(str(tmp_path / "few.json"), str(tmp_path / "many.json"))
    top1 = next(d for d in found.differences if d.metric == "val_top1")
    assert top1.verdict == "B"
    assert top1.low < top1.b - top1.a < top1.high
    assert len(found.table().rows) == len(found.differences)
    found.save(tmp_path / "comparison.json")
    assert (tmp_path / "comparison.json").read_text() == found.to_json()


def test_another_batch_size_is_another_training_but_the_same_frozen_encoder():
    def keys(protocol):
        settings = ({"encoder": str(size), "batch_size": size} for size in (32, 64))
        return {_key(Result(protocol, (), one)) for one in settings}

    assert len(keys("finetune")) == 2
    assert len(keys("linear")) == len(keys("knn")) == 1


def test_seeds_that_shift_alike_up_to_rounding_give_no_p():
    def row(*top1):
        values, spread = statistics.fmean(top1), statistics.stdev(top1)
        by_seed = {"val_top1": list(top1)}
        return Row("x", {"val_top1": values}, {"val_top1": spread}, by_seed, {"seeds": len(top1)})

    assert 0.82 - 0.81 != 0.81 - 0.80, "rounding divides them"
    assert _p_over_seeds(row(0.80, 0.81), row(0.81, 0.82), "val_top1") is None
    assert _p_over_seeds(row(0.80, 0.81), row(0.81, 0.83), "val_top1") is not None


@pytest.mark.parametrize("protocol", ["linear", "knn", "finetune"])
def test_an_image_that_cannot_be_read_moves_no_other(protocol, pixels, noise, caplog):
    tuned = {"seeds": 2, "rate": 1e-3, "epochs": 1} if protocol == "finetune" else {}

    def evaluated():
        return barlow.evaluate(pixels, str(noise), protocol=protocol, **tuned)

    a = evaluated()
    (noise / "test" / "a" / "03.png").write_bytes(b"gone")
    b = evaluated()
    assert "1 of 40 images cannot be read and are skipped, first: test/a/03.png" in caplog.text
    read = torch.arange(40) != 3
    for before, after in zip(a.rows, b.rows, strict=True):
        assert before.read == ""
        assert torch.equal(unpack(after.read, 40), read)
        for bits, fewer in zip(before.correct, after.correct, strict=True):
            assert torch.equal(unpack(fewer, 40), unpack(bits, 40) & read)
    found = [d for d in differences_of(a, b) if d.metric == "val_top1"]
    assert found
    for difference in found:
        assert (difference.low, difference.high) == (0, 0), "of the 39 that both could read"
        assert difference.p == (None if tuned else 1)


def _run(tmp_path, name, *results):
    for i, result in enumerate(results):
        result.save(tmp_path / name / "evaluation" / f"{i}.json")
    return str(tmp_path / name)


def _probed(accuracy, **settings):
    """A linear probe with this share of 1,000 test images right, its encoder another each time."""
    number = round(1000 * accuracy)
    result = _result([True] * number + [False] * (1000 - number))
    return replace(result, settings={**result.settings, "encoder": f"{accuracy}", **settings})


def _side(tmp_path, name, *accuracies):
    runs = [_run(tmp_path, f"{name}{i}", _probed(a)) for i, a in enumerate(accuracies)]
    return ",".join(runs)


def test_one_lucky_run_is_better_and_three_seeds_a_side_are_no_difference(tmp_path):
    top1_a, top1_b = (0.60, 0.70, 0.65), (0.70, 0.62, 0.66)
    side_a, side_b = _side(tmp_path, "a", *top1_a), _side(tmp_path, "b", *top1_b)
    one = compare(side_a.split(",")[0], side_b.split(",")[0])
    assert one.differences[1].verdict == "B"
    _, top1 = compare(side_a, side_b).differences
    assert top1.p_seeds == pytest.approx(stats.ttest_ind(top1_a, top1_b, equal_var=False).pvalue)
    assert (top1.a, top1.b) == pytest.approx((0.65, 0.66))
    assert (top1.low + top1.high) / 2 == pytest.approx(0.01)
    assert (top1.p, top1.verdict) == (None, "no difference")
    better, worse = _side(tmp_path, "c", 0.90, 0.91, 0.92), _side(tmp_path, "d", 0.80, 0.81)
    assert compare(better, worse).differences[1].verdict == "A"


def test_seeds_of_two_ways_to_pretrain_are_no_pairs(tmp_path):
    top1_a, top1_b = (0.60, 0.70, 0.80), (0.651, 0.749, 0.852)
    found = compare(_side(tmp_path, "a", *top1_a), _side(tmp_path, "b", *top1_b))
    assert stats.ttest_rel(top1_a, top1_b).pvalue < 0.05
    assert found.differences[1].p_seeds > 0.05


def test_the_mean_of_a_runs_fine_tunings_is_one_seed(tmp_path):
    of_a = [_finetuned([0.60, 0.62], seed=1), _finetuned([0.66, 0.64], seed=2)]
    of_b = [_finetuned([0.70, 0.72], seed=3), _finetuned([0.76, 0.78], seed=4)]
    side_a = ",".join(_run(tmp_path, f"a{i}", result) for i, result in enumerate(of_a))
    side_b = ",".join(_run(tmp_path, f"b{i}", result) for i, result in enumerate(of_b))
    _, top1 = compare(side_a, side_b).differences
    means = [[r.rows[0].values["val_top1"] for r in side] for side in (of_a, of_b)]
    assert top1.p_seeds == pytest.approx(stats.ttest_ind(*means, equal_var=False).pvalue)
    assert (top1.low + top1.high) / 2 == pytest.approx(top1.b - top1.a)
    _, top1 = compare(side_a.split(",")[0], side_b).differences
    assert top1.p_seeds is None, "fine-tunings of one run are not seeds of its pretraining"
    assert top1.low < top1.b - top1.a < top1.high


def test_of_several_runs_the_images_that_all_could_read_count(tmp_path):
    def unread(result, image):
        read = torch.arange(4) != image
        row = replace(result.rows[0], read=pack(read))
        return replace(result, rows=(row,))

    a0 = _run(tmp_path, "a0", unread(_result([False, True, True, True]), 0))
    a1 = _run(tmp_path, "a1", unread(_result([True, False, True, True]), 1))
    b = _run(tmp_path, "b", _result([True] * 4))
    top1 = compare(f"{a0},{a1}", b).differences[1]
    assert (top1.low, top1.high) == (0, 0)


def test_one_run_a_side_says_that_other_seeds_differ_too(tmp_path):
    a0, a1 = _side(tmp_path, "a", 0.6, 0.7).split(",")
    b0, b1 = _side(tmp_path, "b", 0.65, 0.75).split(",")
    said = "give several runs per side, as A,B,C"
    for found in (compare(a0, b0), compare(f"{a0},{a1}", b0)):
        written = io.StringIO()
        Console(file=written, width=400).print(found.table())
        assert said in " ".join(written.getvalue().split())
        assert said in str(found)
    assert said not in str(compare(f"{a0},{a1}", f"{b0}, {b1}"))


def test_a_path_with_a_comma_is_one_run(tmp_path):
    a = _run(tmp_path, "a,b", _result([True, False]))
    assert compare(a, a).differences


def test_a_run_counts_once(tmp_path):
    side = _side(tmp_path, "a", 0.6, 0.7)
    with pytest.raises(UserError, match=r"a0/ is given twice: give each run once"):
        compare(side, f"{tmp_path}/a0/")


def test_the_run_that_was_evaluated_otherwise_is_named_with_what_differs(tmp_path):
    side_a = _side(tmp_path, "a", 0.6, 0.7)
    side_b = _side(tmp_path, "b", 0.6)
    other = _run(tmp_path, "b1", _probed(0.7, labels_per_class=10))
    with pytest.raises(UserError) as error:
        compare(side_a, f"{side_b},{other}")
    assert "a0 has linear on 1000 images of digits, which is missing from " in str(error.value)
    assert f"; {other} differs in labels_per_class (10, not None): evaluate all" in str(error.value)
    assert "seed" not in str(error.value)
    files = [f"{run}/evaluation/0.json" for run in (*side_a.split(","), other)]
    with pytest.raises(UserError, match=r"not evaluated alike: .*labels_per_class"):
        compare(",".join(files[1:]), files[0])
    _, top1 = compare(",".join(files[:2]), files[2]).differences
    assert top1.verdict, "files are of other settings because they are meant to be"


def test_an_evaluation_that_one_run_lacks_is_left_out_and_told(tmp_path):
    few = {"labels_per_class": 10}
    a = _run(tmp_path, "a", _probed(0.6), replace(_probed(0.5, **few), protocol="knn"))
    b = _run(tmp_path, "b", _probed(0.6), replace(_probed(0.5, **few), protocol="knn"))
    lacking = _run(tmp_path, "c", _probed(0.7))
    found = compare(a, f"{b},{lacking}")
    assert {d.protocol for d in found.differences} == {"linear"}
    assert f"not compared: knn on 1000 images of digits, missing from {lacking}" in str(found)


def test_a_baseline_of_one_of_the_two_is_no_other_evaluation(tmp_path):
    alone = _result([True, False])
    baseline = Row("without pretraining", {"val_top1": 0.0})
    rows = (baseline, *alone.rows)
    beside = replace(alone, rows=rows, settings={**alone.settings, "baseline": "random"})
    a, b = _run(tmp_path, "a", beside), _run(tmp_path, "b", alone)
    assert {d.row for d in compare(a, b).differences} == {"with pretraining"}
    both = _run(tmp_path, "c", alone, beside)
    assert [d.row for d in compare(a, both).differences].count("with pretraining") == 2
    assert "without pretraining" in {d.row for d in compare(a, both).differences}


def test_of_a_run_evaluated_twice_alike_the_newer_numbers_count(tmp_path):
    run = _run(tmp_path, "a", _result([True, True]), _result([True, False]))
    os.utime(tmp_path / "a" / "evaluation" / "1.json", (1, 1))
    top1 = [d.a for d in compare(run, run).differences if d.metric == "val_top1"]
    assert top1 == [1.0]


def test_no_health_is_better(tmp_path):
    def healthy(rank):
        row = Row("with pretraining", {"RankMe": rank, "LiDAR": float("nan")})
        return replace(_health("photos", "one"), rows=(row,))

    runs = [_run(tmp_path, f"{i}", healthy(rank)) for i, rank in enumerate([3.0, 3.1, 9.0, 9.1])]
    (difference,) = compare(",".join(runs[:2]), ",".join(runs[2:])).differences
    assert difference.metric == "RankMe"
    assert difference.p_seeds < 0.05
    assert difference.verdict == ""


def test_shares_are_told_in_percent():
    differences = [Difference("linear", "x", f"val_{m}", 0.5, 0.75) for m in ("recall", "r2")]
    text = str(Comparison("a", "b", tuple(differences)))
    assert "75.00%" in text
    assert "0.75" in text.splitlines()[-1]
