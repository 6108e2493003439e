"""Metrics of any kind, failing ones and full disks: they measure a run, and cannot end it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import classification_items, sparsity
from hf_bimp.reporting import plots
from hf_bimp.storage.files import as_json, write_json
from trainers import assert_same_tensors, make_trainer

EVALUATED = {"eval_strategy": "epoch", "save_strategy": "epoch"}
VALUES = {
    "list": [0.5, 0.25],
    "dict": {"a": 0.5},
    "text": "fine",
    "none": None,
    "nan": float("nan"),
    "infinity": float("inf"),
    "bool": True,
    "numpy": np.float32(0.25),
    "integer": np.int64(3),
    "array": np.eye(2),
    "tensor": torch.ones(3),
    "huge": 10**400,
}


def strict(text: str) -> dict:
    """JSON as the standard has it."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("what", VALUES)
def test_numbers_are_compared_and_the_rest_is_passed_through(tmp_path, what) -> None:
    def metrics(prediction) -> dict:
        return {
            "accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean()),
            what: VALUES[what],
        }

    trainer = make_trainer(tmp_path, eval_dataset=classification_items(16), compute_metrics=metrics, **EVALUATED)
    trainer.train()
    results = strict((tmp_path / "bimp_results.json").read_text())
    is_number = what in ("numpy", "integer")
    assert set(results["pruning_stability"]) == {"accuracy", *([what] if is_number else [])}
    assert results["final"][what] == as_json(VALUES[what])
    assert results["main_metric"] == "accuracy" and (tmp_path / "bimp_run.png").is_file()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| {what} |" in card and "| accuracy |" in card


def test_a_text_first_is_not_the_main_metric(tmp_path) -> None:
    def metrics(prediction) -> dict:
        return {"report": "text", "score": 0.5}

    trainer = make_trainer(tmp_path, eval_dataset=classification_items(16), compute_metrics=metrics)
    trainer.train()
    assert trainer.results["main_metric"] == "score"


def test_metrics_that_are_no_json_are_saved_with_the_history(tmp_path) -> None:
    """With `eval_strategy="no"` nobody but us evaluates, and every checkpoint holds what is logged."""

    def metrics(prediction) -> dict:
        return {"confusion": np.eye(2), "tensor": torch.ones(2), "set": {1}, "score": np.float64("nan")}

    trainer = make_trainer(
        tmp_path, eval_dataset=classification_items(16), compute_metrics=metrics, save_strategy="steps", save_steps=8
    )
    trainer.train()
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    pruned = next(entry for entry in history if "prune_cycle" in entry)
    assert pruned["after_prune_confusion"] == [[1, 0], [0, 1]] and pruned["before_prune_tensor"] == [1, 1]
    assert pruned["after_prune_set"] == [1] and pruned["after_prune_score"] != pruned["after_prune_score"]
    returned = trainer.evaluate()
    assert isinstance(returned["eval_confusion"], np.ndarray) and "epoch" in returned


def broken(prediction) -> dict:
    raise RuntimeError("the metrics service is down")


@pytest.mark.parametrize("evaluate_prunings", [True, False])
def test_an_evaluation_that_nobody_asked_for_may_fail(tmp_path, caplog, evaluate_prunings) -> None:
    trainer = make_trainer(
        tmp_path,
        eval_dataset=classification_items(16),
        compute_metrics=broken,
        save_strategy="steps",
        evaluate_prunings=evaluate_prunings,
    )
    done = trainer.train()
    assert done.global_step == 12
    assert "evaluation of the final model failed" in caplog.text and "service is down" in caplog.text
    assert ("evaluation around a pruning failed" in caplog.text) == evaluate_prunings
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), trainer.model.state_dict())
    assert strict((tmp_path / "bimp_results.json").read_text())["sparsity"]["prunable"] == sparsity(trainer.model)


def test_one_that_was_asked_for_fails_as_it_does_in_trainer(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="service is down"):
        make_trainer(
            tmp_path, eval_dataset=classification_items(16), compute_metrics=broken, eval_strategy="epoch"
        ).train()


def test_the_model_is_saved_before_anything_is_measured(tmp_path) -> None:
    found = []

    def metrics(prediction) -> dict:
        found.append((tmp_path / "model.safetensors").is_file())
        return {}

    make_trainer(
        tmp_path,
        eval_dataset=classification_items(16),
        compute_metrics=metrics,
        save_strategy="steps",
        evaluate_prunings=False,
    ).train()
    assert found == [True]


def test_a_full_disk_costs_pictures_and_card_alone(tmp_path, caplog, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    trainer = make_trainer(tmp_path, save_strategy="steps")
    trainer.train()
    assert "Drawing the pictures failed" in caplog.text and "No space left" in caplog.text
    assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "bimp_results.json").is_file()
    assert not (tmp_path / plots.PLOT_NAME).exists()
    monkeypatch.setattr("huggingface_hub.ModelCard.save", full)
    trainer.create_model_card()
    assert "Writing the model card failed" in caplog.text


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_last_entry_of_the_log_is_trainers_summary(tmp_path, evaluated) -> None:
    data = {"eval_dataset": classification_items(16)} if evaluated else {}
    trainer = make_trainer(tmp_path, **data)
    trainer.train()
    history = trainer.state.log_history
    assert "train_loss" in history[-1] and sum("train_loss" in entry for entry in history) == 1
    assert any("theoretical_speedup" in entry for entry in history)


@pytest.mark.parametrize("method", ["lc", "dnw", "bimp"])
def test_what_trainer_does_at_its_last_step_is_done_whatever_prunes_there(tmp_path, method) -> None:
    """The evaluation around a pruning after the last step must not take Trainer's own for done."""
    settings = {"weight_decay": 0.1, "load_best_model_at_end": True, "logging_steps": 4}
    extra = {"num_cycles": 2} if method == "bimp" else {"method": method, "num_cycles": None}
    saving = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = make_trainer(tmp_path, eval_dataset=classification_items(16), **saving, **settings, **extra)
    trainer.train()
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [4, 8, 12]
    assert [entry["step"] for entry in history if "loss" in entry] == [4, 8, 12]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-12")


def test_json_of_anything(tmp_path) -> None:
    content = {
        "nan": [float("nan"), (np.float64("inf"), 1.5)],
        "array": np.arange(3),
        "tensor": torch.tensor([1.0, float("nan")]),
        "set": {"b", "a"},
        "path": tmp_path,
        1: np.bool_(True),
    }
    write_json(tmp_path / "x.json", content)
    assert strict((tmp_path / "x.json").read_text()) == {
        "nan": [None, [None, 1.5]],
        "array": [0, 1, 2],
        "tensor": [1.0, None],
        "set": ["a", "b"],
        "path": str(tmp_path),
        "1": True,
    }
