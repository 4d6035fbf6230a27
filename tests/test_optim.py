import copy
import math
from itertools import pairwise

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from barlow.muon import Muon, orthogonalise
from barlow.optim import LARS, parameter_groups, warmup_cosine


def reference_lars(w, g, momentum, *, lr, weight_decay, mu, eta, adapt, clip=False):
    """One parameter's update, as the paper's code does it, in plain float64."""
    if adapt:
        g = g + weight_decay * w
        w_norm, g_norm = w.norm(), g.norm()
        if w_norm > 0 and g_norm > 0:
            rate = eta * w_norm / g_norm
            g = g * (min(rate / lr, 1) if clip else rate)
    momentum = mu * momentum + g
    return w - lr * momentum, momentum


@pytest.mark.parametrize("eta", [0.001, 0.02, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_lars_takes_the_reference_steps(eta, clip):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    groups = parameter_groups(model, lr=0.2, lr_bias_norm=0.05, weight_decay=0.01)
    optimizer = LARS(groups, 0.2, momentum=0.9, eta=eta, clip=clip)
    expected = {
        name: (p.detach().clone(), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for _ in range(5):
        model(torch.randn(8, 5).double()).square().mean().backward()
        for name, p in model.named_parameters():
            weight = p.ndim > 1
            expected[name] = reference_lars(
                *(expected[name][0], p.grad, expected[name][1]),
                lr=0.2 if weight else 0.05,
                weight_decay=0.01,
                mu=0.9,
                eta=eta,
                adapt=weight,
                clip=clip,
            )
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip", [False, True])
def test_lars_leaves_a_zero_weight_to_plain_momentum(clip):
    w = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([w], lr=2.0, clip=clip)
    w.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(w.detach(), -2 * torch.ones(2, 2))


def test_lars_goes_on_from_a_state_without_clipping():
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w], lr=1.0)
    state = optimizer.state_dict()
    del state["param_groups"][0]["clip"]
    optimizer.load_state_dict(state)
    w.grad = torch.ones(2, 2)
    optimizer.step()


def test_lars_refuses_a_negative_rate():
    with pytest.raises(ValueError, match="lr is -1"):
        LARS([nn.Parameter(torch.ones(1))], lr=-1)


def test_groups_go_by_what_a_parameter_is_not_by_its_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), LayerNorm2d(4), nn.Linear(4, 2))
    model.bias_like_name = nn.Parameter(torch.ones(3, 3))
    weights, rest = (
        g["params"] for g in parameter_groups(model, lr=1, lr_bias_norm=1, weight_decay=1)
    )
    assert {tuple(p.shape) for p in weights} == {(4, 3, 3, 3), (2, 4), (3, 3)}
    assert all(p.ndim == 1 for p in rest)
    assert len(weights) + len(rest) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad = False
    groups = parameter_groups(layer, lr=1, lr_bias_norm=1, weight_decay=0)
    assert [len(g["params"]) for g in groups] == [0, 1]


def test_the_schedule_warms_up_then_falls_to_the_final_factor():
    factors = [warmup_cosine(s, steps=100, warmup=10, final=0.01) for s in range(101)]
    assert factors[:11] == pytest.approx([i / 10 for i in range(11)])
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5 + 0.01 * 0.5)
    assert factors[100] == pytest.approx(0.01)
    assert math.isfinite(warmup_cosine(0, steps=1, warmup=0))


def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values():
    torch.manual_seed(0)
    matrix = torch.randn(24, 70, dtype=torch.float64)
    for given in (matrix, matrix.T):
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        inner = u.T @ orthogonalise(given) @ v.T  # diagonal if the vectors are kept
        off = inner - torch.diag(inner.diagonal())
        assert off.abs().max() < 1e-10
        assert inner.diagonal().min() > 0.6
        assert inner.diagonal().max() < 1.3


def test_muon_agrees_with_timms_but_for_its_bfloat16():
    from timm.optim.muon import Muon as Timms

    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 16))
    theirs = copy.deepcopy(ours)
    images = torch.randn(32, 3, 5, 5)
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    one = Muon(ours.parameters(), **settings)
    two = Timms(theirs.parameters(), **settings, nesterov=True, ns_coefficients="original")
    for _ in range(3):
        for model, optimizer in ((ours, one), (theirs, two)):
            optimizer.zero_grad()
            (model(images) ** 2).mean().backward()
            optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if a.ndim > 1:
            assert (a - b).norm() < 0.02 * b.norm(), name


def test_muon_gives_what_is_no_matrix_to_adam():
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(5))
    b = nn.Parameter(a.detach().clone())
    one, two = Muon([a], lr=0.01), torch.optim.Adam([b], lr=0.01, betas=(0.9, 0.95))
    for _ in range(4):
        a.grad, b.grad = (2 * a.detach()).clone(), (2 * b.detach()).clone()
        one.step()
        two.step()
    torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="momentum is -1"):
        Muon([a], momentum=-1)
