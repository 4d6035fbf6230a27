import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from barlow.address import key, permutation
from barlow.errors import UserError
from barlow.evaluation.subsets import folds, label_fraction, labels_per_class, split

labels = st.lists(st.integers(0, 4), min_size=5, max_size=60).map(torch.tensor)


@given(labels, st.integers(0, 9))
def test_k_labels_per_class_are_k_of_each_class(y, seed):
    k = int(torch.bincount(y)[torch.bincount(y) > 0].min())
    chosen = labels_per_class(y, k, seed)
    assert len(chosen.unique()) == len(chosen)
    assert set(torch.bincount(y[chosen]).tolist()) <= {0, k}


def test_more_labels_hold_the_fewer_ones():
    y = torch.arange(100) % 5
    assert set(labels_per_class(y, 3).tolist()) < set(labels_per_class(y, 7).tolist())


def test_another_seed_takes_other_labels():
    y = torch.arange(100) % 5
    assert torch.equal(labels_per_class(y, 3, 1), labels_per_class(y, 3, 1))
    assert not torch.equal(labels_per_class(y, 3, 1), labels_per_class(y, 3, 2))


def test_a_fraction_is_the_same_share_of_every_class():
    y = torch.repeat_interleave(torch.arange(3), torch.tensor([100, 40, 3]))
    assert torch.bincount(y[label_fraction(y, 0.1)]).tolist() == [10, 4, 1]


@given(labels, st.floats(0.05, 0.5))
def test_a_split_divides_and_leaves_every_class_something_to_train_on(y, share):
    first, second = split(y, share)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(len(y)))
    assert set(y.tolist()) == set(y[first].tolist())


@given(labels, st.integers(2, 5))
def test_folds_hold_each_image_out_once(y, number):
    parts = folds(y, number)
    held_out = torch.cat([part for _, part in parts])
    assert torch.equal(held_out.sort().values, torch.arange(len(y)))
    assert all(len(a) + len(b) == len(y) for a, b in parts)


@pytest.mark.parametrize("k", [0, 3])
def test_impossible_numbers_of_labels_are_refused_with_what_is_possible(k):
    with pytest.raises(UserError, match=r"must be at least 1|class 1 has only 2"):
        labels_per_class(torch.tensor([0, 0, 0, 1, 1]), k)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_a_fraction_is_a_fraction(fraction):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        label_fraction(torch.tensor([0, 1]), fraction)


def _class_by_class(y, wanted, seed, stream):
    """The choice as it is defined: of each class, the first of a permutation of its images."""
    chosen = []
    for c, k in enumerate(wanted):
        of_class = (y == c).nonzero().flatten()
        chosen.append(of_class[permutation(len(of_class), key(seed, stream, c))[:k]])
    return torch.cat(chosen).sort().values


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60).map(torch.tensor), st.integers(0, 9))
def test_sorting_once_chooses_what_looking_for_each_class_chooses(y, seed):
    counts = torch.bincount(y).tolist()
    assert torch.equal(
        label_fraction(y, 0.4, seed),
        _class_by_class(y, [max(1, round(0.4 * n)) if n else 0 for n in counts], seed, 101),
    )
    held_out = [min(n - 1, max(1, round(0.2 * n))) if n > 1 else 0 for n in counts]
    assert torch.equal(split(y, 0.2, seed)[1], _class_by_class(y, held_out, seed, 102))
    place, offset = torch.empty_like(y), 0
    for c in range(len(counts)):
        of_class = (y == c).nonzero().flatten()
        order = permutation(len(of_class), key(seed, 102, c))
        place[of_class[order]] = (torch.arange(len(of_class)) + offset) % 3
        offset += len(of_class)
    parts = [(place == i).nonzero().flatten() for i in range(3)]
    found = [part for _, part in folds(y, 3, seed)]
    assert [part.tolist() for part in found] == [part.tolist() for part in parts if len(part)]
