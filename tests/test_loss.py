"""The loss on one process, against the paper's Algorithm 1 written out in float64."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from barlow.errors import UserError
from barlow.loss import BarlowTwinsLoss, cross_correlation, mixed_barlow_twins_regulariser

FORMS = ("features", "samples")
SHAPES = [(2, 5), (3, 2), (7, 1), (16, 16), (300, 70), (64, 700), (257, 1100)]  # (N, D)


def reference_correlation(z1: Tensor, z2: Tensor, eps: float = 1e-5) -> Tensor:
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt() for z in (z1, z2))
    return a.T @ b / len(z1)


def reference_loss(
    z1: Tensor, z2: Tensor, lambd: float, scale: float = 1.0, target: float = 0.0
) -> Tensor:
    c = reference_correlation(z1, z2)
    off_diagonal = c[~torch.eye(len(c), dtype=torch.bool)]
    return scale * (
        (1 - c.diagonal()).square().sum() + lambd * (off_diagonal - target).square().sum()
    )


def embeddings(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two views' embeddings that agree in part, with means and deviations of their own."""
    random = torch.Generator().manual_seed(seed)
    shared, own1, own2 = torch.randn(3, n, d, generator=random, dtype=torch.float64)
    spread, mean = torch.rand(2, d, generator=random, dtype=torch.float64)
    return [((shared + own) * (0.5 + spread) + mean).to(dtype) for own in (own1, own2)]


def value_and_gradients(function, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("target", [0.0, -1.0])
def test_float64_equals_the_reference(form, n, d, target):
    z = embeddings(n, d, dtype=torch.float64)
    criterion = BarlowTwinsLoss(0.02, scale=0.3, off_diagonal_target=target, form=form)
    value, gradients = value_and_gradients(criterion, *z)
    expected, slopes = value_and_gradients(
        lambda z1, z2: reference_loss(z1, z2, 0.02, 0.3, target), *z
    )
    assert relative(value, expected) < 1e-12
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert relative(gradient, slope) < (1e-12 if n > 2 else 1e-8)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(3, 80),
    d=st.integers(1, 120),
    seed=st.integers(0, 2**20),
    lambd=st.floats(1e-4, 1.0),
    form=st.sampled_from(FORMS),
)
def test_float32_equals_the_reference_to_rounding(n, d, seed, lambd, form):
    z = embeddings(n, d, seed)
    value, gradients = value_and_gradients(BarlowTwinsLoss(lambd, form=form), *z)
    expected, slopes = value_and_gradients(
        lambda z1, z2: reference_loss(z1, z2, lambd), *[x.double() for x in z]
    )
    # A feature whose few samples nearly coincide magnifies the rounding of its mean, and a
    # gradient may vanish: rounding has a floor. The next test has neither.
    assert abs(float(value) - float(expected)) < 1e-6 * (float(expected) + d)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert (gradient - slope).norm() < 1e-4 * (slope.norm() + (d / n) ** 0.5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "d"), [(300, 70), (70, 300), (256, 256), (64, 2048)])
def test_float32_is_within_a_millionth(form, n, d):
    z = embeddings(n, d)
    value, gradients = value_and_gradients(BarlowTwinsLoss(form=form), *z)
    expected, slopes = value_and_gradients(
        lambda z1, z2: reference_loss(z1, z2, 0.0051), *[x.double() for x in z]
    )
    assert relative(value, expected) < 1e-6
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert relative(gradient, slope) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_two_samples_are_exact_to_rounding(form):
    # Two samples are normalised to +1 and -1, but for eps: where they lie far apart the gradient
    # is the difference of two nearly equal numbers, so here they lie close together.
    z = [0.01 * x for x in embeddings(2, 6, seed=1)]
    value, gradients = value_and_gradients(BarlowTwinsLoss(form=form), *z)
    expected, slopes = value_and_gradients(
        lambda z1, z2: reference_loss(z1, z2, 0.0051), *[x.double() for x in z]
    )
    assert relative(value, expected) < 1e-6
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert relative(gradient, slope) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    z = [x.requires_grad_() for x in embeddings(5, 7, dtype=torch.float64)]
    criterion = BarlowTwinsLoss(0.1, scale=2.0, off_diagonal_target=-1.0, form=form)
    assert torch.autograd.gradcheck(criterion, z)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(0.5, 20), shift=st.floats(-10, 10), form=st.sampled_from(FORMS))
def test_the_loss_does_not_see_scale_and_shift(factor, shift, form):
    z1, z2 = embeddings(40, 60)
    criterion = BarlowTwinsLoss(form=form)
    moved = criterion(z1 * factor + shift, z2)
    assert float(moved) == pytest.approx(float(criterion(z1, z2)), rel=1e-4)


def test_order_of_views_and_of_samples_does_not_matter():
    z1, z2 = embeddings(40, 60)
    criterion, order = BarlowTwinsLoss(), torch.randperm(40)
    expected = pytest.approx(float(criterion(z1, z2)), rel=1e-6)
    assert float(criterion(z2, z1)) == expected
    assert float(criterion(z1[order], z2[order])) == expected


@pytest.mark.parametrize("target", [0.0, -1.0])
@pytest.mark.parametrize("form", FORMS)
def test_terms_are_the_parts_of_the_loss(form, target):
    z1, z2 = embeddings(40, 60)
    criterion = BarlowTwinsLoss(0.02, scale=0.5, off_diagonal_target=target, form=form)
    loss = criterion(z1.requires_grad_(), z2)
    c = reference_correlation(z1.double(), z2.double()).detach()
    off_diagonal = c[~torch.eye(60, dtype=torch.bool)]
    terms = criterion.terms
    assert not any(term.requires_grad or term.shape for term in terms)
    assert float(terms.loss) == float(loss.detach())
    assert float(loss.detach()) == pytest.approx(
        0.5 * float(terms.invariance + 0.02 * terms.redundancy), rel=1e-6
    )
    close = {
        "invariance": (1 - c.diagonal()).square().sum(),
        "redundancy": (off_diagonal - target).square().sum(),
        "diagonal_error": (1 - c.diagonal()).square().mean(),
        "off_diagonal_rms": off_diagonal.square().mean().sqrt(),
    }
    for name, expected in close.items():
        assert float(getattr(terms, name)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_constant_feature_gives_finite_numbers(form):
    z1, z2 = embeddings(20, 30)
    z1[:, 3] = 7.25
    z2[:, 3] = 0.0
    value, gradients = value_and_gradients(BarlowTwinsLoss(form=form), z1, z2)
    expected, slopes = value_and_gradients(
        lambda z1, z2: reference_loss(z1, z2, 0.0051), z1.double(), z2.double()
    )
    assert relative(value, expected) < 1e-6
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert torch.isfinite(gradient).all()
        assert relative(gradient, slope) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_far_from_zero_costs_little_precision(form):
    z = [x + 100 for x in embeddings(64, 96)]
    value, gradients = value_and_gradients(BarlowTwinsLoss(form=form), *z)
    expected, slopes = value_and_gradients(
        lambda z1, z2: reference_loss(z1, z2, 0.0051), *[x.double() for x in z]
    )
    assert relative(value, expected) < 1e-5
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert relative(gradient, slope) < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32(form, dtype):
    z = embeddings(40, 60, dtype=dtype)
    value, gradients = value_and_gradients(BarlowTwinsLoss(form=form), *z)
    wide, slopes = value_and_gradients(BarlowTwinsLoss(form=form), *[x.float() for x in z])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, wide)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, slope.to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_keeps_sums_in_float32(form):
    z = [x.bfloat16() for x in embeddings(128, 96)]
    plain, slopes = value_and_gradients(BarlowTwinsLoss(form=form), *z)
    with torch.autocast("cpu", torch.bfloat16):
        value, gradients = value_and_gradients(BarlowTwinsLoss(form=form), *z)
    assert value.dtype == torch.float32
    assert relative(value, plain) < 2e-3
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert relative(gradient.float(), slope.float()) < 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_layout_of_the_input_does_not_matter(form):
    z1, z2 = embeddings(40, 60)
    strided = [torch.stack([z, z], 2)[:, :, 0] for z in (z1, z2)]
    transposed = [z.T.contiguous().T for z in (z1, z2)]
    expected, slopes = value_and_gradients(BarlowTwinsLoss(form=form), z1, z2)
    for z in (strided, transposed):
        assert not z[0].is_contiguous()
        value, gradients = value_and_gradients(BarlowTwinsLoss(form=form), *z)
        torch.testing.assert_close(value, expected)
        for gradient, slope in zip(gradients, slopes, strict=True):
            torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_can_be_taken_again(form):
    z = [x.requires_grad_() for x in embeddings(20, 30)]
    loss = BarlowTwinsLoss(form=form)(*z)
    first = torch.autograd.grad(loss, z, retain_graph=True)
    again = torch.autograd.grad(loss * 3, z)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one * 3, other)


def test_only_one_view_may_need_a_gradient():
    z1, z2 = embeddings(20, 30)
    loss = BarlowTwinsLoss()(z1.requires_grad_(), z2)
    (gradient,) = torch.autograd.grad(loss, [z1])
    assert gradient.shape == z1.shape


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_loss_is_the_same_without_gradients(context):
    z1, z2 = embeddings(20, 30)
    with context():
        value = BarlowTwinsLoss()(z1, z2)
    assert float(value) == float(BarlowTwinsLoss()(z1, z2))


def test_a_second_derivative_is_refused_not_wrong():
    z = [x.requires_grad_() for x in embeddings(20, 30)]
    with pytest.raises(RuntimeError, match="does not support second derivatives"):
        torch.autograd.grad(BarlowTwinsLoss()(*z), z, create_graph=True)


@pytest.mark.parametrize(("n", "d"), [(64, 24), (16, 96)])
def test_compiles_into_one_graph(n, d):
    z = embeddings(n, d)
    criterion = BarlowTwinsLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    value, gradients = value_and_gradients(compiled, *z)
    expected, slopes = value_and_gradients(criterion, *z)
    torch.testing.assert_close(value, expected)
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient, slope)


def test_cross_correlation_equals_the_reference_with_gradient():
    z = embeddings(30, 20, dtype=torch.float64)
    torch.testing.assert_close(cross_correlation(*z), reference_correlation(*z))
    assert torch.autograd.gradcheck(
        cross_correlation, [x[:6, :4].clone().requires_grad_() for x in z]
    )


def reference_regulariser(z1, z2, mixed, order, mix, lambd):
    def correlation(x, y):
        return reference_correlation(x, y)

    total = 0.0
    for z in (z1, z2):
        expected = mix * correlation(z1, z) + (1 - mix) * correlation(z2[order], z)
        total = total + (correlation(mixed, z) - expected).square().sum()
    return lambd * total


@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 12)])
def test_the_mixed_regulariser_equals_the_paper(n, d):
    z1, z2 = embeddings(n, d, dtype=torch.float64)
    mixed, _ = embeddings(n, d, seed=1, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    found = value_and_gradients(
        lambda *z: mixed_barlow_twins_regulariser(*z, order, 0.3, lambd=0.02), z1, z2, mixed
    )
    expected = value_and_gradients(
        lambda *z: reference_regulariser(*z, order, 0.3, 0.02), z1, z2, mixed
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4), (1, 4)), "a batch of 1 .* at least 2"),
        (((0, 4), (0, 4)), "a batch of 0 .* at least 2"),
        (((4, 3), (4, 5)), r"\(4, 3\) and \(4, 5\)"),
        (((4, 3, 2), (4, 3, 2)), r"shape \(N, D\)"),
        (((4, 0), (4, 0)), r"\(4, 0\)"),
    ],
)
def test_what_cannot_be_is_named(shapes, message):
    z1, z2 = (torch.zeros(shape) for shape in shapes)
    for function in (BarlowTwinsLoss(), cross_correlation):
        with pytest.raises(UserError, match=message):
            function(z1, z2)


def test_types_that_cannot_be_are_named():
    with pytest.raises(UserError, match=r"torch.int64"):
        BarlowTwinsLoss()(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long))
    with pytest.raises(UserError, match="rows"):
        BarlowTwinsLoss(form="rows")  # type: ignore[arg-type]


def test_importing_the_loss_imports_torch_alone():
    code = (
        "import sys, barlow.loss; "
        "print([m for m in ('timm', 'torchvision', 'datasets', 'lightning_fabric', 'sklearn') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
