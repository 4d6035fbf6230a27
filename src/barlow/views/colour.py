"""The changes to a view's pixel values: colour, blur, solarisation and noise.

Everything here works in place on planes: `(C, N, P)` float32 in 0 to 1, where P is the number of
pixels in a view. In this layout a channel of the whole batch is one contiguous block, and
consecutive samples are a slice.
"""

from bisect import bisect_left
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from barlow import address
from barlow.views.geometry import to_device
from barlow.views.settings import ViewSettings

_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, rounded as in torchvision
_TINY = 1e-12  # avoids dividing by the chroma of a grey pixel, 0; it has no hue and needs none
_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # 0 is brightness
# Weights too small to change a float32 pixel; one below 1e-38, a denormal number, would take as
# long as a hundred products.
_FAINT = 1e-9
_BLOCK = 32  # pixels of a row or column that one matrix product blurs

Samples = Tensor | slice
"""Which samples of a batch: `(n,)` indices, or a slice, which avoids a gather."""


def grey(planes: Tensor) -> Tensor:
    """The luma of RGB planes: `(3, N, P)` to `(N, P)`; one channel is its own luma."""
    if len(planes) == 1:
        return planes[0].clone()
    red, green, blue = planes
    luma: Tensor = red * _GREY[0]
    return luma.add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def shift_hue(planes: Tensor, shift: Tensor) -> None:
    """Shift the hue of RGB planes in place, exactly as a conversion to HSV and back would.

    Shifting the hue keeps the largest and the smallest channel value of a pixel, so only the hue
    `h` has to be computed, in sixths of the circle with red at 0. Its distance from red, times the
    chroma, equals `g + b - r + largest - 2 * smallest` in all six sectors. The sign of `h` is that
    of `g - b`. A channel whose own colour is at `h0` becomes
    `largest - chroma * clamp(distance(h, h0) - 1, 0, 1)`. This needs no comparisons: on the CPU,
    torch takes longer for one `where` or boolean mask than for ten of these steps.

    Args:
        planes: `(3, N, P)`.
        shift: `(N, 1)`, as a share of the circle.
    """
    red, green, blue = planes
    upper, lower = torch.maximum(green, blue), torch.minimum(green, blue)
    largest, smallest = torch.maximum(upper, red), torch.minimum(lower, red)
    chroma = torch.sub(largest, smallest, out=upper)
    base, top = smallest.sub_(chroma), largest.add_(chroma)
    side = torch.sub(green, blue, out=lower)
    hue = green.add_(blue).sub_(red).sub_(base)
    hue.div_(torch.clamp(chroma, min=_TINY, out=red)).copysign_(side).add_(shift * 6)
    turns = torch.mul(hue, 1 / 6, out=side).round_()
    hue.sub_(turns, alpha=6)  # -3 to 3
    # On that range clamp(3 - distance, 1, 2) is clamp(|h + 1|, 1, 2) for green, whose h0 is 2,
    # and clamp(|h - 1|, 1, 2) for blue, at -2; red's distance is |h| itself.
    torch.abs(hue, out=red).clamp_(1, 2)
    torch.addcmul(top, chroma, red, value=-1, out=red)
    torch.sub(hue, 1, out=blue).abs_().clamp_(1, 2)
    torch.addcmul(base, chroma, blue, out=blue)
    hue.add_(1).abs_().clamp_(1, 2)
    torch.addcmul(base, chroma, hue, out=green)


class Jitter(NamedTuple):
    """The colour changes of every sample: blends before the hue shift, the shift, blends after."""

    ahead: Tensor
    """`(N,)` how many of the three blends come before the hue shift; -1 means no change at all."""
    kinds: Tensor
    """`(N, 3)` which blend comes first, second and third."""
    blends: Tensor
    """`(N, 3, 3)`: for each of the three in turn, the shares of the image, of its luma and of its
    mean luma in the blend."""
    hue: Tensor
    """`(N, 1)` shift of the hue, as a share of the circle."""

    def take(self, samples: Samples) -> "Jitter":
        """The changes of some samples."""
        return Jitter(*(part[samples] for part in self))


def draw_jitter(settings: ViewSettings, draws: Tensor) -> Jitter:
    """Draw the colour changes as torchvision's `ColorJitter` does.

    Args:
        settings: the view's distribution.
        draws: `(N, 9)` uniform numbers: one decides whether to change the sample, four give the
            strengths, and the ranks of the last four are the order.

    Returns:
        The changes that `jitter` applies.
    """
    strength = torch.tensor([settings.brightness, settings.contrast, settings.saturation])
    low = (1 - strength).clamp(min=0)
    factors = low + (1 + strength - low) * draws[:, 1:4]
    hue = (2 * draws[:, 4:5] - 1) * settings.hue
    return plan(draws[:, 5:9].argsort(1), factors, hue, draws[:, 0] < settings.jitter)


def plan(order: Tensor, factors: Tensor, hue: Tensor, jittered: Tensor) -> Jitter:
    """Colour changes of known strength and order.

    Brightness blends the image with black, contrast with its mean luma and saturation with its
    luma. So all three are `factor * x + share * luma + share * mean luma`.

    Args:
        order: `(N, 4)` the four changes in turn; 0 is brightness, 1 contrast, 2 saturation, 3 hue.
        factors: `(N, 3)` strengths of the first three.
        hue: `(N, 1)` shift of the hue.
        jittered: `(N,)` bool, whether to change the sample at all.
    """
    kinds = order[order != _HUE].view(-1, 3)
    factor = factors.gather(1, kinds)  # (N, 3), in the order of the blends
    shares = [factor, (1 - factor) * (kinds == _SATURATION), (1 - factor) * (kinds == _CONTRAST)]
    ahead = torch.where(jittered, (order == _HUE).int().argmax(1), -1)
    return Jitter(ahead, kinds, torch.stack(shares, 2), hue)


def jitter(planes: Tensor, changes: Jitter) -> None:
    """Brightness, contrast, saturation and hue, every sample in its own order, in place.

    The hue shift is the expensive step, so it is done once for the whole batch: after the blends
    that precede it in each sample, and before the rest. The samples are sorted by `ahead`, so each
    of these steps works on one slice.

    Args:
        planes: `(C, N, P)`, C being 1 or 3.
        changes: those of these samples, sorted by `ahead`.
    """
    ahead = changes.ahead.tolist()
    start, n = bisect_left(ahead, 0), len(ahead)
    for k in range(3):  # the k-th blend of samples with more than k blends before the hue shift
        _blend(planes, changes, k, slice(bisect_left(ahead, k + 1), n))
    if len(planes) == 3 and start < n:
        shift_hue(planes[:, start:], changes.hue[start:])
    for k in range(3):  # the k-th blend of the other samples
        _blend(planes, changes, k, slice(start, bisect_left(ahead, k + 1)))


def _blend(planes: Tensor, changes: Jitter, k: int, samples: slice) -> None:
    """Apply the k-th blend of some samples, in place; compute only what one of them needs."""
    if samples.start >= samples.stop:
        return
    kinds = changes.kinds[samples, k].tolist()
    image, luma, mean = changes.blends[samples, k].T[..., None]  # (n, 1) each
    planes = planes[:, samples]
    rest = None
    if _CONTRAST in kinds:
        rest = grey(planes.mean(2, keepdim=True)).mul_(mean)  # (n, 1)
    if _SATURATION in kinds:
        with_luma = grey(planes).mul_(luma)  # (n, P)
        rest = with_luma if rest is None else with_luma.add_(rest)
    planes.mul_(image)
    if rest is not None:
        planes.add_(rest)
    planes.clamp_(0, 1)


def _select(planes: Tensor, samples: Samples) -> Tensor:
    """The planes of some samples; gathering by `planes[:, indices]` is several times slower."""
    return planes[:, samples] if isinstance(samples, slice) else planes.index_select(1, samples)


def to_grey(planes: Tensor, samples: Samples) -> None:
    """Replace the three channels of some samples with their luma, in place."""
    planes[:, samples] = grey(_select(planes, samples))


def blur(planes: Tensor, samples: Samples, sigma: Tensor, size: int, reach: int) -> None:
    """Blur some samples with a Gaussian, in place; reflected at the border, as in torchvision.

    A block of pixels is blurred by a product with the band matrix of the kernel, because torch's
    matrix products run near the machine's peak speed, and its convolutions with a kernel per sample
    run far below it.

    Args:
        planes: `(C, N, P)`.
        samples: which of the N.
        sigma: `(n, 1)` in pixels.
        size: pixels per side; P is its square.
        reach: pixels from the kernel's centre to its end.
    """
    reach = min(reach, size - 1)
    offset = torch.arange(-reach, reach + 1, device=planes.device)
    kernel = (-0.5 * (offset / sigma) ** 2).exp()
    kernel *= kernel > _FAINT
    kernel /= kernel.sum(1, keepdim=True)  # (n, k)
    block = min(size, _BLOCK)
    over = -size % block  # pixels of padding that complete the last block
    window = block + 2 * reach
    # If the kernel followed by `block` zeros is repeated `block` times and read in lines that are
    # one element shorter, the kernel moves one element to the right from line to line.
    band = F.pad(kernel, (0, block))[:, None].expand(-1, block, -1).flatten(1)
    band = band[:, : block * window].reshape(-1, block, window)  # one for each sample
    for plane in planes:  # one at a time, as one channel of a photograph fits in the cache
        x = _select(plane[None], samples).view(-1, size, size)
        x = F.pad(x, (0, 0, reach, reach), mode="reflect")
        x = F.pad(x, (0, 0, 0, over)) if over else x
        x = band[:, None] @ x.unfold(1, window, block).mT  # (n, blocks, block, S)
        x = x.flatten(1, 2)[:, :size]
        x = F.pad(x, (reach, reach), mode="reflect")
        x = F.pad(x, (0, over)) if over else x
        x = x.unfold(2, window, block).flatten(1, 2) @ band.mT  # (n, S * blocks, block)
        plane[samples] = x.view(-1, size, size + over)[..., :size].flatten(1)


def solarise(planes: Tensor, samples: Samples, threshold: float) -> None:
    """Invert the pixels at or above the threshold in some samples, in place."""
    x = _select(planes, samples)
    planes[:, samples] = x.lerp(1 - x, torch.ge(x, threshold, out=torch.empty_like(x)))


def add_noise(planes: Tensor, samples: Tensor, std: Tensor, key: int, position: Tensor) -> None:
    """Add Gaussian noise to some samples, in place, as a function of key, position and pixel.

    Args:
        planes: `(C, N, P)`.
        samples: `(n,)` indices.
        std: `(n, 1)`.
        key: a key that is used for the noise alone.
        position: `(n,)` int64.
    """
    c, _, pixels = planes.shape
    half = (c * pixels + 1) // 2
    # One hash holds the two uniform numbers of a Box-Muller pair.
    hashed = address.bits(key, to_device(position, planes.device), half)  # (n, half)
    scale = 2.0**-24
    radius = ((hashed >> 40) & 0xFFFFFF).float().add_(1).mul_(scale).log_().mul_(-2).sqrt_()
    angle = ((hashed >> 16) & 0xFFFFFF).float().mul_(scale * 2 * torch.pi)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, : c * pixels]
    normal = normal.view(-1, c, pixels).transpose(0, 1)
    planes[:, samples] = torch.addcmul(planes[:, samples], normal, std).clamp_(0, 1)
