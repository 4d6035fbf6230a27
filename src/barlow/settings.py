"""Every setting of a pretraining: one typed field each, with its default and where that is from."""

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

# Of weights, and of biases and norms. LARS: Zbontar et al. 2021, which SGD shares.
_RATES = {"lars": (0.2, 0.0048), "sgd": (0.2, 0.0048), "adamw": (2e-3, 2e-3), "muon": (0.04, 0.02)}

_COUNTS = (
    *("image_size", "eval_size", "channels", "pool", "stages", "validation_limit", "limit"),
    *("epochs", "accumulate", "devices", "save_every", "eval_every", "log_every"),
)


@dataclass(frozen=True)
class Settings:
    """What a pretraining is made of; each field is an option of `barlow pretrain`.

    The same names are the keys of a recipe and of a run's `config.yaml`.

    Example:
        >>> Settings.of("cifar10", recipe="cifar10", epochs=5).encoder
        'resnet18'
    """

    source: str
    """where the images come from: a folder, Parquet files, or a name such as cifar10"""

    encoder: str = "resnet50"
    """architecture: any timm name"""
    encoder_args: dict[str, Any] = field(default_factory=dict)
    """arguments for timm's constructor, such as '{"channels": [32, 64, 128, 256]}'"""
    stem: Literal["auto", "standard", "small", "padded", "strided"] = "auto"
    """of a ResNet on small images; small: a 3x3 convolution and no pooling; padded: the same with
    two pixels of padding, as solo-learn has it; strided: with a stride of 2, for a quarter of the
    work; auto: small up to 64 pixels, else standard"""
    pool: int = 1
    """side of the grid that a map is averaged to: 2 keeps its quadrants apart, for four times the
    features"""
    stages: int = 1
    """how many of the last stages' maps the representation is made of"""
    pretrained: bool = False
    """start from timm's supervised weights (downloaded)"""
    init: str | None = None
    """start from this encoder: a run, a checkpoint (its projector too, if the widths agree), a timm
    folder, hf://OWNER/NAME, or a file of weights of another project"""
    projector: list[int] = field(default_factory=lambda: [8192, 8192, 8192])
    """widths of the projector's layers (paper: 8192 three times)"""
    lambd: float = 0.0051
    """weight of the redundancy-reduction term (paper: 0.0051); a narrower projector wants a larger
    one: 0.02 at 256 (Agrawal et al. 2024)"""
    off_diagonal_target: float = 0.0
    """where correlations of two features are pulled (paper: 0; -1: HSIC, Tsai et al. 2021)"""
    loss_scale: float = 1.0
    """factor on the loss, as some published recipes have it"""

    image_size: int = 224
    """height and width of a view in pixels"""
    eval_size: int | None = None
    """height and width of images after the training; default: image_size. A network that saw small
    crops does better on somewhat larger images (Touvron et al. 2019)"""
    channels: int = 3
    """channels of the images"""
    views: str = "auto"
    """preset of the two view distributions; auto: small up to 64 pixels, else paper"""
    view1: dict[str, Any] = field(default_factory=dict)
    """changes to the first view's distribution, such as '{"blur": 0.5}'"""
    view2: dict[str, Any] = field(default_factory=dict)
    """changes to the second view's distribution"""
    validation: str | None = None
    """source of the validation loss; default: the source's own validation or test split"""
    validation_limit: int = 2048
    """images the validation loss is taken over, at most"""
    limit: int | None = None
    """use only the first N images of the source"""
    max_broken: float = 0.05
    """share of the images that may be unreadable before the training stops"""

    epochs: int = 100
    """passes over the images (paper: 1000); given beside a recipe with minutes, it replaces them"""
    minutes: float | None = None
    """train for so long by the clock, instead of for epochs; the learning rate follows it"""
    batch_size: int = 256
    """images a step, over all devices (paper: 2048; 256 does nearly as well, section 4)"""
    accumulate: int = 1
    """micro-batches a step: the loss stays that of the whole batch, memory is a micro-batch's"""
    optimizer: Literal["lars", "adamw", "sgd", "muon"] = "lars"
    """lars (paper), adamw, sgd, or muon (Jordan 2024, for short trainings)"""
    lr: float | None = None
    """learning rate of weights; for lars and sgd per 256 images of the batch; default: 0.2 for lars
    (paper) and sgd, 0.002 for adamw, 0.04 for muon"""
    lr_bias_norm: float | None = None
    """learning rate of biases and norms, scaled alike; default: 0.0048 for lars (paper) and sgd,
    0.002 for adamw, 0.02 for muon"""
    weight_decay: float = 1.5e-6
    """decay of weights; biases and norms have none (paper: 1.5e-6; its code: 1e-6)"""
    momentum: float = 0.9
    """of lars, sgd and muon; beta1 of adamw"""
    lars_eta: float = 0.001
    """trust coefficient of lars (paper: 0.001)"""
    lars_clip: bool = False
    """let no weight's rate under lars be larger than that of sgd, as solo-learn does"""
    warmup_epochs: float = 10.0
    """epochs of linear warm-up (paper: 10), at most a tenth of the training"""
    final_lr: float = 0.001
    """factor on the learning rate that the cosine ends with (paper's code: 0.001)"""

    seed: int = 0
    """of initialisation, order and views"""
    precision: Literal["64", "32", "bf16", "16"] = "32"
    """arithmetic: float64 (to compare runs exactly), float32, or mixed with bfloat16 or float16"""
    compile: bool = False
    """compile the model with torch.compile"""
    accelerator: str = "auto"
    """auto, cpu, cuda or mps"""
    devices: int = 1
    """processes on this machine, one a device"""
    sync_batch_norm: bool = True
    """batch normalisation over all devices, so that their number changes nothing"""
    workers: int = 2
    """decoding processes a device, where the images do not fit in memory"""

    save_every: int = 10
    """epochs between the checkpoints that are kept"""
    save_minutes: float = 10.0
    """minutes between the checkpoints that a resumption starts from"""
    eval_every: int | None = None
    """epochs between validations; default: as few as take about 3 % of the time"""
    log_every: int = 50
    """steps between rows of metrics.csv"""
    track: list[str] = field(default_factory=list)
    """send them to wandb, tensorboard, trackio or mlflow too; several with commas"""

    def __post_init__(self) -> None:
        """Plain values, as a recipe would have them, and none that cannot be."""
        for name, kind in get_type_hints(Settings).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                value = str(value)
                if value not in get_args(kind):
                    raise UserError(f"{name} is {value!r}: give {', '.join(get_args(kind))}")
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Path):
                value = str(value)
            elif isinstance(value, str) and float in (kind, *get_args(kind)):
                with suppress(ValueError):
                    value = float(value)  # YAML has 1e-3 for a text
            if not _is_a(value, kind):
                told = inspect.formatannotation(kind).replace("typing.", "").removesuffix(" | None")
                raise UserError(f"{name} is {value!r}: give a value of type {told}")
            object.__setattr__(self, name, value)
        self._check()

    @classmethod
    def of(cls, source: str, recipe: str | Path | None = None, **overrides: Any) -> "Settings":
        """Settings from defaults, then a recipe, then single values.

        Args:
            source: where the images come from.
            recipe: name of a shipped recipe, or path of a YAML file.
            **overrides: fields of this class.

        Raises:
            UserError: if the recipe or a field does not exist, or a value cannot be.
        """
        values = {**(recipe_beside(recipe, overrides) if recipe else {}), **overrides}
        check_names(values, recipe)
        return cls(**{**values, "source": source})  # a run's config.yaml, as a recipe, has one too

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them, learning rates included."""
        lr, lr_bias_norm = self.rates
        return dataclasses.asdict(self) | {"lr": lr, "lr_bias_norm": lr_bias_norm}

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of weights, and of biases and norms: as given, or the optimiser's."""
        lr, lr_bias_norm = _RATES[self.optimizer]
        return (
            lr if self.lr is None else self.lr,
            lr_bias_norm if self.lr_bias_norm is None else self.lr_bias_norm,
        )

    @property
    def view_preset(self) -> str:
        """The preset that `views` stands for at this image size."""
        if self.views != "auto":
            return self.views
        return "small" if self.image_size <= 64 else "paper"

    def _check(self) -> None:
        def refuse(what: str) -> None:
            raise UserError(what)

        for name in _COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                refuse(f"{name} is {value}: give 1 or more")
        for name in ("lr", "lr_bias_norm", "lars_eta", "weight_decay", "warmup_epochs", "workers"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                refuse(f"{name} is {value}: it must not be negative")
        if self.minutes is not None and not self.minutes > 0:
            refuse(f"minutes is {self.minutes}: give more than 0")
        if not 0 <= self.max_broken <= 1:
            refuse(f"max_broken is {self.max_broken}: give a share between 0 and 1")
        if not 0 <= self.momentum < 1:
            refuse(f"momentum is {self.momentum}: give 0 or more, and less than 1")
        if self.batch_size < 2:
            refuse(
                f"batch_size is {self.batch_size}: Barlow Twins correlates over the batch and "
                "needs 2 images or more, better 128 or more"
            )
        parts = self.devices * self.accumulate
        if self.batch_size % parts or self.batch_size // parts < 2:
            near = max(2, round(self.batch_size / parts)) * parts
            refuse(
                f"batch_size {self.batch_size} does not divide over {self.devices} device(s) x "
                f"{self.accumulate} micro-batch(es) of 2 images or more: use a multiple of "
                f"{parts}, for example {near}"
            )
        if not self.projector or min(self.projector) < 1:
            refuse(f"projector is {self.projector}: give the widths of its layers, all 1 or more")
        for name in self.track:
            if name not in TRACKERS:
                refuse(f"track is {name!r}: give {', '.join(TRACKERS)}, or several with commas")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    names = (file.name for file in _recipes().iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_recipe(recipe: str | Path) -> dict[str, Any]:
    """The values of a recipe.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.

    Returns:
        Field names of `Settings` and their values.

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
            f"no recipe {str(recipe)!r}: use {', '.join(recipe_names())}, or a YAML file's path"
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
    """The values of a recipe, without its minutes where epochs are given."""
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
            hint = f": did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"
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
