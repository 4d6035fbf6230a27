"""Accumulation is the loss and the gradient of the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from barlow.accumulate import accumulate
from barlow.loss import BarlowTwinsLoss


class Model(nn.Module):
    """What `accumulate` asks of a model, with a small encoder."""

    def __init__(self, *layers: nn.Module, form: str = "auto") -> None:
        super().__init__()
        self.encoder = nn.Sequential(*layers)
        self.criterion = BarlowTwinsLoss(0.02, form=form)

    def embed(self, view: Tensor) -> Tensor:
        return self.encoder(view)

    def forward(self, view1, view2, grad1=None, grad2=None) -> Tensor:
        z1, z2 = self.embed(view1), self.embed(view2)
        if grad1 is None:
            return self.criterion(z1, z2)
        return (grad1 * z1).sum() + (grad2 * z2).sum()


def small_model(seed: int = 0, form: str = "auto") -> Model:
    torch.manual_seed(seed)
    return Model(nn.Linear(6, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 40), form=form)


def views(n: int) -> Tensor:
    random = torch.Generator().manual_seed(1)
    shared, *own = torch.randn(3, n, 6, generator=random)
    return torch.stack([shared + 0.5 * x for x in own])  # (2, N, 6)


def micro(batch: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
    return [(view1, view2) for view1, view2 in zip(*(v.chunk(k) for v in batch), strict=True)]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("k", [1, 2, 3, 24])
@pytest.mark.parametrize("form", ["features", "samples"])
def test_accumulation_equals_the_whole_batch(k, form):
    whole, parts, batch = small_model(form=form), small_model(form=form), views(24)
    expected = whole(*batch)
    expected.backward()
    loss = accumulate(parts, parts, micro(batch, k))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    difference = gradients(parts) - gradients(whole)
    assert difference.norm() < 1e-5 * gradients(whole).norm()
    torch.testing.assert_close(parts.criterion.terms, whole.criterion.terms)


def test_gradients_are_added_to_those_that_are_there():
    model, batch = small_model(), views(12)
    accumulate(model, model, micro(batch, 3))
    once = gradients(model)
    accumulate(model, model, micro(batch, 3))
    torch.testing.assert_close(gradients(model), 2 * once)


def test_randomness_is_replayed():
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drawn: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.drawn.append(torch.rand(x.shape))
            return x * (self.drawn[-1] > 0.3)

    draws = Draws()
    model = Model(nn.Linear(6, 8), draws, nn.Linear(8, 16))
    accumulate(model, model, micro(views(12), 3))
    first, replayed = draws.drawn[:6], draws.drawn[6:]
    assert len(replayed) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, replayed, strict=True))
    assert not torch.equal(first[0], first[1])


def test_dropout_gives_the_gradient_of_the_loss_that_is_returned():
    def build() -> Model:
        torch.manual_seed(0)
        model = Model(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 16))
        return model.double()

    batch = micro(views(12).double(), 3)
    model = build()
    torch.manual_seed(5)
    before = accumulate(model, model, batch)
    weight = model.encoder[2].weight
    slope = weight.grad.clone()
    step = 1e-6
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * slope
        torch.manual_seed(5)
        losses.append(accumulate(model, model, batch))
        with torch.no_grad():
            weight -= sign * step * slope
    assert losses[0] > before > losses[1]
    change = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(change, slope.square().sum(), rtol=1e-4, atol=0)


def test_running_statistics_are_updated_once():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 16)]
    model, batch = Model(*layers), micro(views(12), 3)
    plain = nn.BatchNorm1d(8)
    for pair in batch:
        for view in pair:
            plain(layers[0](view))
    accumulate(model, model, batch)
    assert layers[1].num_batches_tracked == 6
    assert layers[1].track_running_stats
    torch.testing.assert_close(layers[1].running_mean, plain.running_mean)
    torch.testing.assert_close(layers[1].running_var, plain.running_var)


def test_batch_norm_in_evaluation_keeps_its_running_statistics():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    norm.running_mean.fill_(0.5)
    model, batch = Model(nn.Linear(6, 8), norm), views(12)
    model.eval()
    expected = model(*batch)
    torch.testing.assert_close(accumulate(model, model, micro(batch, 3)), expected.detach())


def test_autocast_is_that_of_the_caller():
    model, batch = small_model(), views(24)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def wrapped(*args: Tensor) -> Tensor:
        with autocast():
            return model(*args)

    loss = accumulate(model, wrapped, micro(batch, 3), autocast=autocast)
    with autocast():
        expected = small_model()(*batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach())
    assert gradients(model).norm() > 0


def test_inside_autocast_all_passes_have_it():
    model, around = small_model(), small_model()
    batch = micro(views(24), 3)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def wrapped(*args: Tensor) -> Tensor:
        with autocast():
            return model(*args)

    loss = accumulate(model, wrapped, batch, autocast=autocast)
    with autocast():
        assert torch.equal(accumulate(around, around, batch), loss)
    assert torch.equal(gradients(around), gradients(model))


def _rank(rank: int, ranks: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    whole, batch = small_model(), views(24)
    # The whole batch on one process: a group of this rank alone.
    alone = [dist.new_group([r]) for r in range(ranks)]
    whole.criterion.process_group = alone[rank]
    expected = whole(*batch)
    expected.backward()

    for k in (1, 3):
        model = small_model()
        wrapped = DistributedDataParallel(model)
        mine = micro(batch[:, rank::ranks], k)
        loss = accumulate(model, wrapped, mine, no_sync=wrapped.no_sync)
        torch.testing.assert_close(loss, expected.detach())
        difference = gradients(model) - gradients(whole)
        assert difference.norm() < 1e-5 * gradients(whole).norm()
    dist.destroy_process_group()


def test_two_ranks_that_accumulate_equal_the_whole_batch(free_port, imported):
    mp.start_processes(_rank, (2, free_port), nprocs=2, start_method="forkserver")


@pytest.fixture
def free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    return store.port
