import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from barlow.ranks import synchronised_batch_norm


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
    with synchronised_batch_norm(world_size > 1):
        y = model(x[part])
    target = torch.randn(8, *y.shape[1:], generator=torch.Generator().manual_seed(2)).double()
    (y - target[part]).pow(3).sum().backward()
    return {
        "output": y.detach(),
        "input gradient": x.grad[part],
        "gradients": [p.grad for p in model.parameters()],
        "buffers": [b for b in model.buffers()],
    }


@pytest.mark.parametrize(
    "kind", ["plain", "without affine", "timm's with activation", "one-dimensional"]
)
def test_batch_norm_on_two_ranks_is_that_of_the_whole_batch(on_ranks, kind):
    whole = gradients(0, 1, kind)
    parts = on_ranks(2, gradients, kind)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for what in ("output", "input gradient"):
        torch.testing.assert_close(torch.cat([p[what] for p in parts]), whole[what], **close)
    for i, gradient in enumerate(whole["gradients"]):
        torch.testing.assert_close(sum(p["gradients"][i] for p in parts), gradient, **close)
    for part in parts:
        torch.testing.assert_close(part["buffers"], whole["buffers"], **close)


def test_evaluation_and_single_processes_are_left_alone():
    model = network("plain").eval()
    with synchronised_batch_norm(True):  # without a process group: any exchange would raise
        model(torch.randn(2, 3, 8, 8))
