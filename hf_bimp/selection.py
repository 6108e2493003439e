"""Exact selection of the smallest magnitudes over all weights, without concatenating or sorting them.

IEEE floats without their sign order like integers. A histogram of their upper 16 bits finds the bucket that holds the
threshold, a histogram of the lower 16 bits inside that bucket finds the threshold itself. Both are exact, take memory
for 65,536 counters however large the model, and visit the weights in chunks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights per chunk: temporaries that stay in the processor's cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # each is exact in float32
_INFINITY_BUCKET = 0x7F80  # upper bits of float32's infinity; NaNs lie at or above it


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
            raise ValueError(
                "A prunable weight is NaN or infinite, so magnitudes cannot be ranked: training diverged before this "
                "pruning. Lower learning_rate, add warm-up or gradient clipping, or check the data."
            )
        totals = counts.cumsum(0)
        bucket = int(torch.searchsorted(totals, k - below))
        below += int(totals[bucket] - counts[bucket])
        prefix = bucket if prefix is None else prefix << 16 | bucket
    return prefix << 16 if only_upper else prefix, below


def prune_smallest(weights: list[Tensor], pruned: list[Tensor], k: int) -> Selection:
    """Marks exactly the k smallest magnitudes in the boolean tensors `pruned`, which also say what was pruned before.

    Equal magnitudes go in the order: pruned before, then the order of `weights`, then the flat index. Weights pruned
    before must be zero, so they are always among the smallest.
    """
    key, below = kth_smallest_key(weights, k) if k else (0, 0)
    ties = k - below  # how many of the weights at the threshold itself go
    if key == 0:
        ties -= sum(int(mask.sum()) for mask in pruned)
    removed = total = 0.0
    for weight, mask in zip(weights, pruned, strict=True):
        for chunk, chunk_mask in zip(flat_chunks(weight), mask.view(-1).split(CHUNK), strict=True):
            keys = magnitude_keys(chunk)
            if ties:
                at_threshold = ((keys == key) & ~chunk_mask).nonzero().view(-1)[:ties]
                ties -= len(at_threshold)
                chunk_mask[at_threshold] = True
            chunk_mask |= keys < key
            device = "cpu" if chunk.device.type == "mps" else chunk.device  # Apple's GPUs have no float64
            values = chunk.to(device).double()
            total += torch.dot(values, values).item()
            values.masked_fill_(~chunk_mask.to(device), 0)
            removed += torch.dot(values, values).item()
    threshold = torch.tensor(key, dtype=torch.int32).view(torch.float32).item()
    return Selection(threshold, math.sqrt(removed), math.sqrt(total))
