"""Which output channels of a model's layers belong together, read off torch-pruning's dependency graph."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from math import prod
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import Node
from torch_pruning.ops import OPTYPE
from transformers.pytorch_utils import Conv1D

from ..layers import PRUNABLE_MODULES, weight_of
from .filters import FilterGroup, Rows, by_name, out_dim

Inputs = Tensor | tuple | Mapping
Items = dict[tuple[Node, str], dict[int, list[int]]]  # node and its side, "out" or "in": channel: its places there

OTHERS = {
    OPTYPE.LN: "a LayerNorm",
    OPTYPE.GN: "a GroupNorm",
    OPTYPE.IN: "an InstanceNorm",
    OPTYPE.PRELU: "a PReLU with a slope per channel",
    OPTYPE.EMBED: "an embedding",
    OPTYPE.PARAMETER: "a parameter outside of linear, convolution and batch norm layers",
    OPTYPE.MHA: "nn.MultiheadAttention",
    OPTYPE.LSTM: "an LSTM",
    OPTYPE.SPLIT: "a split of the channels",
    OPTYPE.UNBIND: "an unbind",
    OPTYPE.EXPAND: "an expand",
    OPTYPE.SLICE: "a slice",
}
RESHAPED = "its filters are reshaped, for example into attention heads"
RESIDUAL_STREAM = "its filters are the residual stream, whose width embeddings and normalisation layers fix"
NORMS_AND_EMBEDDINGS = (OPTYPE.LN, OPTYPE.EMBED, OPTYPE.PARAMETER, OPTYPE.EXPAND)  # an expand: a class token's


class _Conv1DPruner(tp.BasePruningFunc):
    """Makes Transformers' `Conv1D`, whose weight is (inputs, outputs), known to torch-pruning."""

    def prune_out_channels(self, layer: Conv1D, idxs: list[int]) -> Conv1D:
        keep = sorted(set(range(layer.nf)) - set(idxs))
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 1)
        layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        layer.nf = len(keep)
        return layer

    def prune_in_channels(self, layer: Conv1D, idxs: list[int]) -> Conv1D:
        keep = sorted(set(range(layer.nx)) - set(idxs))
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        layer.nx = len(keep)
        return layer

    def get_out_channels(self, layer: Conv1D) -> int:
        return layer.nf

    def get_in_channels(self, layer: Conv1D) -> int:
        return layer.nx


CONV1D_PRUNER = _Conv1DPruner()


class _StaysDense(Exception):
    """Why a group of channels is not pruned."""


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors in the model's outputs, in their order."""
    if isinstance(inputs, Mapping):
        return _tensors(model(**inputs))
    return _tensors(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def _tensors(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return [tensor for output in outputs for tensor in _tensors(output)]
    return []  # caches, None


def shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules own (tied weights)."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {parameter for parameter, count in owners.items() if count > 1}


def trace_groups(
    model: nn.Module, inputs: Inputs, prunable: Collection[str], shared: Collection[int] = ()
) -> tuple[list[FilterGroup], dict[str, str]]:
    """The groups of channels that can be removed, in the order of the layers, and why each other weight stays dense.

    Turns on evaluation mode and every `requires_grad` of `model`. Parameters whose id is in `shared` stay whole.
    Whatever torch-pruning raises on models that it cannot trace passes through.
    """
    graph = _Graph(model, inputs, prunable, shared)
    groups: list[FilterGroup] = []
    dense: dict[str, str] = {}
    done: set[str] = set()
    for layer in [m for m in model.modules() if isinstance(m, PRUNABLE_MODULES)]:
        name = graph.name_of(layer)
        if name is None:  # computed: none of the parameters that could be pruned
            continue
        if layer not in graph.nodes:
            dense.setdefault(name, "no path that can be traced leads from it to the outputs")
        elif name not in done:
            items = graph.expand(layer)
            named = [graph.name_of(node.module) for node, side in items if side == "out" and _is_layer(node)]
            producers = {producer for producer in named if producer is not None}
            try:
                groups.append(graph.read(layer, items))
            except _StaysDense as reason:
                dense |= {producer: str(reason) for producer in sorted(producers) if producer not in dense}
            done |= producers
    groups = _drop_coupled_with_dense(groups, dense)
    return groups, {name: reason for name, reason in dense.items() if name in prunable}


def _drop_coupled_with_dense(groups: list[FilterGroup], dense: dict[str, str]) -> list[FilterGroup]:
    """The groups none of whose layers stays dense or is in another group; adds the reasons of the others."""
    owners = Counter(rows.name for group in groups for rows in group.weights)
    for name in sorted(name for name, count in owners.items() if count > 1):
        dense.setdefault(name, "its filters belong to several groups")
    while bad := [group for group in groups if any(rows.name in dense for rows in group.weights)]:
        for rows in [rows for group in bad for rows in group.weights]:
            dense.setdefault(rows.name, "its filters are coupled with those of a layer that stays dense")
        groups = [group for group in groups if group not in bad]
    return groups


def _is_layer(node: Node) -> bool:
    return isinstance(node.module, PRUNABLE_MODULES)


def _is_normalised_sum(items: Items) -> bool:
    """Whether outputs of several layers (or an embedding's) are added up, and normalised or embedded as a whole."""
    nodes = {node for node, side in items if side == "out"}
    sources = [node for node in nodes if _is_layer(node) or node.type == OPTYPE.EMBED]
    is_sum = any(type(node.grad_fn).__name__.startswith("AddBackward") for node in nodes)
    return is_sum and len(sources) > 1 and any(node.type in NORMS_AND_EMBEDDINGS for node in nodes)


class _Graph:
    """torch-pruning's dependency graph, and what of it ends in the outputs."""

    def __init__(self, model: nn.Module, inputs: Inputs, prunable: Collection[str], shared: Collection[int]):
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.prunable, self.shared = prunable, shared
        self.widest = max(size for parameter in model.parameters() for size in parameter.shape)
        self.ends: set = set()  # autograd nodes that made the outputs
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

        def forward(model: nn.Module, inputs: Inputs) -> list[Tensor]:
            outputs = [tensor for tensor in call(model, inputs) if tensor.requires_grad]
            self.ends = {tensor.grad_fn for tensor in outputs}
            return outputs

        self.graph = tp.DependencyGraph()
        with torch.enable_grad():
            self.graph.build_dependency(
                model, inputs, forward, customized_pruners={Conv1D: CONV1D_PRUNER}, verbose=False
            )
        self.nodes: dict[nn.Module, Node] = self.graph.module2node

    def name_of(self, layer: nn.Module) -> str | None:
        """That of its weight; None where the weight is computed, as by weight norm."""
        weight = weight_of(layer)
        return None if weight is None else self.names[id(weight)]

    def expand(self, layer: nn.Module) -> Items:
        """What the output channels of `layer` reach, by node and side ("out", or "in" of a layer).

        As torch-pruning's `get_pruning_group`, but that one keeps only one of two channels that reach the same place,
        and never ends where it counts places up in circles (timm's MaxViT). This one stops at either.
        """
        pruner = self.graph.get_pruner_of_module(layer)
        channels = [_HybridIndex(idx=i, root_idx=i) for i in range(pruner.get_out_channels(layer))]
        start = self.nodes[layer], pruner.prune_out_channels
        reached: dict[tuple[Node, Callable], set[_HybridIndex]] = {start: set(channels)}
        stack, lost = [(*start, channels)], False
        while stack and not lost:
            node, trigger, pairs = stack.pop()
            for dependency in [d for d in node.dependencies if d.is_triggered_by(trigger)]:
                moved = pairs
                for mapping in filter(None, dependency.index_mapping):
                    moved = mapping(moved)
                seen = reached.setdefault((dependency.target, dependency.handler), set())
                new = set(moved) - seen
                seen |= new
                if new:
                    lost |= self._is_lost([pair.idx for pair in seen])
                    stack.append((dependency.target, dependency.handler, list(new)))
        items: Items = {}
        for (node, handler), found in reached.items():
            outputs = self.graph.get_pruner_of_module(node.module).prune_out_channels
            places = items.setdefault((node, "out" if handler == outputs else "in"), {})
            for pair in sorted(found, key=lambda pair: pair.idx):
                places.setdefault(pair.root_idx, []).append(pair.idx)
        return {key: places for key, places in items.items() if places}

    def read(self, layer: nn.Module, items: Items) -> FilterGroup:
        """The group of all output channels of `layer`, given its `expand`. Raises `_StaysDense` with the reason."""
        if _is_normalised_sum(items):
            raise _StaysDense(RESHAPED if any(_is_mixed(node) for node, _ in items) else RESIDUAL_STREAM)
        for node, side in items:
            self._check_node(node, side)
        if any(self._is_lost([place for found in places.values() for place in found]) for places in items.values()):
            raise _StaysDense("its filters are coupled with each other, or lost track of")
        size = len(items[self.nodes[layer], "out"])
        if size == 1:
            raise _StaysDense("it has a single filter")
        weights, attached, readers = [], [], []
        for (node, side), places in items.items():
            module = node.module
            if _is_layer(node) and side == "in":
                readers.append(self._rows(module.weight, 1 - out_dim(module), places, size))
            elif _is_layer(node):
                weights.append(self._rows(module.weight, out_dim(module), places, size, whole=True))
                if module.bias is not None:
                    attached.append(self._rows(module.bias, 0, places, size))
            elif isinstance(module, _BatchNorm):
                attached += [self._rows(parameter, 0, places, size) for parameter in (module.weight, module.bias)]
        kept = sorted(rows.name for rows in weights if rows.name not in self.prunable)
        if kept:
            raise _StaysDense(f"its filters are coupled with those of {kept[0]}, which is not pruned")
        return FilterGroup(size, by_name(weights), by_name(attached), by_name(readers))

    def _check_node(self, node: Node, side: str) -> None:
        module = node.module
        if side == "out" and (node.type == OPTYPE.OUTPUT or node.grad_fn in self.ends):
            raise _StaysDense("its filters are the model's outputs")
        if node.type in OTHERS:
            raise _StaysDense(f"its filters go through {OTHERS[node.type]}, which is not pruned")
        if _is_mixed(node):
            raise _StaysDense(RESHAPED)
        if _is_layer(node) and weight_of(module) is None:
            raise _StaysDense("its filters are coupled with a layer whose weight is computed (weight norm)")
        if isinstance(module, _BatchNorm) and (module.weight is None or module.bias is None):
            raise _StaysDense("its filters go through a batch norm without weight and bias")
        if isinstance(module, _ConvNd) and module.groups > 1:
            if not module.groups == module.in_channels == module.out_channels:
                raise _StaysDense("its filters are coupled with a grouped convolution that is not depthwise")

    def _is_lost(self, places: list[int]) -> bool:
        """Whether two channels share a place, or one is at a place that no layer has."""
        return len(set(places)) < len(places) or max(places) >= self.widest

    def _rows(
        self, parameter: nn.Parameter, dim: int, places: dict[int, list[int]], size: int, whole: bool = False
    ) -> Rows:
        """`whole`: the group has to take all places of the parameter."""
        name, width = self.names[id(parameter)], parameter.shape[dim]
        if id(parameter) in self.shared:
            raise _StaysDense(f"{name} is tied, shared by several layers")
        counts = {len(found) for found in places.values()}
        used = {place for found in places.values() for place in found}
        if set(places) != set(range(size)) or len(counts) != 1 or max(used) >= width or whole and len(used) != width:
            raise _StaysDense(f"its filters do not correspond one to one to those of {name}")
        index = torch.tensor([places[channel] for channel in range(size)])
        return Rows(name, dim, index.flatten() if counts == {1} else index)


def _is_mixed(node: Node) -> bool:
    """Whether a view takes the channels apart, or together with something else."""
    return node.type == OPTYPE.RESHAPE and not _keeps_channels(node.grad_fn)


def _keeps_channels(view: Any) -> bool:
    """Whether a view leaves the channels, the second dimension of images and else the last, in order and together."""
    before, after = tuple(view._saved_self_sym_sizes), tuple(view._input_metadata[0].shape)
    flattened = len(before) > 2 and after == (before[0], prod(before[1:]))
    if len(before) == 1:  # a scale per channel, made to fit images
        return before[0] in after
    return flattened or before[-1] == after[-1] or before[:2] == after[:2] and len(before) != 3
