import pytest
import torch

import barlow
from barlow.errors import UserError
from barlow.evaluation.compare import Difference, compare, mcnemar, paired_interval
from barlow.evaluation.result import Result, Row, pack


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


def _result(right, loss=1.0, name="digits", spread=None):
    right = torch.tensor(right)
    values = {"train_top1": 1.0, "val_loss": loss, "val_top1": float(right.float().mean())}
    row = Row("with pretraining", values, spread=spread or {}, correct=pack(right))
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
        (Difference("finetune", "x", "val_top1", 0.8, 0.9, p=0.001, spread=0.02), "B"),
        (Difference("finetune", "x", "val_top1", 0.8, 0.9, p=0.001, spread=0.06), "no difference"),
        (Difference("finetune", "x", "val_loss", 0.8, 0.9, spread=0.02), "A"),
        (Difference("health", "x", "rankme", 10.0, 12.0), ""),
    ],
)
def test_a_difference_within_the_seeds_spread_is_none(difference, verdict):
    assert difference.verdict == verdict


def test_results_on_other_images_are_refused(tmp_path):
    _result([True, False]).save(tmp_path / "a.json")
    _result([True, False, True], name="letters").save(tmp_path / "b.json")
    with pytest.raises(UserError, match=r"test images differ .2 of digits, 3 of letters"):
        compare(str(tmp_path / "a.json"), str(tmp_path / "b.json"))


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
