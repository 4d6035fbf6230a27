"""How far a training has come, by steps or by the clock, and its learning rate at that point."""

from dataclasses import dataclass

from barlow.optim import warmup_cosine
from barlow.settings import Settings


@dataclass(frozen=True)
class Schedule:
    """A training's length and the course of its learning rate.

    Args:
        by_clock: whether lengths are in seconds; otherwise they are in steps.
        total: length of the training.
        warmup: length of the linear warm-up.
        final: the factor on the learning rate at the end.

    Example:
        >>> Schedule.of(Settings("cifar10", epochs=100), steps_per_epoch=195).total
        19500
        >>> Schedule.of(Settings("cifar10", minutes=10), steps_per_epoch=195).total
        600
    """

    by_clock: bool
    total: float
    warmup: float
    final: float

    @classmethod
    def of(cls, settings: Settings, steps_per_epoch: int) -> "Schedule":
        """The schedule of these settings; the warm-up is at most a tenth of the training."""
        if settings.minutes:
            total = 60 * settings.minutes
            return cls(True, total, total / 10, settings.final_lr)
        warmup = min(settings.warmup_epochs, settings.epochs / 10)
        total = settings.epochs * steps_per_epoch
        return cls(False, total, round(warmup * steps_per_epoch), settings.final_lr)

    @property
    def unit(self) -> str:
        """What `total` counts."""
        return "second" if self.by_clock else "step"

    def at(self, step: int, seconds: float) -> float:
        """How much is done, in the schedule's unit."""
        return seconds if self.by_clock else step

    def describe(self, step: int, seconds: float) -> str:
        """How far the training is, in words.

        Example:
            >>> Schedule.of(Settings("cifar10", epochs=1), steps_per_epoch=195).describe(3, 2.5)
            'step 3 of 195'
        """
        return f"{self.unit} {self.at(step, seconds):.0f} of {self.total:.0f}"

    def factor(self, step: int, seconds: float) -> float:
        """The factor on the learning rate."""
        return warmup_cosine(
            self.at(step, seconds), steps=self.total, warmup=self.warmup, final=self.final
        )

    def done(self, step: int, seconds: float) -> bool:
        """Whether the training is over."""
        return self.at(step, seconds) >= self.total
