"""The one owner of the masks: what is pruned, and that it stays exactly zero."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from .criteria import Accumulate
from .granularity import Rule, WeightRule
from .ranking import Selection, selection_of
from .zeroing import zero_masked


class Masks:
    """Boolean masks over `weights` (parameters by name, sorted), True where a weight is pruned.

    Hard pruning: a pruned weight, its gradient and its optimizer state are zero for ever after. Where gradient and
    state are zero, no tested optimizer moves a weight from zero, so only gradients need masking at every step. The
    masks hold for the parameters themselves, so wrapping the model (DDP, `torch.compile`) changes nothing.

    `rule` says what a pruning removes (by default the smallest magnitudes of all layers). `attached` are parameters
    that are masked along but are not counted: biases and normalisation channels of removed filters.
    """

    def __init__(
        self,
        weights: dict[str, nn.Parameter],
        rule: Rule | None = None,
        attached: dict[str, nn.Parameter] | None = None,
    ):
        self.weights, self.attached = weights, attached or {}
        self.rule = WeightRule() if rule is None else rule
        self.pruned: dict[str, Tensor] = {}  # empty until something is pruned
        self.statistics: dict[str, Tensor] = {}  # what the rule's criterion has gathered of the gradients

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is masked, counted or not."""
        return self.weights | self.attached

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def num_pruned(self) -> int:
        return sum(int(self.pruned[name].count_nonzero()) for name in self.weights) if self.pruned else 0

    @property
    def sparsity(self) -> float:
        return self.num_pruned / self.num_weights

    @property
    def collapsed(self) -> list[str]:
        """Names of the weights that have nothing left: nothing passes through their layers."""
        return [name for name in self.weights if self.pruned and bool(self.pruned[name].all())]

    def check_plan(self, sparsities: Sequence[float]) -> None:
        """Raises `ValueError` where the rule cannot prune to one of these sparsities, one after the other."""
        self.rule.check_plan(self.weights, self.pruned or self._empty(), sparsities)

    def planned(self, sparsities: Sequence[float]) -> list[float]:
        """What the rule makes of these sparsities, one after the other: it may take whole inputs or filters alone."""
        return self.rule.planned(self.weights, self.pruned or self._empty(), sparsities)

    def prune(self, sparsity: float) -> Selection:
        """Prunes to `sparsity` as the rule says: exactly `round(sparsity * num_weights)` where it ranks weights."""
        pruned = self.pruned or self._empty()
        self.rule.mark(self.weights, pruned, sparsity, self.statistics)
        selection = selection_of(self.weights.values(), [pruned[name] for name in self.weights])
        self.pruned = pruned
        self.mask_weights()
        return selection

    def marks(self, sparsity: float, values: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What the rule prunes of `values` (by default the weights) if nothing is pruned yet; nothing is changed."""
        marks = self._empty()
        self.rule.mark(values or self.weights, marks, sparsity, self.statistics)
        return marks

    def renew(self, sparsity: float, values: dict[str, Tensor] | None = None) -> None:
        """Soft pruning: the masks of `values` (by default the weights), whatever was pruned before.

        The weights are not masked yet: what becomes of those that are no longer pruned is the caller's to say.
        """
        self.pruned = self.marks(sparsity, values)

    def removal(self, values: dict[str, Tensor] | None = None) -> Selection:
        """What masking `values` (by default the weights) by what is pruned takes away."""
        values = values or dict(self.weights)
        return selection_of(values.values(), [self.pruned[name] for name in values])

    @torch.no_grad()
    def swap(self, drop: Mapping[str, Tensor], grow: Mapping[str, Tensor]) -> None:
        """Prunes the weights that are True in `drop`, and gives those back that are True in `grow`, by their names.

        Tensors that neither names stay as they are. A pruned weight that is given back starts from zero; one in both
        is left unpruned.
        """
        self.pruned = self.pruned or self._empty()
        for name in drop.keys() | grow.keys():
            mask = self.pruned[name]
            mask = mask | drop[name] if name in drop else mask
            self.pruned[name] = mask & ~grow[name] if name in grow else mask
            zero_masked(self.weights[name], self.pruned[name])

    @property
    def needs_gradients(self) -> bool:
        """Whether the criterion goes by gradients, so that `observe` has to see those of every step."""
        return self.rule.criterion.accumulate is not None

    @torch.no_grad()
    def observe(self, values: Mapping[str, Tensor]) -> None:
        """Takes up the whole gradients of a step; `values` are the weights that compete at the next pruning."""
        accumulate = cast(Accumulate, self.rule.criterion.accumulate)  # as needs_gradients says
        for name, value in values.items():
            if (gradient := self.weights[name].grad) is not None:
                before = self.statistics.get(name)
                before = torch.zeros_like(value, dtype=torch.float32) if before is None else before
                self.statistics[name] = accumulate(before, value.float(), gradient.float())

    def keep_zeros(self) -> None:
        """Prunes what is zero already; a zero bias or normalisation channel only where its filter is zero."""
        pruned = self._empty() | {name: (w.detach() == 0).contiguous() for name, w in self.weights.items()}
        self.rule.mark_attached(pruned)
        for name, parameter in self.attached.items():
            pruned[name] &= parameter.detach() == 0
        self.pruned = pruned

    def _empty(self) -> dict[str, Tensor]:
        return {n: torch.zeros(w.shape, dtype=torch.bool, device=w.device) for n, w in self.parameters.items()}

    @torch.no_grad()
    def mask_weights(self) -> None:
        parameters = self.parameters
        for name, mask in self.pruned.items():
            zero_masked(parameters[name], mask)

    def mask_gradients(self) -> None:
        parameters = self.parameters
        for name, mask in self.pruned.items():
            if (gradient := parameters[name].grad) is not None:
                zero_masked(gradient, mask)

    def mask_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Zeroes every per-weight state (momentum, second moments, sums of squares) of the pruned weights."""
        parameters = self.parameters
        for name, mask in self.pruned.items():
            for value in optimizer.state.get(parameters[name], {}).values():
                if torch.is_tensor(value) and value.shape == mask.shape:
                    zero_masked(value, mask)

    def checksum(self) -> int:
        """One number that tells different masks apart, to compare processes."""
        total = 0
        for mask in self.pruned.values():
            total = zlib.crc32(mask.cpu().numpy().data, total)
        return total

    def save(self, path: Path) -> None:
        """Writes one bit per weight: the flattened masks, packed eight to a byte, as safetensors."""
        packed = {name: np.packbits(mask.cpu().numpy()) for name, mask in self.pruned.items()}
        shapes = {name: str(list(mask.shape)) for name, mask in self.pruned.items()}
        save_file(packed, path, metadata=shapes or None)  # no header at all where nothing is pruned yet

    def load(self, path: Path) -> None:
        """Reads masks that `save` wrote. Raises `ValueError` where they belong to other weights."""
        packed = load_file(path)
        with safe_open(path, "np") as file:
            shapes = file.metadata() or {}
        here = {name: str(list(parameter.shape)) for name, parameter in self.parameters.items()}
        if packed and shapes != here:
            names = sorted(name for name in shapes | here if shapes.get(name) != here.get(name))
            raise ValueError(f"{path} holds masks for other weights than this run prunes; they differ in: {names[:5]}")
        self.pruned = {name: _unpack(packed[name], p) for name, p in self.parameters.items() if packed}


def _unpack(bits: np.ndarray, weight: Tensor) -> Tensor:
    flat = np.unpackbits(bits, count=weight.numel()).astype(bool)
    return torch.from_numpy(flat).view(weight.shape).to(weight.device)
