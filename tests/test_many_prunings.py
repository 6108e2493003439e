"""Runs of very many prunings: their cost is linear in them, and no more than a hundred are evaluated."""

import sys

import pytest

from helpers import classification_items
from hf_bimp.methods import METHODS
from hf_bimp.schedules.plan import Plan
from trainers import make_trainer


def calls_of_a_run(output_dir, cycles: int) -> int:
    """How many Python functions run while the plan has `cycles` prunings."""
    trainer = make_trainer(output_dir, max_steps=2 * cycles, num_cycles=cycles, logging_steps=100)
    count = 0

    def profile(frame, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        trainer.train()
    finally:
        sys.setprofile(None)
    assert len(trainer.results["prunings"]) == cycles
    return count


def test_the_cost_is_linear(tmp_path) -> None:
    calls_of_a_run(tmp_path / "first", 2)  # imports
    few, more, most = (calls_of_a_run(tmp_path / str(cycles), cycles) for cycles in (20, 100, 180))
    assert most - more < 1.1 * (more - few)


@pytest.mark.parametrize(("prunings", "most", "expected"), [
    (4, 100, [1, 2, 3, 4]),
    (10, 3, [1, 2, 6, 10]),
    (9, 3, [1, 3, 6, 9]),
    (10, 1, [10]),
    (1, 1, [1]),
])  # fmt: skip
def test_those_that_are_evaluated_are_spread(tmp_path, monkeypatch, prunings, most, expected) -> None:
    monkeypatch.setattr(METHODS["bimp"], "most_evaluated", most)
    trainer = make_trainer(
        tmp_path, num_cycles=prunings, max_steps=2 * prunings, eval_dataset=classification_items(9, seed=2)
    )
    trainer.train()
    records = trainer.results["prunings"]
    assert [record["cycle"] for record in records if record["before"]] == expected
    assert [record["cycle"] for record in records if record["after"]] == expected
    assert records[-1]["retrained"]


def test_the_phase_of_every_step() -> None:
    plan = Plan(30, tuple(range(6, 30, 3)), tuple(0.1 * j for j in range(1, 9)))
    assert [plan.phase(step).cycle for step in range(30)] == [0] * 6 + [j for j in range(1, 9) for _ in range(3)]
    assert Plan(5, (0, 5), (0.1, 0.2)).phase(4).cycle == 1


def test_a_long_plan_is_looked_up_and_not_searched() -> None:
    plan, seen = Plan(200_000, tuple(range(1, 200_000)), tuple(j / 200_000 for j in range(1, 200_000))), 0

    def profile(frame, event: str, argument: object) -> None:
        nonlocal seen
        seen += event == "call"

    plan.phase(0), plan.cycle_phase(1)
    sys.setprofile(profile)
    try:
        plan.phase(3), plan.cycle_phase(2)
    finally:
        sys.setprofile(None)
    assert seen < 100
