"""Which parameters of a model can be pruned, under which name, and which weight matrices are out of reach."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from .ranking import DTYPES

PRUNABLE_MODULES = (nn.Linear, _ConvNd, Conv1D)


@dataclass(frozen=True)
class PrunableWeights:
    """`weights`: the prunable parameters by name, sorted; `dense_names`: weight matrices that stay dense.

    `first_convolution` and `last_linear` are the names of the weights of the model's first convolution and last
    linear layer, in the order of its modules; None where there is no such layer, or it is not prunable.
    """

    weights: dict[str, nn.Parameter]
    dense_names: tuple[str, ...]
    first_convolution: str | None
    last_linear: str | None


def find_prunable(
    model: nn.Module, prune_modules: Sequence[str] | None = None, skip_modules: Sequence[str] | None = None
) -> PrunableWeights:
    """The weights of linear and convolution layers (and Transformers' `Conv1D`), tied ones once.

    `prune_modules` and `skip_modules` are regular expressions searched in module names: with the former only modules
    that match one are pruned, the latter are left out. Embeddings stay dense, and so does a layer tied to one (T5's
    `lm_head`) unless `prune_modules` matches it. Frozen weights are pruned like others. Raises `ValueError` where a
    pattern matches no layer, or no layer is left to prune.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE_MODULES)}
    chosen, skipped = (
        _matching(layers, prune_modules, "prune_modules"),
        _matching(layers, skip_modules, "skip_modules"),
    )
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    skipped_weights = {id(layers[name].weight) for name in skipped}
    weights = {
        id(module.weight)
        for name, module in layers.items()
        if id(module.weight) not in skipped_weights
        and (name in chosen if prune_modules else id(module.weight) not in embeddings)
    }
    named = sorted(model.named_parameters())  # each parameter once, under its first name
    prunable = {name: parameter for name, parameter in named if id(parameter) in weights}
    if not prunable:
        raise ValueError(
            f"{type(model).__name__} has no prunable weight: only linear and convolution layers are pruned, "
            f"and prune_modules={prune_modules}, skip_modules={skip_modules} leave none of its {len(layers)} layers."
        )
    _check_tensors(prunable)
    dense = [n for n, p in named if p.ndim > 1 and id(p) not in weights | embeddings]
    names = {id(parameter): name for name, parameter in prunable.items()}
    convolutions = [m for m in layers.values() if isinstance(m, _ConvNd)]
    linears = [m for m in layers.values() if isinstance(m, nn.Linear)]
    return PrunableWeights(
        prunable,
        tuple(dense),
        first_convolution=names.get(id(convolutions[0].weight)) if convolutions else None,
        last_linear=names.get(id(linears[-1].weight)) if linears else None,
    )


@dataclass(frozen=True)
class LayerInfo:
    """What the layer of a weight is: its class, and the dimensions of the weight that count outputs and inputs.

    Where a convolution has groups, one of the two counts those of one group.
    """

    kind: type[nn.Module]
    output_dim: int
    input_dim: int


def layer_infos(model: nn.Module) -> dict[str, LayerInfo]:
    """Of every linear and convolution layer of `model`, by the name of its weight."""
    kinds = {id(m.weight): type(m) for m in reversed([*model.modules()]) if isinstance(m, PRUNABLE_MODULES)}
    infos = {}
    for name, parameter in model.named_parameters():
        if (kind := kinds.get(id(parameter))) is not None:
            output_dim = int(issubclass(kind, (_ConvTransposeNd, Conv1D)))
            infos[name] = LayerInfo(kind, output_dim, 1 - output_dim)
    return infos


def _matching(layers: Iterable[str], patterns: Sequence[str] | None, argument: str) -> set[str]:
    if isinstance(patterns, str):
        raise ValueError(f"{argument}={patterns!r} must be a list of regular expressions: [{patterns!r}].")
    found = set()
    for pattern in patterns or ():
        try:
            names = {name for name in layers if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"{argument}: {pattern!r} is no regular expression ({error}).") from error
        if not names:
            examples = ", ".join(list(layers)[:5]) or "none"
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no linear or convolution layer. Patterns are regular "
                f"expressions over module names; this model's layers are: {examples}, ..."
            )
        found |= names
    return found


def _check_tensors(weights: dict[str, nn.Parameter]) -> None:
    for name, weight in weights.items():
        if isinstance(weight, DTensor):
            raise ValueError(f"{name} is sharded (FSDP2, a DTensor), which is not supported. Keep it whole, with DDP.")
        if weight.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {weight.dtype}; prunable weights must be one of {', '.join(map(str, DTYPES))}. "
                "Convert the model first, for example with model.float()."
            )
