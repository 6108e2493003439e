"""The family whose sparse weights have dense ones behind them, which the optimizer updates."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from .base import Method, Run


class DenseBehind(Method):
    """The model's parameters hold the sparse weights that it computes with; dense ones lie in `behind`.

    They change places only for the optimizer's step, which applies the gradient taken at the sparse weights to the
    dense ones. So evaluation, plain checkpoints, `torch.compile` and DDP see the weights that the method really uses,
    under the names that the model gave them. The last pruning is hard, and leaves nothing behind.
    """

    def __init__(self, run: Run, config: Any = None):
        super().__init__(run, config)
        self.behind: dict[str, Tensor] = {}

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        super().attach(optimizer)
        self.behind = {name: weight.detach().clone() for name, weight in self.masks.weights.items()}

    @torch.no_grad()
    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        if step == 0:  # later ones come after `after_update`, or with a checkpoint
            self.show()

    def show(self) -> None:
        """Puts the weights that the next step computes with into the model."""
        for name, weight in self.masks.weights.items():
            weight.copy_(self.behind[name])
        self.masks.mask_weights()

    @torch.no_grad()
    def sparsify(self, sparsity: float | None, optimizer: torch.optim.Optimizer) -> tuple[float | None, float]:
        self.masks.renew(cast(float, sparsity), self.behind)
        selection = self.masks.removal(self.behind)
        self.show()
        if self.cycle + 1 == self.plan.num_cycles:
            self.behind = {}
            self.masks.mask_optimizer_state(optimizer)
        return selection.threshold, selection.removed_norm

    def edit_gradients(self) -> None:
        if self.is_complete:
            super().edit_gradients()

    @torch.no_grad()
    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        for name, dense in self.behind.items():
            self.masks.weights[name].copy_(dense)

    @torch.no_grad()
    def after_update(self) -> None:
        self.step += 1
        for name, dense in self.behind.items():
            dense.copy_(self.masks.weights[name])
        if not self.is_complete:
            self.renew()
            self.show()

    def renew(self) -> None:
        """The masks of the next step, from the dense weights after this one."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self.behind

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        # The model's own weights are those of its checkpoint. Ties fall by order, and a file has one of its own.
        self.behind = {name: state[name] for name in self.masks.weights if name in state}
