"""What a run leaves behind: log, results, picture, best and final model."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback

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
from hf_bimp import BIMPSeq2SeqArguments, BIMPSeq2SeqTrainer
from processes import output_of
from trainers import (
    assert_same_tensors,
    make_trainer,
    mean_loss,
    pruning_records,
)


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
    assert results["throughput"]["training_samples_per_second"] > 0
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
    output_of(sys.executable, "-c", LOAD_PLAIN, tmp_path / "out", loaded)
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


def test_several_evaluation_sets_are_measured_around_prunings_in_their_order(tmp_path):
    sets = {"first": classification_items(9, seed=2), "second": classification_items(9, seed=3)}
    trainer = make_trainer(tmp_path, eval_dataset=sets, compute_metrics=lambda p: {"size": len(p.label_ids)})
    trainer.train()
    names = ["first_loss", "first_size", "second_loss", "second_size"]
    for pruning in trainer.results["prunings"]:
        assert list(pruning["before"]) == list(pruning["after"]) == names
    assert list(trainer.results["final"]) == names and trainer.results["main_metric"] == "first_size"
