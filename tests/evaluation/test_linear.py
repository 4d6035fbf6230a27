import pytest
import torch
from torch.nn import functional as F

from barlow.errors import UserError
from barlow.evaluation import linear
from barlow.evaluation.linear import (
    choose_penalty,
    fit_logistic,
    fold_in,
    logistic_probe,
    standardisation,
)
from barlow.evaluation.sgd import sgd_probe


@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-3])
def test_logistic_regression_agrees_with_scikit_learn(digits, penalty):
    from sklearn.linear_model import LogisticRegression

    x_train, y_train, x_test, _ = digits
    standardise = standardisation(x_train)
    a, b = standardise(x_train), standardise(x_test)
    theirs = LogisticRegression(C=1 / (len(a) * penalty), tol=1e-6, max_iter=5000)
    theirs.fit(a.double().numpy(), y_train.numpy())
    expected = torch.from_numpy(theirs.predict_log_proba(b.double().numpy())).float()
    ours = fit_logistic(a, y_train, 10, penalty, tolerance=1e-5, max_steps=1000)
    # 0.01 in log probability, 0.3 % where it is below -4: ours is float32 and both stop a little
    # before the optimum.
    torch.testing.assert_close(ours(b).log_softmax(1), expected, atol=1e-2, rtol=3e-3)
    assert (ours(b).argmax(1) == expected.argmax(1)).float().mean() > 0.998


def test_with_few_images_and_a_weak_penalty_it_agrees_too(digits):
    from sklearn.linear_model import LogisticRegression

    x, y, x_test, y_test = (of[:100] if i < 2 else of for i, of in enumerate(digits))
    ours, _ = logistic_probe(x, y, 10, penalty=1e-5)
    standardise = standardisation(x)
    theirs = LogisticRegression(C=1 / (len(x) * 1e-5), tol=1e-9, max_iter=5000)
    theirs.fit(standardise(x).double().numpy(), y.numpy())
    expected = torch.from_numpy(theirs.decision_function(standardise(x_test).double().numpy()))
    assert (ours(x_test).argmax(1) == expected.argmax(1)).float().mean() > 0.97
    losses = [float(F.cross_entropy(logits, y_test)) for logits in (ours(x_test), expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_no_trial_with_few_images_stays_at_the_penalty_before(monkeypatch):
    losses = []

    class Recorded(linear._Trial):
        def __call__(self, penalty, start):
            loss, classifier = super().__call__(penalty, start)
            losses.append(loss)
            return loss, classifier

    monkeypatch.setattr(linear, "_Trial", Recorded)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(100) % 10
    classes = torch.randn(10, 500, generator=generator)
    x = torch.randn(100, 500, generator=generator) + 0.5 * classes[y]  # separated in every fold
    choose_penalty(standardisation(x)(x), y, 10)
    number = len(linear.PENALTIES)
    for fold in range(5):
        assert len(set(losses[fold * number :][: number - 2])) == number - 2


def test_a_fit_from_a_start_ends_where_a_fit_from_zero_ends(digits):
    x, y, *_ = digits
    x = standardisation(x)(x)
    first = fit_logistic(x, y, 10, 1e-1)
    a = fit_logistic(x, y, 10, 1e-2, first, tolerance=1e-5)
    b = fit_logistic(x, y, 10, 1e-2, tolerance=1e-5)
    torch.testing.assert_close(a(x).softmax(1), b(x).softmax(1), atol=2e-3, rtol=0)


def test_standardisation_folds_into_the_classifier(digits):
    x, y, x_test, _ = digits
    standardise = standardisation(x)
    classifier = fit_logistic(standardise(x), y, 10, 1e-1)
    folded = fold_in(classifier, standardise)
    torch.testing.assert_close(folded(x_test), classifier(standardise(x_test)), atol=1e-3, rtol=0)


def test_a_feature_that_never_changes_is_of_no_effect():
    x = torch.tensor([[1.0, 7.3], [2.0, 7.3], [3.0, 7.3]])
    assert standardisation(x)(x)[:, 1].tolist() == [0, 0, 0]


def test_the_penalty_is_chosen_near_the_best_of_the_grid(digits):
    x, y, *_ = digits
    half = torch.arange(len(x)) < 400
    x = standardisation(x[half])(x)
    chosen = choose_penalty(x[half], y[half], 10)

    def loss(penalty):
        classifier = fit_logistic(x[half], y[half], 10, penalty)
        return float(F.cross_entropy(classifier(x[~half]), y[~half]))

    assert loss(chosen) < 1.1 * min(loss(p) for p in (1e0, 1e-1, 1e-2, 1e-3, 1e-4))


def test_a_part_of_many_images_chooses_as_all_of_them(digits, monkeypatch):
    x, y, *_ = digits
    x = standardisation(x)(x)
    monkeypatch.setattr(linear, "_FEW", 1_000)
    everything = choose_penalty(x, y, 10)
    monkeypatch.setattr(linear, "_ENOUGH", 1_500)
    monkeypatch.setattr(linear, "_A_FEATURE", 1)
    part = choose_penalty(x, y, 10)
    steps = [linear.PENALTIES.index(p) for p in (everything, part)]
    assert abs(steps[0] - steps[1]) <= 1


def test_one_label_per_class_is_enough(digits):
    x, y, *_ = digits
    one = torch.stack([(y == c).nonzero()[0, 0] for c in range(10)])
    classifier, _ = logistic_probe(x[one], y[one], 10)
    assert (classifier(x[one]).argmax(1) == y[one]).all()


def test_fewer_images_than_features_find_the_optimum_in_the_span_of_the_images():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    classes = torch.randn(3, 400, generator=generator)
    x = torch.randn(60, 400, generator=generator) * torch.logspace(-1, 1, 400) + classes[y]
    found, _ = logistic_probe(x, y, 3, penalty=1e-2)
    standardise = standardisation(x)
    in_features = fold_in(fit_logistic(standardise(x), y, 3, 1e-2, tolerance=1e-6), standardise)
    others = torch.randn(200, 400, generator=generator) * torch.logspace(-1, 1, 400)
    # Both stop a little before the optimum, and these images lie outside of the span.
    torch.testing.assert_close(
        found(others).softmax(1), in_features(others).softmax(1), atol=2e-2, rtol=0
    )


def test_the_sgd_probe_comes_close_to_the_optimum(digits):
    x_train, y_train, x_test, y_test = digits
    exact, _ = logistic_probe(x_train, y_train, 10)
    by_sgd, _ = sgd_probe(x_train, y_train, 10, epochs=100)
    accuracy = [(c(x_test).argmax(1) == y_test).float().mean() for c in (exact, by_sgd)]
    assert abs(accuracy[0] - accuracy[1]) < 0.02


def test_the_sgd_probe_repeats_itself(digits):
    x, y, *_ = digits
    (a, _), (b, _) = (sgd_probe(x, y, 10, epochs=1, seed=3) for _ in range(2))
    assert torch.equal(a.weight, b.weight)


def test_one_class_is_nothing_to_learn():
    with pytest.raises(UserError, match="one class"):
        logistic_probe(torch.randn(4, 2), torch.zeros(4, dtype=torch.long), 1)


@pytest.mark.parametrize("few", [5_000, 10])
def test_no_trial_is_judged_on_a_class_that_it_has_not_fitted(monkeypatch, few):
    seen = []

    class Recorded(linear._Trial):
        def __init__(self, x, y, classes, fit, held_out, tolerance):
            seen.append((set(y[fit].tolist()), set(y[held_out].tolist())))
            super().__init__(x, y, classes, fit, held_out, tolerance)

    monkeypatch.setattr(linear, "_Trial", Recorded)
    monkeypatch.setattr(linear, "_FEW", few)
    for name in ("_ENOUGH", "_A_FEATURE", "_A_CLASS"):
        monkeypatch.setattr(linear, name, 1)
    # Classes of one image, whose fold fits none, and of two, of which a part of the rest drops one.
    y = torch.tensor([0] * 60 + [1] * 60 + [2, 3] + [4, 4, 5, 5])
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0))
    choose_penalty(x, y, 6)
    assert any(len(fitted) < 6 for fitted, _ in seen)
    for fitted, judged in seen:
        assert judged
        assert judged <= fitted
