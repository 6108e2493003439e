"""The learning rate of every step: all retraining schedules and dense histories against slow, obvious references."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from hf_bimp import BIMPConfig, DenseHistory, IterativeMagnitudePruning, Masks, Plan, Run, make_plan
from hf_bimp.schedules.retraining import RETRAIN_SCHEDULES
from hf_bimp.trainer.lr_scheduler import PlannedScheduler

OPTIMIZER = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])  # has no state of the pruned weights

TUNED = ("constant", "stepped", "cosine", "linear")
NO_WARMUP = ("ft", "lrw")
TUNED_RATE = 0.037
LENGTHS = {1: 50, 2: 60, 3: 113}  # the last cycle takes a remainder
DENSE_STEPS = {1: 53, 2: 60, 3: 41}


def weights() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {"a": torch.nn.Parameter(torch.randn(20, 30)), "b": torch.nn.Parameter(3 * torch.randn(10, 30))}


# ---- The formulas, one step at a time ----


def dense_rate(i: int, steps: int, warmup: int, eta: float = 0.2) -> float:
    """Linear decay, by Transformers' definition with a warm-up and the field's without."""
    return eta * i / warmup if i < warmup else eta * (steps - i) / (steps - warmup)


def expected_rate(
    schedule: str, i: int, n: int, eta: list[float], warmup: int, ratio: float, d: float, T_rt: int | None = None
) -> float:
    T, eta_1, eta_T = len(eta), max(eta), eta[-1]
    if schedule == "lrw":
        return eta[T - n + i]
    if schedule == "ft":
        return eta_T
    p = {"slr": eta_1, "clr": eta_1, "llr": eta_1}.get(schedule, TUNED_RATE if schedule in TUNED else d * eta_1)
    w = round(ratio * n)
    m = n - w
    if i < w:
        return p * (i + 1) / (w + 1)
    j = i - w
    if schedule in ("slr", "stepped"):
        source = math.floor(j * T / m)
        return p / eta_1 * (eta_1 if source < warmup else eta[source])
    if schedule == "clr":
        return eta_T + (p - eta_T) * (1 + math.cos(math.pi * j / m)) / 2
    if schedule == "cosine":
        return p * (1 + math.cos(math.pi * j / m)) / 2
    if schedule == "constant":
        return p
    return p * (1 - j / m)


class Reference:
    """Prunes NumPy copies by sorting, to have ALLR's d of each cycle."""

    def __init__(self) -> None:
        self.values = np.concatenate([w.detach().double().numpy().ravel() for w in weights().values()])
        self.pruned_before = 0.0

    def d1(self, sparsity: float) -> float:
        s = 1 - (1 - sparsity) / (1 - self.pruned_before)
        before = self.values.copy()
        smallest = np.argsort(np.abs(self.values), kind="stable")[: round(sparsity * len(before))]
        self.values[smallest] = 0
        self.pruned_before = sparsity
        d1 = np.linalg.norm(before - self.values) / (np.linalg.norm(before) * np.sqrt(s))
        return float(np.clip(d1, 0, 1))


def accuracies() -> list[float]:
    """Of the dense model once, then after each pruning; the last one is above the dense one."""
    return [0.8, 0.5, 0.7, 0.9]


def method(schedule: str, plan: Plan, history: DenseHistory | None, ratio: float | None = None):
    dense, measured = history and history.rates(), iter(accuracies())
    config = BIMPConfig(
        retrain_schedule=schedule,
        retrain_learning_rate=TUNED_RATE if schedule in TUNED else None,
        retrain_warmup_ratio=ratio,
    )
    unit = 1.0 if dense else 0.2  # rates are multiples of it
    run = Run(plan, Masks(weights()), dense, learning_rate=unit, train_accuracy=lambda: next(measured))
    return IterativeMagnitudePruning(run, config)


@pytest.mark.parametrize("schedule", RETRAIN_SCHEDULES)
@pytest.mark.parametrize("cycles", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("own_ratio", [None, 0.25])
def test_every_rate_of_a_run(schedule: str, cycles: int, warmup: int, own_ratio: float | None) -> None:
    if own_ratio and schedule in NO_WARMUP:
        own_ratio = 0.0
    total, dense_steps = LENGTHS[cycles] + DENSE_STEPS[cycles], DENSE_STEPS[cycles]
    plan = make_plan(total, 0.8, cycles, dense_steps / total)
    run = method(schedule, plan, DenseHistory(dense_steps, 0.2, warmup_steps=warmup), own_ratio)
    eta = [dense_rate(i, dense_steps, warmup) for i in range(dense_steps)]
    ratio = own_ratio if own_ratio is not None else 0.0 if schedule in TUNED else 0.1
    n, reference, accuracy = LENGTHS[cycles] // cycles, Reference(), accuracies()
    used, expected, done = [], [], 0
    for step in range(total):
        if step < dense_steps:
            expected.append(eta[step])
        else:
            cycle = min((step - dense_steps) // n, cycles - 1) + 1
            length = n if cycle < cycles else LENGTHS[cycles] - (cycles - 1) * n
            if cycle > done:
                assert run.is_due(step)
                record, done = run.prune(OPTIMIZER), cycle
                d1 = reference.d1(1 - (1 - 0.8) ** (cycle / cycles))
                if schedule == "acc_allr":
                    d1 = max((accuracy[0] - accuracy[cycle]) / accuracy[0], 0.0)
                d2 = min(length / dense_steps, 1)
                d = {"allr_d1": d1, "allr_d2": d2}.get(schedule, max(d1, d2))
                assert (record.cycle, record.step) == (cycle, step)
                assert (record.d1, record.d2) == pytest.approx((d1, d2), abs=1e-9)
            first = dense_steps + (cycle - 1) * n
            expected.append(expected_rate(schedule, step - first, length, eta, warmup, ratio, d))
        assert not run.is_due(step)
        used.append(run.rate(step))
    assert used == pytest.approx(expected, abs=1e-9, rel=0)
    assert run.is_complete


def test_the_field_default_is_reached_without_warmup() -> None:
    assert DenseHistory(10, 0.5).rates().rates == pytest.approx([0.5 * (1 - i / 10) for i in range(10)], abs=1e-15)


@pytest.mark.parametrize("schedule", [s for s in RETRAIN_SCHEDULES if s not in NO_WARMUP])
def test_the_warmed_up_peak_is_used_once_in_full(schedule: str) -> None:
    run = method(schedule, make_plan(100, 0.8, 1), DenseHistory(50, 0.2), 0.1)
    peak = run.prune(OPTIMIZER).retrain_peak
    rates = [run.rate(step) for step in range(50, 100)]
    assert rates[:5] == pytest.approx([peak * k / 6 for k in range(1, 6)], abs=1e-12)
    assert rates[5] == pytest.approx(peak, abs=1e-12) and max(rates) == rates[5]


@pytest.mark.parametrize("schedule", ["allr", "acc_allr", "allr_d1"])
def test_without_a_dense_history_the_impact_decides_alone(schedule: str) -> None:
    run = method(schedule, make_plan(30, 0.8, 1, 0.0), None)
    record = run.prune(OPTIMIZER)
    assert record.d2 is None
    assert record.d1 == pytest.approx(0.3 / 0.8 if schedule == "acc_allr" else Reference().d1(0.8), abs=1e-9)
    assert record.retrain_peak * run.run.learning_rate == pytest.approx(record.d1 * 0.2, abs=1e-12)


@pytest.mark.parametrize("schedule", ["ft", "lrw", "slr", "clr", "stepped", "allr_d2"])
def test_schedules_that_need_the_dense_history_say_so(schedule: str) -> None:
    with pytest.raises(ValueError, match=f"'{schedule}' needs the dense schedule.*dense_steps"):
        method(schedule, make_plan(30, 0.8, 1, 0.0), None)


@pytest.mark.parametrize("schedule", ["llr", "constant", "cosine", "linear"])
def test_schedules_that_need_no_dense_history_run_without(schedule: str) -> None:
    run = method(schedule, make_plan(30, 0.8, 1, 0.0), None, 0.0)
    run.prune(OPTIMIZER)
    assert run.rate(0) * run.run.learning_rate == pytest.approx(0.2 if schedule == "llr" else TUNED_RATE)


def test_rewinding_further_than_the_dense_phase_went_is_refused() -> None:
    history = DenseHistory(9, 0.2)
    with pytest.raises(ValueError, match="'lrw' replays the last 11 .* only 9 steps. Use more cycles"):
        method("lrw", make_plan(20, 0.8, 1, 0.45), history)
    with pytest.raises(ValueError, match="last 10 .* only 9 steps"):  # the last of two cycles takes the remainder
        method("lrw", make_plan(28, 0.8, 2, 9 / 28), history)
    fits = method("lrw", make_plan(18, 0.8, 1, 0.5), history)
    fits.prune(OPTIMIZER)
    assert [fits.rate(9 + i) for i in range(9)] == list(history.rates().rates)


def test_a_retraining_longer_than_the_dense_phase_starts_from_the_largest_rate() -> None:
    run = method("allr", make_plan(100, 0.8, 1, 0.4), DenseHistory(40, 0.2))
    record = run.prune(OPTIMIZER)
    assert record.d2 == 1.0 and record.retrain_peak == pytest.approx(0.2)
    assert all(0 < run.rate(step) <= 0.2 for step in range(40, 100))


def test_nothing_removed_of_nothing_has_no_impact() -> None:
    masks = Masks({"w": torch.nn.Parameter(torch.zeros(4, 4))})
    run = IterativeMagnitudePruning(Run(make_plan(10, 0.5, 1, 0.0), masks))
    assert run.prune(OPTIMIZER).d1 == 0.0


def test_progress_comes_back_from_a_checkpoint() -> None:
    plan, history = make_plan(60, 0.8, 3), DenseHistory(30, 0.2)
    run, resumed = method("acc_allr", plan, history), method("acc_allr", plan, history)
    run.prune(OPTIMIZER)
    resumed.load_state_dict(json.loads(json.dumps(run.state_dict())))
    resumed.masks.pruned = {name: mask.clone() for name, mask in run.masks.pruned.items()}
    resumed.masks.mask_weights()
    after = iter(accuracies()[2:])  # the dense accuracy is not measured again
    resumed.run = replace(resumed.run, train_accuracy=lambda: next(after))
    assert resumed.cycle == 1 and resumed.is_due(40) and not resumed.is_due(30)
    assert run.prune(OPTIMIZER) == resumed.prune(OPTIMIZER)
    assert [run.rate(step) for step in range(30, 50)] == [resumed.rate(step) for step in range(30, 50)]


# ---- The dense schedule ----

TYPES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-3}),
    ("inverse_sqrt", {"timescale": 20}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 0.02}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.3}),
    ("cosine_warmup_with_min_lr", {"min_lr": 0.02}),
    ("warmup_stable_decay", {"num_decay_steps": 15, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}),
]


@pytest.mark.parametrize(("kind", "kwargs"), TYPES)
@pytest.mark.parametrize("warmup", [0, 8])
def test_the_dense_history_is_what_a_stepped_scheduler_gives(kind: str, kwargs: dict, warmup: int) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.2)
    scheduler = get_scheduler(kind, optimizer, warmup, 50, dict(kwargs))
    used = []
    for _ in range(50):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    dense = DenseHistory(50, 0.2, kind, warmup, kwargs).rates()
    assert list(dense.rates) == used  # to the last bit: dense training is that of plain Trainer
    assert (dense.peak, dense.last, dense.steps) == (max(used), used[-1], 50)
    unit = DenseHistory(50, 0.2, kind, warmup, kwargs).rates(unit=0.2)
    assert [0.2 * rate for rate in unit.rates] == used


@pytest.mark.parametrize("warmup", [0, 5])
def test_milestones_multiply_the_rate(warmup: int) -> None:
    dense = DenseHistory(40, 0.1, warmup_steps=warmup, lr_milestones=[0.5, 0.75], lr_gamma=0.2).rates()
    expected = [0.1] * 20 + [0.02] * 10 + [0.004] * 10
    expected[:warmup] = [0.1 * i / 5 for i in range(warmup)]
    assert dense.rates == pytest.approx(expected, abs=1e-15)
    assert (dense.peak, dense.last) == pytest.approx((0.1, 0.004))


def test_the_largest_rate_is_one_that_was_really_used() -> None:
    dense = DenseHistory(6, 0.1, warmup_steps=10).rates()  # the phase ends within its warm-up
    assert dense.peak == pytest.approx(0.05) and dense.last == pytest.approx(0.05)
    floor = DenseHistory(20, 0.1, "cosine_with_min_lr", 4, {"min_lr": 0.03}).rates()
    assert floor.peak == 0.1 and 0.03 < floor.last < 0.035


@pytest.mark.parametrize("schedule", ["slr", "stepped"])
def test_compressing_a_stepped_schedule_keeps_its_shape(schedule: str) -> None:
    history = DenseHistory(80, 0.1, lr_milestones=[0.5, 0.75], lr_gamma=0.1)
    run = method(schedule, make_plan(100, 0.8, 1, 0.8), history, 0.0)
    peak = run.prune(OPTIMIZER).retrain_peak
    expected = [peak] * 10 + [peak / 10] * 5 + [peak / 100] * 5
    assert [run.rate(step) for step in range(80, 100)] == pytest.approx(expected, abs=1e-12)


# ---- The scheduler that Trainer sees ----


def test_skipped_optimizer_steps_do_not_delay_the_schedule() -> None:
    plan, history = make_plan(40, 0.8, 2), DenseHistory(20, 0.2)
    run, reference = method("allr", plan, DenseHistory(20, 1.0)), method("allr", plan, history)
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[0]}, {"params": parameters[1], "lr": 0.1}], lr=0.2)
    scheduler = PlannedScheduler(optimizer, run.rate)
    assert scheduler.get_last_lr() == [0.2, 0.1]
    for step in range(40):
        if run.is_due(step):
            run.prune(OPTIMIZER), reference.prune(OPTIMIZER)
        scheduler.set_step(step)
        rate = reference.rate(step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate / 2], abs=1e-9)
        assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]
        if step % 3:  # the scaler skips every third step, and Trainer then does not step the scheduler
            optimizer.step()
            scheduler.step()
