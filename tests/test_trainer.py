"""`BIMPTrainer` as its users see it: dense parity, learning rates, hard zeros, histories, records, refusals."""

import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    At,
    Classifier,
    classification_items,
    classifier,
    matrices,
    run_arguments,
    snapshot,
    sparsity,
    tiny_t5,
    translation_items,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, T5ForConditionalGeneration, Trainer, TrainingArguments
from transformers.optimization import Adafactor

from hf_bimp import BIMPArguments, BIMPSeq2SeqArguments, BIMPSeq2SeqTrainer, BIMPTrainer
from hf_bimp.arguments import TESTED_OPTIMIZERS

MODELS = {"classifier": (classifier, classification_items), "t5": (tiny_t5, translation_items)}


def make_trainer(
    output_dir: Path, model: nn.Module | None = None, items: list | None = None, **changes
) -> BIMPTrainer:
    """A trainer of the classifier over 12 steps, 6 of them dense, to 80 % in two cycles, but for `changes`."""
    named = {"callbacks", "eval_dataset", "compute_metrics", "optimizers", "model_init", "optimizer_cls_and_kwargs"}
    given = {name: changes.pop(name) for name in named & changes.keys()}
    defaults = {"max_steps": 12, "target_sparsity": 0.8, "num_cycles": 2}
    if changes.get("method") == "dense" or changes.get("num_cycles") == 0:
        defaults = {"max_steps": 12}
    if "num_train_epochs" in changes:
        defaults.pop("max_steps")
    if "prune_fraction" in changes:
        defaults.pop("num_cycles")
    if model is None and "model_init" not in given:
        model = classifier()
    return BIMPTrainer(
        model=model,
        args=BIMPArguments(**run_arguments(output_dir, **(defaults | changes))),
        train_dataset=classification_items() if items is None else items,
        **given,
    )


class RateRecorder:
    """The learning rates of all groups as the optimizer uses them, step by step."""

    def __init__(self):
        self.rates: dict[int, list[float]] = {}

    def follow(self, trainer: Trainer) -> None:
        def record(model: nn.Module, step: int) -> None:
            self.rates[step] = [group["lr"] for group in trainer.optimizer.param_groups]

        trainer.add_callback(At("on_pre_optimizer_step", record))

    def first_group(self) -> list[float]:
        return [self.rates[step][0] for step in sorted(self.rates)]


def recorded_rates(trainer: BIMPTrainer) -> list[float]:
    recorder = RateRecorder()
    recorder.follow(trainer)
    trainer.train()
    return recorder.first_group()


def pruning_records(trainer: BIMPTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "prune_cycle" in entry]


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


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
    assert losses[0] == losses[1] and len(losses[0]) == 2


# ---- Learning rates ----


def dense_rate(i: int, steps: int, warmup: int, peak: float) -> float:
    """Transformers' linear schedule."""
    return peak * (i / warmup if i < warmup else (steps - i) / (steps - warmup))


def expected_rates(schedule: str, plan, warmup: int, eta: float, tuned: float | None, discounts: list[float]) -> list:
    """Every step's rate, written down from the definitions of the schedules alone."""
    t0 = plan.prune_steps[0]
    dense = [dense_rate(i, t0, warmup, eta) for i in range(t0)]
    peak_dense, last_dense = max(dense), dense[-1]
    rates = list(dense)
    bounds = [*plan.prune_steps, plan.total_steps]
    for start, end, d in zip(bounds, bounds[1:], discounts, strict=False):
        n = end - start
        w = round(0.1 * n) if schedule in ("slr", "clr", "llr", "allr", "allr_d1", "allr_d2", "acc_allr") else 0
        if schedule in ("constant", "stepped", "cosine", "linear"):
            p = tuned
        elif schedule == "ft":
            p = last_dense
        else:
            p = peak_dense * (d if "allr" in schedule else 1.0)
        for i in range(n):
            j, m = i - w, n - w
            if schedule == "lrw":
                rates.append(dense[t0 - n + i])
            elif i < w:
                rates.append(p * (i + 1) / (w + 1))
            elif schedule in ("ft", "constant"):
                rates.append(p)
            elif schedule in ("slr", "stepped"):
                at = math.floor(j * t0 / m)
                rates.append(p / peak_dense * (peak_dense if at < warmup else dense[at]))
            elif schedule in ("clr", "cosine"):
                low = last_dense if schedule == "clr" else 0.0
                rates.append(low + (p - low) * (1 + math.cos(math.pi * j / m)) / 2)
            else:
                rates.append(p * (1 - j / m))
    return rates


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


# ---- Hard zeros ----

BY_HAND: dict[str, tuple[type, dict]] = {
    "sgd, nesterov": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "adam, amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "rmsprop, centered": (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "adagrad, warm": (torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.1, "weight_decay": 0.1}),
    "adafactor, momentum": (Adafactor, {"lr": 1e-2, "relative_step": False, "scale_parameter": False, "beta1": 0.9}),
}


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() == 0 for name, weight in matrices(model).items()}


@pytest.mark.parametrize("optim", [o.value for o in TESTED_OPTIMIZERS] + list(BY_HAND))
def test_pruned_weights_gradients_and_optimizer_state_stay_zero(tmp_path, optim):
    given = {"optimizer_cls_and_kwargs": BY_HAND[optim]} if optim in BY_HAND else {"optim": optim, "weight_decay": 0.1}
    if optim in ("sgd", "rmsprop"):
        given["optim_args"] = "momentum=0.9"
    clip = 0.05
    trainer = make_trainer(tmp_path, tiny_t5(), translation_items(), max_steps=15, max_grad_norm=clip, **given)
    pruned: dict[str, Tensor] = {}
    norms: dict[int, float] = {}
    state_tensors = []

    def before_step(model: nn.Module, step: int) -> None:
        if step in trainer.plan.prune_steps:
            now = zeros_of(model)
            planned = trainer.plan.sparsities[trainer.plan.prune_steps.index(step)]
            total = sum(mask.numel() for mask in now.values())
            assert sum(int(mask.sum()) for mask in now.values()) == round(planned * total)
            assert all(bool(now[name][mask].all()) for name, mask in pruned.items())
            pruned.update(now)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms[step] = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients])).item()
        check(model)

    def check(model: nn.Module) -> None:
        weights = matrices(model)
        for name, mask in pruned.items():
            assert not weights[name].detach()[mask].any()
            if weights[name].grad is not None:
                assert not weights[name].grad[mask].any()
            for value in trainer.optimizer.state[weights[name]].values():
                if torch.is_tensor(value) and value.shape == mask.shape:
                    state_tensors.append(value)
                    assert not value[mask].any()

    trainer.add_callback(At("on_pre_optimizer_step", before_step))
    trainer.add_callback(At("on_step_end", lambda model, step: check(model)))
    trainer.train()
    assert sparsity(trainer.model) == pytest.approx(0.8, abs=1e-3)
    # Clipped to exactly this norm, which it would fall short of if pruned weights had counted.
    assert [norms[step] for step in range(15)] == pytest.approx([clip] * 15, rel=1e-3)
    if optim != "adafactor":  # its default keeps sums of rows and columns alone
        assert state_tensors


def test_logged_gradient_norm_ignores_pruned_weights(tmp_path):
    norms = []
    trainer = make_trainer(tmp_path, logging_steps=1, max_grad_norm=1e9)

    def measure(model: nn.Module, step: int) -> None:
        squares = 0.0
        for parameter in model.parameters():
            counted = parameter.grad
            if step >= 6 and parameter.ndim > 1:
                counted = counted[parameter.detach() != 0]
            squares += counted.double().square().sum().item()
        norms.append(math.sqrt(squares))

    trainer.add_callback(At("on_pre_optimizer_step", measure))
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-5)


# ---- IMP: a model that was trained before ----


@pytest.fixture(scope="module")
def dense_checkpoint(tmp_path_factory) -> Path:
    """A T5 trained densely for 20 steps (4 of them warm-up, cosine) at 5e-3."""
    folder = tmp_path_factory.mktemp("dense")
    trainer = make_trainer(
        folder,
        tiny_t5(),
        translation_items(),
        method="dense",
        max_steps=20,
        warmup_steps=4,
        lr_scheduler_type="cosine",
        learning_rate=5e-3,
        save_strategy="steps",
        save_steps=10,
    )
    trainer.train()
    return folder


def cosine_rates(steps: int = 20, warmup: int = 4, peak: float = 5e-3) -> list[float]:
    decay = [(1 + math.cos(math.pi * i / (steps - warmup))) / 2 for i in range(steps - warmup)]
    return [peak * i / warmup for i in range(warmup)] + [peak * factor for factor in decay]


def imp_trainer(output_dir: Path, model: nn.Module, **changes) -> BIMPTrainer:
    defaults = {"dense_ratio": 0.0, "max_steps": 8, "num_cycles": 1, "target_sparsity": 0.6}
    return make_trainer(output_dir, model, translation_items(), **(defaults | changes))


def test_dense_method_prunes_nothing(dense_checkpoint):
    model = T5ForConditionalGeneration.from_pretrained(dense_checkpoint)
    assert sparsity(model) == 0
    results = json.loads((dense_checkpoint / "bimp_results.json").read_text())
    assert results["plan"]["prune_steps"] == [] and results["sparsity"]["prunable"] == 0


def test_history_is_read_from_the_checkpoint(tmp_path, dense_checkpoint):
    def run(schedule: str) -> tuple[list[float], dict]:
        model = T5ForConditionalGeneration.from_pretrained(dense_checkpoint)
        # The arguments of the new run say other things about the dense schedule: the history wins.
        trainer = imp_trainer(tmp_path / schedule, model, retrain_schedule=schedule, learning_rate=1e-4)
        rates = recorded_rates(trainer)
        assert trainer.plan.prune_steps == (0,) and len(rates) == 8
        return rates, pruning_records(trainer)[0]

    dense = cosine_rates()
    assert run("ft")[0] == pytest.approx([dense[-1]] * 8, rel=1e-9)
    assert run("lrw")[0] == pytest.approx(dense[-8:], rel=1e-9)
    rates, record = run("allr")
    d = max(record["prune_d1"], 8 / 20)
    assert record["prune_d2"] == pytest.approx(8 / 20, rel=1e-9)
    assert record["prune_retrain_peak"] == pytest.approx(d * 5e-3, rel=1e-9)
    assert rates[1] == pytest.approx(d * 5e-3, rel=1e-9)  # one warm-up step, then the peak in full


def test_history_of_an_unfinished_dense_phase_is_not_one(tmp_path, dense_checkpoint):
    model = T5ForConditionalGeneration.from_pretrained(dense_checkpoint / "checkpoint-10")
    with pytest.raises(ValueError, match="dense_steps"):
        imp_trainer(tmp_path, model, retrain_schedule="ft").train()


def test_history_is_that_of_the_dense_phase_for_a_pruned_model(tmp_path):
    first = make_trainer(
        tmp_path / "bimp", tiny_t5(), translation_items(), save_strategy="steps", save_steps=100, dense_ratio=0.75
    )
    first.train()
    sparse = T5ForConditionalGeneration.from_pretrained(tmp_path / "bimp")
    second = imp_trainer(tmp_path / "again", sparse, keep_zeros=True, target_sparsity=0.9, max_steps=6)
    second.train()
    assert second.plan.initial_sparsity == pytest.approx(0.8, abs=1e-3)
    assert pruning_records(second)[0]["prune_d2"] == pytest.approx(6 / 9, rel=1e-9)


def test_history_given_by_arguments(tmp_path):
    changes = {"dense_steps": 40, "learning_rate": 2e-3, "warmup_steps": 10}
    trainer = imp_trainer(tmp_path / "lrw", tiny_t5(), retrain_schedule="lrw", **changes)
    assert recorded_rates(trainer) == pytest.approx([2e-3 * (8 - i) / 30 for i in range(8)], rel=1e-9)
    trainer = imp_trainer(tmp_path / "d2", tiny_t5(), retrain_schedule="allr_d2", **changes)
    assert max(recorded_rates(trainer)) == pytest.approx(2e-3 * 8 / 40, rel=1e-9)
    with pytest.raises(ValueError, match="lrw"):
        imp_trainer(tmp_path / "short", tiny_t5(), retrain_schedule="lrw", dense_steps=7).train()


@pytest.mark.parametrize("schedule", ["ft", "lrw", "slr", "clr", "stepped", "allr_d2"])
def test_schedules_that_need_the_unknown_history_are_refused(tmp_path, schedule):
    model = tiny_t5()
    before = snapshot(model)
    tuned = {"retrain_learning_rate": 1e-3} if schedule == "stepped" else {}
    trainer = imp_trainer(tmp_path / "out", model, retrain_schedule=schedule, **tuned)
    with pytest.raises(ValueError, match="dense_steps"):
        trainer.train()
    assert_same_tensors(snapshot(model), before)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("schedule", ["allr", "acc_allr"])
def test_without_history_allr_goes_by_d1_alone_and_says_so(tmp_path, caplog, schedule):
    trainer = imp_trainer(tmp_path, tiny_t5(), retrain_schedule=schedule, learning_rate=3e-3)
    rates = recorded_rates(trainer)
    assert "d1 alone" in caplog.text and "dense_steps" in caplog.text
    (record,) = pruning_records(trainer)
    assert "prune_d2" not in record
    assert record["prune_retrain_peak"] == pytest.approx(record["prune_d1"] * 3e-3, rel=1e-9)
    assert max(rates) == pytest.approx(record["prune_d1"] * 3e-3, rel=1e-9)


def test_stale_model_path_does_not_stop_a_run(tmp_path, dense_checkpoint):
    model = T5ForConditionalGeneration.from_pretrained(dense_checkpoint)
    model.config.name_or_path = str(tmp_path / "moved" / "away")
    imp_trainer(tmp_path / "out", model, retrain_schedule="llr").train()
    assert sparsity(model) == pytest.approx(0.6, abs=1e-3)


# ---- Other ways to say how much and how long ----


def sparse_classifier(share: float) -> Classifier:
    model = classifier()
    with torch.no_grad():
        for weight in matrices(model).values():
            weight.view(-1)[: round(share * weight.numel())] = 0
    return model


def test_keep_zeros_without_pruning_fine_tunes_a_sparse_model(tmp_path):
    model = sparse_classifier(0.5)
    zeros, before = zeros_of(model), snapshot(model)
    trainer = make_trainer(tmp_path, model, keep_zeros=True, num_cycles=0, weight_decay=0.1)
    trainer.train()
    for name, weight in matrices(model).items():
        assert torch.equal(weight.detach() == 0, zeros[name])
        assert not torch.equal(weight, before[name])
    assert trainer.plan.prune_steps == () and trainer.plan.initial_sparsity == 0.5
    assert pruning_records(trainer) == []


def test_keep_zeros_and_prune_further(tmp_path):
    model = sparse_classifier(0.5)
    zeros = zeros_of(model)
    seen = []
    held = At(
        "on_step_end", lambda model, step: seen.append(all(zeros_of(model)[n][z].all() for n, z in zeros.items()))
    )
    trainer = make_trainer(tmp_path, model, keep_zeros=True, target_sparsity=0.875, callbacks=[held])
    trainer.train()
    assert seen == [True] * 12
    assert trainer.plan.sparsities == pytest.approx((0.75, 0.875))
    assert sparsity(model) == 0.875


def test_keep_zeros_refuses_a_target_that_is_reached_already(tmp_path):
    with pytest.raises(ValueError, match="50.00% sparse already"):
        make_trainer(tmp_path, sparse_classifier(0.5), keep_zeros=True, target_sparsity=0.4).train()


def test_without_keep_zeros_old_zeros_may_grow(tmp_path):
    model = sparse_classifier(0.5)
    sparsity_before, grown = sparsity(model), []
    watch = At("on_step_end", lambda model, step: grown.append(sparsity(model)))
    make_trainer(tmp_path, model, callbacks=[watch]).train()
    assert sparsity_before == 0.5 and grown[5] < 0.1


def test_keep_zeros_clears_the_state_of_an_optimizer_passed_by_hand(tmp_path):
    model = sparse_classifier(0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    items = classification_items()
    batch = {"x": torch.stack([i["x"] for i in items]), "labels": torch.tensor([i["labels"] for i in items])}
    zeros = zeros_of(model)
    model(**batch)["loss"].backward()
    optimizer.step()  # momentum everywhere
    optimizer.zero_grad()
    with torch.no_grad():
        for name, weight in matrices(model).items():
            weight[zeros[name]] = 0
    nonzero = []

    def look(model: nn.Module, step: int) -> None:
        for name, weight in matrices(model).items():
            nonzero.append(int(optimizer.state[weight]["momentum_buffer"][zeros[name]].count_nonzero()))

    trainer = make_trainer(
        tmp_path, model, keep_zeros=True, target_sparsity=0.875, optimizers=(optimizer, None),
        callbacks=[At("on_step_end", look)],
    )  # fmt: skip
    trainer.train()
    assert sum(nonzero) == 0 and nonzero


def test_prune_fraction_decides_the_number_of_cycles(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=16, prune_fraction=0.5, target_sparsity=0.9)
    trainer.train()
    assert trainer.plan.sparsities == pytest.approx((0.5, 0.75, 0.875, 0.9))
    assert trainer.plan.prune_steps == (8, 10, 12, 14)
    total = sum(w.numel() for w in matrices(trainer.model).values())
    assert sparsity(trainer.model) == round(0.9 * total) / total


def test_budget_in_epochs(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=4, dense_ratio=0.25)  # 4 steps an epoch
    trainer.train()
    assert trainer.plan.total_steps == trainer.state.global_step == 16
    assert trainer.plan.prune_steps == (4, 10)


def test_budget_in_epochs_with_accumulation_and_a_ragged_end(tmp_path):
    trainer = make_trainer(
        tmp_path, items=classification_items(37), num_train_epochs=4, gradient_accumulation_steps=2, num_cycles=1
    )
    trainer.train()
    assert trainer.plan.total_steps == trainer.state.global_step == 12  # 5 batches, so 3 steps an epoch
    assert trainer.plan.prune_steps == (6,) and sparsity(trainer.model) == pytest.approx(0.8, abs=3e-3)


def test_second_train_call_is_a_new_run(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.plan is None
    first = recorded_rates(trainer)
    assert trainer.plan.prune_steps == (6, 9)
    again = RateRecorder()
    again.follow(trainer)
    trainer.train()
    assert [entry["prune_cycle"] for entry in pruning_records(trainer)] == [1, 2]
    assert again.first_group()[:6] == first[:6]
    assert sparsity(trainer.model) == pytest.approx(0.8, abs=3e-3)
    assert trainer.plan.initial_sparsity == 0


def test_model_init(tmp_path):
    trainer = make_trainer(tmp_path, model_init=lambda: classifier())
    outside = trainer.model
    trainer.train()
    assert trainer.model is not outside
    assert sparsity(trainer.model) == pytest.approx(0.8, abs=3e-3)
    weights = snapshot(trainer.model)
    trainer.train()
    assert_same_tensors(snapshot(trainer.model), weights)


def test_groups_of_a_given_optimizer_keep_their_proportions(tmp_path):
    model = classifier()
    groups = [{"params": model.first.parameters(), "lr": 1e-3}, {"params": model.last.parameters(), "lr": 4e-2}]
    trainer = make_trainer(
        tmp_path, model, optimizers=(torch.optim.SGD(groups, momentum=0.9), None), retrain_schedule="llr"
    )
    recorder = RateRecorder()
    recorder.follow(trainer)
    trainer.train()
    expected = expected_rates("llr", trainer.plan, 0, 1.0, None, [1.0, 1.0])
    assert len(recorder.rates) == 12
    for step, (slow, fast) in recorder.rates.items():
        assert slow == pytest.approx(1e-3 * expected[step], rel=1e-9, abs=1e-15)
        assert fast == pytest.approx(4e-2 * expected[step], rel=1e-9, abs=1e-15)
    assert sparsity(model) == pytest.approx(0.8, abs=3e-3)


# ---- ALLR by accuracy ----


def share_right(model: nn.Module, weights: dict[str, Tensor], items: list[dict]) -> float:
    """Counted item by item."""
    was = snapshot(model)
    model.load_state_dict(weights)
    model.eval()
    right = total = 0
    with torch.no_grad():
        for item in items:
            batch = {name: torch.as_tensor(value)[None] for name, value in item.items()}
            labels = batch["labels"].view(-1)
            predictions = model(**batch)["logits"].view(len(labels), -1).argmax(-1)
            right += int((predictions == labels)[labels != -100].sum())
            total += int((labels != -100).sum())
    model.load_state_dict(was)
    model.train()
    return right / total


@pytest.mark.parametrize("name", MODELS)
def test_acc_allr_measures_the_drop_of_the_training_accuracy(tmp_path, name):
    make_model, make_items = MODELS[name]
    model, items = make_model(dropout=0.2), make_items(37)
    dense, pruned = [], []
    trainer = make_trainer(
        tmp_path,
        model,
        items,
        max_steps=60,
        dense_ratio=0.9,
        target_sparsity=0.9,
        retrain_schedule="acc_allr",
        learning_rate=3e-2,
        callbacks=[At("on_step_end", lambda model, step: dense.append(snapshot(model)) if step == 54 else None)],
    )

    def after_pruning(model: nn.Module, step: int) -> None:
        if step in trainer.plan.prune_steps:
            pruned.append(snapshot(model))

    trainer.add_callback(At("on_pre_optimizer_step", after_pruning))
    trainer.train()
    before = share_right(model, dense[0], items)
    drops = [(before - share_right(model, weights, items)) / before for weights in pruned]
    expected = [min(max(drop, 0.0), 1.0) for drop in drops]
    assert any(0 < d < 1 for d in expected)
    assert [entry["prune_d1"] for entry in pruning_records(trainer)] == pytest.approx(expected, abs=1e-9)


def test_acc_allr_measures_on_training_data_with_persistent_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # workers end at once afterwards

    def run() -> None:
        held_out, sizes = classification_items(5, seed=8), []
        workers = dict(dataloader_num_workers=1, dataloader_persistent_workers=True)
        evaluation = dict(eval_dataset=held_out, eval_strategy="steps", eval_steps=3)
        trainer = make_trainer(tmp_path, retrain_schedule="acc_allr", **workers, **evaluation)
        gather = trainer.accelerator.gather_for_metrics

        def spy(rows, *args, **kwargs):
            gathered = gather(rows, *args, **kwargs)
            if torch.is_tensor(gathered) and gathered.ndim == 2 and gathered.shape[1] == 2:
                sizes.append(len(gathered))
            return gathered

        trainer.accelerator.gather_for_metrics = spy
        trainer.train()
        assert sum(sizes) == 3 * 32  # dense, and after each of two prunings
        assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_loss(trainer.model, held_out), rel=1e-5)

    run()
    gc.collect()


def mean_loss(model: nn.Module, items: list[dict]) -> float:
    model.eval()
    with torch.no_grad():
        batch = {"x": torch.stack([i["x"] for i in items]), "labels": torch.tensor([i["labels"] for i in items])}
        return model(**batch)["loss"].item()


# ---- Records ----


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_each_pruning_is_logged_as_it_was(tmp_path):
    before, after = {}, []
    watch = At("on_step_end", lambda model, step: before.update({step: snapshot(model)}))
    trainer = make_trainer(tmp_path, callbacks=[watch], retrain_schedule="allr")
    trainer.add_callback(At("on_pre_optimizer_step", lambda model, step: after.append(snapshot(model))))
    trainer.train()
    records = pruning_records(trainer)
    assert [r["step"] for r in records] == [6, 9] == list(trainer.plan.prune_steps)
    previous = 0.0
    for cycle, (record, planned) in enumerate(zip(records, trainer.plan.sparsities, strict=True), 1):
        dense = torch.cat([before[record["step"]][n].view(-1) for n in matrices(trainer.model)]).double()
        sparse = torch.cat([after[record["step"]][n].view(-1) for n in matrices(trainer.model)]).double()
        removed = (dense - sparse).abs()
        s = 1 - (1 - planned) / (1 - previous)
        d1 = min(removed.norm().item() / (dense.norm().item() * math.sqrt(s)), 1.0)
        assert record["prune_cycle"] == cycle
        assert record["prune_sparsity"] == round(planned * dense.numel()) / dense.numel()
        assert record["prune_threshold"] == removed.max().item() < sparse[sparse != 0].abs().min().item()
        assert record["prune_d1"] == pytest.approx(d1, rel=1e-6)
        assert record["prune_d2"] == pytest.approx(3 / 6)
        assert record["prune_retrain_peak"] == pytest.approx(1e-2 * max(d1, 0.5), rel=1e-6)
        previous = planned


def test_early_stopping_waits_for_the_last_cycle(tmp_path):
    calls = iter(range(10_000))
    trainer = make_trainer(
        tmp_path,
        max_steps=24,
        eval_dataset=classification_items(8, seed=2),
        compute_metrics=lambda prediction: {"score": -float(next(calls))},  # worse every time
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.plan.prune_steps == (12, 18)
    assert trainer.state.best_global_step == 19  # the first evaluation of the last cycle
    assert trainer.state.global_step == 21
    assert sparsity(trainer.model) == pytest.approx(0.8, abs=3e-3)


def test_best_model_is_one_that_reached_the_target(tmp_path):
    calls = iter(range(10_000))
    trainer = make_trainer(
        tmp_path,
        eval_dataset=classification_items(8, seed=2),
        compute_metrics=lambda prediction: {"score": -float(next(calls))},
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        num_cycles=1,
        dense_ratio=0.25,
    )
    trainer.train()
    assert trainer.plan.prune_steps == (3,)
    assert trainer.state.best_global_step == 6
    best = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert_same_tensors(snapshot(trainer.model), best)
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), best)
    assert sparsity(trainer.model) == pytest.approx(0.8, abs=3e-3)
    final = next(e["eval_score"] for e in trainer.state.log_history if e["step"] == 6 and "eval_score" in e)
    assert json.loads((tmp_path / "bimp_results.json").read_text())["final"]["score"] == final


def test_results_and_picture(tmp_path):
    held_out = classification_items(100, seed=2)
    given = dict(eval_dataset=held_out, compute_metrics=accuracy, target_sparsity=0.95, seed=5)
    trainer = make_trainer(tmp_path, max_steps=30, learning_rate=3e-2, **given)
    dense = []
    trainer.callback_handler.callbacks.insert(
        0, At("on_step_end", lambda model, step: dense.append(mean_loss(model, held_out)) if step == 15 else None)
    )
    trainer.train()
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert results["plan"]["total_steps"] == 30
    assert results["plan"]["prune_steps"] == list(trainer.plan.prune_steps) == [15, 22]
    assert results["plan"]["sparsities"] == list(trainer.plan.sparsities)
    first, last = results["prunings"]
    assert first["before"]["loss"] == pytest.approx(dense[0], rel=1e-5) == results["dense"]["loss"]
    assert first["retrained"] == last["before"] and last["retrained"] == results["final"]
    assert last["after"]["accuracy"] < last["before"]["accuracy"]
    stability = 1 - (last["before"]["accuracy"] - last["after"]["accuracy"]) / last["before"]["accuracy"]
    assert results["pruning_stability"]["accuracy"] == pytest.approx(stability)
    assert results["final"]["loss"] == pytest.approx(mean_loss(trainer.model, held_out), rel=1e-5)
    weights = matrices(trainer.model)
    assert results["sparsity"]["prunable"] == pytest.approx(sparsity(trainer.model))
    assert results["sparsity"]["per_layer"] == {n: float((w == 0).double().mean()) for n, w in weights.items()}
    zeros = sum(int((p == 0).sum()) for p in trainer.model.parameters())
    count = sum(p.numel() for p in trainer.model.parameters())
    assert results["sparsity"]["all_parameters"] == pytest.approx(zeros / count)
    assert results["seed"] == 5
    assert results["throughput"]["train_samples_per_second"] > 0
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert (tmp_path / "bimp_run.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_measuring_the_prunings_changes_no_weight(tmp_path):
    weights = []
    for evaluate in (True, False):
        trainer = make_trainer(
            tmp_path / str(evaluate), classifier(dropout=0.3), eval_dataset=classification_items(9, seed=2),
            evaluate_prunings=evaluate,
        )  # fmt: skip
        trainer.train()
        weights.append(snapshot(trainer.model))
        assert any(key.startswith("after_prune_") for key in pruning_records(trainer)[0]) == evaluate
    assert_same_tensors(*weights)


LOAD_PLAIN = """
import sys
from transformers import AutoModelForSeq2SeqLM
from safetensors.torch import save_file

model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
assert not any(name.split(".")[0] == "hf_bimp" for name in sys.modules)
save_file({name: w.clone() for name, w in model.named_parameters()}, sys.argv[2])
"""


def test_saved_model_is_plain_and_sparse(tmp_path):
    args = BIMPSeq2SeqArguments(
        **run_arguments(
            tmp_path / "out",
            max_steps=6,
            target_sparsity=0.7,
            save_strategy="steps",
            save_steps=4,
            predict_with_generate=True,
        )
    )
    trainer = BIMPSeq2SeqTrainer(
        model=tiny_t5(),
        args=args,
        train_dataset=translation_items(),
        eval_dataset=translation_items(6, seed=3),
        compute_metrics=lambda p: {"generated": float(p.predictions.ndim == 2 and p.predictions.dtype.kind == "i")},
    )
    trainer.train()
    assert trainer.results["final"]["generated"] == 1.0
    loaded = tmp_path / "loaded.safetensors"
    subprocess.run([sys.executable, "-c", LOAD_PLAIN, str(tmp_path / "out"), str(loaded)], check=True, timeout=120)
    weights = load_file(loaded)
    assert_same_tensors(weights, {name: p.detach() for name, p in trainer.model.named_parameters()})
    prunable = [weights[name] for name in matrices(trainer.model)]
    count = sum(w.numel() for w in prunable)
    assert sum(int((w == 0).sum()) for w in prunable) == round(0.7 * count)


def test_bare_module_is_saved_as_a_plain_state_dict(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    trainer.train()
    fresh = Classifier()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same_tensors(snapshot(fresh), snapshot(trainer.model))
    assert sparsity(fresh) == pytest.approx(0.8, abs=3e-3)


def test_final_evaluation_in_bfloat16_leaves_the_saved_weights_alone(tmp_path):
    saving = dict(save_strategy="steps", save_steps=12)
    items, held_out = translation_items(), translation_items(8, seed=2)
    trainer = make_trainer(tmp_path, tiny_t5(), items, eval_dataset=held_out, bf16_full_eval=True, **saving)
    trainer.train()
    last = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), last)


# ---- Bad input ----


def test_nan_weights_stop_the_run_at_the_pruning(tmp_path):
    def poison(model: nn.Module, step: int) -> None:
        if step == 5:
            with torch.no_grad():
                model.first.weight[0, 0] = float("nan")

    trainer = make_trainer(tmp_path, callbacks=[At("on_step_begin", poison)])
    with pytest.raises(ValueError, match="NaN"):
        trainer.train()
    assert trainer.state.global_step == 6


class Lookup(nn.Module):
    """Nothing to prune."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.table(labels).sum()}


def test_models_without_prunable_modules_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no prunable weight"):
        make_trainer(tmp_path, Lookup())


@pytest.mark.parametrize("argument", ["prune_modules", "skip_modules"])
def test_patterns_that_match_nothing_are_refused(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{argument}.*'nowhere'.*first"):
        make_trainer(tmp_path, **{argument: ["nowhere"]})


def test_skipping_everything_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no prunable weight"):
        make_trainer(tmp_path, skip_modules=["."])


@pytest.mark.parametrize("changes", [{"num_cycles": 7}, {"dense_ratio": 0.95}, {"dense_ratio": 0.01}])
def test_phases_without_a_step_are_refused_before_training(tmp_path, changes):
    model = classifier()
    before = snapshot(model)
    trainer = make_trainer(tmp_path / "out", model, **changes)
    with pytest.raises(ValueError, match="at least 1"):
        trainer.train()
    assert_same_tensors(snapshot(model), before)
    assert not list((tmp_path / "out").glob("*"))


def test_scheduler_passed_by_hand_is_refused(tmp_path):
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="lr_scheduler_type"):
        make_trainer(tmp_path, model, optimizers=(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3)))


class OwnOptimizer(torch.optim.SGD):
    """Anyone's optimizer."""


def test_untested_optimizers_are_refused_by_name(tmp_path):
    model = classifier()
    with pytest.raises(ValueError, match="OwnOptimizer"):
        make_trainer(tmp_path, model, optimizers=(OwnOptimizer(model.parameters(), lr=1e-2), None))
    with pytest.raises(ValueError, match="OwnOptimizer"):
        make_trainer(tmp_path, model, optimizer_cls_and_kwargs=(OwnOptimizer, {"lr": 1e-2}))
    with pytest.raises(ValueError, match="relative_step"):
        make_trainer(tmp_path, model, optimizers=(Adafactor(model.parameters()), None))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # from within peft
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's own use of transformers
def test_peft_models_are_refused(tmp_path):
    import peft

    model = peft.get_peft_model(tiny_t5(), peft.LoraConfig(target_modules=["q"], r=2))
    with pytest.raises(ValueError, match="PEFT"):
        make_trainer(tmp_path, model, translation_items())


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {"target_sparsity": 0.9},
        {"num_cycles": 1},
        {"max_steps": 16},
        {"dense_ratio": 0.25},
        {"retrain_schedule": "llr"},
        {"learning_rate": 3e-3},
        {"warmup_steps": 2},
        {"skip_modules": ["last"]},
        {"retrain_warmup_ratio": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_resuming_under_another_plan_is_refused_and_loses_nothing(tmp_path, finished_run, changes):
    before = files_of(finished_run)
    trainer = make_trainer(finished_run, save_strategy="steps", save_steps=4, **changes)
    with pytest.raises(ValueError, match=f"(?s)another plan.*{'|'.join(['plan', *changes, 'dense_schedule'])}"):
        trainer.train(resume_from_checkpoint=True)
    assert files_of(finished_run) == before


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, save_strategy="steps", save_steps=4).train()
    return folder


def test_resuming_from_a_checkpoint_of_plain_trainer_is_refused(tmp_path):
    plain = Trainer(
        model=classifier(),
        args=TrainingArguments(**run_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)),
        train_dataset=classification_items(),
    )
    plain.train()
    with pytest.raises(ValueError, match="checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resuming_from_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
