import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    with pytest.raises(UserError, match=r"give 1 or more|class 1 has only 2"):
        labels_per_class(torch.tensor([0, 0, 0, 1, 1]), k)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_a_fraction_is_a_fraction(fraction):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        label_fraction(torch.tensor([0, 1]), fraction)
