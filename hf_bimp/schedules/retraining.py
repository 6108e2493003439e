"""The learning rate of every step, as pure functions of the step, the plan and the peaks (no torch).

Rates are in whatever unit the caller uses, as long as it is the same everywhere; the trainer works in multiples of the
optimizer's own learning rate, so that its dense phase is bit-identical to plain `Trainer`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

RETRAIN_SCHEDULES = (
    *("ft", "lrw", "slr", "clr", "llr"),  # from the paper, fixed by the dense schedule
    *("allr", "allr_d1", "allr_d2", "acc_allr"),  # from the paper, adapted to the pruning
    *("constant", "stepped", "cosine", "linear"),  # with a peak that the user tunes
)
ADAPTIVE = ("allr", "allr_d1", "allr_d2", "acc_allr")
TUNED = ("constant", "stepped", "cosine", "linear")
WITHOUT_WARMUP = ("ft", "lrw")
# These replay or compress the dense schedule, or take a number from its end or its length.
NEED_DENSE_HISTORY = ("ft", "lrw", "slr", "clr", "stepped", "allr_d2")


@dataclass(frozen=True)
class DenseRates:
    """The dense schedule eta, step by step: `rates[i]` at step i of T; the first `warmup_steps` of them warm up."""

    rates: Sequence[float]
    warmup_steps: int = 0
    peak: float = field(init=False)  # eta_1: the largest rate that the dense phase really uses

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak", max(self.rates))

    @property
    def steps(self) -> int:
        return len(self.rates)

    @property
    def last(self) -> float:  # eta_T
        return self.rates[-1]

    def compressed(self, index: int, length: int) -> float:
        """Budget-aware conversion (Li et al., 2020): step `index` of the schedule squeezed into `length` steps."""
        step = index * self.steps // length
        return self.peak if step < self.warmup_steps else self.rates[step]


def default_warmup_ratio(schedule: str) -> float:
    """10 % of a cycle for the schedules that the paper warms up, nothing for the others and for tuned ones."""
    return 0.0 if schedule in WITHOUT_WARMUP + TUNED else 0.1


def discount(schedule: str, d1: float, d2: float | None) -> float:
    """ALLR's factor d on eta_1, from the impact d1 of the pruning and the relative length d2 of the retraining.

    `d2` is None where the length of the dense training is not known; d1 then decides alone.
    """
    if schedule == "allr_d1":
        return d1
    if schedule == "allr_d2":
        return cast(float, d2)
    if schedule in ("allr", "acc_allr"):
        return d1 if d2 is None else max(d1, d2)
    return 1.0


def retrain_peak(
    schedule: str, steps: int, eta_1: float, dense: DenseRates | None, d: float = 1.0, tuned_rate: float | None = None
) -> float:
    """The largest learning rate of a cycle of `steps` steps: what the schedule starts from, after its warm-up."""
    if schedule == "ft":
        return cast(DenseRates, dense).last
    if schedule == "lrw":
        return max(cast(DenseRates, dense).rates[-steps:])
    if schedule in TUNED:
        return cast(float, tuned_rate)
    return d * eta_1


def retrain_rate(
    schedule: str, index: int, steps: int, peak: float, dense: DenseRates | None, warmup_ratio: float
) -> float:
    """Learning rate of step `index` (0..steps-1) of a prune-retrain cycle."""
    known = cast(DenseRates, dense)  # by the schedules that need it, see NEED_DENSE_HISTORY
    if schedule == "lrw":
        return known.rates[known.steps - steps + index]
    # At least one step is left for the peak and what follows it.
    warmup = 0 if schedule == "ft" else min(round(warmup_ratio * steps), steps - 1)
    if index < warmup:
        return peak * (index + 1) / (warmup + 1)
    done, length = index - warmup, steps - warmup
    if schedule in ("ft", "constant"):
        return peak
    if schedule in ("slr", "stepped"):
        return peak / known.peak * known.compressed(done, length)
    if schedule in ("clr", "cosine"):
        floor = known.last if schedule == "clr" else 0.0
        return floor + (peak - floor) * (1 + math.cos(math.pi * done / length)) / 2
    return peak * (1 - done / length)
