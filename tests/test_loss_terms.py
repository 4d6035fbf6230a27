import pytest
import torch

from barlow.errors import TrainingError
from barlow.loss_terms import Means


def terms(*values):
    return tuple(torch.tensor(float(v)) for v in values)


def test_the_first_step_that_is_not_finite_is_named_with_its_term():
    means = Means()
    means.add(terms(1, 1, 1, 1, 1))
    means.pop()
    for values in ((1, 1, 1, 1, 1), (2, 1, float("inf"), 1, 1), (float("nan"),) * 5, (1,) * 5):
        means.add(terms(*values))
    again = Means()
    again.load_state_dict(means.state_dict())
    for each in (means, again):
        with pytest.raises(TrainingError, match="redundancy is inf at step 12"):
            each.check(step=14)


def test_means_are_of_the_steps_since_they_were_read():
    means = Means()
    for value in (1, 2, 6):
        means.add(terms(*[value] * 5))
    assert means.pop()["invariance"] == 3
    means.add(terms(*[5] * 5))
    assert means.pop()["loss"] == 5
