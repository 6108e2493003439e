"""Measuring a model in the middle of a run."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..reporting.flops import MultiplyAdds, count_multiply_adds
from ..reporting.results import metrics_under
from ..reproducibility import preserved_random_state
from .checkpoints import CheckpointHooks
from .checks import warn_of_unused

logger = logging.get_logger(__name__)


def check_readable_twice(data: Dataset) -> None:
    """Raises `ValueError` for data whose first items training would go without, once they have been looked at."""
    if isinstance(data, IterableDataset) and iter(data) is data:
        raise ValueError(
            "granularity='filter' traces the model with the first training items, and this data set gives every item "
            "only once. Use one that starts over when iterated again, such as a datasets.IterableDataset."
        )


def first_items(inputs: Any, items: int = 2) -> Any:
    """The first items of a batch: a mapping, a tuple or list (which becomes one), or a tensor."""
    if isinstance(inputs, Mapping):
        return {name: first_items(value, items) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(first_items(value, items) for value in inputs)
    return inputs[:items] if torch.is_tensor(inputs) and inputs.ndim else inputs


def try_to_count(model: nn.Module, inputs: Any) -> MultiplyAdds | None:
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
def accuracy(
    batches: Iterable[dict[str, Any]],
    forward: Callable[[dict[str, Any]], Any],
    gather: Callable[[Tensor], Tensor],
    shifts_labels: bool,
) -> float:
    """Share of the labels (tokens, pixels) of all `batches` that the model gets right.

    `forward` gives the outputs of a batch, `gather` puts the rows of all processes together. Where `shifts_labels`, a
    position predicts the next label.
    """
    counts = torch.zeros(2, dtype=torch.int64)
    for inputs in batches:
        labels, outputs = inputs["labels"], forward(inputs)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        predictions = predicted_classes(logits, labels)
        if shifts_labels:
            predictions, labels = predictions[..., :-1], labels[..., 1:]
        counted = labels.ne(-100)
        # One row an item, so that the copies that fill up the last batch of some processes are dropped.
        rows = [(predictions.eq(labels) & counted).reshape(len(labels), -1), counted.reshape(len(labels), -1)]
        counts = gather(torch.stack([row.sum(1) for row in rows], 1)).sum(0) + counts.to(labels.device)
    right, total = counts.tolist()
    return right / total


class _ProgressOnly(TrainerCallback):
    """The bar of a progress callback, without what it prints of a log."""

    def __init__(self, bar: ProgressCallback):
        self.bar = bar

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.on_prediction_step(args, state, control, **kwargs)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.on_evaluate(args, state, control, **kwargs)


def _progress_bars(callbacks: list[TrainerCallback]) -> list[ProgressCallback]:
    return [callback for callback in callbacks if isinstance(callback, ProgressCallback)]


class MeasuringHooks(CheckpointHooks):
    """A mixin over `Trainer`: what is measured in the middle of a run, without leaving a trace in it."""

    _ignore_keys_around_pruning: list[str] | None = None  # of evaluations, as given to train()
    _multiply_adds: MultiplyAdds | None = None  # of one pass over two training items
    _waits_for_batch = False  # whether they are counted on the first batch

    def _metrics_around_pruning(self) -> dict[str, Any]:
        """Metrics of the model as it is on the evaluation data, without leaving a trace in the run.

        It evaluates as `Trainer` does, and takes what trainers log beside what `evaluate` returns.
        """
        if self.eval_dataset is None:
            return {}
        with self._silent_evaluation() as logged, preserved_random_state():
            metrics = self.evaluate(ignore_keys=self._ignore_keys_around_pruning)
            return metrics_under(
                {name: value for entry in [*logged, metrics] for name, value in entry.items()}, "eval_"
            )

    @contextlib.contextmanager
    def _silent_evaluation(self) -> Iterator[list[dict[str, Any]]]:
        """Evaluations that callbacks (early stopping, trackers) do not see; gives what would have been logged."""
        handler, control = self.callback_handler, copy.copy(self.control)
        logged: list[dict[str, Any]] = []
        callbacks, handler.callbacks = handler.callbacks, [*map(_ProgressOnly, _progress_bars(handler.callbacks))]
        history, self.state.log_history = self.state.log_history, logged
        try:
            yield logged
        finally:
            handler.callbacks, self.state.log_history, self.control = callbacks, history, control

    def _bimp_train_accuracy(self) -> float:
        """On the whole training set, in evaluation mode."""

        def forward(inputs: dict[str, Any]) -> Any:
            with self.compute_loss_context_manager():
                return self.compute_loss(self.model, inputs, return_outputs=True)[1]

        batches = map(self._prepare_inputs, self.get_test_dataloader(self.train_dataset))
        self.model.eval()
        with preserved_random_state():
            share = accuracy(batches, forward, self.accelerator.gather_for_metrics, self._loss_shifts_labels)
        self.model.train()
        return share

    def _bimp_example_inputs(self) -> Any:
        """The first training items as the model gets them, on its device."""
        check_readable_twice(self.train_dataset)
        with preserved_random_state():
            batch = next(iter(self.get_test_dataloader(self.train_dataset)))
            return self._as_the_model_gets_them(batch)

    def _as_the_model_gets_them(self, batch: Any) -> Any:
        inputs = self._prepare_inputs(batch)
        if isinstance(inputs, Mapping) and self.compute_loss_func is not None:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}  # Trainer keeps them
        return first_items(inputs)

    def count_multiply_adds(self, batch: Any = None) -> None:
        """At the start of a run, and again with its first batch: data without a length may give every item once."""
        if batch is None:
            self._multiply_adds, self._waits_for_batch = None, not has_length(self.train_dataset)
            inputs = None if self._waits_for_batch else self._bimp_example_inputs()
        else:
            inputs = self._as_the_model_gets_them(batch) if self._waits_for_batch else None
            self._waits_for_batch = False
        if inputs is not None:
            self._multiply_adds = try_to_count(self.model, inputs)
            warn_of_unused(self.model, self.method.masks, self._multiply_adds)

    def theoretical_speedup(self) -> float | None:
        """Multiply-adds of the dense model over those of the model as it is; None where they cannot be counted."""
        if self._multiply_adds is None:
            return None
        weights = self.method.masks.weights
        return self._multiply_adds.speedup({n: int(w.count_nonzero()) / w.numel() for n, w in weights.items()})

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.method is not None and self.method.traits.finds_sparsity:
            logs = logs | {"sparsity": self.method.sparsity}  # what its settings are tuned by
        super().log(logs, *args, **kwargs)
