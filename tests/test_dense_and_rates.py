"""The dense phase is plain Trainer's, and every step uses the learning rate of the plan."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from helpers import (
    At,
    matrices,
    run_arguments,
    snapshot,
    sparsity,
)
from hf_bimp import BIMPTrainer
from trainers import MODELS, assert_same_tensors, expected_rates, make_trainer, pruning_records, recorded_rates

# ---- Dense parity ----


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("name", MODELS)
def test_dense_phase_is_plain_trainer_bit_for_bit(tmp_path, name, optim):
    make_model, make_items = MODELS[name]
    common = dict(
        optim=optim,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        seed=7,
        eval_strategy="steps",
        eval_steps=3,
    )
    items, held_out = make_items(30), make_items(9, seed=2)
    plain_model = make_model(dropout=0.1)
    plain = Trainer(
        model=plain_model,
        args=TrainingArguments(**run_arguments(tmp_path / "plain", max_steps=8, **common)),
        train_dataset=items,
        eval_dataset=held_out,
    )
    plain.train()
    seen: dict[int, dict] = {}
    watch = At("on_step_end", lambda model, step: seen.setdefault(step, snapshot(model)))
    start = make_model(dropout=0.1)
    initial = snapshot(start)
    trainer = make_trainer(
        tmp_path / "bimp",
        start,
        items,
        eval_dataset=held_out,
        callbacks=[watch],
        max_steps=14,
        dense_ratio=8 / 14,
        **common,
    )
    trainer.train()
    assert trainer.plan.prune_steps[0] == 8
    assert_same_tensors(seen[8], snapshot(plain_model))
    assert not torch.equal(seen[8][next(iter(matrices(start)))], initial[next(iter(matrices(start)))])
    losses = [
        [e["eval_loss"] for e in t.state.log_history if "eval_loss" in e and e["step"] <= 6] for t in (plain, trainer)
    ]
    # Outputs of two objects: to rounding, where their weights are the same to the bit.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 2


# ---- Learning rates ----


def discounts_of(trainer: BIMPTrainer) -> list[float]:
    choose: dict[str, Callable] = {"allr_d1": lambda d1, d2: d1, "allr_d2": lambda d1, d2: d2}
    rule = choose.get(trainer.args.retrain_schedule, max)
    return [rule(entry["prune_d1"], entry["prune_d2"]) for entry in pruning_records(trainer)]


SCHEDULES = ["ft", "lrw", "slr", "clr", "llr", "allr", "allr_d1", "allr_d2", "acc_allr"]
TUNED = ["constant", "stepped", "cosine", "linear"]


@pytest.mark.parametrize(
    "schedule, cycles, warmup",
    [(schedule, 1 + i % 3, 4 * (i % 2)) for i, schedule in enumerate(SCHEDULES + TUNED)],
)
def test_every_step_uses_the_planned_rate(tmp_path, schedule, cycles, warmup):
    tuned = 3e-3 if schedule in TUNED else None
    trainer = make_trainer(
        tmp_path,
        max_steps=46,
        dense_ratio=0.5,
        num_cycles=cycles,
        warmup_steps=warmup,
        retrain_schedule=schedule,
        retrain_learning_rate=tuned,
        per_device_train_batch_size=32,
        logging_steps=1,
    )
    rates = recorded_rates(trainer)
    expected = expected_rates(schedule, trainer.plan, warmup, 1e-2, tuned, discounts_of(trainer))
    assert len(expected) == 46 and len(set(expected)) > 10
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("schedule", ["clr", "allr"])
def test_steps_that_the_loss_scaler_skips_do_not_shift_the_schedule(tmp_path, schedule):
    skipped, overflowing = [], [1, 5, 11, 12, 13, 19]  # the last dense step and the first after a pruning too
    trainer = make_trainer(
        tmp_path, max_steps=24, retrain_schedule=schedule, max_grad_norm=0.0, warmup_steps=2, optim="adamw_torch"
    )
    # As in fp16: the scaler skips the steps whose gradients overflow.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflow(model: nn.Module, step: int) -> None:
        if step in overflowing:
            model.last.weight.grad[0, 0] = float("inf")

    trainer.add_callback(At("on_pre_optimizer_step", overflow))
    trainer.add_callback(
        At("on_optimizer_step", lambda model, step: skipped.append(trainer.accelerator.optimizer_step_was_skipped))
    )
    rates = recorded_rates(trainer)
    assert [step for step, was_skipped in enumerate(skipped) if was_skipped] == overflowing
    expected = expected_rates(schedule, trainer.plan, 2, 1e-2, None, discounts_of(trainer))
    assert rates == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert trainer.method.masks.sparsity == pytest.approx(0.8, abs=1e-2) == sparsity(trainer.model)


def test_milestones_step_the_dense_phase(tmp_path):
    rates = recorded_rates(make_trainer(tmp_path, max_steps=20, lr_milestones=[0.5, 0.8], lr_gamma=0.1))
    assert rates[:10] == pytest.approx([1e-2] * 5 + [1e-3] * 3 + [1e-4] * 2, rel=1e-9)
