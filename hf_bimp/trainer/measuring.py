"""Measuring a model in the middle of a run."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

from ..reporting.flops import MultiplyAdds, count_multiply_adds
from ..reporting.results import metrics_under
from ..reproducibility import preserved_random_state, untouched
from ..storage.files import as_json
from .checkpoints import CheckpointHooks
from .checks import warn_of_unused
from .example_inputs import (
    check_readable_twice,
    first_that_works,
    fitting_example,
    inputs_of_first_call,
    watched_calls,
)
from .train_accuracy import INSTEAD, accuracy, labels_of, logits_of

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def only_a_measure(what: str) -> Iterator[None]:
    """What fails inside is a warning: nothing that only measures or draws may end a training."""
    try:
        yield
    except Exception as error:  # metrics, models and data sets are anybody's code, and disks are full at times
        logger.warning(f"{what} failed, and the run goes on without: {type(error).__name__}: {error}")


def _is_readable(loader: DataLoader) -> bool:
    try:
        next(iter(loader))
    except Exception as error:  # a collator that does not fit: the user has a loader of his own
        logger.info(f"The training data is read by get_train_dataloader alone: {type(error).__name__}: {error}")
        return False
    return True


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

        It evaluates as `Trainer` does, and takes what trainers log beside what `evaluate` returns. Where that fails,
        there are none, and a warning.
        """
        if self.eval_dataset is None:
            return {}
        logged: list[dict[str, Any]] = []
        with (
            only_a_measure("The evaluation around a pruning"),
            preserved_random_state(),
            self.measured_model(),
        ):
            with self._silent_evaluation() as logged:
                logged.append(self.evaluate(ignore_keys=self._ignore_keys_around_pruning))
            return metrics_under({name: value for entry in logged for name, value in entry.items()}, "eval_")
        return {}

    @contextlib.contextmanager
    def _silent_evaluation(self) -> Iterator[list[dict[str, Any]]]:
        """Evaluations that callbacks (early stopping, trackers) do not see; gives what would have been logged."""
        handler, control, flags = self.callback_handler, self.control, dict(vars(self.control))
        logged: list[dict[str, Any]] = []
        callbacks, handler.callbacks = handler.callbacks, [*map(_ProgressOnly, _progress_bars(handler.callbacks))]
        history, self.state.log_history = self.state.log_history, logged
        try:
            yield logged
        finally:
            handler.callbacks, self.state.log_history, self.control = callbacks, history, control
            for name, value in flags.items():  # of the very object that Trainer is about to read
                setattr(control, name, value)

    def measured_model(self) -> contextlib.AbstractContextManager:
        """In it, passes over the model leave it as it was; the one that was counted has told what they write to."""
        return untouched(self.bare_model, frozenset() if self._multiply_adds is None else self._multiply_adds.written)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with self._saved_buffers():
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _saved_buffers(self) -> Iterator[None]:
        """In it, every process has the buffers of the first one, which are those that a checkpoint holds.

        Statistics of batch norms are each process's own until the next training step.
        """
        if self.args.world_size == 1:
            yield
            return
        buffers = [buffer for buffer in self.bare_model.buffers() if buffer.layout == torch.strided]
        own = [buffer.clone() for buffer in buffers]
        for buffer in buffers:
            torch.distributed.broadcast(buffer, 0)
        try:
            yield
        finally:
            for buffer, before in zip(buffers, own, strict=True):
                buffer.copy_(before)

    # ---- On training items ----

    def _measured_items(self) -> DataLoader:
        """The training items in their order; as the user's own loader has them where the data alone cannot be read."""
        if self.train_dataset is not None:
            loader = self.get_test_dataloader(self.train_dataset)
            if type(self).get_train_dataloader is CheckpointHooks.get_train_dataloader or _is_readable(loader):
                return loader
        return self.get_train_dataloader()

    def _first_batch(self) -> Any:
        """On the device. That of trainers that prepare batches otherwise may generate, and comes with the training."""
        with preserved_random_state():
            return Trainer._prepare_inputs(self, next(iter(self._measured_items())))

    def _bimp_train_accuracy(self) -> float:
        """On the whole training set, in evaluation mode."""
        with preserved_random_state(), self.measured_model(), self._saved_buffers():
            batches = map(self._prepare_inputs, self._measured_items())
            self.model.eval()
            gather, names = self.accelerator.gather_for_metrics, self.label_names or ["labels"]
            return accuracy(batches, self._outputs_of, gather, names, self._loss_shifts_labels)

    def _outputs_of(self, inputs: Any) -> Any:
        with self.compute_loss_context_manager():
            # A copy: with label smoothing or compute_loss_func Trainer takes the labels out.
            return self.compute_loss(self.model, dict(inputs), return_outputs=True)[1]

    def check_train_accuracy(self) -> None:
        """Raises `ValueError` where the first batch shows that `_bimp_train_accuracy` would mean nothing."""
        with preserved_random_state(), untouched(self.bare_model), torch.no_grad():
            inputs = self._prepare_inputs(next(iter(self._measured_items())))
            labels = labels_of(inputs, self.label_names or ["labels"])
            self.model.eval()
            try:
                outputs = self._outputs_of(inputs)
            except Exception as error:  # any trainer's compute_loss
                raise ValueError(
                    "retrain_schedule='acc_allr' measures an accuracy, and compute_loss(..., return_outputs=True) "
                    f"gives no outputs of the first batch: {type(error).__name__}: {error}. {INSTEAD}"
                ) from error
            logits_of(outputs, labels)

    def _bimp_example_inputs(self) -> Any:
        """The first training items as the model gets them, on its device, for tracing. Raises `ValueError`."""
        check_readable_twice(self.train_dataset)
        batch = self._first_batch()
        return fitting_example(self.bare_model, batch, lambda: self._handed_to_the_model(batch))

    def _handed_to_the_model(self, batch: Any) -> Any:
        """What `compute_loss` calls the model with: labels may stay behind. None where that is not seen."""
        given = dict(batch) if isinstance(batch, Mapping) else batch
        with preserved_random_state(), untouched(self.bare_model), torch.no_grad():
            return inputs_of_first_call(self.bare_model, lambda model: self.compute_loss(model, given))

    def count_multiply_adds(self) -> None:
        """At the start of a run; where the first items do not fit or come only once, with the first step's call."""
        self._multiply_adds, self._waits_for_batch = None, True
        if has_length(self.train_dataset):
            try:
                self._count(self._first_batch())
            except Exception as error:  # data and models are anybody's code
                logger.info(f"Multiply-adds are counted in the first step: {type(error).__name__}: {error}")

    def _count(self, batch: Any) -> None:
        self._multiply_adds = first_that_works(lambda inputs: count_multiply_adds(self.bare_model, inputs), batch)
        self._waits_for_batch = False
        warn_of_unused(self.method.masks, self._multiply_adds)

    @contextlib.contextmanager
    def counted_if_waiting(self, batch: Any) -> Iterator[None]:
        """Around the first training step: what the model is called with in it is counted after it."""
        if not self._waits_for_batch:
            yield
            return
        self._waits_for_batch = False
        is_compiled = self.args.torch_compile or self.bare_model is not self.model
        if is_compiled:  # a hook would become part of what is compiled
            calls = [self._handed_to_the_model(Trainer._prepare_inputs(self, batch))]
            yield
        else:
            with watched_calls(self.bare_model) as calls:
                yield
        try:
            self._count(calls[0] if calls and calls[0] is not None else Trainer._prepare_inputs(self, batch))
        except Exception as error:  # any model's code runs here, and a measure alone must not end a training
            logger.warning(f"No theoretical speedup will be reported, multiply-adds cannot be counted: {error!r}")

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
        # Every checkpoint holds the history as JSON, which metrics may not be, and some are nobody's but ours.
        self.state.log_history[-1:] = [as_json(entry, has_nan=True) for entry in self.state.log_history[-1:]]
