"""Runs that are killed: for each method its own settings, and what a checkpoint depends on, drawn at random."""

import random
from typing import Any

import torch
from torch import Tensor, nn

from helpers import CLASSES, FEATURES, classification_items, run_arguments, tiny_t5, translation_items
from hf_bimp import BIMPArguments, BIMPTrainer
from hf_bimp.methods import METHODS
from hf_bimp.schedules.retraining import RETRAIN_SCHEDULES
from method_table import SHORT

STEPS = 14

# One of each is drawn. What a key of MODELS, `processes` and `evaluated` say is for `build`, the rest are arguments.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "optimizer": [
        {},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"optim": "adafactor"},
        {"optim": "rmsprop"},
        {"optim": "adagrad"},
    ],
    "precision": [{}, {}, {"bf16": True}],
    "accumulation": [{}, {}, {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 3}],
    "saving": [
        {"save_steps": 1},
        {"save_steps": 1, "save_total_limit": 1},
        {"save_steps": 2, "save_total_limit": 2},
        {"save_strategy": "epoch"},
    ],
    "evaluation": [
        {},
        {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy"},
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "accuracy"},
    ],
    "workers": [{}, {}, {}, {"dataloader_num_workers": 1}, {"dataloader_num_workers": 1, "persistent": True}],
    "schedule": [{}, {"lr_scheduler_type": "cosine", "warmup_steps": 2}, {"weight_decay": 0.05}],
    "processes": [{}] * 7 + [{"processes": 2}],
}
MODELS = ("batch norm", "convolutions", "t5")


def draw(method: str, rng: random.Random) -> dict[str, Any]:
    """A scenario of `method`; equal states of `rng` give equal ones."""
    scenario: dict[str, Any] = {"method": method, "model": rng.choice(MODELS)} | SHORT.get(method, {})
    for name in OPTIONS:
        scenario = rng.choice(OPTIONS[name]) | scenario
    if scenario.pop("persistent", False):
        scenario["dataloader_persistent_workers"] = True
    if scenario.get("save_strategy") == "best":
        scenario.pop("save_total_limit", None)
    elif "metric_for_best_model" in scenario and scenario.get("save_strategy") != "epoch" and rng.random() < 0.5:
        scenario |= {"load_best_model_at_end": True, "eval_steps": scenario["save_steps"]}
    traits = METHODS[method].traits
    if not traits.has_dense_phase and rng.random() < 0.3:
        scenario["finetune_ratio"] = 0.2
    if method == "gmp":
        scenario |= rng.choice([{}, {"gmp_hard": True}, {"gmp_schedule": "cyclic"}])
        scenario.pop("lr_scheduler_type", None)  # it has a schedule of its own
    elif method == "bimp":
        scenario |= _of_bimp(scenario["model"], rng)
    if traits.allocations and method != "dense" and "granularity" not in scenario:
        scenario["allocation"] = rng.choice(traits.allocations)
    return scenario


def _of_bimp(model: str, rng: random.Random) -> dict[str, Any]:
    schedule = rng.choice([name for name in RETRAIN_SCHEDULES if name not in ("acc_allr", *_TUNED)])
    own = {"num_cycles": rng.randint(1, 3), "dense_ratio": 0.5, "retrain_schedule": schedule}
    if model != "t5" and rng.random() < 0.3:
        own["retrain_schedule"] = "acc_allr"
    kind = rng.random()
    if kind < 0.2:
        return own | {"granularity": "2:4", "target_sparsity": None}
    if kind < 0.4 and model == "convolutions":
        return own | {"granularity": "filter", "target_sparsity": 0.5}
    return own | {"criterion": rng.choice(["magnitude", "taylor", "random"])}


_TUNED = ("constant", "stepped", "cosine", "linear")  # by a retrain_learning_rate of one's own


class BatchNorm(nn.Module):
    """Statistics of its own beside the weights, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.2)
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return _output(self.last(self.dropout(self.norm(self.first(x)).relu())), labels)


class Convolutions(nn.Module):
    """With a connection past one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 8, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.norm(self.first(x[:, None])).relu()
        hidden = (hidden + self.second(hidden)).relu()
        return _output(self.last(self.dropout(hidden.mean(2))), labels)


def _output(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    return (
        {"logits": logits}
        if labels is None
        else {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}
    )


def _accuracy(prediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    counts = prediction.label_ids != -100
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids)[counts].mean())}


def build(output_dir: str, scenario: dict[str, Any]) -> BIMPTrainer:
    """The scenario's trainer, of a model of its own."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "logging_steps": 1, "measure_deployment": False}
    settings |= scenario
    settings.pop("processes", None)
    torch.manual_seed(0)
    name = settings.pop("model")
    model = {"batch norm": BatchNorm, "convolutions": Convolutions, "t5": lambda: tiny_t5(0.1)}[name]()
    items = translation_items if name == "t5" else classification_items
    is_evaluated = "eval_strategy" in settings
    return BIMPTrainer(
        model=model,
        args=BIMPArguments(**run_arguments(output_dir, **settings)),
        train_dataset=items(37),
        eval_dataset=items(11, seed=2) if is_evaluated else None,
        compute_metrics=_accuracy if is_evaluated else None,
    )
