"""What one pruning removes: single weights, n of m consecutive inputs, or whole filters.

A rule marks, in the boolean tensors that it is given, what is to be zero at a sparsity; `Masks` owns those tensors.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.utils import logging

from .allocation import ALLOCATIONS, Layer, layer_counts
from .criteria import Criterion, criterion_named, random_scores
from .lamp import lamp_counts
from .ranking import NOT_FINITE, SCORE_NOT_FINITE, mark_smallest
from .structured.filters import FilterGroup, Rows

FILTER_CRITERIA = ("magnitude", "random")  # what a norm of a whole filter is known for
_N_OF_M = re.compile(r"(\d+):(\d+)")
_ROUNDING = 1e-9  # a count that is missed by rounding error alone is met

logger = logging.get_logger(__name__)


def check_rule(granularity: str, allocation: str | None, criterion: str) -> None:
    """Raises `ValueError` where what to prune is not one of the choices, or they do not go together."""
    if granularity not in ("weight", "filter") and parse_n_of_m(granularity) is None:
        raise ValueError(f"granularity={granularity!r} is none of weight, filter and n:m (such as 2:4).")
    if allocation is not None and allocation not in ALLOCATIONS:
        raise ValueError(f"allocation={allocation!r} is none of {', '.join(ALLOCATIONS)}.")
    if granularity != "weight" and allocation not in (None, "uniform"):
        raise ValueError(
            f"allocation={allocation!r} with granularity={granularity!r}: filters and n:m take the same share of "
            "every layer. Leave allocation out, or use granularity='weight'."
        )
    criterion_named(criterion)
    if granularity == "filter" and criterion not in FILTER_CRITERIA:
        raise ValueError(
            f"criterion={criterion!r} ranks single weights: with granularity='filter' it is one of "
            f"{', '.join(FILTER_CRITERIA)}."
        )


class Rule(Protocol):
    """Marks in `pruned` (by parameter name, what was pruned before) what is pruned at `sparsity`.

    `statistics` are what the criterion has gathered of the gradients, by the same names.
    """

    criterion: Criterion

    def mark(
        self,
        weights: Mapping[str, Tensor],
        pruned: dict[str, Tensor],
        sparsity: float,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None: ...

    def check_plan(
        self, weights: Mapping[str, Tensor], pruned: dict[str, Tensor], sparsities: Sequence[float]
    ) -> None:
        """Raises `ValueError` where the rule cannot prune this much, and warns where a pruning would do nothing."""
        return None

    def planned(
        self, weights: Mapping[str, Tensor], pruned: dict[str, Tensor], sparsities: Sequence[float]
    ) -> list[float]:
        """The sparsities that pruning to `sparsities` ends at, one after the other, up to whole weights or filters."""
        return list(sparsities)

    def mark_attached(self, pruned: dict[str, Tensor]) -> None:
        """Marks what hangs on pruned weights: nothing, but for filters."""
        return None


def parse_n_of_m(granularity: str) -> tuple[int, int] | None:
    """(2, 4) for "2:4"; None where it is no such pattern. Raises `ValueError` where n of m makes no sense."""
    match = _N_OF_M.fullmatch(granularity)
    if match is None:
        return None
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ValueError(f"granularity={granularity!r}: of m consecutive inputs n stay, so 0 < n < m, as in 2:4.")
    return n, m


def kind_of(granularity: str) -> str:
    """weight, filter or n:m."""
    return "n:m" if parse_n_of_m(granularity) else granularity


class WeightRule(Rule):
    """Prunes exactly `round(sparsity * N)` single weights.

    `allocation` says how they spread over the layers (`allocation.ALLOCATIONS`), `criterion` which go within a layer,
    or over all of them for global: a name of `criteria.CRITERIA`; random scores are drawn from `seed`.
    `first_convolution` and `last_linear` are the names of the two weights that UNIFORM+ treats apart.
    """

    def __init__(
        self,
        allocation: str = "global",
        criterion: str = "magnitude",
        seed: int = 0,
        first_convolution: str | None = None,
        last_linear: str | None = None,
    ):
        self.allocation, self.criterion, self.seed = allocation, criterion_named(criterion), seed
        self.first_convolution, self.last_linear = first_convolution, last_linear

    def check_plan(
        self, weights: Mapping[str, Tensor], pruned: dict[str, Tensor], sparsities: Sequence[float]
    ) -> None:
        if self.allocation in ("global", "lamp"):
            return  # they reach any
        size, layers = sum(weight.numel() for weight in weights.values()), self.layers(weights, pruned)
        for sparsity in sparsities:
            layer_counts(self.allocation, layers, round(sparsity * size))

    def layers(self, weights: Mapping[str, Tensor], pruned: dict[str, Tensor]) -> list[Layer]:
        return [
            Layer(
                tuple(weight.shape),
                int(pruned[name].count_nonzero()),
                name == self.first_convolution,
                name == self.last_linear,
            )
            for name, weight in weights.items()
        ]

    def mark(
        self,
        weights: Mapping[str, Tensor],
        pruned: dict[str, Tensor],
        sparsity: float,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        values, masks = list(weights.values()), [pruned[name] for name in weights]
        k = round(sparsity * sum(weight.numel() for weight in values))
        done = sum(int(mask.count_nonzero()) for mask in masks)
        if k < done:
            raise ValueError(f"{done} weights are pruned already, and {k} would be fewer: masks only grow.")
        scores = self.criterion.scores(weights, pruned, statistics or {}, self.seed)
        if self.allocation == "global":
            mark_smallest(values, masks, k, scores)
            return
        if self.allocation == "lamp":
            counts = lamp_counts(values, masks, k)
        else:
            counts = layer_counts(self.allocation, self.layers(weights, pruned), k)
        for i, (value, mask, count) in enumerate(zip(values, masks, counts, strict=True)):
            mark_smallest([value], [mask], count, None if scores is None else [scores[i]])


class NOfMRule(Rule):
    """Of every m consecutive inputs of a filter, the ceil(m * (1 - sparsity)) largest stay, never fewer than n.

    `dimensions` gives, by name, the dimension of the weight that indexes its inputs.
    """

    def __init__(self, n: int, m: int, dimensions: dict[str, int], criterion: str = "magnitude", seed: int = 0):
        self.n, self.m, self.dimensions = n, m, dimensions
        self.criterion, self.seed = criterion_named(criterion), seed

    def kept(self, sparsity: float) -> int:
        """How many of m consecutive inputs stay."""
        return max(self.n, math.ceil(self.m * (1 - sparsity) - _ROUNDING))

    def check_plan(
        self, weights: Mapping[str, Tensor], pruned: dict[str, Tensor], sparsities: Sequence[float]
    ) -> None:
        kept = [self.m, *map(self.kept, sparsities)]
        if idle := [str(j) for j in range(1, len(kept)) if kept[j] == kept[j - 1]]:
            logger.warning(
                f"granularity='{self.n}:{self.m}' keeps whole inputs, {kept[1:]} of {self.m} in the cycles of this "
                f"plan, so that cycle {', '.join(idle)} prunes nothing. Use fewer cycles."
            )

    def planned(
        self, weights: Mapping[str, Tensor], pruned: dict[str, Tensor], sparsities: Sequence[float]
    ) -> list[float]:
        gone = [
            pruned[name].movedim(self.dimensions[name], -1).reshape(-1, self.m).sum(1, dtype=torch.int64)
            for name in weights
        ]
        total = self.m * sum(len(blocks) for blocks in gone)
        least = [self.m - self.kept(sparsity) for sparsity in sparsities]
        return [sum(int(blocks.clamp_min(count).sum()) for blocks in gone) / total for count in least]

    @torch.no_grad()
    def mark(
        self,
        weights: Mapping[str, Tensor],
        pruned: dict[str, Tensor],
        sparsity: float,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        masks = [pruned[name] for name in weights]
        kept = self.kept(sparsity)
        scores = self.criterion.scores(weights, pruned, statistics or {}, self.seed)
        for (name, weight), score, mask in zip(
            weights.items(), scores or [w.abs() for w in weights.values()], masks, strict=True
        ):
            if not (score.isfinite() | mask).all():
                raise ValueError(NOT_FINITE if scores is None else SCORE_NOT_FINITE)
            inputs = self.dimensions[name]
            ranked = score.masked_fill(mask, -math.inf).movedim(inputs, -1)
            blocks = ranked.reshape(*ranked.shape[:-1], -1, self.m)
            order = blocks.argsort(dim=-1, stable=True)  # of equal ones the earlier goes first
            chosen = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, order[..., : self.m - kept], True)
            mask |= chosen.reshape(ranked.shape).movedim(-1, inputs).reshape(weight.shape)


class FilterRule(Rule):
    """Removes `round(sparsity * size)` of the filters of each group: those of the smallest L2 norm, or random ones.

    Coupled filters (of layers whose outputs are added up) are one group and share one norm. What is attached to a
    filter, its bias and its batch-norm channel, is masked with it. An attention head is one filter: its query, key and
    value rows with its columns of the output projection, and of grouped queries all that share its keys and values.
    The last head of a group stays.
    """

    def __init__(self, groups: list[FilterGroup], criterion: str = "magnitude", seed: int = 0):
        self.groups, self.criterion, self.seed = groups, criterion_named(criterion), seed

    @torch.no_grad()
    def mark(
        self,
        weights: Mapping[str, Tensor],
        pruned: dict[str, Tensor],
        sparsity: float,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        gone = [self._gone(group, pruned) for group in self.groups]
        drawn = random_scores(self.seed, gone) if self.criterion.score is None else None
        for i, group in enumerate(self.groups):
            scores = self._norms(group, weights) if drawn is None else drawn[i].cpu()
            if not scores.isfinite().all():
                raise ValueError(NOT_FINITE)
            order = scores.masked_fill(gone[i].cpu(), -1).argsort(stable=True)
            most = group.size - bool(group.attentions)  # attention keeps a head
            chosen = order[: max(min(round(sparsity * group.size), most), int(gone[i].count_nonzero()))]
            _mark(pruned, group.weights, chosen)
        self.mark_attached(pruned)

    def mark_attached(self, pruned: dict[str, Tensor]) -> None:
        for group in self.groups:
            _mark(pruned, group.attached, self._gone(group, pruned).cpu().nonzero().view(-1))

    @staticmethod
    def _gone(group: FilterGroup, pruned: dict[str, Tensor]) -> Tensor:
        """Which filters are pruned wholly already, (size,)."""
        return torch.stack([_rows(pruned[r.name], r).all(1) for r in group.weights]).all(0)

    @staticmethod
    def _norms(group: FilterGroup, weights: Mapping[str, Tensor]) -> Tensor:
        squares = [_rows(weights[r.name].double(), r).square().sum(1) for r in group.weights]
        return torch.stack(squares).sum(0).sqrt().cpu()


def _mark(pruned: dict[str, Tensor], rows: Iterable[Rows], filters: Tensor) -> None:
    for row in rows:
        mask = pruned[row.name]
        mask.index_fill_(row.dim, row.index[filters].reshape(-1).to(mask.device), True)


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    """(size, everything of that filter)."""
    index = rows.index.to(tensor.device)
    return tensor.movedim(rows.dim, 0)[index.reshape(-1)].reshape(len(index), -1)
