"""What a run tells of its pruning: collapse, speedup, distance, stability, per-layer sparsity, throughput."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import IterableDataset, default_collate

from helpers import classification_items, classifier, matrices, run_arguments
from hf_bimp import BIMPArguments, BIMPTrainer, LayerCollapseError
from hf_bimp.methods import IterativeMagnitudePruning
from hf_bimp.reporting.throughput import Throughput
from trainers import assert_same_tensors, make_trainer, pruning_records


def accuracy(evaluated) -> dict[str, float]:
    return {"accuracy": float((evaluated.predictions.argmax(-1) == evaluated.label_ids).mean())}


def test_a_run_measures_itself(tmp_path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=classification_items(16, seed=5), compute_metrics=accuracy)
    distances = []
    prune = IterativeMagnitudePruning.prune

    def watched(method, optimizer):
        before = {name: weight.detach().clone() for name, weight in method.masks.weights.items()}
        pruning = prune(method, optimizer)
        change = [(before[name] - weight).flatten() for name, weight in method.masks.weights.items()]
        distances.append(torch.cat(change).double().norm().item())
        return pruning

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IterativeMagnitudePruning, "prune", watched)
        trainer.train()
    results = json.loads((tmp_path / "bimp_results.json").read_text())
    assert [p["distance"] for p in results["prunings"]] == pytest.approx(distances) and min(distances) > 0
    weights = matrices(trainer.model)
    # A linear layer multiplies each of its weights once for every item.
    total, left = sum(w.numel() for w in weights.values()), sum(int((w != 0).sum()) for w in weights.values())
    assert results["theoretical_speedup"] == pytest.approx(total / left)
    assert results["prunings"][-1]["theoretical_speedup"] == pytest.approx(total / left)
    per_layer = {name: float((w == 0).float().mean()) for name, w in weights.items()}
    assert results["sparsity"]["per_layer"] == pytest.approx(per_layer)
    last = results["prunings"][-1]
    lost = (last["before"]["accuracy"] - last["after"]["accuracy"]) / last["before"]["accuracy"]
    assert results["pruning_stability"]["accuracy"] == pytest.approx(1 - lost)
    assert results["throughput"]["training_samples_per_second"] > 0
    logged = trainer.state.log_history[-2]  # the last one is Trainer's summary
    for name in (
        "theoretical_speedup",
        "training_samples_per_second",
        "pruning_stability_accuracy",
        "collapsed_layers",
    ):
        assert name in logged
    assert {f"layer_sparsity/{name}" for name in weights} <= logged.keys()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert (tmp_path / "bimp_layers.png").stat().st_size > 1000 and "(bimp_layers.png)" in card
    for shown in (
        "theoretical speedup",
        "training samples per second",
        "pruning stability (accuracy)",
        "first.weight",
    ):
        assert shown in card
    assert f"{results['prunings'][0]['distance']:.4g}" in card


def test_a_trainer_evaluates_and_saves_before_it_trains(tmp_path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=classification_items(16), compute_metrics=accuracy)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    assert 0 <= before <= 1 and (tmp_path / "model.safetensors").is_file()


def test_throughput_counts_only_steps_that_follow_each_other(monkeypatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 100.0, 101.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    throughput = Throughput()
    assert throughput.per_second() is None
    for samples in (10, 10, 4):
        throughput.trained_on(samples)
        throughput.step_ended()
    throughput.interrupted()
    for samples in (10, 6):
        throughput.trained_on(samples // 2)  # two micro-batches
        throughput.trained_on(samples // 2)
        throughput.step_ended()
    assert throughput.per_second() == (10 + 4 + 6) / 4


def with_a_tiny_layer() -> nn.Module:
    model = classifier()
    with torch.no_grad():
        model.last.weight.mul_(1e-3)
    return model


def test_a_collapsed_layer_is_warned_of_and_said_in_the_results(tmp_path, caplog) -> None:
    changes = {"dense_ratio": 0.0, "num_cycles": 1, "target_sparsity": 0.6, "learning_rate": 1e-6}
    trainer = make_trainer(tmp_path, with_a_tiny_layer(), **changes)
    trainer.train()
    assert "Layer collapse" in caplog.text and "last.weight" in caplog.text
    assert trainer.results["collapsed_layers"] == ["last.weight"]
    assert pruning_records(trainer)[0]["prune_collapsed_layers"] == 1
    trainer.create_model_card()
    assert "| layers with nothing left | last.weight |" in (tmp_path / "README.md").read_text()


def test_a_collapsed_layer_can_stop_the_run(tmp_path) -> None:
    changes = {"dense_ratio": 0.0, "num_cycles": 1, "target_sparsity": 0.6, "on_collapse": "raise"}
    with pytest.raises(LayerCollapseError, match=r"last\.weight.*Use more cycles"):
        make_trainer(tmp_path, with_a_tiny_layer(), **changes).train()
    trainer = make_trainer(tmp_path, with_a_tiny_layer(), **(changes | {"allocation": "uniform"}))
    trainer.train()
    assert trainer.results["collapsed_layers"] == []


@pytest.mark.parametrize("allocation", ["uniform", "erk", "lamp", "uniform_plus"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_every_rule_resumes_as_if_uninterrupted(tmp_path, allocation, criterion) -> None:
    rule = {"allocation": allocation, "criterion": criterion, "save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(tmp_path / "whole", **rule)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **rule)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")]
    assert_same_tensors(*files)
    assert whole.results["sparsity"]["prunable"] == pytest.approx(0.8, abs=1 / 192)
    assert whole.results["allocation"] == allocation and whole.results["criterion"] == criterion


def test_resuming_under_another_rule_is_refused(tmp_path) -> None:
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    with pytest.raises(ValueError, match="allocation: global there, erk now"):
        make_trainer(tmp_path, allocation="erk").train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_what_uniform_plus_cannot_reach_is_refused_before_training(tmp_path) -> None:
    trainer = make_trainer(tmp_path, allocation="uniform_plus", target_sparsity=0.99)
    with pytest.raises(ValueError, match=r"0\.9322 is the maximum here"):
        trainer.train()
    assert trainer.state.global_step == 0


class Once(IterableDataset):
    """A stream that gives every item once."""

    def __init__(self, items: list[dict]):
        self.stream = iter(items)

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        return next(self.stream)


def test_a_stream_is_trained_on_from_its_first_item_to_its_last(tmp_path) -> None:
    items = classification_items(96)  # as many as 12 steps of 8 need
    streamed, traced = (
        make_trainer(tmp_path / "a", items=Once(items), allocation="erk"),
        make_trainer(tmp_path / "b", items=Once(items), granularity="filter", target_sparsity=0.5),
    )
    streamed.train()
    assert streamed.state.global_step == 12 and streamed.results["theoretical_speedup"] > 1
    with pytest.raises(ValueError, match="gives every item only once"):
        traced.train()


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x, labels=None):
        logits = self.head(self.encoder(x[:, None])[:, 0])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_attention_that_torch_runs_without_its_layers_is_not_called_unused(tmp_path, caplog) -> None:
    make_trainer(tmp_path, Attentive()).train()
    assert "does not use" not in caplog.text


def test_cycles_of_a_pattern_that_prune_nothing_are_said(tmp_path, caplog) -> None:
    make_trainer(tmp_path, granularity="1:2", target_sparsity=None).train()
    assert "[2, 1] of 2 in the cycles of this plan, so that cycle 1 prunes nothing" in caplog.text


def test_weights_that_the_model_does_not_use_are_named(tmp_path, caplog) -> None:
    model = classifier()
    model.spare = nn.Linear(8, 8)
    make_trainer(tmp_path, model).train()
    assert "does not use 1 of its prunable weights (25.0% of their elements): spare.weight" in caplog.text


def test_batches_that_are_no_mapping_train_too(tmp_path) -> None:
    """With a `compute_loss` of one's own, which decides what of them the model gets."""

    class OwnLoss(BIMPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            x, labels = inputs
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, labels)
            return (loss, outputs) if return_outputs else loss

    torch.manual_seed(0)
    data = list(zip(torch.randn(32, 8), torch.randint(0, 4, (32,)), strict=True))
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    args = BIMPArguments(**run_arguments(tmp_path, max_steps=12, target_sparsity=0.5))
    trainer = OwnLoss(model=model, args=args, train_dataset=data, data_collator=default_collate)
    trainer.train()
    assert trainer.results["sparsity"]["prunable"] == 0.5 and trainer.results["theoretical_speedup"] == 2
