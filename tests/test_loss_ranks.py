"""Several processes compute the loss of one, in value and in the gradient that DDP averages."""

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow.errors import UserError
from barlow.loss import BarlowTwinsLoss, cross_correlation, mixed_barlow_twins_regulariser

N, D = 24, 20


def embeddings(n: int = N, d: int = D) -> Tensor:
    random = torch.Generator().manual_seed(0)
    shared, *own = torch.randn(3, n, d, generator=random, dtype=torch.float64)
    return torch.stack([shared + x for x in own]) + torch.arange(n).reshape(-1, 1) / n


class Twins(nn.Module):
    def __init__(self, criterion: BarlowTwinsLoss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projector = nn.Sequential(nn.Linear(D, 30), nn.Tanh(), nn.Linear(30, 36)).double()
        self.criterion = criterion

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.criterion(self.projector(x1), self.projector(x2))


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def alone() -> dist.ProcessGroup:
    """A group of this rank only: in it the loss is that of one process."""
    return [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]


def claim_equal_one(rank: int, ranks: int) -> None:
    batch, group = embeddings(), alone()
    for form in ("features", "samples"):
        for target in (0.0, -1.0):
            options = {"scale": 0.5, "off_diagonal_target": target, "form": form}
            one = Twins(BarlowTwinsLoss(0.02, **options, process_group=group))
            expected = one(*batch)
            expected.backward()
            many = Twins(BarlowTwinsLoss(0.02, **options))
            wrapped = DistributedDataParallel(many)
            loss = wrapped(*batch[:, rank::ranks])
            loss.backward()
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(many.criterion.terms, one.criterion.terms)
            torch.testing.assert_close(gradients(many), gradients(one))
            with torch.no_grad():
                torch.testing.assert_close(many(*batch[:, rank::ranks]), expected)


def claim_gradient_is_world_size_times_the_slice(rank: int, ranks: int) -> None:
    batch, group = embeddings(), alone()
    for form in ("features", "samples"):
        whole = batch.clone().requires_grad_()
        BarlowTwinsLoss(form=form, process_group=group)(*whole).backward()
        mine = batch[:, rank::ranks].clone().requires_grad_()
        BarlowTwinsLoss(form=form)(*mine).backward()
        torch.testing.assert_close(mine.grad, ranks * whole.grad[:, rank::ranks])


def claim_uneven(rank: int, ranks: int) -> None:
    batch, group = embeddings(), alone()
    parts = batch.split([5, 13, 1, N - 19] if ranks == 4 else [5, N - 5], dim=1)
    for form in ("features", "samples", "auto"):
        one = Twins(BarlowTwinsLoss(form=form, process_group=group))
        expected = one(*batch)
        expected.backward()
        many = Twins(BarlowTwinsLoss(form=form))
        wrapped = DistributedDataParallel(many)
        loss = wrapped(*parts[rank])
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(many), gradients(one))


def claim_known_to_be_equal(rank: int, ranks: int) -> None:
    mine = embeddings()[:, rank::ranks]
    for form in ("features", "samples"):
        expected, got = (
            BarlowTwinsLoss(form=form, equal_batches=equal)(*mine) for equal in (False, True)
        )
        assert torch.equal(expected, got)


def claim_correlation_and_regulariser(rank: int, ranks: int) -> None:
    group = alone()
    for n, d in ((32, 8), (16, 24)):
        batch = torch.cat([embeddings(n, d), embeddings(n, d).flip(2)[:1]])  # z1, z2, mixed
        sizes = [1, n - 1] if ranks == 2 else [1, 2, 3, n - 6]
        first = sum(sizes[:rank])
        rows = slice(first, first + sizes[rank])
        orders = [
            torch.randperm(size, generator=torch.Generator().manual_seed(size)) for size in sizes
        ]
        order = torch.cat([o + sum(sizes[:r]) for r, o in enumerate(orders)])
        functions = [
            lambda z, o, g: cross_correlation(*z[:2], process_group=g).square()[0].sum(),
            lambda z, o, g: mixed_barlow_twins_regulariser(*z, o, 0.3, process_group=g),
        ]
        for function in functions:
            whole = batch.clone().requires_grad_()
            expected = function(whole, order, group)
            expected.backward()
            mine = batch[:, rows].clone().requires_grad_()
            value = function(mine, orders[rank], None)
            value.backward()
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(mine.grad, ranks * whole.grad[:, rows])


def claim_float32_is_exact_to_rounding(rank: int, ranks: int) -> None:
    group = alone()
    for n, d in ((64, 200), (200, 64)):
        batch = embeddings(n, d)
        whole = batch.clone().requires_grad_()
        expected = BarlowTwinsLoss(process_group=group)(*whole)
        expected.backward()
        mine = batch[:, rank::ranks].float().requires_grad_()
        loss = BarlowTwinsLoss()(*mine)
        loss.backward()
        slope = ranks * whole.grad[:, rank::ranks]
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        assert (mine.grad - slope).norm() < 1e-5 * slope.norm()


def claim_refused_on_every_rank(rank: int, ranks: int) -> None:
    for sizes in ([1] + [0] * (ranks - 1), [0] * ranks):
        z = torch.randn(2, sizes[rank], D)
        with pytest.raises(UserError, match="use at least 2 samples"):
            BarlowTwinsLoss()(*z)


def claim_one_sample_a_rank(rank: int, ranks: int) -> None:
    batch = embeddings()[:, :ranks]
    expected = BarlowTwinsLoss(process_group=alone())(*batch)
    torch.testing.assert_close(BarlowTwinsLoss()(*batch[:, rank : rank + 1]), expected)


def claim_compiled(rank: int, ranks: int) -> None:
    batch, group = embeddings(), alone()
    for form in ("features", "samples"):
        one = Twins(BarlowTwinsLoss(form=form, process_group=group))
        one(*batch).backward()
        many = Twins(BarlowTwinsLoss(form=form))
        many.compile(backend="aot_eager")
        wrapped = DistributedDataParallel(many)
        wrapped(*batch[:, rank::ranks]).backward()
        torch.testing.assert_close(gradients(many), gradients(one))


def _enter(rank: int, ranks: int, port: int, claim: Callable[[int, int], None]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    claim(rank, ranks)
    dist.destroy_process_group()


def claims(rank: int, ranks: int, port: int, names: list[str]) -> None:
    def every(rank: int, ranks: int) -> None:
        for name in names:
            globals()[name](rank, ranks)

    _enter(rank, ranks, port, every)


@pytest.fixture
def free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    return store.port


EVERY = [name for name in list(globals()) if name.startswith("claim_")]


# All claims in one start of the processes.
def test_two_ranks_equal_one(free_port, imported):
    mp.start_processes(claims, (2, free_port, EVERY), nprocs=2, start_method="forkserver")


def test_four_ranks_equal_one(free_port, imported):
    names = [name for name in EVERY if name != "claim_compiled"]
    mp.start_processes(claims, (4, free_port, names), nprocs=4, start_method="forkserver")
