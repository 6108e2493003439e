"""Models that take no labels and return a tensor, as timm's and torchvision's do: their columns and their loss."""

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .cross_entropy import OWN_LOSS, CrossEntropy, logits_of
from .loss import LabelWeightedLoss

_Base = Trainer if TYPE_CHECKING else object
LABELS = ("labels", "label", "label_ids")  # what Trainer's own collator takes for labels


def forward_arguments(model: nn.Module) -> list[str] | None:
    """The arguments of a forward that takes no labels; None where it may, or returns a loss without, as it says.

    None for models of Transformers too, which have conventions of their own.
    """
    parameters = inspect.signature(model.forward).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    has_loss = any("label" in name or name == "return_loss" for name in names)
    return None if isinstance(model, PreTrainedModel) or takes_any or has_loss else names or None


class NamedColumns:
    """A collator around `collator`, after which labels are called "labels", and inputs as the model's `arguments` are.

    Where no column is called as the first argument, the only one that is no argument goes there. Raises `ValueError`
    where several could. Where one is, and with `removes_unused`, items lose what is no argument before they are
    collated, as Trainer has it.
    """

    def __init__(self, collator: Callable[[list], Any], arguments: list[str], removes_unused: bool):
        self.collator, self.arguments, self.removes_unused = collator, arguments, removes_unused

    def __call__(self, items: list) -> Any:
        batch = self.collator([self._without_unused(item) for item in items])
        return self._named(dict(batch)) if isinstance(batch, Mapping) else batch

    def _without_unused(self, item: Any) -> Any:
        if not self.removes_unused or not isinstance(item, Mapping) or self.arguments[0] not in item:
            return item
        return {name: value for name, value in item.items() if name in [*self.arguments, *LABELS]}

    def _named(self, batch: dict[str, Any]) -> dict[str, Any]:
        for name in LABELS[1:]:
            if name in batch and "labels" not in batch:
                batch["labels"] = batch.pop(name)
        if "labels" in batch and torch.is_tensor(batch["labels"]) and not batch["labels"].is_floating_point():
            batch["labels"] = batch["labels"].long()  # in eight bits -100, which does not count, is another class
        first, held = self.arguments[0], ", ".join(batch)
        others = [name for name in batch if name not in ["labels", *self.arguments]]
        if not any(name in batch for name in self.arguments):  # the first may be one that can be left out
            if len(others) != 1:
                raise ValueError(
                    f"The model takes {', '.join(self.arguments)}, and which of the columns {held} is {first!r} is "
                    "not clear. Name it so (dataset.rename_column), take the others out (dataset.remove_columns), or "
                    f"pass a data_collator whose batches are {{{first!r}: ..., 'labels': ...}}."
                )
            batch[first] = batch.pop(others[0])
        return batch


class PlainModels(_Base):
    """A mixin over `Trainer`: trains models whose forward takes no labels, by cross-entropy, on any column names.

    The model stays as it is. Where batches hold labels, the loss is `CrossEntropy`, smoothed as the arguments say, and
    evaluations have it too; predictions are the logits. A `compute_loss_func` or a `compute_loss` of the user's own
    goes first, and batches without labels are left to the model.
    """

    _bimp_forward_arguments: list[str] | None = None  # of such a model

    def __init__(
        self, model: nn.Module | str | None = None, args: TrainingArguments | None = None, *rest: Any, **kwargs: Any
    ):
        _let_labels_be_smoothed(model, args)
        super().__init__(model, args, *rest, **kwargs)
        if type(self).compute_loss not in (LabelWeightedLoss.compute_loss, PlainModels.compute_loss):
            return
        self._bimp_forward_arguments = names = forward_arguments(self.bare_model)
        if names is not None:
            self.data_collator = NamedColumns(self.data_collator, names, self.args.remove_unused_columns)
            given = self.args.label_names or ["labels"]
            self.label_names = ["labels" if name in LABELS else name for name in given]  # as NamedColumns calls them

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        _let_labels_be_smoothed(model, self.args)
        return model

    # Private: an item's columns need not be called as the forward's arguments are, by which Trainer removes them.
    def _get_collator_with_removed_columns(
        self, data_collator: Callable[[list], Any], description: str | None = None
    ) -> Callable[[list], Any]:
        if self._bimp_forward_arguments is None:
            return super()._get_collator_with_removed_columns(data_collator, description)
        return data_collator  # NamedColumns

    # Private: as the one above, of a whole data set.
    def _remove_unused_columns(self, dataset: Dataset, description: str | None = None) -> Dataset:
        names = self._bimp_forward_arguments
        if names is None or names[0] in dataset.column_names:
            return super()._remove_unused_columns(dataset, description)
        return dataset

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self._bimp_forward_arguments is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"The batch is a {type(inputs).__name__}, and what of it the model takes as "
                f"{', '.join(self._bimp_forward_arguments)} is not known. Pass a data_collator that returns a dict of "
                "these and 'labels', or use a trainer with a compute_loss of its own."
            )
        if self.compute_loss_func is not None or "labels" not in inputs:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if torch.is_tensor(outputs):
                if self.compute_loss_func is None and model.training:
                    raise ValueError(
                        f"The model returns a tensor and no loss, and the batch ({', '.join(inputs)}) holds no labels "
                        f"to take one of. Call the column of classes 'labels'. {OWN_LOSS}"
                    )
                outputs = {"logits": outputs}
        else:
            outputs = {"logits": logits_of(model(**{n: value for n, value in inputs.items() if n != "labels"}))}
            loss = CrossEntropy(self.args.label_smoothing_factor)(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def _let_labels_be_smoothed(model: nn.Module | str | None, args: TrainingArguments | None) -> None:
    """For label smoothing Trainer looks into `model.config`, which other models than Transformers' lack."""
    if isinstance(model, nn.Module) and not hasattr(model, "config") and args is not None:
        if args.label_smoothing_factor:
            model.config = None
