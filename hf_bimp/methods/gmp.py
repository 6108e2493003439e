"""GMP: gradual magnitude pruning (Zhu and Gupta, 2017), soft or hard, with the paper's learning-rate variants."""

from dataclasses import dataclass, field, replace
from typing import Any

from ..schedules.plan import Budget
from .base import Run
from .gradual import Gradual, GradualConfig, SoftMasks
from .registry import register_method

SCHEDULES = ("stepped", "linear", "cyclic")
MILESTONES = [0.5, 0.75]  # of the stepped schedule, unless lr_milestones says otherwise


@dataclass
class GMPConfig(GradualConfig):
    """The settings of GMP."""

    gmp_hard: bool = field(
        default=False,
        metadata={
            "help": "gmp: pruned weights are gone for good. By default they keep their values, frozen and unused, and "
            "compete again at the next pruning."
        },
    )
    gmp_schedule: str = field(
        default="stepped",
        metadata={
            "help": "gmp: the learning rate. 'stepped' (at lr_milestones, by default 0.5 and 0.75 of the run), "
            "'linear', or 'cyclic' (linear to 0 between each two prunings); all after warmup_steps.",
            "choices": SCHEDULES,
        },
    )


@register_method
class GradualMagnitudePruning(SoftMasks, Gradual):
    """Masks at K steps the smallest magnitudes of all weights, masked ones with the values that they had included."""

    name = "gmp"
    description = "Gradual magnitude pruning (GMP, Zhu and Gupta, 2017)"
    Config = GMPConfig

    def __init__(self, run: Run, config: GMPConfig | None = None):
        super().__init__(run, config)
        self.traits = replace(self.traits, is_hard=self.config.gmp_hard)

    @classmethod
    def check(cls, config: Any, budget: Budget) -> None:
        super().check(config, budget)
        if config.gmp_schedule not in SCHEDULES:
            raise ValueError(f"gmp_schedule={config.gmp_schedule!r} is none of {', '.join(SCHEDULES)}.")

    @classmethod
    def dense_schedule(cls, config: GMPConfig) -> dict:
        own: dict[str, dict] = {
            "stepped": {"lr_milestones": MILESTONES},
            "linear": {},
            "cyclic": {"lr_scheduler_type": "constant_with_warmup"},
        }
        return own[config.gmp_schedule]

    def scheduled_rate(self, step: int) -> float:
        if self.config.gmp_schedule != "cyclic":
            return super().scheduled_rate(step)
        phase = self.plan.phase(step)
        length = min(phase.start + phase.steps, self.plan.schedule_steps) - phase.start
        return self.schedule.rates[step] * (1 - (step - phase.start) / length)
