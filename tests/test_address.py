import torch

from barlow import address


def test_a_number_depends_on_key_position_and_column_alone():
    everything = address.uniform(3, torch.arange(1000), 8)
    some = torch.tensor([999, 0, 17])
    assert torch.equal(address.uniform(3, some, 5), everything[some, :5])
    assert not torch.equal(address.uniform(4, some, 5), everything[some, :5])


def test_the_numbers_never_change_between_versions():
    """Resuming a run with a newer version draws the same views."""
    assert address.key(0, 1, 2) == 8293983836596404377
    assert address.uniform(address.key(0), torch.tensor([0, 10**12]), 2).tolist() == [
        [0.4635133743286133, 0.5633416771888733],
        [0.17974603176116943, 0.6041324138641357],
    ]


def test_numbers_are_uniform_and_independent():
    draws = address.uniform(address.key(1), torch.arange(20_000), 10)
    assert draws.min() >= 0
    assert draws.max() < 1
    n = draws.numel()
    # Five standard errors: a fair generator fails once in millions of keys, and the key is fixed.
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    counts = torch.histc(draws, bins=100, min=0, max=1)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5
    between_columns = torch.corrcoef(draws.T) - torch.eye(10)
    between_neighbours = torch.corrcoef(torch.stack([draws[:-1, 0], draws[1:, 0]]))[0, 1]
    assert between_columns.abs().max() < 5 / 20_000**0.5
    assert abs(between_neighbours) < 5 / 20_000**0.5


def test_neighbouring_keys_are_unrelated():
    draws = torch.stack(
        [address.uniform(address.key(0, epoch), torch.arange(5000), 1)[:, 0] for epoch in range(10)]
    )
    assert (torch.corrcoef(draws) - torch.eye(10)).abs().max() < 5 / 5000**0.5


def test_keys_fit_a_manual_seed_and_do_not_collide():
    keys = {address.key(seed, epoch) for seed in range(-50, 50) for epoch in range(100)}
    assert len(keys) == 10_000
    assert all(0 <= key < 2**63 for key in keys)
    assert address.key(0) != address.key(0, 0)
    torch.Generator().manual_seed(max(keys))


def test_a_permutation_is_a_function_of_its_key():
    assert torch.equal(address.permutation(100, 5), address.permutation(100, 5))
    assert not torch.equal(address.permutation(100, 5), address.permutation(100, 6))
    assert torch.equal(address.permutation(100, 5).sort().values, torch.arange(100))
