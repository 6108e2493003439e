"""Exact selection of the smallest magnitudes (or scores) over all weights, without concatenating or sorting them.

IEEE floats without their sign order like integers, and so do signed ones once the bits of negative ones are turned
round. A histogram of the upper 16 bits finds the bucket that holds the threshold, a histogram of the lower 16 bits
inside that bucket finds the threshold itself. Both are exact, take memory for 65,536 counters however large the model,
and visit the weights in chunks. Nothing is read back from an accelerator for a chunk: it would wait for each.
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
    """int32 keys of either sign, in the order of `chunk`; what is pruned is below all others."""
    bits = (chunk.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    return (bits ^ ((bits >> 31) & MAGNITUDE)).masked_fill_(pruned, _LOWEST)


class _Magnitudes:
    """The keys of weights, chunk by chunk: what was pruned before is zero, and so among the lowest."""

    offset = 0  # of the lowest upper half of a key
    lowest = 0  # key, that of what was pruned before

    def __init__(self, weights: list[Tensor], pruned: list[Tensor]):
        self.weights, self.device = weights, weights[0].device
        # bfloat16 is the upper half of float32: nothing is left to tell apart in the lower one.
        self.only_upper = all(weight.dtype == torch.bfloat16 for weight in weights)

    def __iter__(self) -> Iterator[Tensor]:
        return (magnitude_keys(chunk) for weight in self.weights for chunk in flat_chunks(weight))

    def check(self, counts: Tensor) -> None:
        """Raises `ValueError` where the histogram of upper halves has numbers that are none."""
        if counts[INFINITY_BUCKET:].any():
            raise ValueError(NOT_FINITE)


class _Scores:
    """The keys of scores, chunk by chunk."""

    offset = 1 << 15
    lowest = _LOWEST
    only_upper = False

    def __init__(self, scores: list[Tensor], pruned: list[Tensor]):
        self.scores, self.pruned, self.device = scores, pruned, scores[0].device

    def __iter__(self) -> Iterator[Tensor]:
        for score, mask in zip(self.scores, self.pruned, strict=True):
            for chunk, chunk_mask in zip(flat_chunks(score), mask.view(-1).split(CHUNK), strict=True):
                yield score_keys(chunk, chunk_mask)

    def check(self, counts: Tensor) -> None:
        """As that of magnitudes; negative infinity lies just above the lowest keys, and negative NaNs between."""
        lowest = self.offset - 1 - INFINITY_BUCKET
        below = int(counts[: lowest + 1].sum()) - _number_pruned(self.pruned)
        if below or counts[self.offset + INFINITY_BUCKET :].any():
            raise ValueError(SCORE_NOT_FINITE)


def _reads_are_free(tensor: Tensor) -> bool:
    """Whether nothing has to be waited for."""
    return tensor.device.type == "cpu"


def _number_pruned(pruned: list[Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in pruned)


def _histogram(keys: _Magnitudes | _Scores, shift: int, prefix: int | None) -> Tensor:
    """How many keys have each upper half, or with `prefix` as that each lower half: int64 (65536,), on the CPU."""
    counts = torch.zeros((1 << 16) + 1, dtype=torch.int64, device=keys.device)  # one more for all that do not count
    ones = torch.ones(CHUNK, dtype=torch.int64, device=keys.device)
    for chunk in keys:
        chunk = chunk.to(keys.device)
        if prefix is None:
            buckets = (chunk >> shift) + keys.offset if keys.offset else chunk >> shift
        elif _reads_are_free(chunk):
            buckets = (chunk[chunk >> 16 == prefix] & 0xFFFF) >> shift
        else:  # the size of what is picked out would have to be read
            buckets = torch.where(chunk >> 16 == prefix, (chunk & 0xFFFF) >> shift, 1 << 16)
        counts.scatter_add_(0, buckets.long(), ones[: len(buckets)])
    return counts[:-1].cpu()


def kth_smallest_key(keys: _Magnitudes | _Scores, k: int) -> tuple[int, int]:
    """The k-th smallest key (k >= 1) and how many lie strictly below it.

    Raises `ValueError` where a weight or a score is NaN or infinite.
    """
    prefix: int | None = None
    below = 0
    for shift in (16,) if keys.only_upper else (16, 0):
        counts = _histogram(keys, shift, prefix)
        if prefix is None:
            keys.check(counts)
        totals = counts.cumsum(0)
        bucket = int(torch.searchsorted(totals, k - below))
        below += int(totals[bucket] - counts[bucket])
        prefix = bucket - keys.offset if prefix is None else prefix << 16 | bucket
    found = cast(int, prefix)
    return found << 16 if keys.only_upper else found, below


def mark_smallest(weights: list[Tensor], pruned: list[Tensor], k: int, scores: list[Tensor] | None = None) -> None:
    """Marks exactly the k smallest magnitudes in the boolean tensors `pruned`, which also say what was pruned before.

    Equal magnitudes go in the order: pruned before, then the order of `weights`, then the flat index. Weights pruned
    before must be zero, so they are always among the smallest. Where `scores` (floats of either sign, shaped like
    `weights`, ranked in float32) are given, they are ranked in place of the magnitudes, behind what was pruned before.
    Raises `ValueError` where what is ranked is NaN or infinite.
    """
    if not k:
        return
    keys = _Magnitudes(weights, pruned) if scores is None else _Scores(scores, pruned)
    key, below = kth_smallest_key(keys, k)
    ties = k - below  # how many of the weights at the threshold itself go
    if key == keys.lowest:
        ties -= _number_pruned(pruned)
    left = torch.tensor(ties, device=keys.device)
    marks = (mask for tensor in pruned for mask in tensor.view(-1).split(CHUNK))
    for chunk, mask in zip(keys, marks, strict=True):
        if ties and (not _reads_are_free(mask) or left > 0):
            left = left.to(mask.device)
            at_threshold = (chunk == key) & ~mask
            places = at_threshold.cumsum(0)
            mask |= at_threshold & (places <= left)
            left = left - places[-1] if len(places) else left
        mask |= chunk < key


def prune_smallest(
    weights: list[Tensor], pruned: list[Tensor], k: int, scores: list[Tensor] | None = None
) -> Selection:
    """`mark_smallest`, and what it removes."""
    mark_smallest(weights, pruned, k, scores)
    return selection_of(weights, pruned)


def exact(tensor: Tensor) -> Tensor:
    """A float64 copy, for sums without rounding that matters."""
    return tensor.detach().to("cpu" if tensor.device.type == "mps" else tensor.device).double()  # MPS has no float64


def selection_of(weights: Iterable[Tensor], pruned: Iterable[Tensor]) -> Selection:
    """Threshold and norms of weights that are about to be masked by `pruned`.

    Raises `ValueError` where a weight is NaN or infinite.
    """
    sums: dict[torch.device, Tensor] = {}  # of the squares of all and of what goes, and the largest of that
    for weight, mask in zip(weights, pruned, strict=True):
        for chunk, chunk_mask in zip(flat_chunks(weight), mask.view(-1).split(CHUNK), strict=True):
            if not len(chunk):
                continue
            values = exact(chunk)
            gone = values.masked_fill(~chunk_mask.to(values.device), 0)
            found = sums.setdefault(values.device, values.new_zeros(3))
            found[0] += torch.dot(values, values)
            found[1] += torch.dot(gone, gone)
            low, high = gone.aminmax()
            found[2].copy_(torch.maximum(found[2], torch.maximum(high, -low)))
    read = [found.tolist() for found in sums.values()]
    total, removed = sum(row[0] for row in read), sum(row[1] for row in read)
    largest = max((row[2] for row in read), default=0.0)
    if not math.isfinite(total):
        raise ValueError(NOT_FINITE)
    return Selection(largest, math.sqrt(removed), math.sqrt(total))
