"""A loss whose mean is over the labels of the whole accumulated batch, for any model."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

_Base = Trainer if TYPE_CHECKING else object


class LabelWeightedLoss(_Base):
    """A mixin over `Trainer`: the mean loss per label of the whole accumulated batch, on all processes.

    Models return the mean over their own micro-batch, and many (T5, BART, classification heads) ignore
    `num_items_in_batch`; weighting it with the micro-batch's share of the labels is right for all of them. Trainers
    whose `compute_loss` or `compute_loss_func` is their own are left as they are.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is None and type(self).compute_loss is LabelWeightedLoss.compute_loss:
            # Has Trainer count the items of a whole batch; compute_loss then normalises by them for any model.
            self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs)
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"]
        if self._loss_shifts_labels and "shift_labels" not in inputs:
            labels = labels[..., 1:]
        share = labels.ne(-100).sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:
            share = share * self.accelerator.num_processes  # DDP averages the gradients of the processes
        result = super().compute_loss(model, inputs, return_outputs)  # the mean over the micro-batch
        loss = result[0] if return_outputs else result
        # The mean over no label is NaN: a zero that depends on every parameter keeps DDP's processes in step.
        loss = loss * share if share > 0 else 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, result[1]) if return_outputs else loss
