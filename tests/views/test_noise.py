import torch

from barlow.views import TwoViews, colour

EVERY = torch.arange(400)


def noise(position: torch.Tensor, key: int = 0, pixels: int = 625) -> torch.Tensor:
    planes = torch.full((1, len(position), pixels), 0.5)
    std = torch.full((len(position), 1), 0.05)
    colour.add_noise(planes, torch.arange(len(position)), std, key, position)
    return (planes[0] - 0.5) / 0.05


def test_noise_is_normal():
    drawn = noise(EVERY).double()
    n = drawn.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean() - moment) < 5 * (spread / n) ** 0.5


def test_no_two_pixels_share_their_noise():
    drawn = noise(EVERY)
    correlation = torch.corrcoef(torch.cat([drawn[:, :40], drawn[:, -40:]], 1).T)
    assert (correlation - torch.eye(80)).abs().max() < 5 / 400**0.5
    assert (torch.corrcoef(drawn) - torch.eye(400)).abs().max() < 6 / 625**0.5


def test_noise_depends_on_its_address_alone():
    some = torch.tensor([399, 3])
    torch.testing.assert_close(noise(some), noise(EVERY)[some], rtol=0, atol=1e-5)
    assert not torch.allclose(noise(some), noise(some, key=1))


def test_noise_stays_within_the_range_of_pixels():
    images = torch.randint(0, 2, (20, 1, 28, 28), dtype=torch.uint8) * 255
    for view in TwoViews(28, "digits", in_chans=1, mean=(0,), std=(1,))(images, key=0):
        assert view.min() >= 0
        assert view.max() <= 1 + 1e-6  # a crop rounds
