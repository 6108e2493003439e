"""The one owner of the masks: what is pruned, and that it stays exactly zero."""

import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from .selection import Selection, prune_smallest


class Masks:
    """Boolean masks over `weights` (parameters by name, sorted), True where a weight is pruned.

    Hard pruning: a pruned weight, its gradient and its optimizer state are zero for ever after. Where gradient and
    state are zero, no tested optimizer moves a weight from zero, so only gradients need masking at every step. The
    masks hold for the parameters themselves, so wrapping the model (DDP, `torch.compile`) changes nothing.
    """

    def __init__(self, weights: dict[str, nn.Parameter]):
        self.weights = weights
        self.pruned: dict[str, Tensor] = {}  # empty until something is pruned

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for weight in self.weights.values())

    @property
    def num_pruned(self) -> int:
        return sum(int(mask.sum()) for mask in self.pruned.values())

    @property
    def sparsity(self) -> float:
        return self.num_pruned / self.num_weights

    def prune(self, sparsity: float) -> Selection:
        """Prunes to exactly `round(sparsity * num_weights)` weights, the smallest magnitudes of all layers."""
        pruned = self.pruned or self._empty()
        k = round(sparsity * self.num_weights)
        if k < self.num_pruned:
            raise ValueError(f"{self.num_pruned} weights are pruned already, and {k} would be fewer: masks only grow.")
        selection = prune_smallest(list(self.weights.values()), list(pruned.values()), k)
        self.pruned = pruned
        self.mask_weights()
        return selection

    def keep_zeros(self) -> None:
        """Prunes what is zero already."""
        self.pruned = {name: (weight.detach() == 0).contiguous() for name, weight in self.weights.items()}

    def _empty(self) -> dict[str, Tensor]:
        return {n: torch.zeros(w.shape, dtype=torch.bool, device=w.device) for n, w in self.weights.items()}

    @torch.no_grad()
    def mask_weights(self) -> None:
        for name, mask in self.pruned.items():
            self.weights[name].masked_fill_(mask, 0)

    def mask_gradients(self) -> None:
        for name, mask in self.pruned.items():
            if (gradient := self.weights[name].grad) is not None:
                gradient.masked_fill_(mask, 0)

    def mask_optimizer_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Zeroes every per-weight state (momentum, second moments, sums of squares) of the pruned weights."""
        for name, mask in self.pruned.items():
            for value in optimizer.state.get(self.weights[name], {}).values():
                if torch.is_tensor(value) and value.shape == mask.shape:
                    value.masked_fill_(mask, 0)

    def checksum(self) -> int:
        """One number that tells different masks apart, to compare processes."""
        total = 0
        for mask in self.pruned.values():
            total = zlib.crc32(mask.cpu().numpy(), total)
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
        here = {name: str(list(weight.shape)) for name, weight in self.weights.items()}
        if packed and shapes != here:
            names = sorted(name for name in shapes | here if shapes.get(name) != here.get(name))
            raise ValueError(f"{path} holds masks for other weights than this run prunes; they differ in: {names[:5]}")
        self.pruned = {name: _unpack(packed[name], weight) for name, weight in self.weights.items() if packed}


def _unpack(bits: np.ndarray, weight: Tensor) -> Tensor:
    flat = np.unpackbits(bits, count=weight.numel()).astype(bool)
    return torch.from_numpy(flat).view(weight.shape).to(weight.device)
