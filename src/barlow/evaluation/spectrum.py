"""What can be said of features without labels: how many directions they use, and how evenly."""

import torch
from torch import Tensor, nn

from barlow.errors import UserError

_EPS = 1e-7  # RankMe's, for float32


def rankme(x: Tensor) -> float:
    """Smooth rank of features: exp of the entropy of their singular values.

    Garrido et al. 2023, equation 1 (features are not centred). From 1, collapsed, to
    min(N, F); between encoders of one architecture, more tends to be better.

    Args:
        x: `(N, F)` float32.

    Returns:
        The number.

    Example:
        >>> round(rankme(torch.eye(4)), 2)
        4.0
    """
    return _exp_entropy(_eigenvalues(x, centre=False).sqrt(), _EPS)


def effective_rank(x: Tensor) -> float:
    """Exp of the entropy of the eigenvalues of the covariance (Roy and Vetterli 2007).

    As `rankme`, but on centred features and on variances instead of their square roots: the number
    of directions among which the variance is spread.
    """
    return _exp_entropy(_eigenvalues(x), 0.0)


def alpha_req(x: Tensor, first: int = 4, last: int = 100) -> float:
    """Decay of the spectrum: eigenvalue number i of the covariance falls as i ** -alpha.

    Agrawal et al. 2022. Near 1 is a good sign; well above, few directions carry everything; well
    below, the tail is noise.

    Args:
        x: `(N, F)` float32.
        first: rank from which the line is fitted; the very first eigenvalues do not lie on it.
        last: rank up to which the line is fitted.

    Returns:
        Alpha, from a least-squares line through the logarithms with weights 1 / rank, as in the
        authors' code; NaN with fewer than three eigenvalues to fit.
    """
    spectrum = _eigenvalues(x).double()
    rank = torch.arange(1, len(spectrum) + 1, dtype=torch.double)
    if len(spectrum) < 2 * first:
        first = 1
    used = (rank >= first) & (rank <= last) & (spectrum > 1e-10 * spectrum[0])
    if int(used.sum()) < 3:
        return float("nan")
    a, b, weight = rank[used].log(), spectrum[used].log(), 1 / rank[used]
    a = a - (weight * a).sum() / weight.sum()
    return -float((weight * a * b).sum() / (weight * a * a).sum())


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """Rank of what tells images apart, beyond what their augmentation does to them.

    Thilak et al. 2024, equations 1 to 4: exp of the entropy of the eigenvalues of
    S_w^-1/2 S_b S_w^-1/2, where the views of one image are a class.

    Args:
        views: `(N, V, F)` float32, V views of each of N images; the paper takes 1,000 images,
            50 views each.
        delta: added to the within-class covariance (the paper's, 1e-4).

    Returns:
        The number, from 1 to min(N - 1, F); more is better.

    Raises:
        UserError: with fewer than two views or images.
    """
    images, number, width = views.shape
    if images < 2 or number < 2:
        raise UserError(f"LiDAR of {images} images with {number} views: give at least two of each")
    x = views.double()
    means = x.mean(1)  # (N, F)
    within = (x - means[:, None]).flatten(0, 1)  # (N * V, F)
    s_w = within.T @ within / (images * (number - 1)) + delta * torch.eye(width, dtype=x.dtype)
    between = means - means.mean(0)
    values, vectors = torch.linalg.eigh(s_w)
    scaled = between @ vectors * values.rsqrt() / (images - 1) ** 0.5  # (N, F)
    return _exp_entropy(torch.linalg.svdvals(scaled).square(), _EPS)


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """Log of the mean Gaussian potential of pairs on the sphere (Wang and Isola 2020).

    Args:
        x: `(N, F)` float32.
        t: of the potential; 2 in the paper.

    Returns:
        0 if all features point the same way, towards -2 t the more evenly they are spread.
    """
    x = nn.functional.normalize(x)
    return float(torch.pdist(x).square().mul(-t).exp().mean().log())


def alignment(a: Tensor, b: Tensor) -> float:
    """Mean squared distance on the sphere of two views of the same images (Wang and Isola 2020).

    Args:
        a: `(N, F)` float32, of one view.
        b: `(N, F)` float32, of the other.

    Returns:
        0 if augmentation changes nothing; 2 for views no more alike than chance.
    """
    distance = nn.functional.normalize(a) - nn.functional.normalize(b)
    return float(distance.square().sum(1).mean())


def mean_off_diagonal(x: Tensor) -> float:
    """Mean absolute correlation between two different features.

    Barlow Twins' redundancy reduction (Zbontar et al. 2021, equation 1) lowers these correlations
    in the embedding; this measures them in the representation. Constant features are left out.

    Args:
        x: `(N, F)` float32.

    Returns:
        Between 0 and 1; less is less redundant.
    """
    x = x - x.mean(0)
    deviation = x.norm(dim=0)
    alive = deviation > 1e-6 * deviation.max()
    x = x[:, alive] / deviation[alive]
    c = x.T @ x
    width = len(c)
    if width < 2:
        return float("nan")
    return float((c.abs().sum() - c.diagonal().abs().sum()) / (width * (width - 1)))


def spectrum(x: Tensor) -> Tensor:
    """Eigenvalues of the covariance as shares of the variance, largest first: `(min(N, F),)`."""
    values = _eigenvalues(x)
    shares: Tensor = values / values.sum()
    return shares


def _eigenvalues(x: Tensor, centre: bool = True) -> Tensor:
    """Squared singular values over N, largest first: `(min(N, F),)`."""
    x = x.double()
    x = x - x.mean(0) if centre else x
    # The eigenvalues of the smaller of the two Gram matrices; the larger one adds only zeros.
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0) / len(x)
    return values


def _exp_entropy(values: Tensor, eps: float) -> float:
    p = values / values.sum() + eps
    return float(torch.special.entr(p).sum().exp())
