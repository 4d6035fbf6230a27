import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from barlow.batch_norm import exact_batch_norm


def network(kind):
    torch.manual_seed(0)
    if kind == "plain":
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    if kind == "without affine":
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False))
    if kind == "timm's with activation":
        return nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6))
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))


def gradients(rank, world_size, kind):
    torch.manual_seed(1)
    x = torch.randn(8, 3, 8, 8).double().requires_grad_()
    model = network(kind).double()
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    with exact_batch_norm(True, over_ranks=world_size > 1):
        y = model(x[part])
    target = torch.randn(8, *y.shape[1:], generator=torch.Generator().manual_seed(2)).double()
    (y - target[part]).pow(3).sum().backward()
    return {
        "output": y.detach(),
        "input gradient": x.grad[part],
        "gradients": [p.grad for p in model.parameters()],
        "buffers": [b for b in model.buffers()],
    }


KINDS = ["plain", "without affine", "timm's with activation", "one-dimensional"]


def every_kind(rank, world_size):
    return {kind: gradients(rank, world_size, kind) for kind in KINDS}


def test_batch_norm_on_two_ranks_is_that_of_the_whole_batch(on_ranks):
    found = on_ranks(2, every_kind)  # in one start: most of the time is spent in importing torch
    for kind, whole in every_kind(0, 1).items():
        parts = [rank[kind] for rank in found]
        close = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda text, kind=kind: f"{kind}: {text}"}
        for what in ("output", "input gradient"):
            torch.testing.assert_close(torch.cat([p[what] for p in parts]), whole[what], **close)
        for i, gradient in enumerate(whole["gradients"]):
            torch.testing.assert_close(sum(p["gradients"][i] for p in parts), gradient, **close)
        for part in parts:
            torch.testing.assert_close(part["buffers"], whole["buffers"], **close)


@pytest.mark.parametrize("size", [(64, 8, 32, 32), (20, 3, 70, 70), (40, 6, 9), (70, 6)])
def test_batch_norm_in_float32_is_that_of_float64(size):
    # A mean far from zero, and a gradient whose sum nearly cancels, as behind another batch norm.
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(size, generator=draw) + 3
    slope = torch.randn(size, generator=draw)
    slope -= slope.mean([d for d in range(len(size)) if d != 1], keepdim=True)
    if len(size) == 4:
        x, slope = (t.contiguous(memory_format=torch.channels_last) for t in (x, slope))
    results = []
    for dtype, exact in ((torch.float64, False), (torch.float32, True)):
        norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(size)](size[1])
        norm = norm.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        with exact_batch_norm(exact, over_ranks=False):
            y = norm(leaf)
        gradients = torch.autograd.grad(y, [leaf, norm.weight], slope.to(dtype))
        results.append([y.detach(), *gradients, norm.running_mean, norm.running_var])
    for got, expected in zip(results[1], results[0], strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 4e-6


def test_evaluation_is_left_alone():
    model = network("plain").eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    with exact_batch_norm(True, over_ranks=False):
        assert torch.equal(model(x), expected)


def test_one_value_a_channel_has_no_statistics():
    with exact_batch_norm(True, over_ranks=False), pytest.raises(ValueError, match="more than one"):
        nn.BatchNorm1d(3)(torch.zeros(1, 3))
