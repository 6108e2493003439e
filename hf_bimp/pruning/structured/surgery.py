"""Taking channels out of a model, zeroed or removed, and comparing what models put out."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner.function import PrunerBox
from transformers.pytorch_utils import Conv1D

from .filters import Attention, FilterGroup, Rows, out_dim
from .heads import fit_heads
from .tracing import CONV1D_PRUNER, Inputs, call

TOLERANCE = 1e-4  # largest difference of outputs that count as equal, relative to their largest magnitude

Choice = tuple[FilterGroup, Tensor]  # a group and int64 (n,): those of its channels to take out


def zero_filters(model: nn.Module, group: FilterGroup) -> Tensor:
    """int64 (n,): the channels of `group` that add nothing to the outputs.

    Filters are wholly zero, biases and norms included; of attention heads the values or the output columns are.
    """
    parameters = dict(model.named_parameters())

    def is_zero(all_rows: Iterable[Rows]) -> Tensor:
        zero = torch.ones(group.size, dtype=torch.bool)
        for rows in all_rows:
            values = (parameters[rows.name].detach() == 0).movedim(rows.dim, 0).cpu()
            empty = values.reshape(len(values), -1).all(1)
            zero &= empty[rows.index].view(group.size, -1).all(1)
        return zero

    if group.attentions:
        zeros = [is_zero(attention.values) | is_zero([attention.output]) for attention in group.attentions]
        return torch.stack(zeros).all(0).nonzero().flatten()
    return is_zero((*group.weights, *group.attached)).nonzero().flatten()


@torch.no_grad()
def zero_channels(model: nn.Module, choices: Iterable[Choice]) -> None:
    """Zeroes what makes the chosen channels anything but zero; of attention heads the values alone."""
    parameters = dict(model.named_parameters())
    for group, channels in choices:
        values = [rows for attention in group.attentions for rows in attention.values]
        for rows in values or (*group.weights, *group.attached):
            parameter = parameters[rows.name]
            parameter.index_fill_(rows.dim, rows.index[channels].flatten().to(parameter.device), 0)


def remove_channels(model: nn.Module, choices: Iterable[Choice]) -> None:
    """Removes the chosen channels in place, those of each parameter at once."""
    removed: dict[tuple[str, int], set[int]] = defaultdict(set)
    attentions: dict[str, Attention] = {}
    for group, channels in choices:
        for rows in (*group.weights, *group.attached, *group.readers):
            removed[rows.name, rows.dim].update(rows.index[channels].flatten().tolist())
        attentions |= {attention.name: attention for attention in group.attentions}
    for (name, dim), places in removed.items():
        owner, _, kind = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        if kind == "weight":
            _remove_of_layer(module, dim, sorted(places))
        elif kind != "bias":  # biases go with the weights
            parameter = module.get_parameter(kind)
            kept = [place for place in range(parameter.shape[dim]) if place not in places]
            values = parameter.detach()[(slice(None),) * dim + (kept,)]
            setattr(module, kind, nn.Parameter(values, parameter.requires_grad))
    for attention in attentions.values():
        fit_heads(model, attention)


def _remove_of_layer(module: Any, dim: int, places: list[int]) -> None:
    trained = {kind: weight.requires_grad for kind, weight in module.named_parameters()}
    pruner = CONV1D_PRUNER if isinstance(module, Conv1D) else PrunerBox[tp.ops.module2type(module)]
    (pruner.prune_out_channels if dim == out_dim(module) else pruner.prune_in_channels)(module, places)
    for kind, weight in module.named_parameters():  # torch-pruning puts new ones in their place
        weight.requires_grad_(trained[kind])


def deep_copy(model: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A copy, also where modules hold tensors that a forward pass has computed (`torch.nn.utils.weight_norm`).

    Python's deepcopy alone refuses those. `tensors` are what the copy has in place of the model's, by their ids.
    """
    held = (value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value))
    computed = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    return copy.deepcopy(model, {**computed, **(tensors or {})})


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy over the memory of `model`, whose parameters take no gradients."""
    tensors: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    tensors |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return deep_copy(model, tensors)


def cpu_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 and evaluation mode: neither TF32 nor half precision blurs its outputs."""
    return deep_copy(model).cpu().float().eval()


def cpu_inputs(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.detach().cpu().float() if inputs.is_floating_point() else inputs.cpu()
    if isinstance(inputs, Mapping):
        return {name: cpu_inputs(value) for name, value in inputs.items()}
    return tuple(cpu_inputs(value) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def output_difference(model: nn.Module, other: nn.Module, inputs: Inputs) -> float:
    """The largest difference between the outputs of two models, relative to the largest magnitude of each output.

    NaN where an output has any, infinite where shapes differ. Raises what the models raise.
    """
    differences = [torch.tensor(0.0)]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = call(model, inputs)
        torch.manual_seed(0)
        for want, have in zip(expected, call(other, inputs), strict=True):
            if want.shape != have.shape:
                return float("inf")
            scale = want.abs().max().clamp_min(torch.finfo(want.dtype).tiny)
            differences.append(((want - have).abs().max() / scale).float())
    return torch.stack(differences).max().item()
