"""Exact selection of the smallest magnitudes (or scores) over all weights, without concatenating or sorting them.

IEEE floats without their sign order like integers, and so do signed ones once the bits of negative ones are turned
round. A histogram of the upper 16 bits finds the bucket that holds the threshold, a histogram of the lower 16 bits
inside that bucket finds the threshold itself. Both are exact, take memory for 65,536 counters however large the model,
and visit the weights in chunks.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights per chunk: temporaries that stay in the processor's cache
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # each is exact in float32
MAGNITUDE = 0x7FFFFFFF  # the bits of a float but for its sign
INFINITY_BUCKET = 0x7F80  # upper bits of float32's infinity; NaNs lie at or above it
_LOWEST = -(1 << 31)  # below the key of every number
NOT_FINITE = (
    "A prunable weight is NaN or infinite, so magnitudes cannot be ranked: training diverged before this pruning. "
    "Lower learning_rate, add warm-up or gradient clipping, or check the data."
)
SCORE_NOT_FINITE = (
    "A score is NaN or infinite, so weights cannot be ranked: training diverged before this pruning, or the criterion "
    "overflows. Lower learning_rate, add warm-up or gradient clipping, or check the criterion."
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
    """int32 keys from 0 on, in the order of the magnitudes of `chunk`."""
    return chunk.float().view(torch.int32) & MAGNITUDE


def score_keys(chunk: Tensor, pruned: Tensor) -> Tensor:
    """int32 keys of either sign, in the order of `chunk`; what is pruned is below all others.

    Raises `ValueError` where a score is NaN or infinite.
    """
    if not (chunk.isfinite() | pruned).all():
        raise ValueError(SCORE_NOT_FINITE)
    bits = (chunk.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill_(pruned, _LOWEST)


class _Magnitudes:
    """The keys of weights, chunk by chunk: what was pruned before is zero, and so among the lowest."""

    offset = 0  # of the lowest upper half of a key

    def __init__(self, weights: list[Tensor]):
        self.weights = weights
        # bfloat16 is the upper half of float32: nothing is left to tell apart in the lower one.
        self.only_upper = all(weight.dtype == torch.bfloat16 for weight in weights)

    def __iter__(self) -> Iterator[Tensor]:
        return (magnitude_keys(chunk) for weight in self.weights for chunk in flat_chunks(weight))

    def check(self, counts: Tensor) -> None:
        if counts[INFINITY_BUCKET:].any():
            raise ValueError(NOT_FINITE)


class _Scores:
    """The keys of scores, chunk by chunk."""

    offset = 1 << 15
    only_upper = False

    def __init__(self, scores: list[Tensor], pruned: list[Tensor]):
        self.scores, self.pruned = scores, pruned

    def __iter__(self) -> Iterator[Tensor]:
        for score, mask in zip(self.scores, self.pruned, strict=True):
            for chunk, chunk_mask in zip(flat_chunks(score), mask.view(-1).split(CHUNK), strict=True):
                yield score_keys(chunk, chunk_mask)

    def check(self, counts: Tensor) -> None:
        """`score_keys` has."""


def _histogram(keys: Iterable[Tensor], shift: int, prefix: int | None, offset: int) -> Tensor:
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in keys:
        if prefix is None:
            buckets = (chunk >> shift) + offset if offset else chunk >> shift
        else:
            buckets = (chunk[chunk >> 16 == prefix] & 0xFFFF) >> shift
        counts += torch.bincount(buckets, minlength=1 << 16).cpu()
    return counts


def kth_smallest_key(keys: _Magnitudes | _Scores, k: int) -> tuple[int, int]:
    """The k-th smallest key (k >= 1) and how many lie strictly below it.

    Raises `ValueError` where a weight or a score is NaN or infinite.
    """
    prefix: int | None = None
    below = 0
    for shift in (16,) if keys.only_upper else (16, 0):
        counts = _histogram(keys, shift, prefix, keys.offset)
        if prefix is None:
            keys.check(counts)
        totals = counts.cumsum(0)
        bucket = int(torch.searchsorted(totals, k - below))
        below += int(totals[bucket] - counts[bucket])
        prefix = bucket - keys.offset if prefix is None else prefix << 16 | bucket
    found = cast(int, prefix)
    return found << 16 if keys.only_upper else found, below


def prune_smallest(
    weights: list[Tensor], pruned: list[Tensor], k: int, scores: list[Tensor] | None = None
) -> Selection:
    """Marks exactly the k smallest magnitudes in the boolean tensors `pruned`, which also say what was pruned before.

    Equal magnitudes go in the order: pruned before, then the order of `weights`, then the flat index. Weights pruned
    before must be zero, so they are always among the smallest. Where `scores` (floats of either sign, shaped like
    `weights`, ranked in float32) are given, they are ranked in place of the magnitudes, behind what was pruned before.
    """
    keys = _Magnitudes(weights) if scores is None else _Scores(scores, pruned)
    lowest = 0 if scores is None else _LOWEST
    key, below = kth_smallest_key(keys, k) if k else (lowest, 0)
    ties = k - below  # how many of the weights at the threshold itself go
    if key == lowest:
        ties -= sum(int(mask.count_nonzero()) for mask in pruned)
    removed = total = largest = 0.0
    for weight, score, mask in zip(weights, weights if scores is None else scores, pruned, strict=True):
        chunks = zip(flat_chunks(weight), flat_chunks(score), mask.view(-1).split(CHUNK), strict=True)
        for chunk, chunk_scores, chunk_mask in chunks:
            chunk_keys = magnitude_keys(chunk) if scores is None else score_keys(chunk_scores, chunk_mask)
            if ties:
                at_threshold = ((chunk_keys == key) & ~chunk_mask).nonzero().view(-1)[:ties]
                ties -= len(at_threshold)
                chunk_mask[at_threshold] = True
            chunk_mask |= chunk_keys < key
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
