"""The same run on one process or two, in one micro-batch or two, learns the same and prunes the same weights."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from helpers import (
    FEATURES,
    At,
    Classifier,
    classification_items,
    classifier,
    matrices,
    run_arguments,
    tiny_t5,
    translation_items,
)
from hf_bimp import BIMPArguments, BIMPTrainer
from method_table import PRUNING_STABLE, SHORT
from processes import output_of

STEPS, BOUNDARIES = 12, (4, 8)


class Plain(Classifier):
    """Takes no labels and returns its logits alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)["logits"]


class Stream(IterableDataset):
    """Items without a number, which one process reads and shares out."""

    def __init__(self, items: list):
        self.items = items

    def __iter__(self) -> Iterator:
        return iter(self.items)


def plain() -> Plain:
    model = Plain()
    model.load_state_dict(classifier().state_dict())
    return model


MODELS = {
    "classifier": (classifier, classification_items),
    "plain": (plain, classification_items),
    "t5": (tiny_t5, translation_items),
}
SCHEDULES = {"classifier": "acc_allr", "plain": "acc_allr", "t5": "allr"}
WHOLE = 40  # whole batches only: with two processes Accelerate repeats items to fill up the last one
RAGGED = 37  # the last batch of an epoch is smaller, and accumulates fewer micro-batches
METHODS = {name: SHORT[name] for name in PRUNING_STABLE}
TASKS = {  # of two processes: model, batch of each process, accumulation
    "classifier": ("classifier", 4, 1),
    "plain, accumulation": ("plain", 2, 2),
    "t5": ("t5", 4, 1),
    "t5, accumulation": ("t5", 2, 2),
}


def train(
    folder: Path,
    name: str,
    batch: int,
    accumulation: int,
    count: int = WHOLE,
    unlabelled: bool = False,
    streamed: bool = False,
    rank: int = 0,
    **changes,
) -> None:
    """Trains and leaves in `folder` the losses and, by rank, the weights before and after each pruning."""
    folder.mkdir(exist_ok=True)
    make_model, make_items = MODELS[name]
    model, items = make_model(), make_items(count)
    if unlabelled:
        items[::4] = [item | {"labels": torch.full_like(item["labels"], -100)} for item in items[::4]]
    if name == "t5":  # label smoothing takes the labels away, and collators then give these
        items = [item | {"decoder_input_ids": model._shift_right(item["labels"][None])[0]} for item in items]
    seen: dict[str, torch.Tensor] = {}
    defaults = dict(
        max_steps=STEPS,
        dense_ratio=BOUNDARIES[0] / STEPS,
        num_cycles=2,
        target_sparsity=0.8,
        retrain_schedule=SCHEDULES[name],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        optim="sgd",
        optim_args="momentum=0.9",
        learning_rate=0.1,
        max_grad_norm=1.0,
    )
    if "method" in changes:
        for of_bimp in ("dense_ratio", "num_cycles", "retrain_schedule"):
            del defaults[of_bimp]
    trainer = BIMPTrainer(
        model=model,
        args=BIMPArguments(**run_arguments(folder, **(defaults | changes))),
        train_dataset=Stream(items) if streamed else items,
    )

    def keep(prefix: str):
        def action(model: torch.nn.Module, step: int) -> None:
            if step in BOUNDARIES:
                weights = matrices(getattr(model, "module", model))
                seen.update({f"{prefix} {step} {n}": w.detach().clone() for n, w in weights.items()})

        return action

    trainer.add_callback(At("on_step_end", keep("before")))
    trainer.add_callback(At("on_pre_optimizer_step", keep("after")))
    trainer.train()
    save_file(seen, folder / f"weights-{rank}.safetensors")
    save_file(matrices(trainer.model), folder / f"final-{rank}.safetensors")
    if rank == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """Every one of `TASKS` in two processes, as `torchrun` starts them, in a folder of its name."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    output_of(*command, __file__, folder)
    return folder


def log_of(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in json.loads((folder / "log.json").read_text()) if key in entry]


def assert_equivalent(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    losses = log_of(one, "loss"), log_of(other, "loss")
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=tolerance)
    for key in ("prune_d1", "prune_threshold", "prune_retrain_peak"):
        values = log_of(one, key), log_of(other, key)
        assert len(values[0]) == 2 and values[0] == pytest.approx(values[1], rel=1e-3)
    weights = load_file(one / "weights-0.safetensors"), load_file(other / "weights-0.safetensors")
    assert len(weights[0]) == len(weights[1]) > 0
    for boundary, threshold in zip(BOUNDARIES, log_of(one, "prune_threshold"), strict=True):
        pruned = 0
        for name in (n for n in weights[0] if n.startswith(f"after {boundary} ")):
            masks = [after[name] == 0 for after in weights]
            pruned += int(masks[0].sum())
            differing = masks[0] != masks[1]
            magnitudes = weights[0][name.replace("after", "before")][differing].abs()
            assert ((magnitudes - threshold).abs() < 1e-5).all()
        assert pruned > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_learn_the_same(tmp_path, name, accumulation):
    train(tmp_path / "whole", name, batch=8, accumulation=1, count=RAGGED)
    train(tmp_path / "parts", name, batch=8 // accumulation, accumulation=accumulation, count=RAGGED)
    assert_equivalent(tmp_path / "whole", tmp_path / "parts")


def test_logits_alone_learn_the_same_as_with_the_loss_of_the_model(tmp_path):
    train(tmp_path / "own", "classifier", batch=4, accumulation=2, count=RAGGED)
    train(tmp_path / "plain", "plain", batch=4, accumulation=2, count=RAGGED)
    assert_equivalent(tmp_path / "own", tmp_path / "plain")


def test_micro_batches_without_any_label_count_for_nothing(tmp_path):
    """Their mean loss is NaN; in a larger batch nobody would notice them."""
    train(tmp_path / "whole", "t5", batch=8, accumulation=1, unlabelled=True)
    train(tmp_path / "parts", "t5", batch=1, accumulation=8, unlabelled=True)
    assert_equivalent(tmp_path / "whole", tmp_path / "parts")


def test_smoothed_labels_are_normalised_alike(tmp_path):
    smooth = {"count": RAGGED, "label_smoothing_factor": 0.1}
    train(tmp_path / "whole", "t5", batch=8, accumulation=1, **smooth)
    train(tmp_path / "parts", "t5", batch=4, accumulation=2, **smooth)
    assert_equivalent(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_learn_the_same_as_one(tmp_path, two_processes, task):
    train(tmp_path, TASKS[task][0], batch=8, accumulation=1)
    assert_equivalent(tmp_path, two_processes / task)


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_prune_the_same_weights(two_processes, task):
    ranks = [load_file(two_processes / task / f"weights-{rank}.safetensors") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    pruned = [weight for key, weight in ranks[0].items() if key.startswith(f"after {BOUNDARIES[1]} ")]
    count = sum(weight.numel() for weight in pruned)
    assert sum(int((weight == 0).sum()) for weight in pruned) == round(0.8 * count)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_learn_the_same_by_any_method(tmp_path, two_processes, method):
    train(tmp_path, "classifier", batch=8, accumulation=1, method=method, **METHODS[method])
    log, losses = two_processes / method, log_of(tmp_path, "loss")
    assert losses == pytest.approx(log_of(log, "loss"), rel=1e-4) and len(losses) == STEPS
    assert log_of(tmp_path, "prune_sparsity") == pytest.approx(log_of(log, "prune_sparsity"), abs=1e-2)
    ranks = [load_file(log / f"final-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])


def test_two_processes_that_share_out_a_stream_measure_what_its_zeros_save(two_processes):
    """One measures, but both take part in reading what it measures on."""
    results = json.loads((two_processes / "streamed" / "bimp_results.json").read_text())
    assert results["throughput"]["inference"]["example"] == {"x": [2, FEATURES]}


if __name__ == "__main__":
    stream = {"rank": int(os.environ["RANK"]), "streamed": True, "retrain_schedule": "allr"}
    train(Path(sys.argv[1]) / "streamed", "classifier", 4, 1, **stream)
    for method, knobs in METHODS.items():
        rank = int(os.environ["RANK"])
        train(Path(sys.argv[1]) / method, "classifier", 4, 1, rank=rank, method=method, **knobs)
    for task, (name, batch, accumulation) in TASKS.items():
        train(Path(sys.argv[1]) / task, name, batch, accumulation, rank=int(os.environ["RANK"]))


def test_a_compute_loss_of_ones_own_is_scaled_as_plain_trainer_scales_it(tmp_path) -> None:
    def losses(base: type[Trainer], args: TrainingArguments) -> list[float]:
        class OwnLoss(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                outputs = model(**inputs)
                return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

        trainer = OwnLoss(model=classifier(), args=args, train_dataset=classification_items())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    common = run_arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-2)
    plain = losses(Trainer, TrainingArguments(**common))
    ours = losses(BIMPTrainer, BIMPArguments(**common, method="dense"))
    assert ours == pytest.approx(plain, rel=1e-6) and len(ours) == 4  # outputs of two objects
