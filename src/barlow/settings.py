"""All settings of a pretraining run: one typed field each, with its default and its origin."""

import dataclasses
import inspect
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from barlow.errors import UserError, one_line

TRACKERS = ("wandb", "tensorboard", "trackio", "mlflow")

# Default learning rates of weights, and of biases and norms. Those of LARS are the paper's (Zbontar
# et al. 2021), and SGD shares them.
_RATES = {"lars": (0.2, 0.0048), "sgd": (0.2, 0.0048), "adamw": (2e-3, 2e-3), "muon": (0.04, 0.02)}

_COUNTS = (
    *("image_size", "eval_size", "channels", "pool", "stages", "validation_limit", "limit"),
    *("epochs", "accumulate", "devices", "save_every", "eval_every", "log_every"),
)


@dataclass(frozen=True)
class Settings:
    """Settings of a pretraining run; each field is an option of `barlow pretrain`.

    The same names are the keys of a recipe and of a run's `config.yaml`.

    Example:
        >>> Settings.of("cifar10", recipe="cifar10", epochs=5).encoder
        'resnet18'
    """

    source: str
    """source of the images: a folder, Parquet files, or a name such as cifar10"""

    encoder: str = "resnet50"
    """architecture: any timm name"""
    encoder_args: dict[str, Any] = field(default_factory=dict)
    """arguments for timm's constructor, such as '{"channels": [32, 64, 128, 256]}'"""
    stem: Literal["auto", "standard", "small", "padded", "strided"] = "auto"
    """first layers of the encoder: standard (timm's own), or for a ResNet small (a 3x3 convolution,
    no pooling), padded (small with two pixels of padding, as in solo-learn) or strided (small with
    a stride of 2, for a quarter of the computation); auto: small for a ResNet at up to 64 pixels,
    else standard"""
    pool: int = 1
    """side of the grid that each feature map is averaged to; 2 keeps the four quadrants apart, for
    four times the features"""
    stages: int = 1
    """number of last stages whose feature maps make up the representation"""
    pretrained: bool = False
    """start from timm's supervised weights (downloaded)"""
    init: str | None = None
    """start from a trained encoder: a run, a checkpoint, a timm folder, hf://OWNER/NAME, or a file
    of weights of another project; a checkpoint or file of weights also initialises the projector,
    if the widths agree"""
    projector: list[int] = field(default_factory=lambda: [8192, 8192, 8192])
    """widths of the projector's layers (paper: 8192 three times)"""
    lambd: float = 0.0051
    """weight of the redundancy-reduction term (paper: 0.0051); a narrower projector needs a larger
    weight: 0.02 at width 256 (Agrawal et al. 2024)"""
    off_diagonal_target: float = 0.0
    """target of the off-diagonal correlations (paper: 0; -1: HSIC, Tsai et al. 2021)"""
    loss_scale: float = 1.0
    """factor on the whole loss, for published recipes that use one"""

    image_size: int = 224
    """height and width of a view in pixels"""
    eval_size: int | None = None
    """height and width of the encoder's images after training; default: image_size. A network
    trained on small crops does better on somewhat larger images (Touvron et al. 2019)"""
    channels: int = 3
    """number of image channels"""
    views: str = "auto"
    """preset of the two view distributions: paper, small, digits, aerial, microscopy, or auto:
    small up to 64 pixels, else paper"""
    view1: dict[str, Any] = field(default_factory=dict)
    """changes to the first view's distribution, such as '{"blur": 0.5}'"""
    view2: dict[str, Any] = field(default_factory=dict)
    """changes to the second view's distribution"""
    validation: str | None = None
    """source of held-out images for validation; default: the source's own validation split, else
    its test split"""
    validation_limit: int = 2048
    """maximum number of images to validate on"""
    limit: int | None = None
    """use only the first N images of the source"""
    max_broken: float = 0.05
    """largest share of unreadable images; above it, training stops"""

    epochs: int = 100
    """passes over the images (paper: 1000); overrides the minutes of a recipe"""
    minutes: float | None = None
    """train for this many minutes of wall-clock time instead of for epochs; the learning rate
    follows the clock"""
    batch_size: int = 256
    """images per step, over all devices (paper: 2048; 256 does nearly as well, section 4)"""
    accumulate: int = 1
    """micro-batches per step; the loss is still that of the whole batch, in the memory of one
    micro-batch"""
    optimizer: Literal["lars", "adamw", "sgd", "muon"] = "lars"
    """optimiser: lars (paper), adamw, sgd, or muon (Jordan 2024, for short trainings)"""
    lr: float | None = None
    """learning rate of weights, multiplied by batch_size / 256 for lars and sgd; default: 0.2 for
    lars (paper) and sgd, 0.002 for adamw, 0.04 for muon"""
    lr_bias_norm: float | None = None
    """learning rate of biases and norms, multiplied like lr; default: 0.0048 for lars (paper) and
    sgd, 0.002 for adamw, 0.02 for muon"""
    weight_decay: float = 1.5e-6
    """weight decay; not applied to biases and norms (paper: 1.5e-6; its code: 1e-6)"""
    momentum: float = 0.9
    """momentum of lars, sgd and muon; beta1 of adamw"""
    lars_eta: float = 0.001
    """trust coefficient of lars (paper: 0.001)"""
    lars_clip: bool = False
    """cap the rate of each weight under lars at that of sgd, as solo-learn does"""
    warmup_epochs: float = 10.0
    """epochs of linear warm-up (paper: 10), at most a tenth of the training; with minutes, always a
    tenth"""
    final_lr: float = 0.001
    """factor on the learning rate at the end of the cosine schedule (paper's code: 0.001)"""

    seed: int = 0
    """random seed of initialisation, image order and views"""
    precision: Literal["64", "32", "bf16", "16"] = "32"
    """arithmetic: 64 for float64 (to compare runs exactly), 32 for float32, bf16 or 16 for mixed
    precision with bfloat16 or float16"""
    compile: bool = False
    """compile the model with torch.compile"""
    accelerator: str = "auto"
    """device type: auto, cpu, cuda or mps"""
    devices: int = 1
    """processes on this machine, one per device"""
    sync_batch_norm: bool = True
    """synchronise batch normalisation over all devices, so that their number changes the training
    by rounding only"""
    workers: int = 2
    """processes per device that read and crop images; not needed for images of up to 64 pixels
    that fit in memory"""

    save_every: int = 10
    """epochs between checkpoints that are kept"""
    save_minutes: float = 10.0
    """minutes between saves of the checkpoint that a run resumes from"""
    eval_every: int | None = None
    """epochs between validations; default: chosen so that they take about 3 % of the time"""
    log_every: int = 50
    """steps between rows of metrics.csv"""
    track: list[str] = field(default_factory=list)
    """also send the metrics to wandb, tensorboard, trackio or mlflow; separate several with
    commas"""

    def __post_init__(self) -> None:
        """Convert values to plain types, as in a recipe, and reject invalid ones."""
        for name, kind in get_type_hints(Settings).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                value = str(value)
                if value not in get_args(kind):
                    raise UserError(
                        f"{name} is {value!r}: expected one of {', '.join(get_args(kind))}"
                    )
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Path):
                value = str(value)
            elif isinstance(value, str) and float in (kind, *get_args(kind)):
                with suppress(ValueError):
                    value = float(value)  # YAML reads 1e-3 as a string
            if not _is_a(value, kind):
                expected = (
                    inspect.formatannotation(kind).replace("typing.", "").removesuffix(" | None")
                )
                raise UserError(f"{name} is {value!r}: expected a value of type {expected}")
            object.__setattr__(self, name, value)
        self._check()

    @classmethod
    def of(cls, source: str, recipe: str | Path | None = None, **overrides: Any) -> "Settings":
        """Combine the defaults, a recipe and single values; later ones take precedence.

        Args:
            source: where the images come from.
            recipe: name of a shipped recipe, or path to a YAML file.
            **overrides: fields of this class.

        Raises:
            UserError: if the recipe or a field does not exist, or a value is invalid.
        """
        values = {**(recipe_beside(recipe, overrides) if recipe else {}), **overrides}
        check_names(values, recipe)
        return cls(**{**values, "source": source})  # a config.yaml used as a recipe has a source

    def to_dict(self) -> dict[str, Any]:
        """Plain values as stored in `config.yaml`, with the learning rates filled in."""
        lr, lr_bias_norm = self.rates
        return dataclasses.asdict(self) | {"lr": lr, "lr_bias_norm": lr_bias_norm}

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of weights, and of biases and norms; default: the optimiser's own."""
        lr, lr_bias_norm = _RATES[self.optimizer]
        return (
            lr if self.lr is None else self.lr,
            lr_bias_norm if self.lr_bias_norm is None else self.lr_bias_norm,
        )

    @property
    def view_preset(self) -> str:
        """The preset that `views` selects at this image size."""
        if self.views != "auto":
            return self.views
        return default_preset(self.image_size)

    def _check(self) -> None:
        for name in _COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        for name in ("lr", "lr_bias_norm", "lars_eta", "weight_decay", "warmup_epochs", "workers"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise UserError(f"{name} is {value}: it must not be negative")
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"minutes is {self.minutes}: it must be greater than 0")
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"max_broken is {self.max_broken}: it must be a share between 0 and 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum}: it must be at least 0 and less than 1")
        if self.batch_size < 2:
            raise UserError(
                f"batch_size is {self.batch_size}: Barlow Twins computes correlations over the "
                "batch and needs at least 2 images, preferably 128 or more"
            )
        parts = self.devices * self.accumulate
        if self.batch_size % parts or self.batch_size // parts < 2:
            near = max(2, round(self.batch_size / parts)) * parts
            raise UserError(
                f"batch_size {self.batch_size} cannot be split evenly over {self.devices} "
                f"device(s) x {self.accumulate} micro-batch(es) of at least 2 images: use a "
                f"multiple of {parts}, such as {near}"
            )
        if not self.projector or min(self.projector) < 1:
            raise UserError(
                f"projector is {self.projector}: expected the widths of its layers, each at least 1"
            )
        for name in self.track:
            if name not in TRACKERS:
                raise UserError(
                    f"track is {name!r}: use any of {', '.join(TRACKERS)}, separated by commas"
                )


def default_preset(image_size: int) -> str:
    """The preset of views for a run that names none: "small" up to 64 pixels, "paper" above."""
    return "small" if image_size <= 64 else "paper"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    names = (file.name for file in _recipes().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """Load the values of a recipe.

    Args:
        recipe: name of a shipped recipe, or path to a YAML file.

    Returns:
        A mapping from field names of `Settings` to values.

    Raises:
        UserError: if there is no such recipe, or it is not a YAML mapping.
    """
    path = Path(recipe)
    if str(recipe) in recipe_names():
        text = (_recipes() / f"{recipe}.yaml").read_bytes()
    elif path.is_file():
        text = path.read_bytes()
    else:
        raise UserError(
            f"unknown recipe {str(recipe)!r}: use {', '.join(recipe_names())}, or a YAML file"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {str(recipe)!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {str(recipe)!r} must be a YAML mapping of settings to values")
    check_names(values, recipe)
    return values


def recipe_beside(recipe: str | Path, given: Container[str]) -> dict[str, Any]:
    """The values of a recipe, without its minutes if epochs are given."""
    values = load_recipe(recipe)
    if "epochs" in given:
        values.pop("minutes", None)
    return values


def check_names(values: dict[str, Any], recipe: str | Path | None = None) -> None:
    """Refuse names that are not settings, naming the nearest one that is."""
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in values:
        if name not in known:
            from difflib import get_close_matches

            near = get_close_matches(str(name), known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else f": use one of {', '.join(known)}"
            place = f" in recipe {str(recipe)!r}" if recipe else ""
            raise UserError(f"unknown setting {name!r}{place}{hint}")


def _is_a(value: object, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(_is_a(one, get_args(kind)[0]) for one in value)
    return isinstance(value, int | float if kind is float else origin or kind)


def _recipes() -> Any:
    return files("barlow") / "recipes"
