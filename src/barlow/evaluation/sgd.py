"""The papers' linear probe: epochs of stochastic gradient descent, the rate swept."""

from collections.abc import Sequence

import torch
from torch import Tensor

from barlow.address import key, permutation
from barlow.errors import UserError
from barlow.evaluation.linear import LinearClassifier, fold_in, standardisation
from barlow.evaluation.subsets import split

# For standardised features and batches of 256, on a logarithmic grid.
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_ORDER, _SWEEP = 103, 104


def sgd_probe(
    x: Tensor,
    y: Tensor,
    classes: int,
    epochs: int = 100,
    rate: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    weight_decay: float = 1e-6,
) -> tuple[LinearClassifier, float]:
    """Train a linear classifier on features by SGD with momentum 0.9 and a cosine to zero.

    Batches, epochs, decay and schedule are the linear evaluation of Zbontar et al. 2021
    (appendix A); the rate is chosen among `RATES` on a tenth of the training images, held out,
    all rates being trained side by side.

    Args:
        x: `(M, F)` float32, training features as the encoder gives them.
        y: `(M,)` int64.
        classes: C.
        epochs: passes over the features.
        rate: skips the choice.
        seed: of the order and the division.
        batch_size: images a step.
        weight_decay: on the weights and the bias.

    Returns:
        A classifier for features as the encoder gives them, and the rate.

    Raises:
        UserError: if `epochs` is below 1.
    """
    if epochs < 1:
        raise UserError(f"epochs is {epochs}: give 1 or more, or none for the exact optimum")
    standardise = standardisation(x)
    x = standardise(x)

    def train(x: Tensor, y: Tensor, rates: Sequence[float], stream: int) -> tuple[Tensor, Tensor]:
        return _train(x, y, classes, rates, epochs, key(seed, stream), batch_size, weight_decay)

    if rate is None:
        fit, held_out = split(y, 0.1, seed)
        rate = RATES[2]
        if len(held_out):
            weight, bias = train(x[fit], y[fit], RATES, _SWEEP)
            scores = torch.einsum("nf,gfc->gnc", x[held_out], weight) + bias
            losses = [float(torch.nn.functional.cross_entropy(s, y[held_out])) for s in scores]
            rate = RATES[min(range(len(RATES)), key=lambda g: _finite(losses[g]))]
    weight, bias = train(x, y, [rate], _ORDER)
    return fold_in(LinearClassifier(weight[0], bias[0, 0]), standardise), rate


def _finite(loss: float) -> float:
    return loss if loss == loss else float("inf")


def _train(
    x: Tensor,
    y: Tensor,
    classes: int,
    rates: Sequence[float],
    epochs: int,
    seed: int,
    batch_size: int,
    weight_decay: float,
) -> tuple[Tensor, Tensor]:
    """Weights `(G, F, C)` and biases `(G, 1, C)`, one classifier a rate, on the same batches."""
    batch_size = min(batch_size, len(x))
    steps = len(x) // batch_size
    parameters = x.new_zeros(len(rates), x.shape[1] + 1, classes)  # the last row is the bias
    velocity = torch.zeros_like(parameters)
    slope = torch.empty_like(parameters)
    rate = torch.tensor(rates).view(-1, 1, 1)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    rows = torch.arange(batch_size)
    for epoch in range(epochs):
        order = permutation(len(x), key(seed, epoch))
        for step in range(steps):
            chosen = order[step * batch_size : (step + 1) * batch_size]
            batch = x[chosen]  # (B, F + 1)
            p = torch.matmul(batch, parameters).softmax(2)  # (G, B, C)
            p[:, rows, y[chosen]] -= 1
            torch.matmul(batch.T, p, out=slope)
            slope.div_(batch_size).add_(parameters, alpha=weight_decay)
            velocity.mul_(0.9).add_(slope)
            done = (epoch * steps + step) / (epochs * steps)
            parameters.sub_(
                velocity * (rate * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))
            )
    return parameters[:, :-1], parameters[:, -1:]
