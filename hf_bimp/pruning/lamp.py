"""LAMP (Lee et al., 2021): how many weights each layer loses when the smallest layer-adaptive scores go.

The score of a weight is its square over the sum of the squares of all weights in its layer that are not smaller. In a
layer it grows with the magnitude, so the counts alone say which weights go: the smallest of each layer.

A histogram of each layer over the upper 16 bits of the magnitudes gives bounds of the scores in every bucket. Only in
the few buckets whose bounds straddle the threshold the magnitudes are told apart. Sums are of whole numbers within a
bucket, then of buckets in their order, so that they do not depend on where in the layer a weight lies.
"""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ranking import CHUNK, INFINITY_BUCKET, MAGNITUDE, NOT_FINITE, flat_chunks

_GATHERED = CHUNK  # keys at once; a layer with more in the buckets that matter is counted by histograms instead
_SLACK = 1e-6  # of bounds: above the rounding to float32, far below the width of a bucket


@dataclass(frozen=True)
class _Layer:
    """The buckets of a layer that hold weights, in ascending order: how many, and the sum of squares above each."""

    weight: Tensor
    buckets: Tensor  # int32 (n,), the upper 16 bits of the magnitudes
    counts: Tensor  # int32 (n,)
    above: Tensor  # float64 (n,)
    low: Tensor  # float32 (n,), no score in the bucket is smaller
    high: Tensor  # float32 (n,), none is larger


def lamp_counts(weights: list[Tensor], pruned: list[Tensor], k: int) -> list[int]:
    """How many weights of each layer are among the k smallest scores of all.

    Equal scores go in the order: pruned before, then the order of `weights`. Raises `ValueError` where a weight is NaN
    or infinite.
    """
    histogram = _Histogram(weights[0].device)
    layers = [_layer(weight, histogram) for weight in weights]
    if not k:
        return [0] * len(layers)
    upto = [layer.counts.cumsum(0, dtype=torch.int32).numpy() for layer in layers]
    least = _kth([(layer.low.numpy(), numbers) for layer, numbers in zip(layers, upto, strict=True)], k)
    most = _kth([(layer.high.numpy(), numbers) for layer, numbers in zip(layers, upto, strict=True)], k)
    del upto
    below = [int(layer.counts[layer.high < least].sum()) for layer in layers]  # whatever the threshold is
    found = [_scores(layer, histogram, (layer.high >= least) & (layer.low <= most)) for layer in layers]
    threshold = _kth(found, k - sum(below))
    counts = [number + _count(*scores, threshold, False) for number, scores in zip(below, found, strict=True)]
    ends = [number + _count(*scores, threshold, True) for number, scores in zip(below, found, strict=True)]
    if threshold == 0:
        counts = [int(mask.count_nonzero()) for mask in pruned]
    left = k - sum(counts)
    for i, end in enumerate(ends):
        taken = min(left, end - counts[i])  # of those at the threshold itself
        counts[i] += taken
        left -= taken
    return counts


def _kth(layers: list[tuple[np.ndarray, np.ndarray]], k: int) -> float:
    """The k-th smallest of all values, by bisection over their bits: doubles order like integers.

    Each layer gives its values in ascending order, and how many weights have one of those up to it. As arrays of
    NumPy, in which a single value is found ten times as fast.
    """
    low, high = 0, struct.unpack("q", struct.pack("d", 2.0))[0]
    while low < high:
        middle = (low + high) // 2
        if sum(_count(values, upto, _double(middle), True) for values, upto in layers) >= k:
            high = middle
        else:
            low = middle + 1
    return _double(low)


def _count(values: np.ndarray, upto: np.ndarray, value: float, with_equal: bool) -> int:
    place = values.searchsorted(values.dtype.type(value), "right" if with_equal else "left")
    return int(upto[place - 1]) if place else 0


def _double(bits: int) -> float:
    return struct.unpack("d", struct.pack("q", bits))[0]


class _Histogram:
    """How many magnitudes have each value of the upper 16 bits, and the sums and sums of squares of the lower 16.

    All are whole numbers, so that the order of summation does not matter. Memory is taken once for all layers: large
    pieces that come and go between the small ones that stay would leave holes of many times their size.
    """

    def __init__(self, device: torch.device):
        self.table = torch.zeros(3, 1 << 16, dtype=torch.int64, device=device)
        self.floats = torch.empty(CHUNK, device=device)
        self.keys = torch.empty(2, CHUNK, dtype=torch.int32, device=device)
        self.buffers = torch.empty(3, CHUNK, dtype=torch.int64, device=device)

    def keys_of(self, chunk: Tensor) -> Tensor:
        """As `magnitude_keys`; valid until the next call."""
        floats = self.floats[: len(chunk)].copy_(chunk)
        return torch.bitwise_and(floats.view(torch.int32), MAGNITUDE, out=self.keys[0, : len(chunk)])

    def of(self, weight: Tensor) -> Tensor:
        """(3, 65536) on the CPU; valid until the next call."""
        self.table.zero_()
        for chunk in flat_chunks(weight):
            keys, part = self.keys_of(chunk), self.keys[1, : len(chunk)]
            upper, lower, ones = self.buffers[:, : len(chunk)]
            upper.copy_(torch.bitwise_right_shift(keys, 16, out=part))
            lower.copy_(torch.bitwise_and(keys, 0xFFFF, out=part))
            self.table[0].scatter_add_(0, upper, ones.fill_(1))
            self.table[1].scatter_add_(0, upper, lower)
            self.table[2].scatter_add_(0, upper, lower.mul_(lower))
        return self.table.cpu()


def _layer(weight: Tensor, histogram: _Histogram) -> _Layer:
    """In a bucket magnitudes are step * (base + lower), where `lower` is the lower 16 bits of the key."""
    counts, sums, squares = histogram.of(weight)
    if counts[INFINITY_BUCKET:].any():
        raise ValueError(NOT_FINITE)
    buckets = counts.nonzero().view(-1)
    number, first, second = (table[buckets].double() for table in (counts, sums, squares))
    exponent = buckets >> 7
    base = ((buckets & 127) + 128 * (exponent > 0)).double() * (1 << 16)
    step = torch.ldexp(torch.ones(len(buckets), dtype=torch.float64), exponent.clamp_min(1) - 150)
    total = (number * base * base + 2 * base * first + second) * step * step
    from_here = total.flip(0).cumsum(0).flip(0)
    above = torch.cat([from_here[1:], from_here.new_zeros(1)])
    smallest, largest = (base * step).square(), ((base + 0xFFFF) * step).square()
    low = torch.where(from_here > 0, smallest / from_here, 0.0)
    high = torch.where(largest > 0, largest / (above + largest), 0.0)
    # Where all weights of a bucket are the same, as quantized ones are, their score is known.
    only = sums[buckets] // counts[buckets]
    value = ((base + only) * step).square()
    is_one_value = (counts[buckets] * only == sums[buckets]) & (counts[buckets] * only * only == squares[buckets])
    low = torch.where(is_one_value & (from_here > 0), value / from_here, low) * (1 - _SLACK)
    high = torch.where(is_one_value & (from_here > 0), value / from_here, high) * (1 + _SLACK)
    return _Layer(weight, buckets.int(), counts[buckets].int(), above, low.float(), high.float())


def _scores(layer: _Layer, histogram: _Histogram, chosen: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the different magnitudes in the `chosen` buckets, which follow each other, in ascending order.

    And how many weights there have one of those up to it.
    """
    buckets = layer.buckets[chosen].long()
    if not len(buckets):
        return np.empty(0), np.empty(0, np.int64)
    keys, counts = _distinct(layer.weight, histogram, buckets, int(layer.counts[chosen].sum()))
    squares = keys.to(torch.int32).view(torch.float32).double().square()
    sums = layer.above[chosen][-1] + (counts * squares).flip(0).cumsum(0).flip(0)
    return torch.where(squares > 0, squares / sums, 0.0).numpy(), counts.cumsum(0, dtype=torch.int32).numpy()


def _distinct(weight: Tensor, histogram: _Histogram, buckets: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The different keys in `buckets`, int64 in ascending order, and how many weights have each."""
    first, last = int(buckets[0]) << 16, (int(buckets[-1]) + 1) << 16
    if number <= _GATHERED:
        found, filled = torch.empty(number, dtype=torch.int32), 0
        for chunk in flat_chunks(weight):
            keys = histogram.keys_of(chunk)
            keys = keys[(keys >= first) & (keys <= last - 1)]
            found[filled : filled + len(keys)] = keys
            filled += len(keys)
        keys, counts = found.unique(return_counts=True)
        return keys.long(), counts
    tables = torch.zeros(len(buckets), 1 << 16, dtype=torch.int64)
    for chunk in flat_chunks(weight):
        keys = histogram.keys_of(chunk)
        for row, bucket in zip(tables, buckets.tolist(), strict=True):
            row += torch.bincount(keys[keys >> 16 == bucket] & 0xFFFF, minlength=1 << 16).cpu()
    row_of, lower = tables.nonzero(as_tuple=True)
    return (buckets[row_of] << 16) | lower, tables[row_of, lower]
