"""Which parameters of a model can be pruned, under which name, and which weight matrices are out of reach."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import is_pruned
from transformers.pytorch_utils import Conv1D

from ..storage.model_formats import out_of_wrappers
from .ranking import DTYPES

PRUNABLE_MODULES = (nn.Linear, _ConvNd, Conv1D)


@dataclass(frozen=True)
class PrunableWeights:
    """`weights`: the prunable parameters by name, sorted; `stays_dense`: why each other weight matrix is not pruned.

    `first_convolution` and `last_linear` are the names of the weights of the model's first convolution and last
    linear layer, in the order of its modules; None where there is no such layer, or it is not prunable.
    """

    weights: dict[str, nn.Parameter]
    stays_dense: dict[str, str]
    first_convolution: str | None
    last_linear: str | None

    @property
    def dense_names(self) -> tuple[str, ...]:
        """The names of the weight matrices that stay dense."""
        return tuple(self.stays_dense)


def weight_of(layer: nn.Module) -> nn.Parameter | None:
    """The weight that `layer` owns; None where it is computed anew at each access (weight norm)."""
    return layer._parameters.get("weight")


def find_prunable(
    model: nn.Module,
    prune_modules: Sequence[str] | None = None,
    skip_modules: Sequence[str] | None = None,
    with_frozen: bool = True,
) -> PrunableWeights:
    """The weights of linear and convolution layers (and Transformers' `Conv1D`), tied ones once.

    `prune_modules` and `skip_modules` are regular expressions searched in module names: with the former only modules
    that match one are pruned, the latter are left out. Embeddings stay dense, and so does a layer tied to one (T5's
    `lm_head`) unless `prune_modules` matches it. Frozen weights are pruned like others unless `with_frozen` is False.
    Raises `ValueError` where a pattern matches no layer, no layer is left to prune, or a layer has no weight yet.
    """
    model = out_of_wrappers(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE_MODULES)}
    check_layers(model)
    chosen, skipped = (
        _matching(layers, prune_modules, "prune_modules"),
        _matching(layers, skip_modules, "skip_modules"),
    )
    embeddings = {id(weight_of(module)) for module in model.modules() if isinstance(module, nn.Embedding)}
    skipped_weights = {id(weight_of(layers[name])) for name in skipped}
    chosen_weights = {id(weight_of(layers[name])) for name in chosen}
    of_layers = {id(weight_of(module)) for module in layers.values()}
    prunable, dense = {}, {}
    for name, parameter in sorted(model.named_parameters()):  # each parameter once, under its first name
        if id(parameter) not in of_layers:
            reason = _reason_outside_layers(model, name)
        elif not parameter.numel():
            reason = "it has no elements"
        elif id(parameter) in skipped_weights:
            reason = "skip_modules leaves it out"
        elif prune_modules and id(parameter) not in chosen_weights:
            reason = "prune_modules does not name it"
        elif not prune_modules and id(parameter) in embeddings:
            reason = "it is tied to an embedding"
        elif not (with_frozen or parameter.requires_grad):
            reason = "it is frozen, so that no gradient could decide what goes"
        else:
            prunable[name] = parameter
            continue
        if parameter.ndim > 1 and id(parameter) not in embeddings:
            dense[name] = reason
    if not prunable:
        frozen = "" if with_frozen else " that is trained"
        raise ValueError(
            f"{type(model).__name__} has no prunable weight{frozen}: only linear and convolution layers are pruned, "
            f"and prune_modules={prune_modules}, skip_modules={skip_modules} leave none of its {len(layers)} layers."
        )
    _check_tensors(prunable)
    names = {id(parameter): name for name, parameter in prunable.items()}
    convolutions = [m for m in layers.values() if isinstance(m, _ConvNd)]
    linears = [m for m in layers.values() if isinstance(m, nn.Linear)]
    return PrunableWeights(
        prunable,
        dense,
        first_convolution=names.get(id(weight_of(convolutions[0]))) if convolutions else None,
        last_linear=names.get(id(weight_of(linears[-1]))) if linears else None,
    )


def _reason_outside_layers(model: nn.Module, name: str) -> str:
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, (ParametrizationList, *PRUNABLE_MODULES)):
        return "its layer's weight is computed from it (weight norm or another parametrization)"
    return f"{type(owner).__name__} is no linear or convolution layer"


def check_layers(model: nn.Module) -> None:
    """Raises `ValueError` for layers that have no weight of their own yet, with the way to one."""
    for name, module in model.named_modules():
        if any(is_lazy(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            raise ValueError(
                f"{name} is a lazy {type(module).__name__} whose weights do not exist yet. Run a batch through the "
                "model once, such as model(**batch), before it is given to the trainer."
            )
        if isinstance(module, PRUNABLE_MODULES) and weight_of(module) is None and is_pruned(module):
            raise ValueError(
                f"{name} is pruned by torch.nn.utils.prune, which computes its weight from {name}.weight_orig and a "
                "mask. Make it a weight of its own first, torch.nn.utils.prune.remove(module, 'weight') for each such "
                "layer, and keep its zeros with keep_zeros=True."
            )


@dataclass(frozen=True)
class LayerInfo:
    """What the layer of a weight is: its class, and the dimensions of the weight that count outputs and inputs.

    Where a convolution has `groups`, one of the two counts those of one group: the inputs, of transposed ones the
    outputs.
    """

    kind: type[nn.Module]
    output_dim: int
    input_dim: int
    groups: int = 1


def layer_infos(model: nn.Module) -> dict[str, LayerInfo]:
    """Of every linear and convolution layer of `model`, by the name of its weight."""
    layers = {id(weight_of(m)): m for m in reversed([*model.modules()]) if isinstance(m, PRUNABLE_MODULES)}
    infos = {}
    for name, parameter in model.named_parameters():
        if (layer := layers.get(id(parameter))) is not None:
            output_dim = int(isinstance(layer, (_ConvTransposeNd, Conv1D)))
            groups = layer.groups if isinstance(layer, _ConvNd) else 1
            infos[name] = LayerInfo(type(layer), output_dim, 1 - output_dim, groups)
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
