"""ALLR by accuracy measures what it says, on the training data."""

import gc

import pytest
import torch
from torch import Tensor, nn

from helpers import (
    At,
    classification_items,
    snapshot,
)
from trainers import MODELS, make_trainer, mean_loss, pruning_records


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
