"""LAMP (Lee et al., 2021): how many weights each layer loses when the smallest layer-adaptive scores go.

The score of a weight is its square over the sum of the squares of all weights in its layer that are not smaller. In a
layer it grows with the magnitude, so the counts alone say which weights go: the smallest of each layer.
"""

import torch
from torch import Tensor

from .ranking import NOT_FINITE, exact


def lamp_scores(weight: Tensor) -> Tensor:
    """The scores of one layer in ascending order, float64 (size,); the largest weight has 1, a zero has 0."""
    squares = exact(weight).reshape(-1).square().sort().values
    if not squares.isfinite().all():
        raise ValueError(NOT_FINITE)
    sums = squares.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(squares, squares)  # equal magnitudes count each other, so they score the same
    return torch.where(squares > 0, squares / sums[first], 0.0)


def lamp_counts(weights: list[Tensor], pruned: list[Tensor], k: int) -> list[int]:
    """How many weights of each layer are among the k smallest scores of all.

    Equal scores go in the order: pruned before, then the order of `weights`.
    """
    scores = [lamp_scores(weight) for weight in weights]
    threshold = _kth_smallest(scores, k)
    counts = [int(torch.searchsorted(s, threshold)) for s in scores]
    ties = [int(torch.searchsorted(s, threshold, right=True)) - c for s, c in zip(scores, counts, strict=True)]
    if threshold == 0:
        counts = [int(mask.sum()) for mask in pruned]
        ties = [tie - count for tie, count in zip(ties, counts, strict=True)]
    left = k - sum(counts)
    for i, tie in enumerate(ties):
        taken = min(left, tie)
        counts[i] += taken
        left -= taken
    return counts


def _kth_smallest(scores: list[Tensor], k: int) -> float:
    """The k-th smallest of all scores (0 for k = 0), by bisection over their bits: doubles order like integers."""
    low, high = 0, int(torch.tensor(1.0, dtype=torch.float64).view(torch.int64))
    while low < high:
        middle = (low + high) // 2
        if sum(int(torch.searchsorted(s, _double(middle), right=True)) for s in scores) >= k:
            high = middle
        else:
            low = middle + 1
    return _double(low)


def _double(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int64).view(torch.float64).item()
