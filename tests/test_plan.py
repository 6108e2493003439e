"""The plan: a budget of steps split into a dense phase and cycles, and the sparsity after each pruning."""

import math
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from hf_bimp import Plan, make_plan
from hf_bimp.schedules.plan import cycle_sparsities

budgets = given(
    total=st.integers(1, 500),
    cycles=st.integers(1, 12),
    dense_ratio=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
    initial=st.sampled_from([0.0, 0.25, 0.5]),
)


def planned(total: int, cycles: int, dense_ratio: float, initial: float = 0.0) -> Plan | None:
    try:
        return make_plan(total, 0.9, cycles, dense_ratio, initial_sparsity=initial)
    except ValueError:
        return None


def test_a_plan_by_hand() -> None:
    plan = make_plan(100, 0.875, 3, 0.5)
    assert (plan.dense_steps, plan.num_cycles, plan.prune_steps) == (50, 3, (50, 66, 82))
    assert plan.sparsities == pytest.approx((0.5, 0.75, 0.875), abs=1e-12)
    assert [(p.cycle, p.start, p.steps) for p in plan.phases] == [(0, 0, 50), (1, 50, 16), (2, 66, 16), (3, 82, 18)]
    assert [p.sparsity for p in plan.phases] == [0.0, *plan.sparsities]


@budgets
@example(total=3, cycles=1, dense_ratio=0.5, initial=0.0)
@settings(deadline=None, derandomize=True, max_examples=150)
def test_the_phases_tile_the_budget(total: int, cycles: int, dense_ratio: float, initial: float) -> None:
    dense_steps = round(dense_ratio * total)
    steps = (total - dense_steps) // cycles
    plan = planned(total, cycles, dense_ratio, initial)
    # Refused exactly where a phase would be empty.
    assert (plan is None) == (steps < 1 or (dense_ratio > 0 and dense_steps < 1))
    if plan is None:
        return
    lengths = [dense_steps] * (dense_steps > 0) + [steps] * (cycles - 1) + [total - dense_steps - (cycles - 1) * steps]
    assert [phase.steps for phase in plan.phases] == lengths and sum(lengths) == total
    assert plan.prune_steps == tuple(dense_steps + j * steps for j in range(cycles))
    owners = [phase.cycle for phase in plan.phases for _ in range(phase.steps)]
    assert [plan.phase(step).cycle for step in range(total)] == owners
    assert all(plan.cycle_phase(j).start == plan.prune_steps[j - 1] for j in range(1, cycles + 1))


@given(st.floats(0.01, 0.99), st.integers(1, 20), st.sampled_from([0.0, 0.3, 0.6]))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_every_pruning_removes_the_same_fraction(target: float, cycles: int, initial: float) -> None:
    assume(target > initial + 1e-6)
    plan = make_plan(1000, target, cycles, initial_sparsity=initial)
    s = 1 - ((1 - target) / (1 - initial)) ** (1 / cycles)
    assert plan.sparsities == pytest.approx(
        [1 - (1 - initial) * (1 - s) ** j for j in range(1, cycles + 1)], abs=1e-12
    )
    assert plan.sparsities[-1] == target
    assert [plan.pruned_fraction(j) for j in range(1, cycles + 1)] == pytest.approx([s] * cycles, abs=1e-9)


@pytest.mark.parametrize(
    ("target", "fraction", "cycles"),
    [
        (0.2, 0.2, 1),
        (1 - 0.8**2, 0.2, 2),  # reached but for rounding errors: no third pruning
        (1 - 0.8**7, 0.2, 7),
        (1 - 0.8**7 + 1e-6, 0.2, 8),
        (0.9, 0.2, 11),
        (0.98, 0.2, 18),
        (0.488, 0.2, 3),
        (0.271, 0.1, 3),
        (0.9, 0.5, 4),
    ],
)
def test_a_fixed_fraction_decides_the_number_of_cycles(target: float, fraction: float, cycles: int) -> None:
    plan = make_plan(1000, target, None, prune_fraction=fraction)
    assert plan.num_cycles == cycles
    assert plan.sparsities[:-1] == pytest.approx([1 - (1 - fraction) ** j for j in range(1, cycles)], abs=1e-12)
    assert plan.sparsities[-1] == target
    assert plan.pruned_fraction(cycles) <= fraction + 1e-6


def test_a_fixed_fraction_counts_from_the_initial_sparsity() -> None:
    assert cycle_sparsities(0.95, None, 0.5, 0.6) == pytest.approx((0.8, 0.9, 0.95), abs=1e-12)


@given(st.floats(0.01, 0.99), st.floats(0.05, 0.9), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_the_number_of_cycles_is_the_smallest_that_reaches_the_goal(
    target: float, fraction: float, initial: float
) -> None:
    assume(target > initial + 1e-6)
    cycles = len(cycle_sparsities(target, None, fraction, initial))
    reached = [1 - (1 - initial) * (1 - fraction) ** j for j in (cycles - 1, cycles)]
    assert reached[1] >= target - 1.1e-9 and (cycles == 1 or reached[0] < target - 0.9e-9)


def test_no_cycle_is_a_plan_without_pruning() -> None:
    plan = make_plan(30, num_cycles=0, initial_sparsity=0.7)
    assert (plan.num_cycles, plan.dense_steps, plan.prune_steps) == (0, 30, ())
    assert [(p.cycle, p.start, p.steps, p.sparsity) for p in plan.phases] == [(0, 0, 30, 0.7)]


def test_a_ratio_of_zero_prunes_before_the_first_step() -> None:
    plan = make_plan(10, 0.5, 2, 0.0)
    assert plan.dense_steps == 0 and plan.prune_steps == (0, 5)
    assert [phase.cycle for phase in plan.phases] == [1, 2]


@given(st.integers(1, 12), st.integers(1, 12), st.one_of(st.just(0.0), st.floats(0.01, 0.99)))
@example(10, 1, 0.01)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_number_of_steps_in_the_error_is_the_smallest_that_works(
    total: int, cycles: int, dense_ratio: float
) -> None:
    assume(planned(total, cycles, dense_ratio) is None)
    with pytest.raises(ValueError, match=rf"^{total} optimizer steps .*dense_ratio={dense_ratio}") as error:
        make_plan(total, 0.9, cycles, dense_ratio)
    enough = int(re.search(r"at least (\d+) steps", str(error.value))[1])
    assert enough > total and planned(enough, cycles, dense_ratio)
    assert not any(planned(steps, cycles, dense_ratio) for steps in range(total, enough))


@pytest.mark.parametrize("target", [0.3, 0.5])
def test_a_target_below_the_initial_sparsity_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match=f"50.00% sparse already and target_sparsity={target}.*num_cycles=0"):
        make_plan(100, target, 1, initial_sparsity=0.5)


def test_the_plan_is_plain_numbers_as_json_has_them() -> None:
    saved = make_plan(100, 0.75, 2).to_dict()
    assert saved["prune_steps"] == [50, 75] and saved["total_steps"] == 100 and saved["initial_sparsity"] == 0.0
    assert math.isclose(saved["sparsities"][0], 0.5) and isinstance(saved["sparsities"], list)
