"""The papers' linear probe: epochs of stochastic gradient descent, with several rates tried."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow.address import SGD_ORDER, SGD_SWEEP_ORDER, key, permutation
from barlow.errors import UserError
from barlow.evaluation.linear import LinearClassifier, fold_in, standardisation
from barlow.evaluation.subsets import split

# For standardised features and batches of 256, on a logarithmic grid.
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RATE_UNCHOSEN = 1e-2  # if no class has a second image to hold out
_MOMENTUM = 0.9
_DECAY = 1e-6  # Zbontar et al. 2021, appendix A


class Descent:
    """Linear classifiers at several rates, trained side by side on the same batches.

    SGD with momentum 0.9; the rates fall to zero along a cosine.

    Args:
        features: F.
        classes: C.
        rates: G learning rates.
    """

    def __init__(self, features: int, classes: int, rates: Sequence[float]) -> None:
        self._parameters = torch.zeros(len(rates), features + 1, classes)  # the last row: the bias
        self._velocity = torch.zeros_like(self._parameters)
        self._slope = torch.empty_like(self._parameters)
        self._rates = torch.tensor(rates).view(-1, 1, 1)

    def step(self, x: Tensor, y: Tensor, done: float) -> None:
        """Take one step with every classifier.

        Args:
            x: `(B, F + 1)` float32, standardised, with a last column of ones.
            y: `(B,)` int64.
            done: share of the training that is done, for the cosine.
        """
        p = torch.matmul(x, self._parameters).softmax(2)  # (G, B, C)
        p[:, torch.arange(len(y)), y] -= 1
        torch.matmul(x.T, p, out=self._slope)
        self._slope.div_(len(y)).add_(self._parameters, alpha=_DECAY)
        self._velocity.mul_(_MOMENTUM).add_(self._slope)
        factor = 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)))
        self._parameters.sub_(self._velocity * (self._rates * factor))

    def classifier(self, rate: int) -> LinearClassifier:
        """The classifier of one of the rates, by its index."""
        return LinearClassifier(self._parameters[rate, :-1], self._parameters[rate, -1])

    def best(self, x: Tensor, y: Tensor) -> int:
        """The index of the rate with the lowest cross-entropy on `(N, F)` and `(N,)`."""
        losses = [float(F.cross_entropy(self.classifier(g)(x), y)) for g in range(len(self._rates))]
        return min(range(len(losses)), key=lambda g: losses[g] if losses[g] == losses[g] else 1e30)


def sgd_probe(
    x: Tensor,
    y: Tensor,
    classes: int,
    epochs: int = 100,
    rate: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[LinearClassifier, float]:
    """Train a linear classifier on features by SGD.

    Batches, epochs, decay and schedule are the linear evaluation of Zbontar et al. 2021
    (appendix A); the rate is chosen among `RATES` on a tenth of the training images, held out.

    Args:
        x: `(M, F)` float32, training features as the encoder gives them.
        y: `(M,)` int64.
        classes: C.
        epochs: passes over the features.
        rate: learning rate to use instead of choosing one.
        seed: seed of the order and the division.
        batch_size: images per step.

    Returns:
        A classifier for features as the encoder gives them, and the rate.

    Raises:
        UserError: if `epochs` is below 1.
    """
    if epochs < 1:
        raise UserError(
            f"epochs is {epochs}: it must be at least 1, or omitted for the exact optimum"
        )
    standardise = standardisation(x)
    x = standardise(x)

    def train(x: Tensor, y: Tensor, rates: Sequence[float], stream: int) -> Descent:
        descent = Descent(x.shape[1], classes, rates)
        x = with_ones(x)
        size = min(batch_size, len(x))
        steps = len(x) // size
        for epoch in range(epochs):
            order = permutation(len(x), key(seed, stream, epoch))
            for step in range(steps):
                chosen = order[step * size : (step + 1) * size]
                descent.step(x[chosen], y[chosen], (epoch * steps + step) / (epochs * steps))
        return descent

    if rate is None:
        fit, held_out = split(y, 0.1, seed)
        rate = RATE_UNCHOSEN
        if len(held_out):
            swept = train(x[fit], y[fit], RATES, SGD_SWEEP_ORDER)
            rate = RATES[swept.best(x[held_out], y[held_out])]
    return fold_in(train(x, y, [rate], SGD_ORDER).classifier(0), standardise), rate


def with_ones(x: Tensor) -> Tensor:
    """`(N, F)` to `(N, F + 1)`: the bias is the weight of a feature that is always one."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
