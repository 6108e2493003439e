"""Measuring a model in the middle of a run, without leaving a trace in it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers.utils import logging

from ..reporting.flops import MultiplyAdds, count_multiply_adds
from ..reporting.results import final_metrics
from ..reproducibility import preserved_random_state

_NOT_METRICS = ("_runtime", "_per_second", "_time")

logger = logging.get_logger(__name__)


def pruning_metrics(trainer, prefix: str) -> dict[str, float]:
    """Metrics of the model as it is, on the trainer's evaluation data, their names under `prefix`.

    It predicts rather than evaluates: callbacks that act on evaluations, such as early stopping, do not see it.
    """
    if trainer.eval_dataset is None or not trainer.args.evaluate_prunings:
        return {}
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    loss_only, metrics = trainer.args.prediction_loss_only, {}
    trainer.args.prediction_loss_only = loss_only or trainer.compute_metrics is None
    trainer.is_measuring = True
    try:
        with preserved_random_state():
            for name, dataset in sets.items():
                full_prefix = f"{prefix}_{name}" if name else prefix
                prediction = trainer.predict(dataset, trainer.ignore_keys_for_eval, metric_key_prefix=full_prefix)
                metrics |= prediction.metrics
    finally:
        trainer.args.prediction_loss_only = loss_only
        trainer.is_measuring = False
    return {name: value for name, value in metrics.items() if not name.endswith(_NOT_METRICS)}


def metrics_before_pruning(trainer) -> dict[str, float]:
    """`pruning_metrics` before a pruning: those of the evaluation that has just been, if there was one."""
    done = (
        final_metrics(trainer.state.log_history, trainer.state.global_step) if trainer.args.evaluate_prunings else {}
    )
    return {f"before_prune_{k}": v for k, v in done.items()} or pruning_metrics(trainer, "before_prune")


def example_inputs(trainer) -> dict[str, Any]:
    """The first training items as the model gets them, on its device.

    Raises `ValueError` where the training would then go without them: the data can be read only once.
    """
    data = trainer.train_dataset
    if isinstance(data, IterableDataset) and iter(data) is data:
        raise ValueError(
            "granularity='filter' traces the model with the first training items, and this data set gives every item "
            "only once. Use one that starts over when iterated again, such as a datasets.IterableDataset."
        )
    with preserved_random_state():
        return first_items(trainer, next(iter(trainer.get_test_dataloader(data))))


def first_items(trainer, batch: dict[str, Any], items: int = 2) -> dict[str, Any]:
    """The first items of a batch as the model gets them, on its device."""
    inputs = dict(trainer._prepare_inputs(batch))
    if trainer.compute_loss_func is not None:
        inputs.pop("labels", None)  # Trainer keeps them for the loss
    return {name: value[:items] if torch.is_tensor(value) else value for name, value in inputs.items()}


def try_to_count(model: nn.Module, inputs: dict[str, Any]) -> MultiplyAdds | None:
    """Multiply-adds of one pass over `inputs`; None, with a warning, where a model defies counting."""
    try:
        return count_multiply_adds(model, inputs)
    except Exception as error:  # any model's code runs here, and a measure alone must not end a training
        logger.warning(f"No theoretical speedup will be reported, multiply-adds cannot be counted: {error!r}")
        return None


def predicted_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """The likeliest class of each label, in the shape of `labels`.

    Logits are (items, classes), (items, tokens, classes), or for segmentation (items, classes, height, width), which
    are resized to the labels' height and width.
    """
    if labels.ndim < 3:
        return logits.argmax(-1)
    return resized(logits, labels).argmax(1)


def resized(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits (items, classes, h, w) at the height and width of `labels` (items, H, W): many models give a quarter."""
    if logits.shape[-2:] == labels.shape[-2:]:
        return logits
    return nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def train_accuracy(trainer) -> float:
    """Share of the training labels (tokens, pixels) that the model gets right, in evaluation mode."""
    counts = torch.zeros(2, dtype=torch.int64, device=trainer.args.device)
    trainer.model.eval()
    with preserved_random_state():
        for inputs in trainer.get_test_dataloader(trainer.train_dataset):
            inputs = trainer._prepare_inputs(inputs)
            labels = inputs["labels"]
            with trainer.compute_loss_context_manager():
                _, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
            predictions = predicted_classes(logits, labels)
            if trainer._loss_shifts_labels:
                predictions, labels = predictions[..., :-1], labels[..., 1:]
            counted = labels.ne(-100)
            # One row an item, so that the copies that fill up the last batch of some processes are dropped.
            rows = [(predictions.eq(labels) & counted).reshape(len(labels), -1), counted.reshape(len(labels), -1)]
            per_item = torch.stack([row.sum(1) for row in rows], 1)
            counts += trainer.accelerator.gather_for_metrics(per_item).sum(0)
    trainer.model.train()
    right, total = counts.tolist()
    return right / total
