"""Trainers for the tests, and what their runs are asked."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer

from helpers import (
    At,
    classification_items,
    classifier,
    matrices,
    run_arguments,
    tiny_t5,
    translation_items,
)
from hf_bimp import BIMPArguments, BIMPTrainer

MODELS = {"classifier": (classifier, classification_items), "t5": (tiny_t5, translation_items)}


def make_trainer(
    output_dir: Path, model: nn.Module | None = None, items: list | None = None, **changes
) -> BIMPTrainer:
    """A trainer of the classifier over 12 steps, 6 of them dense, to 80 % in two cycles, but for `changes`.

    What the zeros save is not measured, which takes longer than the run.
    """
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
        args=BIMPArguments(**run_arguments(output_dir, **({"measure_deployment": False} | defaults | changes))),
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
    assert [name for name in one if not torch.equal(one[name].cpu(), other[name].cpu())] == []


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


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() == 0 for name, weight in matrices(model).items()}


def mean_loss(model: nn.Module, items: list[dict]) -> float:
    model.eval()
    with torch.no_grad():
        batch = {"x": torch.stack([i["x"] for i in items]), "labels": torch.tensor([i["labels"] for i in items])}
        return model(**batch)["loss"].item()


def dense_rate(i: int, steps: int, warmup: int, peak: float) -> float:
    """Transformers' linear schedule."""
    return peak * (i / warmup if i < warmup else (steps - i) / (steps - warmup))
