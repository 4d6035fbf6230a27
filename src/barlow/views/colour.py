"""What happens to a view's pixel values.

Everything here works in place on planes: `(C, N, P)` float32 in 0 to 1, where P is the pixels of
a view. A channel of the whole batch is then one contiguous block, and a run of samples a slice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from barlow import address
from barlow.views.settings import ViewSettings

_GREY = (0.2989, 0.587, 0.114)  # ITU-R 601, torchvision's digits
_TINY = 1e-12  # a grey pixel has no hue and needs none


def grey(planes: Tensor) -> Tensor:
    """The luma of RGB planes: `(3, N, P)` to `(N, P)`."""
    red, green, blue = planes
    luma: Tensor = red * _GREY[0]
    return luma.add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def shift_hue(planes: Tensor, shift: Tensor) -> None:
    """Turn the hue of RGB planes in place, exactly as through HSV and back.

    A turn of the hue keeps the largest and the smallest channel of a pixel, so it needs the hue
    `h` alone, in sixths of the circle with red at 0. Its distance from red, times the chroma,
    comes to `max(g, b) + min(g, b) + largest - r - 2 * smallest` in all six sectors, its side is
    the sign of `g - b`, and a channel whose own colour is at `h0` becomes
    `largest - chroma * clamp(distance(h, h0) - 1, 0, 1)`. There is no comparison in it: `where`
    and boolean masks cost torch more on the CPU than ten of these steps.

    Args:
        planes: `(3, N, P)`.
        shift: `(N, 1)` share of the circle.
    """
    red, green, blue = planes
    upper, lower = torch.maximum(green, blue), torch.minimum(green, blue)
    largest, smallest = torch.maximum(upper, red), torch.minimum(lower, red)
    hue = upper.add_(lower).add_(largest).sub_(red).sub_(smallest, alpha=2)
    side = torch.sub(green, blue, out=lower)
    chroma = largest.sub_(smallest)
    hue.div_(torch.clamp(chroma, min=_TINY, out=red)).copysign_(side).add_(shift * 6)
    turns = torch.mul(hue, 1 / 6, out=side).round_()
    hue.sub_(turns, alpha=6)  # -3 to 3
    base = smallest.sub_(chroma)
    # |distance - 3| unrolls the circle: from 3 on, the way back is shorter. Then
    # largest - chroma * clamp(distance - 1, 0, 1) = base + chroma * clamp(3 - distance, 1, 2).
    for plane, colour in ((red, 0), (green, 2), (blue, -2)):
        near = torch.sub(hue, colour, out=turns).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(base, chroma, near, out=plane)


def _blend(planes: Tensor, operation: Tensor, factors: Tensor) -> None:
    """One of brightness (0), contrast (1) and saturation (2) per sample, in place.

    Each is a blend of the image with something: black, its mean luma, its luma. So all three are
    `factor * x + pixel * luma + level`, with a share of the luma and a level for each sample.

    Args:
        planes: `(C, N, P)`; with one channel the image is its own luma.
        operation: `(N, 1)`.
        factors: `(N, 3)`, by operation.
    """
    luma = grey(planes) if len(planes) == 3 else planes[0].clone()  # (N, P)
    factor = factors.gather(1, operation)  # (N, 1)
    rest = 1 - factor
    level = luma.mean(1, keepdim=True) * rest * (operation == 1)
    torch.addcmul(level, luma, rest * (operation == 2), out=luma)
    torch.addcmul(luma, planes, factor, out=planes).clamp_(0, 1)


def jitter_parameters(settings: ViewSettings, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the colour changes as torchvision's `ColorJitter` does.

    Args:
        settings: the view's distribution.
        draws: `(N, 8)` uniform numbers: four strengths, four whose ranks are the order.

    Returns:
        Factors of brightness, contrast and saturation `(N, 3)`; shift of the hue `(N, 1)`; the
        order of the four operations `(N, 4)`, 3 being the hue.
    """
    strength = torch.tensor([settings.brightness, settings.contrast, settings.saturation])
    low = (1 - strength).clamp(min=0)
    factors = low + (1 + strength - low) * draws[:, :3]
    hue = (2 * draws[:, 3:4] - 1) * settings.hue
    return factors, hue, draws[:, 4:8].argsort(1)


def jitter(planes: Tensor, factors: Tensor, hue: Tensor, order: Tensor, jittered: Tensor) -> None:
    """Brightness, contrast, saturation and hue, every sample in its own order, in place.

    The hue is the dear one, so it is done once for the whole batch: before it come the blends
    that precede it, after it the rest. The caller has the samples sorted by `sort_key`, so each of
    these steps takes one slice.

    Args:
        planes: `(C, N, P)`, C being 1 or 3, sorted.
        factors: `(N, 3)`.
        hue: `(N, 1)`.
        order: `(N, 4)`.
        jittered: `(N,)` bool; the others come first and stay as they are.
    """
    device = planes.device
    ahead = sort_key(order, jittered)  # how many blends come before the hue
    counts = torch.bincount(ahead + 1, minlength=5).cumsum(0).tolist()
    n = len(ahead)
    blends = order[order != 3].view(n, 3, 1).to(device)
    ahead = ahead.clamp(min=0)[:, None, None].to(device)
    factors, hue = factors.to(device), hue.to(device)
    start = counts[0]
    for k in range(3):  # the k-th blend of those who have more than k before the hue
        if (some := slice(counts[k + 1], n)).start < n:
            _blend(planes[:, some], blends[some, k], factors[some])
    if len(planes) == 3 and start < n:
        shift_hue(planes[:, start:], hue[start:])
    for k in range(3):  # and of those who have not
        if (some := slice(start, counts[k + 1])).stop > start:
            _blend(planes[:, some], blends[some, k], factors[some])


def sort_key(order: Tensor, jittered: Tensor) -> Tensor:
    """The number of blends before the hue, `(N,)`; -1 for a sample without colour changes."""
    return torch.where(jittered, (order == 3).int().argmax(1), -1)


def to_grey(planes: Tensor, some: Tensor) -> None:
    """Replace the three channels of samples `some`, `(n,)` indices, with their luma, in place."""
    planes[:, some] = grey(planes[:, some])


def blur(planes: Tensor, some: Tensor, sigma: Tensor, size: int, reach: int) -> None:
    """Gaussian blur of samples `some`, in place; reflected at the border, as torchvision.

    Args:
        planes: `(C, N, P)`.
        some: `(n,)` indices.
        sigma: `(n, 1)` pixels.
        size: pixels of each side, P being its square.
        reach: pixels from the kernel's middle to its end.
    """
    reach = min(reach, size - 1)
    offset = torch.arange(-reach, reach + 1, device=planes.device)
    kernel = (-0.5 * (offset / sigma) ** 2).exp()
    kernel /= kernel.sum(1, keepdim=True)  # (n, k)
    c, n = len(planes), len(some)
    x = planes[:, some].reshape(1, c * n, size, size)
    kernel = kernel.repeat(c, 1)
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    x = F.conv2d(x, kernel[:, None, None, :], groups=c * n)
    x = F.conv2d(x, kernel[:, None, :, None], groups=c * n)
    planes[:, some] = x.view(c, n, size * size)


def solarise(planes: Tensor, some: Tensor, threshold: float) -> None:
    """Invert the pixels at or above the threshold in samples `some`, in place."""
    x = planes[:, some]
    planes[:, some] = x.lerp(1 - x, torch.ge(x, threshold, out=torch.empty_like(x)))


def add_noise(planes: Tensor, some: Tensor, std: Tensor, key: int, position: Tensor) -> None:
    """Add Gaussian noise to samples `some`, in place, every pixel's by its address.

    Args:
        planes: `(C, N, P)`.
        some: `(n,)` indices.
        std: `(n, 1)`.
        key: of the noise alone.
        position: `(n,)` int64.
    """
    c, _, pixels = planes.shape
    half = (c * pixels + 1) // 2
    # One hash holds the two uniform numbers of a Box-Muller pair.
    hashed = address.bits(key, position.to(planes.device), half)  # (n, half)
    scale = 2.0**-24
    radius = ((hashed >> 40) & 0xFFFFFF).float().add_(1).mul_(scale).log_().mul_(-2).sqrt_()
    angle = ((hashed >> 16) & 0xFFFFFF).float().mul_(scale * 2 * torch.pi)
    normal = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, : c * pixels]
    normal = normal.view(-1, c, pixels).transpose(0, 1)
    planes[:, some] = torch.addcmul(planes[:, some], normal, std).clamp_(0, 1)
