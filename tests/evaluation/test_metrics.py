import numpy as np
import pytest
import torch

from barlow.evaluation.metrics import classification_metrics


def always(answer, y, classes=2):
    return torch.eye(classes)[torch.full_like(y, answer)]


def test_always_good_has_half_the_mean_recall():
    y = torch.tensor([0] * 95 + [1] * 5)
    found = classification_metrics(always(0, y), y, "val", loss=False)
    assert found == pytest.approx({"val_top1": 0.95, "val_recall": 0.5})


def test_mean_recall_is_scikit_learns_over_the_classes_of_the_test():
    metrics = pytest.importorskip("sklearn.metrics")
    y = torch.tensor([0] * 30 + [2] * 12 + [3] * 7)  # class 1 has no image
    scores = torch.randn(len(y), 4, generator=torch.Generator().manual_seed(0))
    scores[scores.argmax(1) == 1] = torch.eye(4)[0]
    expected = metrics.balanced_accuracy_score(y.numpy(), np.asarray(scores.argmax(1)))
    assert classification_metrics(scores, y, "val")["val_recall"] == pytest.approx(expected)


@pytest.mark.parametrize(("images", "listed"), [((2, 1), False), ((5, 2), True), ((4, 0), False)])
def test_mean_recall_is_of_unequal_classes_only(images, listed):
    y = torch.arange(2).repeat_interleave(torch.tensor(images))
    assert ("val_recall" in classification_metrics(always(0, y), y, "val")) == listed
    assert "train_recall" not in classification_metrics(always(0, y), y, "train")
