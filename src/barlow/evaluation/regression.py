"""Numbers and tags from features: ridge regression, and one logistic regression per tag."""

import torch
from torch import Tensor

from barlow.errors import UserError
from barlow.evaluation.linear import LinearClassifier, fold_in, logistic_probe, standardisation

# Relative to the mean eigenvalue of the covariance of standardised features, which is 1.
PENALTIES = tuple(10.0**exponent for exponent in range(-5, 4))


def ridge_probe(x: Tensor, y: Tensor) -> tuple[LinearClassifier, float]:
    """Ridge regression, its penalty chosen by leaving out each training image in turn.

    Minimises mean squared error + penalty × sum(weight²) on standardised features; the bias is not
    penalised. The leave-one-out errors are exact and need no further fit: the error for image i
    without it is its residual over 1 - h_i, where h_i is its leverage (Allen 1974).

    Args:
        x: `(M, F)` float32, training features as the encoder gives them.
        y: `(M, T)` float32.

    Returns:
        A function from features as the encoder gives them to `(N, T)`, and the penalty, the same
        for all columns (each column counts by its share of unexplained variance).

    Raises:
        UserError: if there are fewer than 3 images, or a column does not vary.
    """
    if len(x) < 3:
        raise UserError(f"{len(x)} labelled training images: a regression needs 3 or more")
    standardise = standardisation(x)
    x = standardise(x).double()
    centre, deviation = y.double().mean(0), y.double().std(0, correction=0)
    if not bool((deviation > 0).all()):
        raise UserError("a column has the same number for all training images: remove it")
    z = (y.double() - centre) / deviation  # (M, T)
    eigenvalues, vectors = torch.linalg.eigh(x.T @ x / len(x))
    eigenvalues = eigenvalues.clamp(min=0)
    p = x @ vectors  # (M, F), uncorrelated
    slope = p.T @ z / len(x)  # (F, T)
    errors = []
    for penalty in PENALTIES:
        shrink = 1 / (eigenvalues + penalty)  # (F,)
        residual = z - p @ (shrink[:, None] * slope)
        # 1 / M is the leverage of the bias.
        leverage = (p.square() @ shrink) / len(x) + 1 / len(x)  # (M,)
        without = residual / (1 - leverage).clamp(min=1e-9)[:, None]
        errors.append(float(without.square().mean()))
    penalty = PENALTIES[min(range(len(PENALTIES)), key=lambda i: errors[i])]
    weight = vectors @ (slope / (eigenvalues + penalty)[:, None]) * deviation  # (F, T)
    found = LinearClassifier(weight.float(), centre.float())
    return fold_in(found, standardise), penalty


def tag_probe(x: Tensor, y: Tensor, seed: int = 0) -> tuple[LinearClassifier, list[float | None]]:
    """One logistic regression per tag, each with its own penalty, chosen as for classes.

    Args:
        x: `(M, F)` float32, training features as the encoder gives them.
        y: `(M, T)`, 0 or 1.
        seed: seed of the division for the choice.

    Returns:
        A function from features to log odds `(N, T)`, and the penalties; None for a tag that all
        training images have, or none of them: its log odds are the same for all images.
    """
    weight, bias = x.new_zeros(x.shape[1], y.shape[1]), x.new_zeros(y.shape[1])
    penalties = list[float | None]()
    for tag, has in enumerate(y.T.long()):
        share = float(has.float().mean())
        if share in (0.0, 1.0):
            bias[tag] = 20.0 if share else -20.0
            penalties.append(None)
            continue
        two, penalty = logistic_probe(x, has, 2, seed=seed)
        weight[:, tag] = two.weight[:, 1] - two.weight[:, 0]
        bias[tag] = two.bias[1] - two.bias[0]
        penalties.append(penalty)
    return LinearClassifier(weight, bias), penalties
