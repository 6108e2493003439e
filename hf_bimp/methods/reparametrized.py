"""The family whose sparse weights are a function of the dense ones and of trained thresholds or gates."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.ranking import exact
from .base import Method, Run, Traits
from .dense_behind import DenseBehind


class Reparametrized(DenseBehind):
    """The model computes with `used(w, e)`, where the method trains e, one tensor a weight, beside the dense w.

    Once an optimizer step autograd hands the gradient with respect to what the model used on to w and e, and adds that
    of the penalty, so that neither micro-batches nor processes change it. How sparse it becomes is up to the knobs.
    """

    traits = Traits(finds_sparsity=True, prunes_frozen=False, allocations=())
    decays_extras = False  # whether e has the weight decay of the weights

    def __init__(self, run: Run, config: Any = None):
        super().__init__(run, config)
        self.extras: dict[str, nn.Parameter] = {}

    @abstractmethod
    def initial(self, weight: Tensor, output_dim: int) -> Tensor:
        """e of a weight, whose dimension `output_dim` counts its outputs."""

    @abstractmethod
    def used(self, dense: Tensor, extra: Tensor) -> Tensor:
        """The weight that the model computes with, differentiable in both."""

    def penalties(self, extra: Tensor) -> list[Tensor]:
        """What e adds to the loss."""
        return []

    def final(self, dense: Tensor, extra: Tensor) -> Tensor:
        """The weight in the end, with true zeros."""
        return self.used(dense, extra)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        super().attach(optimizer)
        self.extras = {
            name: nn.Parameter(self.initial(weight.detach(), self._output_dim(name)))
            for name, weight in self.masks.weights.items()
        }
        decay = self._weight_decay(optimizer) if self.decays_extras else 0.0
        optimizer.add_param_group({"params": self.extra_parameters, "weight_decay": decay})

    def _output_dim(self, name: str) -> int:
        return self.run.layers[name].output_dim if name in self.run.layers else 0

    @property
    def extra_parameters(self) -> list[nn.Parameter]:
        return list(self.extras.values())

    @property
    @torch.no_grad()
    def sparsity(self) -> float:
        """What it would be if the run ended now."""
        if self.is_complete:
            return super().sparsity
        kept = sum(int(self.final(dense, self.extras[name]).count_nonzero()) for name, dense in self.behind.items())
        return 1 - kept / self.masks.num_weights

    def show(self) -> None:
        for name, weight in self.masks.weights.items():
            weight.copy_(self.used(self.behind[name], self.extras[name]))

    def edit_gradients(self) -> None:
        if self.is_complete:
            return super().edit_gradients()
        for name, weight in self.masks.weights.items():
            extra = self.extras[name]
            if weight.grad is None:
                extra.grad = None
                continue
            with torch.enable_grad():
                dense = self.behind[name].detach().requires_grad_()
                used, penalties = self.used(dense, extra), self.penalties(extra)
            to_used = [weight.grad, *(None for _ in penalties)]
            to_dense, extra.grad = torch.autograd.grad([used, *penalties], (dense, extra), to_used)
            weight.grad.copy_(to_dense)

    @torch.no_grad()
    def sparsify(self, sparsity: float | None, optimizer: torch.optim.Optimizer) -> tuple[float | None, float]:
        squares = 0.0
        for name, weight in self.masks.weights.items():
            final = self.final(self.behind[name], self.extras[name])
            squares += (exact(weight) - exact(final)).square().sum().item()
            weight.copy_(final).add_(0.0)  # -0.0 becomes 0.0: compressed files keep signs, at a bit a weight
            self.extras[name].grad = None  # the optimizer has no more to do with it
        self.behind = {}
        self.masks.keep_zeros()
        self.masks.mask_optimizer_state(optimizer)
        return None, math.sqrt(squares)

    def state_dict(self) -> dict[str, Any]:
        extras = {f"extra.{name}": extra.detach() for name, extra in self.extras.items()}
        dense = {f"dense.{name}": dense for name, dense in self.behind.items()}
        return Method.state_dict(self) | extras | dense

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        Method.load_state_dict(self, state)
        for name, extra in self.extras.items():
            extra.copy_(state[f"extra.{name}"])
        self.behind = {} if self.is_complete else {name: state[f"dense.{name}"] for name in self.masks.weights}
