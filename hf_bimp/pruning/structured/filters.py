"""What a group of filters is: where its channels lie in a model's parameters."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Rows:
    """Where the channels of a group lie in parameter `name`: channel c at `index[c]` along `dim`.

    For outputs `dim` is 0, but 1 for transposed convolutions and Transformers' `Conv1D`. `index` is int64, (size,), or
    (size, r) where a channel takes r places.
    """

    name: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Attention:
    """Where the heads of the attention module `name` lie.

    A channel is a key-value head of `head_dim` units, with the `queries` heads that read it (more than one in
    grouped-query attention). `projections` and `biases`: rows of the query, key and value layers; `values`: those of
    the value layer alone, with its bias; `output`: columns of the output projection; `tables`: columns of relative
    position biases, one a head.
    """

    name: str
    head_dim: int
    queries: int
    projections: tuple[Rows, ...]
    biases: tuple[Rows, ...]
    values: tuple[Rows, ...]
    output: Rows
    tables: tuple[Rows, ...] = ()

    @property
    def size(self) -> int:
        return len(self.output.index)


@dataclass(frozen=True)
class FilterGroup:
    """`size` output channels that several layers share, so that each can only be removed from all of them at once.

    `weights`: those of the linear and convolution layers that produce the channels. `attached`: their biases, and
    weight and bias of the batch norms on them. `readers`: weights of the layers that take the channels as inputs,
    whose columns go when the model shrinks.

    Where the channels are attention heads, `attentions` are the modules that they belong to, and `weights` has the
    columns of the output projections too: a head is all that it takes. Nothing of it reaches the outputs where either
    its value rows with their bias or its output columns are zero, whatever its scores are.
    """

    size: int
    weights: tuple[Rows, ...]
    attached: tuple[Rows, ...]
    readers: tuple[Rows, ...] = ()
    attentions: tuple[Attention, ...] = ()


def out_dim(layer: nn.Module) -> int:
    """The dimension of the weight that indexes outputs."""
    if isinstance(layer, _ConvNd):
        return int(layer.transposed and layer.groups == 1)
    return int(isinstance(layer, Conv1D))


def by_name(rows: Iterable[Rows]) -> tuple[Rows, ...]:
    return tuple(sorted(rows, key=lambda r: r.name))
