"""What makes a weight worth keeping: scores by which weights are ranked, of which the smallest go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Tensor, Any], Tensor]  # of a weight and, where gradients are gathered, its statistic
Accumulate = Callable[[Tensor, Tensor, Tensor], Tensor]

DECAY = 0.9  # of the running mean of gradients: about ten steps count


@dataclass(frozen=True)
class Criterion:
    """How weights are ranked.

    `score(weight, statistic)` gives a float tensor of the weight's shape; of finite scores of any sign the smallest
    go first. It is None for random scores. `accumulate(statistic, weight, gradient)`, all float32, gives the statistic
    of a weight after an optimizer step, from the one before (zeros at first) and the step's whole gradient; None where
    gradients do not matter, and `score` then gets no statistic.
    """

    name: str
    score: Score | None
    accumulate: Accumulate | None = None

    def scores(
        self, values: Mapping[str, Tensor], pruned: Mapping[str, Tensor], statistics: Mapping[str, Tensor], seed: int
    ) -> list[Tensor] | None:
        """Those of all weights in their order; None where the magnitudes themselves are ranked."""
        if self.name == "magnitude":
            return None
        score = self.score
        if score is None:
            return random_scores(seed, [pruned[name] for name in values])
        if self.accumulate is not None and (missing := [name for name in values if name not in statistics]):
            raise ValueError(
                f"criterion={self.name!r} goes by gradients, and there are none yet of {', '.join(missing[:5])}. "
                "Prune after some training (dense_ratio above 0), and leave frozen layers out (skip_modules)."
            )
        scores = {name: score(value.detach(), statistics.get(name)) for name, value in values.items()}
        return [self._checked(name, values[name], score) for name, score in scores.items()]

    def _checked(self, name: str, value: Tensor, score: Tensor) -> Tensor:
        if score.shape != value.shape or not score.is_floating_point():
            raise ValueError(
                f"criterion={self.name!r} gives {tuple(score.shape)} {score.dtype} for {name} of shape "
                f"{tuple(value.shape)}: return one float for each weight."
            )
        return score


def random_scores(seed: int, pruned: Sequence[Tensor]) -> list[Tensor]:
    """Scores in (0, 1]: the same in every process and after a resume, as seed and progress decide."""
    done = sum(int(mask.count_nonzero()) for mask in pruned)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + done)
    return [(1 - torch.rand(mask.shape, generator=generator)).to(mask.device) for mask in pruned]


CRITERIA: dict[str, Criterion] = {}


def register_criterion(name: str, *, accumulate: Accumulate | None = None) -> Callable[[Score], Score]:
    """Makes `criterion=name` rank weights by the function that it decorates; see `Criterion` for both functions.

    Register where your module is imported, before the arguments are made. Raises `ValueError` for a name that is
    taken.

        @register_criterion("distance_to_one")
        def distance_to_one(weight, statistic):
            return (weight - 1).abs()
    """

    def register(score: Score) -> Score:
        add(Criterion(name, score, accumulate))
        return score

    return register


def add(criterion: Criterion) -> None:
    taken = CRITERIA.get(criterion.name)
    if taken is not None and _origin(taken) != _origin(criterion):  # the same again where a module is imported twice
        raise ValueError(f"There is a criterion {criterion.name!r} already. Register yours under another name.")
    CRITERIA[criterion.name] = criterion


def _origin(criterion: Criterion) -> tuple[str, str] | None:
    return criterion.score and (criterion.score.__module__, criterion.score.__qualname__)


def criterion_named(name: str) -> Criterion:
    """Raises `ValueError` where there is none."""
    if name not in CRITERIA:
        raise ValueError(
            f"criterion={name!r} is none of {', '.join(CRITERIA)}. One of your own is registered with "
            "hf_bimp.register_criterion, before the arguments are made."
        )
    return CRITERIA[name]


# ---- Ours ----


@register_criterion("magnitude")
def magnitude(weight: Tensor, statistic: Tensor | None) -> Tensor:
    """|w|, the paper's."""
    return weight.abs()


add(Criterion("random", None))


def _running_mean(statistic: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    return DECAY * statistic + (1 - DECAY) * gradient


@register_criterion("taylor", accumulate=_running_mean)
def taylor(weight: Tensor, statistic: Tensor) -> Tensor:
    """|w * dL/dw|, what the loss changes by to first order if the weight goes (Molchanov et al., 2017).

    dL/dw is the mean over about the last ten steps.
    """
    return (weight.float() * statistic).abs()


def _movement_so_far(statistic: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    return statistic - weight * gradient


@register_criterion("movement", accumulate=_movement_so_far)
def movement(weight: Tensor, statistic: Tensor) -> Tensor:
    """-sum over all steps of w * dL/dw: large where weights move away from zero (Sanh et al., 2020)."""
    return statistic
