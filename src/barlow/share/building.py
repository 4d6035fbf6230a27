"""Building an encoder from its description and filling it with weights."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from barlow.data import Preprocess
from barlow.encoders import EncoderSpec
from barlow.errors import UserError


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder and what else was found with it.

    Attributes:
        encoder: the encoder, with its `preprocess`.
        projector: the state dict of the projector it was trained with; empty if there is none or
            its architecture differs from ours.
        origin: for an encoder of another project, one line on what was recognised and left out.
    """

    encoder: nn.Module
    projector: dict[str, Tensor] = field(default_factory=dict)
    origin: str = ""


def build_described(description: Mapping[str, Any]) -> nn.Module:
    """Build the encoder that a file describes, with its `preprocess` and without its weights."""
    encoder = EncoderSpec.from_dict(description["encoder"]).build()
    encoder.preprocess = Preprocess(**description["preprocess"])
    return encoder


def load_weights(
    encoder: nn.Module, weights: dict[str, Tensor], where: str, beside: Iterable[str] = ()
) -> str:
    """Load weights into an encoder, which must get all of its own; any others are left out.

    Args:
        encoder: the encoder, freshly built.
        weights: the weights, under the encoder's names.
        where: the file, for messages.
        beside: names of further weights in the file.

    Returns:
        A line on how many matched, and which were left out or missing. Only the counters of batch
        norm layers may be missing; they then start at zero.

    Raises:
        UserError: naming the first weights that are missing or of another shape.
    """
    wanted = encoder.state_dict()
    absent = [k for k in wanted if k not in weights]
    missing = [k for k in absent if not k.endswith("num_batches_tracked")]
    misshapen = [k for k in wanted if k in weights and wanted[k].shape != weights[k].shape]
    if missing or misshapen:
        what = f"lacks {missing[0]}" if missing else f"has a different shape for {misshapen[0]}"
        raise UserError(f"the weights in {where} do not fit the encoder: the file {what}")
    encoder.load_state_dict({k: weights.get(k, wanted[k]) for k in wanted})
    left_out = [*(k for k in weights if k not in wanted), *beside]
    return (
        f"{len(wanted) - len(absent)} of {len(wanted)} weights matched; "
        f"left out: {count_names(k.partition('.')[0] for k in left_out)}; "
        f"missing: {count_names(k.rpartition('.')[2] for k in absent)}"
    )


def count_names(names: Iterable[str]) -> str:
    """List names, each with the number of its occurrences.

    Example:
        >>> count_names(["fc", "bn", "fc"]), count_names([])
        ('fc (2), bn (1)', 'nothing')
    """
    return ", ".join(f"{name} ({n})" for name, n in Counter(names).items()) or "nothing"
