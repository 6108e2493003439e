"""Exact selection of the smallest magnitudes (or scores) over all weights, without concatenating or sorting them.

IEEE floats without their sign order like integers. A histogram of their upper 16 bits finds the bucket that holds the
threshold, a histogram of the lower 16 bits inside that bucket finds the threshold itself. Both are exact, take memory
for 65,536 counters however large the model, and visit the weights in chunks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights per chunk: temporaries that stay in the processor's cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # each is exact in float32
_INFINITY_BUCKET = 0x7F80  # upper bits of float32's infinity; NaNs lie at or above it
NOT_FINITE = (
    "A prunable weight is NaN or infinite, so magnitudes cannot be ranked: training diverged before this pruning. "
    "Lower learning_rate, add warm-up or gradient clipping, or check the data."
)


@dataclass(frozen=True)
class Selection:
    """`threshold`: largest pruned magnitude; `removed_norm`, `norm`: L2 norms of the weights removed and of all."""

    threshold: float
    removed_norm: float
    norm: float


def flat_chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.detach().reshape(-1).split(CHUNK)


def magnitude_keys(chunk: Tensor) -> Tensor:
    """int32 keys in the order of the magnitudes of `chunk`."""
    return chunk.float().view(torch.int32) & 0x7FFFFFFF


def _histogram(chunks: Iterator[Tensor], shift: int, prefix: int | None) -> Tensor:
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in chunks:
        keys = magnitude_keys(chunk)
        if prefix is not None:
            keys = keys[keys >> 16 == prefix] & 0xFFFF
        counts += torch.bincount(keys >> shift, minlength=1 << 16).cpu()
    return counts


def kth_smallest_key(weights: list[Tensor], k: int) -> tuple[int, int]:
    """Key of the k-th smallest magnitude (k >= 1) and how many weights lie strictly below it.

    Raises `ValueError` where a weight is NaN or infinite.
    """
    prefix, below = None, 0
    # bfloat16 is the upper half of float32: nothing is left to tell apart in the lower one.
    only_upper = all(weight.dtype == torch.bfloat16 for weight in weights)
    for shift in (16,) if only_upper else (16, 0):
        counts = _histogram((chunk for weight in weights for chunk in flat_chunks(weight)), shift, prefix)
        if prefix is None and counts[_INFINITY_BUCKET:].any():
            raise ValueError(NOT_FINITE)
        totals = counts.cumsum(0)
        bucket = int(torch.searchsorted(totals, k - below))
        below += int(totals[bucket] - counts[bucket])
        prefix = bucket if prefix is None else prefix << 16 | bucket
    return prefix << 16 if only_upper else prefix, below


def prune_smallest(
    weights: list[Tensor], pruned: list[Tensor], k: int, scores: list[Tensor] | None = None
) -> Selection:
    """Marks exactly the k smallest magnitudes in the boolean tensors `pruned`, which also say what was pruned before.

    Equal magnitudes go in the order: pruned before, then the order of `weights`, then the flat index. Weights pruned
    before must be zero, so they are always among the smallest. Where `scores` (float32, shaped like `weights`) are
    given, they are ranked in place of the magnitudes: 0 for what was pruned before, positive elsewhere.
    """
    ranked = weights if scores is None else scores
    key, below = kth_smallest_key(ranked, k) if k else (0, 0)
    ties = k - below  # how many of the weights at the threshold itself go
    if key == 0:
        ties -= sum(int(mask.count_nonzero()) for mask in pruned)
    removed = total = largest = 0.0
    for weight, score, mask in zip(weights, ranked, pruned, strict=True):
        chunks = zip(flat_chunks(weight), flat_chunks(score), mask.view(-1).split(CHUNK), strict=True)
        for chunk, chunk_scores, chunk_mask in chunks:
            keys = magnitude_keys(chunk_scores)
            if ties:
                at_threshold = ((keys == key) & ~chunk_mask).nonzero().view(-1)[:ties]
                ties -= len(at_threshold)
                chunk_mask[at_threshold] = True
            chunk_mask |= keys < key
            values = exact(chunk)
            total += torch.dot(values, values).item()
            values = values.masked_fill_(~chunk_mask.to(values.device), 0)
            removed += torch.dot(values, values).item()
            if scores is not None and len(values):
                largest = max(largest, values.abs().max().item())
    threshold = torch.tensor(key, dtype=torch.int32).view(torch.float32).item() if scores is None else largest
    return Selection(threshold, math.sqrt(removed), math.sqrt(total))


def exact(tensor: Tensor) -> Tensor:
    """A float64 copy, for sums without rounding that matters."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device).double()  # MPS has no float64


def selection_of(weights: Iterable[Tensor], pruned: Iterable[Tensor]) -> Selection:
    """Threshold and norms of weights that are about to be masked by `pruned`."""
    removed = total = largest = 0.0
    for weight, mask in zip(weights, pruned, strict=True):
        for chunk, chunk_mask in zip(flat_chunks(weight), mask.view(-1).split(CHUNK), strict=True):
            values = exact(chunk)
            total += torch.dot(values, values).item()
            values = values[chunk_mask.to(values.device)]
            removed += torch.dot(values, values).item()
            largest = max(largest, values.abs().max().item() if len(values) else 0.0)
    if not math.isfinite(total):
        raise ValueError(NOT_FINITE)
    return Selection(largest, math.sqrt(removed), math.sqrt(total))


def combined(selections: list[Selection]) -> Selection:
    """One selection out of those of several layers."""
    return Selection(
        max(s.threshold for s in selections),
        math.hypot(*(s.removed_norm for s in selections)),
        math.hypot(*(s.norm for s in selections)),
    )
