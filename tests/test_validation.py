import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from barlow.validation import collapse_warning, epochs_between_validations, health_metrics


def test_the_vote_of_the_others_equals_scikit_learns():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=random)
    y = torch.randn(300, 16, generator=random) + 0.8 * torch.eye(4, 16)[labels]
    y[7] = y[8]  # twice the same image: neither may be taken for itself
    search = NearestNeighbors(n_neighbors=20, metric="cosine", algorithm="brute").fit(y)
    distance, rows = search.kneighbors()  # of the others
    votes = np.zeros((300, 4))
    for i in range(300):
        np.add.at(votes[i], labels.numpy()[rows[i]], np.exp((1 - distance[i]) / 0.07))
    expected = (votes.argmax(1) == labels.numpy()).mean()
    found = health_metrics(y, y, labels)["knn_top1"]
    assert 0.3 < expected < 0.95
    assert found == pytest.approx(expected, abs=0.0034)  # one image: float32 may break a tie


def test_images_without_a_label_have_no_part_in_the_vote():
    y = torch.eye(6).repeat(4, 1)
    labels = torch.arange(6).repeat(4)
    labels[:3] = -1
    assert health_metrics(y, y, labels)["knn_top1"] == 1.0
    assert "knn_top1" not in health_metrics(y, y, torch.full((24,), -1))
    assert "knn_top1" not in health_metrics(y, y, None)


def test_health_tells_a_rich_representation_from_a_collapsed_one():
    y = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    line = y[:, :1] @ y[:1] + 1e-4 * y
    rich, poor = health_metrics(y, y, None), health_metrics(line, line, None)
    assert rich["effective_rank"] > 20
    assert rich["rankme_embedding"] > 20
    assert rich["mean_abs_off_diagonal"] < 0.1
    assert poor["effective_rank"] < 1.1
    assert poor["mean_abs_off_diagonal"] > 0.99
    assert collapse_warning(rich) is None
    assert "embedding has collapsed" in collapse_warning(health_metrics(y, line, None))
    assert "collapsed" in collapse_warning(poor)
    assert "collapsed" in collapse_warning({"effective_rank": float("nan")}), "a point has none"
    assert collapse_warning({"loss": 3.0}) is None, "steps at which health was not looked at"


@pytest.mark.parametrize(
    ("images", "held_out"), [(50_000, 2048), (4_000, 1_000), (1_281_167, 2048)]
)
def test_validation_takes_three_percent_of_the_time_or_less(images, held_out):
    epochs = epochs_between_validations(images, held_out)
    # A passage forward is half of one backward; two views are trained, four passes look.
    assert 4 * held_out <= 0.03 * (2 * 3 * images) * epochs
