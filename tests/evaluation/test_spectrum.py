import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from barlow.errors import UserError
from barlow.evaluation.spectrum import (
    alignment,
    alpha_req,
    effective_rank,
    lidar,
    mean_off_diagonal,
    rankme,
    spectrum,
    uniformity,
)


def test_rankme_is_the_papers_formula_on_numpys_singular_values(digits):
    x = digits[2]
    sigma = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rankme(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_the_spectrum_is_that_of_numpys_covariance(digits):
    x = digits[2]
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1]
    ours = spectrum(x)
    np.testing.assert_allclose(ours, expected / expected.sum(), atol=1e-9)
    p = (expected / expected.sum()).clip(1e-30)
    assert effective_rank(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)


def test_few_images_have_the_spectrum_of_the_other_gram_matrix():
    x = torch.randn(7, 30)
    expected = np.linalg.eigvalsh(np.cov(x.double().numpy().T))[::-1][:7]
    np.testing.assert_allclose(spectrum(x), expected / expected.sum(), atol=1e-9)


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_ranks_count_directions_that_are_used_evenly(directions):
    x = torch.zeros(400, 16)
    x[:, :directions] = torch.eye(directions).repeat(400 // directions + 1, 1)[:400]
    x = x * (torch.arange(400) % 2 * 2 - 1)[:, None]
    assert rankme(x) == pytest.approx(directions, rel=0.02)


@given(st.floats(0.3, 2.5))
def test_alpha_is_the_decay_that_was_put_in(alpha):
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(500, 200, generator=generator, dtype=torch.double))
    q = torch.linalg.qr(q - q.mean(0))[0]  # centred and orthogonal: the spectrum is exact
    x = q * torch.arange(1, 201, dtype=torch.double) ** (-alpha / 2)
    assert alpha_req(x) == pytest.approx(alpha, abs=1e-3)


def test_alpha_is_numpys_line_with_a_rank_weighing_its_inverse():
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.1, 150, dtype=torch.double)  # a bent spectrum, no power law
    x = torch.randn(400, 150, generator=generator, dtype=torch.double) * scale
    rank = np.arange(4, 101)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1][3:100]
    slope, plain = (
        -np.polyfit(np.log(rank), np.log(values), 1, w=w)[0] for w in (rank**-0.5, None)
    )
    assert alpha_req(x) == pytest.approx(slope, rel=1e-9)
    assert abs(slope - plain) > 0.1


def test_lidar_agrees_with_scipys_generalised_eigenvalues(digits):
    from scipy.linalg import eigh

    generator = torch.Generator().manual_seed(0)
    x = digits[2][:200]
    views = x[:, None] + 0.3 * x.std() * torch.randn(200, 5, x.shape[1], generator=generator)
    means = views.double().mean(1)
    s_b = np.cov(means.numpy().T)
    inner = (views.double() - means[:, None]).flatten(0, 1).numpy()
    s_w = inner.T @ inner / (200 * 4) + 1e-4 * np.eye(x.shape[1])
    values = eigh(s_b, s_w, eigvals_only=True).clip(0)
    p = values / values.sum() + 1e-7
    assert lidar(views) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_lidar_sees_one_direction_where_one_tells_images_apart():
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(300, 8, 10, generator=generator)
    views[:, :, 0] += 1000 * torch.randn(300, 1, generator=generator)
    assert lidar(views) < 1.01


def test_uniformity_and_alignment_are_their_papers_two_lines(digits):
    a, b = digits[0][:500], digits[0][500:1000]
    x, y = F.normalize(a).double(), F.normalize(b).double()
    distances = torch.cdist(x, x).square()[torch.ones(500, 500).triu(1).bool()]
    assert uniformity(a) == pytest.approx(float((-2 * distances).exp().mean().log()), rel=1e-4)
    assert alignment(a, b) == pytest.approx(float((x - y).norm(dim=1).square().mean()), rel=1e-4)
    assert alignment(a, a) == 0


def test_the_mean_off_diagonal_is_that_of_numpys_correlation(digits):
    c = np.abs(np.corrcoef(digits[2].double().numpy().T))
    width = len(c)
    expected = (c.sum() - width) / (width * (width - 1))
    assert mean_off_diagonal(digits[2]) == pytest.approx(expected, rel=1e-4)


def test_a_dead_feature_is_left_out():
    x = torch.randn(50, 3)
    dead = torch.cat([x, torch.full((50, 1), 7.3)], 1)
    assert mean_off_diagonal(dead) == pytest.approx(mean_off_diagonal(x), rel=1e-5)


def test_one_view_tells_nothing():
    with pytest.raises(UserError, match="two of each"):
        lidar(torch.randn(5, 1, 3))
