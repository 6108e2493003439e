"""How many weights each layer loses: uniform, UNIFORM+ and ERK as exact integer counts (no torch)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

ALLOCATIONS = ("global", "uniform", "uniform_plus", "erk", "lamp")
LAST_LINEAR_LIMIT = Fraction(4, 5)  # UNIFORM+ prunes the last fully connected layer this far (Gale et al., 2019)


@dataclass(frozen=True)
class Layer:
    """A prunable weight: its shape, how much of it is pruned already, and whether UNIFORM+ treats it apart."""

    shape: tuple[int, ...]
    pruned: int = 0
    is_first_convolution: bool = False
    is_last_linear: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def free(self) -> int:
        """Weights that are left: no rule can keep more."""
        return self.size - self.pruned


def layer_counts(allocation: str, layers: Sequence[Layer], k: int) -> list[int]:
    """How many weights of each layer are pruned once k are in all, those pruned before among them.

    The rule's shares are met in the largest-remainder sense, so the counts are integers that sum to k; where a layer
    was pruned beyond its share before, the others share what is left. `allocation` is uniform, uniform_plus or erk.
    Raises `ValueError` where the rule cannot prune k weights, and names the most that it can.
    """
    keep = sum(layer.size for layer in layers) - k
    if allocation == "uniform":
        quotas = _proportional(keep, [layer.size for layer in layers], [layer.free for layer in layers])
    elif allocation == "erk":
        # density ~ (sum of dimensions) / (product of dimensions), so the kept weights ~ the sum of dimensions
        quotas = _proportional(keep, [sum(layer.shape) for layer in layers], [layer.free for layer in layers])
    elif allocation == "uniform_plus":
        quotas = _uniform_plus(keep, layers)
    else:
        raise ValueError(f"allocation={allocation!r} gives no counts of its own: use uniform, uniform_plus or erk.")
    kept = _largest_remainder(quotas, keep)
    return [layer.size - number for layer, number in zip(layers, kept, strict=True)]


def max_sparsity(allocation: str, layers: Sequence[Layer]) -> float:
    """The largest share of the weights that the rule can prune: below 1 for UNIFORM+ alone."""
    if allocation != "uniform_plus":
        return 1.0
    total = sum(layer.size for layer in layers)
    return (total - sum(_least_kept(layer) for layer in layers)) / total


def _least_kept(layer: Layer) -> int:
    """What UNIFORM+ keeps at the least."""
    if layer.is_first_convolution:
        return layer.free
    return min(layer.free, math.ceil((1 - LAST_LINEAR_LIMIT) * layer.size)) if layer.is_last_linear else 0


def _proportional(total: int | Fraction, shares: Sequence[int], caps: Sequence[int]) -> list[Fraction]:
    """Splits `total` in proportion to `shares`, none above its cap; what caps leave over goes to the others."""
    quotas = [Fraction(cap) for cap in caps]
    free = set(range(len(shares)))
    while free:
        left = total - sum(caps[i] for i in range(len(caps)) if i not in free)
        scale = Fraction(left, sum(shares[i] for i in free))
        capped = {i for i in free if scale * shares[i] > caps[i]}
        if not capped:
            for i in free:
                quotas[i] = scale * shares[i]
            break
        free -= capped
    return quotas


def _uniform_plus(keep: int, layers: Sequence[Layer]) -> list[Fraction]:
    total = sum(layer.size for layer in layers)
    quotas: dict[int, Fraction] = {}
    for i, layer in enumerate(layers):
        if layer.is_first_convolution:
            quotas[i] = Fraction(layer.free)
        elif layer.is_last_linear:
            uniform = layer.size * Fraction(keep, total)
            quotas[i] = min(max(uniform, Fraction(_least_kept(layer))), Fraction(layer.free))
    last = next((i for i, layer in enumerate(layers) if layer.is_last_linear and i in quotas), None)
    others = [i for i in range(len(layers)) if i not in quotas]
    left: Fraction = keep - sum(quotas.values(), Fraction(0))
    most = sum(layers[i].free for i in others)
    if last is not None and not 0 <= left <= most:  # the others are wholly pruned, or dense: the last layer gives way
        shared = min(max(left, Fraction(0)), Fraction(most))
        quotas[last] += left - shared
        left = shared
    if left < 0 or (last is not None and quotas[last] < _least_kept(layers[last])):
        largest = math.floor(max_sparsity("uniform_plus", layers) * 1e4) / 1e4  # rounded down, so that it can be given
        raise ValueError(
            f"allocation='uniform_plus' cannot reach a sparsity of {1 - keep / total:.4f}: the first convolution "
            f"stays dense and the last fully connected layer is pruned to {float(LAST_LINEAR_LIMIT):.0%} at most, so "
            f"{largest} is the maximum here. Lower target_sparsity, or use another allocation."
        )
    split = _proportional(left, [layers[i].size for i in others], [layers[i].free for i in others])
    quotas |= dict(zip(others, split, strict=True))
    return [quotas[i] for i in range(len(layers))]


def _largest_remainder(quotas: Sequence[Fraction], total: int) -> list[int]:
    """Integers that sum to `total`: floors, and one more where the largest fractions are cut off (earlier first)."""
    floors = [math.floor(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (floors[i] - quotas[i], i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors
