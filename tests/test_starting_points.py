"""Runs that start from a trained or sparse model, and other ways to say how much and how long."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from helpers import (
    At,
    Classifier,
    classification_items,
    classifier,
    matrices,
    snapshot,
    sparsity,
    tiny_t5,
    translation_items,
)
from hf_bimp import BIMPTrainer
from trainers import (
    RateRecorder,
    assert_same_tensors,
    expected_rates,
    make_trainer,
    pruning_records,
    recorded_rates,
    zeros_of,
)

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
