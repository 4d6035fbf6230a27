import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from barlow.errors import UserError
from barlow.evaluation import knn
from barlow.evaluation.knn import knn_scores, nearest, vote


def test_votes_agree_with_lightly(digits):
    lightly = pytest.importorskip("lightly.utils.benchmarking")
    x_train, y_train, x_test, _ = digits
    scores = knn_scores(x_test, x_train, F.one_hot(y_train, 10).float())
    bank = F.normalize(x_train).T
    for (k, t), ours in scores.items():
        theirs = lightly.knn_predict(F.normalize(x_test), bank, y_train, 10, k, t)
        assert (ours.argmax(1) == theirs[:, 0]).float().mean() > 0.998  # ties


def test_votes_agree_with_the_formula_of_wu_et_al(digits):
    x_train, y_train, x_test, _ = digits
    scores = knn_scores(x_test, x_train, F.one_hot(y_train, 10).float())
    similarity = F.normalize(x_test.double()) @ F.normalize(x_train.double()).T
    for (k, t), ours in scores.items():
        top, rows = similarity.topk(k + 1)
        clear = top[:, k - 1] - top[:, k] > 1e-6  # else float32 may take the other of the two
        assert clear.float().mean() > 0.9
        top, rows = top[:, :k], rows[:, :k]
        weight = (top / t).exp()
        votes = torch.zeros(len(x_test), 10, dtype=torch.double)
        for row, of_row in enumerate(rows):
            votes[row].index_add_(0, y_train[of_row], weight[row])
        torch.testing.assert_close(
            ours[clear], (votes / weight.sum(1)[:, None]).float()[clear], atol=1e-4, rtol=0
        )


def test_neighbours_agree_with_scikit_learn(digits):
    from sklearn.neighbors import NearestNeighbors

    x_train, _, x_test, _ = digits
    theirs = NearestNeighbors(n_neighbors=20, metric="cosine").fit(x_train.double().numpy())
    distance, _ = theirs.kneighbors(x_test.double().numpy())
    similarity, _ = nearest(x_test, x_train, 20)
    torch.testing.assert_close(
        similarity, 1 - torch.from_numpy(distance).float(), atol=2e-6, rtol=0
    )


@settings(max_examples=25)
@given(st.integers(1, 700), st.integers(1, 40), st.integers(0, 5))
def test_chunks_and_groups_find_what_sorting_everything_finds(bank_size, k, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(7, 3, generator=generator)
    bank = torch.randn(bank_size, 3, generator=generator)
    k = min(k, bank_size)
    everything = F.normalize(queries) @ F.normalize(bank).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_QUERIES", 3)
        patch.setattr(knn, "_BANK", 300)
        similarity, rows = nearest(queries, bank, k)
    torch.testing.assert_close(similarity, everything.topk(k).values)
    torch.testing.assert_close(everything.gather(1, rows), similarity)


def test_votes_are_shares():
    scores = knn_scores(torch.randn(5, 4), torch.randn(30, 4), torch.eye(3).repeat(10, 1))
    for share in scores.values():
        torch.testing.assert_close(share.sum(1), torch.ones(5))


def test_a_small_temperature_does_not_overflow():
    scores = knn_scores(torch.eye(3), torch.eye(3), torch.eye(3), (3,), (1e-4,))
    torch.testing.assert_close(scores[3, 1e-4], torch.eye(3))


def test_no_neighbours_are_refused():
    with pytest.raises(UserError, match="no labelled training image"):
        knn_scores(torch.eye(2), torch.empty(0, 2), torch.empty(0, 2))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, tuple | list) else [found]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return found


def test_a_vote_among_many_classes_counts_as_any_and_stays_small():
    from barlow.validation import health_metrics

    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 1000, (1200,), generator=random)
    y = torch.randn(1200, 16, generator=random) + torch.randn(1000, 16, generator=random)[labels]
    similarity, rows = nearest(y, y, 21)
    itself = rows == torch.arange(1200)[:, None]
    similarity, order = similarity.masked_fill(itself, -torch.inf).sort(1, descending=True)
    classes = labels.unique(return_inverse=True)[1]
    one_hot = F.one_hot(classes[rows.gather(1, order)]).float()
    expected = (vote(similarity, one_hot, 0.07, 20).argmax(1) == classes).float().mean()
    with Largest() as largest:
        found = health_metrics(y, y, labels)["knn_top1"]
    assert 0.1 < found < 0.9
    assert found == float(expected)
    assert largest.elements <= 1200 * 1200  # all similarities


def test_classes_by_number_are_counted_as_one_hot_ones_without_so_many_numbers():
    random = torch.Generator().manual_seed(0)
    bank = torch.randn(1200, 8, generator=random)
    y = torch.randint(0, 1000, (1200,), generator=random)
    with Largest() as largest:
        found = knn_scores(bank[:20], bank, y, classes=1001)
    assert largest.elements < 1200 * 1000
    expected = knn_scores(bank[:20], bank, F.one_hot(y, 1001).float())
    for setting, scores in found.items():
        torch.testing.assert_close(scores, expected[setting])


def test_the_protocol_counts_classes_by_number(encoder, monkeypatch):
    from barlow.evaluation import probes

    seen = []

    def record(queries, bank, targets, *rest, **options):
        seen.append(targets.shape)
        return knn_scores(queries, bank, targets, *rest, **options)

    monkeypatch.setattr(probes, "knn_scores", record)
    probes.knn(encoder, "mnist5k", limit=100)
    assert seen == [(100,)]
