"""What a run prunes of a model: its masks, with the rule that its arguments choose."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from ..storage.model_formats import out_of_wrappers
from .granularity import FilterRule, NOfMRule, WeightRule, parse_n_of_m
from .layers import PrunableWeights, find_prunable, layer_infos
from .masks import Masks
from .structured.groups import find_filter_groups


def make_masks(
    model: nn.Module,
    example_inputs: Callable[[], Any],
    granularity: str = "weight",
    allocation: str | None = None,
    criterion: str = "magnitude",
    seed: int = 0,
    prune_modules: Sequence[str] | None = None,
    skip_modules: Sequence[str] | None = None,
    with_frozen: bool = True,
) -> tuple[Masks, dict[str, str]]:
    """The masks of a run, and why each weight matrix stays dense that does (embeddings aside).

    `example_inputs` gives a batch of the model's inputs; filters alone need it, to trace which depend on each other.
    `with_frozen`: whether weights that are not trained are pruned too.
    Raises `ValueError` where nothing is left to prune.
    """
    model = out_of_wrappers(model)
    found = find_prunable(model, prune_modules, skip_modules, with_frozen)
    dense = found.stays_dense
    if granularity == "filter":
        groups, reasons = find_filter_groups(model, example_inputs(), found.weights.keys())
        parameters = dict(model.named_parameters())
        names = sorted({rows.name for group in groups for rows in group.weights})
        attached = sorted({rows.name for group in groups for rows in group.attached})
        _check_not_empty(names, granularity, reasons)
        weights = {name: parameters[name] for name in names}
        masks = Masks(weights, FilterRule(groups, criterion, seed), {name: parameters[name] for name in attached})
        return masks, dense | reasons
    pattern = parse_n_of_m(granularity)
    if pattern is None:
        rule = WeightRule(allocation or "global", criterion, seed, found.first_convolution, found.last_linear)
        return Masks(found.weights, rule), dense
    return _n_of_m(model, found, *pattern, criterion, seed, dense)


def _n_of_m(
    model: nn.Module, found: PrunableWeights, n: int, m: int, criterion: str, seed: int, dense: dict[str, str]
) -> tuple[Masks, dict[str, str]]:
    infos = layer_infos(model)
    dimensions = {name: infos[name].input_dim for name in found.weights}
    reasons = {}
    for name, weight in found.weights.items():
        # The m inputs are of one output: a group's, which a transposed convolution has one after the other.
        of_groups = infos[name].groups if issubclass(infos[name].kind, _ConvTransposeNd) else 1
        inputs = weight.shape[dimensions[name]] // of_groups
        if inputs % m:
            reasons[name] = f"its {inputs} inputs do not divide by {m}"
    weights = {name: weight for name, weight in found.weights.items() if name not in reasons}
    _check_not_empty(list(weights), f"{n}:{m}", reasons)
    return Masks(weights, NOfMRule(n, m, dimensions, criterion, seed)), dense | reasons


def _check_not_empty(names: Sequence[str], granularity: str, reasons: dict[str, str]) -> None:
    if not names:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
        raise ValueError(f"granularity={granularity!r} leaves nothing of this model to prune ({shown}). Use 'weight'.")
