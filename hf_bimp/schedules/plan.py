"""When to prune and how far: the whole run as plain numbers (no torch)."""

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import cast

# A goal that is missed by rounding error alone counts as reached (Renda et al.'s fixed fraction).
GOAL_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Phase:
    """A stretch of optimizer steps with one learning-rate schedule and one sparsity.

    `cycle` is 0 for the dense phase and 1..J for the prune-retrain cycles; `start` is the first optimizer step of the
    phase, `steps` its length.
    """

    cycle: int
    start: int
    steps: int
    sparsity: float | None  # None where the method finds its own


@dataclass(frozen=True)
class Plan:
    """A run of `total_steps` optimizer steps (T), of which those before the first pruning are dense (T0).

    Pruning j (1..J) happens before optimizer step `prune_steps[j - 1]` (before step T: after the last one) and raises
    the sparsity of the prunable weights to `sparsities[j - 1]`, which is None where the method finds its own; before
    the first one it is `initial_sparsity` (S_0). The user's learning-rate schedule spans the first `schedule_steps`:
    the dense phase, unless a pruning-stable method trains through its prunings.
    """

    total_steps: int
    prune_steps: tuple[int, ...] = ()
    sparsities: tuple[float | None, ...] = ()
    initial_sparsity: float = 0.0
    schedule_steps: int = None  # type: ignore[assignment]  # __post_init__ puts dense_steps in its place

    def __post_init__(self) -> None:
        if self.schedule_steps is None:
            object.__setattr__(self, "schedule_steps", self.dense_steps)

    @property
    def num_cycles(self) -> int:
        return len(self.prune_steps)

    @property
    def dense_steps(self) -> int:
        return self.prune_steps[0] if self.prune_steps else self.total_steps

    @cached_property  # asked for at every step
    def phases(self) -> tuple[Phase, ...]:
        """The dense phase (where it has steps) and then every cycle."""
        return tuple(phase for phase in self._all_phases if phase.steps)

    @cached_property
    def _all_phases(self) -> list[Phase]:
        starts = (0, *self.prune_steps)
        ends = (*self.prune_steps, self.total_steps)
        levels = (self.initial_sparsity, *self.sparsities)
        rows = zip(range(len(starts)), starts, ends, levels, strict=True)
        return [Phase(j, start, end - start, level) for j, start, end, level in rows]

    def phase(self, step: int) -> Phase:
        """The phase that optimizer step `step` (0..T-1) belongs to."""
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.start) - 1]

    def cycle_phase(self, cycle: int) -> Phase:
        """The phase of prune-retrain cycle `cycle` (1..J)."""
        return self._all_phases[cycle]

    def pruned_fraction(self, cycle: int) -> float:
        """s_j: the planned fraction of the remaining weights that pruning `cycle` (1..J) removes."""
        before, after = cast(tuple[float, ...], (self.initial_sparsity, *self.sparsities))[cycle - 1 : cycle + 1]
        return 1 - (1 - after) / (1 - before)

    def to_dict(self) -> dict:
        plan = asdict(self)
        if self.schedule_steps == self.dense_steps:
            del plan["schedule_steps"]
        return plan | {"prune_steps": list(self.prune_steps), "sparsities": list(self.sparsities)}


@dataclass(frozen=True)
class Budget:
    """What a method makes its plan from.

    `total_steps` is T in optimizer steps; None while only arguments are checked. `target_sparsity` is the goal, None
    where none is given. `initial_sparsity` is that of the zeros to keep, with `keep_zeros`. `finetune_ratio` is the
    share of T that is fine-tuned after a pruning-stable method.
    """

    total_steps: int | None = None
    target_sparsity: float | None = None
    initial_sparsity: float = 0.0
    keep_zeros: bool = False
    finetune_ratio: float = 0.0

    @property
    def steps(self) -> int:
        """T, once it is known."""
        return cast(int, self.total_steps)

    @property
    def method_steps(self) -> int:
        """How many steps a pruning-stable method has, before fine-tuning. Raises `ValueError` for none."""
        steps = self.steps - round(self.finetune_ratio * self.steps)
        if steps < 1:
            raise ValueError(
                f"finetune_ratio={self.finetune_ratio} of {self.total_steps} optimizer steps leaves the method none."
            )
        return steps


def gradual_prunings(
    steps: int, target_sparsity: float, num_prunings: int, interval: int | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The steps and sparsities of gradual pruning (Zhu and Gupta, 2017) within `steps` optimizer steps (T).

    K = `num_prunings` of them lie at t_k = round(k * T / (K + 1)), or with `interval` one every so many steps. The
    sparsity is target * (1 - (1 - t_k / t_K)^3). Raises `ValueError` where that is no step, or one twice.
    """
    times: tuple[int, ...] = ()
    if interval is None and num_prunings <= steps:
        times = tuple(round(k * steps / (num_prunings + 1)) for k in range(1, num_prunings + 1))
    elif interval is not None:
        times = tuple(range(interval, steps, interval))
    if not times or times[0] < 1 or len(set(times)) < len(times):
        raise ValueError(
            f"{steps} optimizer steps have no room for "
            + (f"{num_prunings} prunings" if interval is None else f"a pruning every {interval}")
            + f" (num_prunings={num_prunings}, prune_interval={interval}). Train for longer, or prune less often."
        )
    return times, tuple(target_sparsity * (1 - (1 - t / times[-1]) ** 3) for t in times)


def check_goal(target_sparsity: float | None) -> None:
    """Raises `ValueError` where that is no sparsity to reach."""
    if target_sparsity is None or not 0 < target_sparsity < 1:
        raise ValueError(
            f"target_sparsity={target_sparsity} must lie strictly between 0 and 1: it is the share of the prunable "
            "weights that are zero in the end, so 0.9 keeps every tenth."
        )


def check_amount(
    target_sparsity: float | None, num_cycles: int | None, dense_ratio: float, prune_fraction: float | None
) -> None:
    """Raises `ValueError` for an amount of pruning that no plan can have."""
    check_goal(target_sparsity)
    if prune_fraction is not None and not 0 < prune_fraction < 1:
        raise ValueError(f"prune_fraction={prune_fraction} must lie strictly between 0 and 1.")
    if num_cycles is not None and num_cycles < 1:
        raise ValueError(f"num_cycles={num_cycles} must be at least 1 to prune.")
    if not 0 <= dense_ratio < 1:
        raise ValueError(f"dense_ratio={dense_ratio} must lie in [0, 1): it is the dense share of the budget.")


def cycles_for(density: float, goal: float, keep: float) -> int:
    """The smallest number of cycles, at least 1, after which `density` times `keep` each is `goal` or less."""
    cycles = max(math.floor(math.log((goal + GOAL_TOLERANCE) / density) / math.log(keep)) - 1, 1)
    while density * keep**cycles > goal + GOAL_TOLERANCE:  # for rounding: a step or two
        cycles += 1
    return cycles


def cycle_sparsities(
    target_sparsity: float, num_cycles: int | None, prune_fraction: float | None, initial_sparsity: float = 0.0
) -> tuple[float, ...]:
    """Sparsity after each pruning: every one removes the same fraction of the weights that remain.

    With `num_cycles` (J) that fraction follows from the target; with `prune_fraction` (Renda et al., 2020) it is
    given, J is the smallest number that reaches the target, and the last pruning meets the target exactly.
    """
    density, goal = 1 - initial_sparsity, 1 - target_sparsity
    if prune_fraction is not None:
        keep = 1 - prune_fraction
        num_cycles = cycles_for(density, goal, keep)
    else:
        num_cycles = 1 if num_cycles is None else num_cycles
        keep = (goal / density) ** (1 / num_cycles)
    return (*(1 - density * keep**j for j in range(1, num_cycles)), target_sparsity)


def make_plan(
    total_steps: int,
    target_sparsity: float | None = None,
    num_cycles: int | None = None,
    dense_ratio: float = 0.5,
    prune_fraction: float | None = None,
    initial_sparsity: float = 0.0,
) -> Plan:
    """Splits a budget of `total_steps` (T) into T0 = round(dense_ratio * T) dense steps and J equal cycles.

    J is 1 unless `num_cycles` or `prune_fraction` says otherwise; the last cycle takes what does not divide.
    `num_cycles=0` plans no pruning at all. Raises `ValueError` where a
    phase would have no step or the model is sparser than the target already.
    """
    if num_cycles == 0:
        return Plan(total_steps, initial_sparsity=initial_sparsity)
    check_amount(target_sparsity, num_cycles, dense_ratio, prune_fraction)
    goal = cast(float, target_sparsity)  # as checked
    if goal <= initial_sparsity:
        raise ValueError(
            f"The model is {initial_sparsity:.2%} sparse already and target_sparsity={target_sparsity} does not go "
            "beyond that. Raise target_sparsity, or pass num_cycles=0 with keep_zeros=True to fine-tune it as it is."
        )
    cycles, how = num_cycles or 1, f"num_cycles={num_cycles or 1}"
    if prune_fraction is not None:
        how = f"prune_fraction={prune_fraction}"
        cycles = cycles_for(1 - initial_sparsity, 1 - goal, 1 - prune_fraction)
    dense_steps, cycle_steps = _split(total_steps, dense_ratio, cycles)
    if not _every_phase_has_steps(total_steps, dense_ratio, cycles):
        raise ValueError(
            f"{total_steps} optimizer steps with dense_ratio={dense_ratio} and {cycles} cycles ({how}) leave "
            f"{dense_steps} steps to the dense phase and {max(cycle_steps, 0)} to each cycle, and every phase needs "
            f"at least 1. Train for at least {_enough_steps(total_steps, dense_ratio, cycles)} steps (max_steps or "
            "num_train_epochs), use fewer cycles, or change dense_ratio."
        )
    sparsities = cycle_sparsities(goal, num_cycles, prune_fraction, initial_sparsity)
    prune_steps = tuple(dense_steps + j * cycle_steps for j in range(cycles))
    return Plan(total_steps, prune_steps, sparsities, initial_sparsity)


def _enough_steps(total_steps: int, dense_ratio: float, cycles: int) -> int:
    """The smallest number of steps from `total_steps` on that gives every phase one."""
    steps = max(total_steps, math.floor((cycles - 0.5) / (1 - dense_ratio)) - 1)  # the dense phase is rounded
    if dense_ratio:
        steps = max(steps, math.floor(0.5 / dense_ratio) - 1)
    while not _every_phase_has_steps(steps, dense_ratio, cycles):  # for rounding: a few steps
        steps += 1
    return steps


def _split(total_steps: int, dense_ratio: float, cycles: int) -> tuple[int, int]:
    """Steps of the dense phase, and of each cycle but the last."""
    dense_steps = round(dense_ratio * total_steps)
    return dense_steps, (total_steps - dense_steps) // cycles


def _every_phase_has_steps(total_steps: int, dense_ratio: float, cycles: int) -> bool:
    dense_steps, cycle_steps = _split(total_steps, dense_ratio, cycles)
    return cycle_steps >= 1 and (dense_steps >= 1 or dense_ratio == 0)
