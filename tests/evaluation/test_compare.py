import io
import json
import statistics

import pytest
import torch
from rich.console import Console
from scipy import stats

import barlow
from barlow.errors import UserError
from barlow.evaluation.compare import (
    Comparison,
    Difference,
    _key,
    _p_over_seeds,
    compare,
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
    with pytest.raises(UserError, match="not evaluated yet: run `barlow evaluate"):
        compare(str(tmp_path), str(tmp_path))
    with pytest.raises(UserError, match="neither a run nor a JSON file"):
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
    assert "1 of 40 images cannot be read and are left out, first test/a/03.png" in caplog.text
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
