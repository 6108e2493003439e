"""Attention heads: where they lie in the projections of a model's attention modules, and how many there are left."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers import weight_of
from .filters import Attention, FilterGroup, Rows, by_name, out_dim

# Names of the query, key, value and output layers. Those of one name are one layer, with its parts in this order.
LAYOUTS = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, ViT, Swin
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # BART, CLIP
    ("q", "k", "v", "o"),  # T5
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT
    ("query", "key", "value", "dense"),  # ALBERT
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("q_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2, over an encoder's states
    ("c_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2
    ("qkv", "qkv", "qkv", "proj"),  # timm
)
TABLES = re.compile(r"(^|\.)(relative_attention_bias\.weight|relative_position_bias_table)$")  # (positions, heads)

# What the modules' code calls the units of a head, the number of heads, and the units of all.
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
HEADS = ("num_heads", "n_heads", "num_attention_heads")
KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads")
UNITS = ("inner_dim", "all_head_size", "attn_dim", "split_size")


@dataclass(frozen=True)
class _Layer:
    """A linear layer: the sizes of its weight, and the dimension of it that counts outputs."""

    name: str
    rows: int
    columns: int
    dim: int
    has_bias: bool

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "_Layer":
        layer = model.get_submodule(name)
        shape, dim = model.get_parameter(f"{name}.weight").shape, out_dim(layer)
        return cls(name, shape[dim], shape[1 - dim], dim, layer.bias is not None)

    def weight_rows(self, index: Tensor) -> Rows:
        return Rows(f"{self.name}.weight", self.dim, index)

    def bias_rows(self, index: Tensor) -> list[Rows]:
        return [Rows(f"{self.name}.bias", 0, index)] if self.has_bias else []


def find_attentions(model: nn.Module) -> list[Attention]:
    """The attention modules of a known layout, in their order. Whether their code does as it should is not checked."""
    found: dict[str, Attention] = {}
    for name, module in model.named_modules():
        for layout in LAYOUTS:
            layers = [_submodule(module, path) for path in layout]
            if all(isinstance(layer, (nn.Linear, Conv1D)) and weight_of(layer) is not None for layer in layers):
                paths = [f"{name}.{path}" if name else path for path in layout]
                if (attention := _attention(model, paths)) is not None:
                    found.setdefault(attention.name, attention)
                break
    return list(found.values())


def head_groups(
    model: nn.Module, prunable: Collection[str], shared: Collection[int], taken: Collection[str]
) -> tuple[list[FilterGroup], dict[str, str]]:
    """A group for the heads of each attention module, and why each other projection in one stays dense.

    Modules that share one position bias (all of a stack of T5) are one group: their heads go at equal indices. All
    projections are in `prunable`, and no id of theirs is in `shared`. `taken` are the weights of other groups.
    """
    groups: list[FilterGroup] = []
    dense: dict[str, str] = {}
    for attentions in _coupled(model, find_attentions(model)):
        inner = [rows.name for attention in attentions for rows in attention.projections]
        names = inner + [attention.output.name for attention in attentions]
        sizes = {attention.size for attention in attentions}
        if len(sizes) > 1:
            continue
        if tied := [name for name in names if id(model.get_parameter(name)) in shared]:
            reason = f"its attention heads stay, as {tied[0]} is tied, shared by several layers"
        elif kept := [name for name in names if name not in prunable]:
            reason = f"its attention heads stay, as {kept[0]} is not pruned"
        elif sizes == {1}:
            reason = "it has a single attention head, or a single one of keys and values"
        else:
            groups.append(_group(attentions, taken))
            continue
        dense |= {name: reason for name in inner if name in prunable}
    return groups, dense


def fit_heads(model: nn.Module, attention: Attention) -> None:
    """Tells the code of an attention module, described as it was before, of the heads that its layers have now.

    Position biases that have more columns become empty ones. Raises `ValueError` where layers do not go together.
    """
    module = model.get_submodule(attention.name)
    units, rest = divmod(_width(model, attention.output), attention.queries * attention.head_dim)
    rows = sum(_width(model, projection) for projection in attention.projections)
    if rest or not units or rows != units * (attention.queries + 2) * attention.head_dim:
        raise ValueError(
            f"{attention.name} has {rows} rows of queries, keys and values over an output projection of "
            f"{_width(model, attention.output)} columns, which are no whole heads of {attention.head_dim}."
        )
    heads = units * attention.queries
    numbers = dict.fromkeys(HEADS, heads) | dict.fromkeys(KEY_VALUE_HEADS, units)
    for name, number in (numbers | dict.fromkeys(UNITS, heads * attention.head_dim)).items():
        if name in vars(module):
            setattr(module, name, number)
    for table in attention.tables:
        owner, _, kind = table.name.rpartition(".")
        holder, parameter = model.get_submodule(owner), model.get_parameter(table.name)
        if parameter.shape[1] != heads:
            setattr(holder, kind, nn.Parameter(parameter.new_empty(len(parameter), heads), parameter.requires_grad))
        if isinstance(holder, nn.Embedding):
            holder.embedding_dim = heads


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module


def _width(model: nn.Module, rows: Rows) -> int:
    return model.get_parameter(rows.name).shape[rows.dim]


def _attention(model: nn.Module, names: list[str]) -> Attention | None:
    """That of the layers `names`; None where the numbers that the module gives are not those of its layers."""
    name, layers = names[0].rpartition(".")[0], [_Layer.of(model, layer) for layer in names]
    counted = _counts(vars(model.get_submodule(name)), layers)
    if counted is None:
        return None
    units, queries, head_dim = counted
    parts: dict[_Layer, list[Tensor]] = defaultdict(list)
    for layer, places in zip(layers, (queries * head_dim, head_dim, head_dim), strict=False):
        start = sum(index.numel() for index in parts[layer])
        parts[layer].append(start + torch.arange(units * places).view(units, places))
    if any(layer.rows != sum(index.numel() for index in found) for layer, found in parts.items()):
        return None
    whole = {layer: torch.cat(found, 1) for layer, found in parts.items()}
    value, output = layers[2], layers[3]
    return Attention(
        name,
        head_dim,
        queries,
        tuple(layer.weight_rows(index) for layer, index in whole.items()),
        tuple(rows for layer, index in whole.items() for rows in layer.bias_rows(index)),
        (value.weight_rows(parts[value][-1]), *value.bias_rows(parts[value][-1])),
        Rows(f"{output.name}.weight", 1 - output.dim, torch.arange(output.columns).view(units, -1)),
        tuple(_tables(model, name, units, units * queries)),
    )


def _counts(own: dict[str, Any], layers: list[_Layer]) -> tuple[int, int, int] | None:
    """Key-value heads, queries that read each, and units of a head, given an attention module's own attributes."""
    columns, rows = layers[3].columns, sum(layer.rows for layer in set(layers[:3]))
    dims = [own[key] for key in HEAD_DIM if own.get(key)]
    dims = dims or [columns // own[key] for key in HEADS if own.get(key)]
    if not dims or columns % dims[0] or not (heads := columns // dims[0]):
        return None
    units = (rows // dims[0] - heads) // 2  # what is left beside the queries is half keys, half values
    if units < 1 or heads % units:
        return None
    expected = dict.fromkeys(HEADS, heads) | dict.fromkeys(KEY_VALUE_HEADS, units) | dict.fromkeys(UNITS, columns)
    is_known = all(own.get(key, number) == number for key, number in expected.items())
    return (units, heads // units, dims[0]) if is_known else None


def _tables(model: nn.Module, name: str, units: int, heads: int) -> Iterator[Rows]:
    for key, parameter in model.get_submodule(name).named_parameters(prefix=name):
        if TABLES.search(key) and parameter.ndim == 2 and parameter.shape[1] == heads:
            yield Rows(key, 1, torch.arange(heads).view(units, -1))


def _coupled(model: nn.Module, attentions: list[Attention]) -> Iterator[list[Attention]]:
    """The attention modules, together where their heads cannot go at different indices.

    Of a stack of T5 the first module computes the position bias (zeros over an encoder's states) that all others add
    to their scores, head by head.
    """
    stacks: dict[str, list[Attention]] = defaultdict(list)
    for attention in attentions:
        stacks[re.sub(r"\d+", "*", attention.name)].append(attention)
    for stack in stacks.values():
        modules = [model.get_submodule(attention.name) for attention in stack]
        if all(getattr(module, "has_relative_attention_bias", True) for module in modules):
            yield from [[attention] for attention in stack]
        else:
            yield stack


def _group(attentions: list[Attention], taken: Collection[str]) -> FilterGroup:
    outputs = [attention.output for attention in attentions]
    weights = [rows for attention in attentions for rows in attention.projections]
    # Where the rows of an output projection are filters of another group, its columns are not counted a second time.
    weights += [rows for rows in outputs if rows.name not in taken]
    readers = [rows for rows in outputs if rows.name in taken]
    readers += [rows for attention in attentions for rows in attention.tables]
    biases = [rows for attention in attentions for rows in attention.biases]
    return FilterGroup(attentions[0].size, by_name(weights), by_name(biases), by_name(readers), tuple(attentions))
