"""A linear classifier on features: multinomial logistic regression, fitted to its optimum."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from barlow.errors import UserError
from barlow.evaluation.subsets import folds, split

# The penalties that are tried, strongest first; each fit starts from the result of the one before.
PENALTIES = (1e1, 1e0, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
# Used if no class has a second image, so that none can be held out: few images need a strong one.
_PENALTY_UNCHOSEN = 1e-1
# Up to this many images, five folds are used; of more, a tenth is held out, whose error is then
# below a point.
_FEW = 5_000
# Gradient tolerances. With a rough one, the held-out loss of many images is within 0.001 of that at
# the optimum. Few images can be separated, where a weak penalty leaves almost no gradient: there, a
# rough fit stays at its start whatever the penalty, and a default one loses up to three points.
_ROUGH, _DEFAULT, _FINE = 5e-3, 3e-4, 1e-5
# The penalty is chosen on this many images, this many per feature or this many per class, whichever
# is most. On CIFAR-10 this finds the same penalty as all 45,000 images, or its neighbour in the
# list, in half the time.
_ENOUGH, _A_FEATURE, _A_CLASS = 20_000, 40, 100


@dataclass(frozen=True)
class Standardise:
    """Subtracts the mean of the training features and divides by their standard deviation.

    Attributes:
        mean: `(F,)`.
        scale: `(F,)`, the inverse standard deviation; 0 for a constant feature.
    """

    mean: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """`(N, F)` to `(N, F)`."""
        return (x - self.mean).mul_(self.scale)


@dataclass(frozen=True)
class LinearClassifier:
    """Scores that are linear in the features.

    Attributes:
        weight: `(F, C)`.
        bias: `(C,)`.
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Features `(N, F)` to logits `(N, C)`."""
        return x @ self.weight + self.bias


def standardisation(x: Tensor) -> Standardise:
    """The standardisation by the mean and standard deviation of training features.

    The features of an encoder differ in scale by orders of magnitude; otherwise one penalty and one
    learning rate for all of them would favour some features because of their scale.

    Args:
        x: `(M, F)` float32, of the training images only.

    Returns:
        A function for any features `(N, F)`.

    Example:
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> standardisation(x)(x)
        tensor([[-1.,  0.],
                [ 1.,  0.]])
    """
    mean = x.mean(0)
    deviation = (x - mean).square_().mean(0).sqrt()  # torch.var over rows takes ten times as long
    constant = deviation <= 1e-6 * mean.abs().clamp(min=1e-6)  # varies by rounding only
    return Standardise(mean, torch.where(constant, 0.0, 1 / deviation))


def fold_in(classifier: LinearClassifier, standardise: Standardise) -> LinearClassifier:
    """Fold the standardisation into a classifier, which then takes the encoder's own features."""
    weight = classifier.weight * standardise.scale[:, None]
    return LinearClassifier(weight, classifier.bias - standardise.mean @ weight)


def fit_logistic(
    x: Tensor,
    y: Tensor,
    classes: int,
    penalty: float,
    start: LinearClassifier | None = None,
    covariance: Tensor | None = None,
    tolerance: float = _DEFAULT,
    max_steps: int = 200,
) -> LinearClassifier:
    """Minimise mean cross-entropy + penalty / 2 × sum(weight²) by L-BFGS.

    The same objective as scikit-learn's `LogisticRegression(C=1 / (M * penalty))`. The bias is
    not penalised.

    Args:
        x: `(M, F)` float32, centred.
        y: `(M,)` int64.
        classes: C; labels are below it.
        penalty: positive.
        start: classifier to start from; default: zero.
        covariance: covariance of x, `(F, F)` float64, if it is known already.
        tolerance: on the largest entry of the (preconditioned) gradient; with the default, the
            accuracy is within 0.01 points of that at the optimum, and the loss within 0.0001.
        max_steps: maximum number of L-BFGS steps.

    Returns:
        The classifier.
    """
    # The features of an encoder are strongly correlated, and gradient methods are slow in the
    # directions of small eigenvalues. In coordinates v with weight = P v, where P P^T is the
    # inverse of the Hessian at zero, covariance / C + penalty × I, the problem is well conditioned.
    precondition = _preconditioner(
        _covariance(x) if covariance is None else covariance, classes, penalty
    )
    v = x.new_zeros(x.shape[1] + 1, classes)  # last row: the bias
    if start is not None:
        v[:-1] = torch.linalg.solve_triangular(precondition, start.weight, upper=True)
        v[-1] = start.bias / classes**0.5
    v.requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [v],
        max_iter=max_steps,
        tolerance_grad=tolerance / classes**0.5,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        with torch.no_grad():
            weight, bias = precondition @ v[:-1], v[-1] * classes**0.5
            # Log-probabilities are (C, M): as (M, C), the product for the slope would take six
            # times as long, and a softmax over only ten classes would not be vectorised.
            log_p = torch.addmm(bias[:, None], weight.T, x.T).log_softmax(0)  # (C, M)
            of_label = log_p.gather(0, y[None])
            nll = -of_label.double().mean()
            residual = log_p.exp_().scatter_add_(0, y[None], -torch.ones_like(of_label))
            slope = residual @ x / len(y) + penalty * weight.T  # (C, F)
            slope_bias = residual.mean(1) * classes**0.5
            v.grad = torch.cat([(slope @ precondition).T, slope_bias[None]])
            return nll + penalty / 2 * weight.double().square().sum()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    v = v.detach()
    return LinearClassifier(precondition @ v[:-1], v[-1] * classes**0.5)


def _covariance(x: Tensor) -> Tensor:
    return (x.T @ x).double() / len(x)


def _preconditioner(covariance: Tensor, classes: int, penalty: float) -> Tensor:
    hessian = covariance / classes
    # The ridge exceeds the rounding errors of x.T @ x; a preconditioner need not be exact.
    hessian.diagonal().add_(max(penalty, 1e-5 * float(hessian.diagonal().mean()), 1e-12))
    # hessian = L L^T, P = L^-T: upper triangular.
    lower = torch.linalg.cholesky(hessian)
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    return inverse.T.contiguous().float()


def choose_penalty(x: Tensor, y: Tensor, classes: int, seed: int = 0) -> float:
    """Choose the penalty by the cross-entropy of training images that are held out.

    Up to 5,000 images, they are divided into five folds; of more, a tenth is held out, and the
    trial fits use no more images than the choice needs. Their penalty is multiplied by the number
    of all images over theirs, so that it weighs as much against the loss of one image. Test images
    are not among the arguments, so they cannot influence the choice.

    Args:
        x: `(M, F)` float32, training features, standardised.
        y: `(M,)` int64.
        classes: C.
        seed: seed of the division.

    Returns:
        One of `PENALTIES`; 0.1 if no class has two images.
    """
    largest = int(torch.bincount(y).max())
    if largest < 2:
        return _PENALTY_UNCHOSEN
    if len(y) > _FEW:
        fit, held_out = split(y, 0.1, seed)
        enough = max(_ENOUGH, _A_FEATURE * x.shape[1], _A_CLASS * classes)
        if len(fit) > enough:
            fit = fit[split(y[fit], enough / len(fit), seed)[1]]
        held_out = _of_seen(y, held_out, fit)
        return _descend(_Trial(x, y, classes, fit, held_out, _ROUGH))
    total = torch.zeros(len(PENALTIES), dtype=torch.double)
    for fit, held_out in folds(y, min(5, largest), seed):
        held_out = _of_seen(y, held_out, fit)
        if not len(held_out):
            continue
        trial, classifier = _Trial(x, y, classes, fit, held_out, _DEFAULT), None
        for i, penalty in enumerate(PENALTIES):
            loss, classifier = trial(penalty, classifier)
            total[i] += len(held_out) * loss
    return PENALTIES[int(total.argmin())]


def _of_seen(y: Tensor, held_out: Tensor, fit: Tensor) -> Tensor:
    """The held-out images whose class is also fitted; no penalty helps to classify the others."""
    return held_out[torch.isin(y[held_out], y[fit])]


def _descend(trial: "_Trial") -> float:
    """Search from the middle penalty in the direction of falling loss, up to the minimum.

    With many images the loss has one minimum along the penalties, and it pays to avoid fits.
    """
    middle = len(PENALTIES) // 2
    found = {middle: trial(PENALTIES[middle], None)}
    for step in (1, -1):  # weaker, else stronger
        i = middle
        while 0 <= i + step < len(PENALTIES):
            found[i + step] = trial(PENALTIES[i + step], found[i][1])
            if found[i + step][0] >= found[i][0]:
                break
            i += step
        if i != middle:
            break
    return PENALTIES[min(found, key=lambda i: found[i][0])]


class _Trial:
    """Fits on some of the training images and returns the cross-entropy on those held out."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        classes: int,
        fit: Tensor,
        held_out: Tensor,
        tolerance: float,
    ) -> None:
        self._x, self._y, self._classes = x[fit], y[fit], classes
        self._tolerance = tolerance
        self._stronger = len(y) / len(fit)
        centre = self._x.mean(0)
        self._x -= centre
        self._x_held_out, self._y_held_out = x[held_out] - centre, y[held_out]
        self._covariance = _covariance(self._x)  # shared by all fits; takes a fifth of one

    def __call__(
        self, penalty: float, start: LinearClassifier | None
    ) -> tuple[float, LinearClassifier]:
        """The loss, and the classifier for the next penalty to start from."""
        classifier = fit_logistic(
            self._x,
            self._y,
            self._classes,
            penalty * self._stronger,
            start,
            self._covariance,
            self._tolerance,
        )
        return float(F.cross_entropy(classifier(self._x_held_out), self._y_held_out)), classifier


def logistic_probe(
    x: Tensor, y: Tensor, classes: int, penalty: float | None = None, seed: int = 0
) -> tuple[LinearClassifier, float]:
    """Multinomial logistic regression with the penalty chosen on held-out training images.

    Args:
        x: `(M, F)` float32, training features as the encoder gives them.
        y: `(M,)` int64.
        classes: C.
        penalty: penalty to use instead of choosing one.
        seed: seed of the division for the choice.

    Returns:
        A classifier for features as the encoder gives them, and the penalty.

    Raises:
        UserError: if the images are all of one class.
    """
    if int((torch.bincount(y) > 0).sum()) < 2:
        raise UserError("all training labels are of one class: a classifier needs two or more")
    standardise = standardisation(x)
    x = standardise(x)
    span = None
    if len(x) < x.shape[1]:
        # Because of the penalty, the weight has no component orthogonal to all images. So if there
        # are fewer images than features, coordinates in an orthonormal basis of their span suffice.
        span = torch.linalg.qr(x.T).Q  # (F, M)
        x = x @ span
    if penalty is None:
        penalty = choose_penalty(x, y, classes, seed=seed)
    tolerance = _FINE if len(x) <= _FEW else _DEFAULT
    found = fit_logistic(x, y, classes, penalty, tolerance=tolerance)
    if span is not None:
        found = LinearClassifier(span @ found.weight, found.bias)
    return fold_in(found, standardise), penalty
