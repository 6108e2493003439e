"""Measuring a model in the middle of a run, without leaving a trace in it."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from .report import final_metrics

_NOT_METRICS = ("_runtime", "_per_second", "_time")


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside leaves Python's, NumPy's and torch's random numbers as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def pruning_metrics(trainer, prefix: str) -> dict[str, float]:
    """Metrics of the model as it is, on the trainer's evaluation data, their names under `prefix`.

    It predicts rather than evaluates: callbacks that act on evaluations, such as early stopping, do not see it.
    """
    if trainer.eval_dataset is None or not trainer.args.evaluate_prunings:
        return {}
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
    loss_only, metrics = trainer.args.prediction_loss_only, {}
    trainer.args.prediction_loss_only = loss_only or trainer.compute_metrics is None
    try:
        with preserved_random_state():
            for name, dataset in sets.items():
                full_prefix = f"{prefix}_{name}" if name else prefix
                prediction = trainer.predict(dataset, trainer.ignore_keys_for_eval, metric_key_prefix=full_prefix)
                metrics |= prediction.metrics
    finally:
        trainer.args.prediction_loss_only = loss_only
    return {name: value for name, value in metrics.items() if not name.endswith(_NOT_METRICS)}


def metrics_before_pruning(trainer) -> dict[str, float]:
    """`pruning_metrics` before a pruning: those of the evaluation that has just been, if there was one."""
    done = (
        final_metrics(trainer.state.log_history, trainer.state.global_step) if trainer.args.evaluate_prunings else {}
    )
    return {f"before_prune_{k}": v for k, v in done.items()} or pruning_metrics(trainer, "before_prune")


@torch.no_grad()
def train_accuracy(trainer) -> float:
    """Share of the training labels (tokens, for sequences) that the model gets right, in evaluation mode."""
    counts = torch.zeros(2, dtype=torch.int64, device=trainer.args.device)
    trainer.model.eval()
    with preserved_random_state():
        for inputs in trainer.get_test_dataloader(trainer.train_dataset):
            inputs = trainer._prepare_inputs(inputs)
            with trainer.compute_loss_context_manager():
                outputs = trainer.model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
            predictions, labels = logits.argmax(-1), inputs["labels"]
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
