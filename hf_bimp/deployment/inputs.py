"""What a model is called with, as named tensors: of an example, of data sets, and at other batch sizes and lengths."""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..pruning.structured.tracing import Inputs

LABELS = ("labels", "label", "label_ids")  # as Trainer has them
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Example:
    """The inputs of a model by name: `tensors`, and `constants` that stay as they are.

    `axes`: for each tensor the dimensions that may have any size, by the names of the sizes ("batch", "length").
    """

    tensors: Tensors
    constants: dict[str, Any]
    order: tuple[str, ...]  # of positional arguments; empty where all are given by name
    axes: dict[str, dict[int, str]]

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: self.tensors[name].shape[d] for name, own in self.axes.items() for d, axis in own.items()}

    def resized(self, **sizes: int) -> Tensors:
        """The tensors with other `sizes` by the names of axes; rows that come in addition differ from the others."""
        result = {}
        for name, tensor in self.tensors.items():
            for dim, axis in self.axes[name].items():
                old, new = tensor.shape[dim], sizes.get(axis, tensor.shape[dim])
                tensor = tensor.index_select(dim, torch.arange(new) % old)
                if axis == "batch" and tensor.ndim > 1 and not _is_mask(tensor):
                    tensor = torch.stack([row.roll(i // old, -1) for i, row in enumerate(tensor)])
            result[name] = tensor
        return result

    def without_axes(self, names: Iterable[str]) -> "Example":
        """The same with the axes of these `names` fixed to the sizes that they have."""
        gone = set(names)
        axes = {name: {dim: axis for dim, axis in own.items() if axis not in gone} for name, own in self.axes.items()}
        return Example(self.tensors, self.constants, self.order, axes)


def _is_mask(tensor: Tensor) -> bool:
    """Of zeros and ones: moved around they might leave a row with nothing to attend to."""
    return tensor.ndim == 2 and bool(((tensor == 0) | (tensor == 1)).all())


def read_example(model: nn.Module, inputs: Inputs) -> Example:
    """The example inputs by name, without labels, on the CPU. Raises `ValueError` where they are no such inputs."""
    order: tuple[str, ...] = ()
    if isinstance(inputs, Mapping):
        given = without_labels(model, dict(inputs))
    else:
        values = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        order = tuple(_positional(model, len(values)))
        given = dict(zip(order, values, strict=True))
    tensors = {name: as_cpu(value) for name, value in given.items() if torch.is_tensor(value)}
    constants = {name: value for name, value in given.items() if name not in tensors}
    odd = [name for name, value in constants.items() if not isinstance(value, (bool, int, float, str, type(None)))]
    if odd or not any(tensor.ndim and tensor.numel() for tensor in tensors.values()):
        what = f"{odd[0]} is a {type(constants[odd[0]]).__name__}" if odd else "there is no tensor with a row in them"
        raise ValueError(
            f"example_inputs must be a tensor, a tuple or a dict of tensors (and numbers), but {what}. Give a batch, "
            "such as next(iter(dataloader))."
        )
    return Example(tensors, constants, order, _axes(tensors))


def as_cpu(tensor: Tensor) -> Tensor:
    """On the CPU, floating point as float32."""
    return tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.detach().cpu()


def without_labels(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs without labels; of encoder-decoders what the decoder makes of them is left in their place."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    labels = inputs.get("labels")
    if make is not None and labels is not None and "decoder_input_ids" not in inputs:
        labels = torch.as_tensor(labels)
        shifted = make(labels.reshape(-1, labels.shape[-1])).reshape(labels.shape)
        inputs = inputs | {"decoder_input_ids": shifted}
    return {name: value for name, value in inputs.items() if name not in LABELS}


def _positional(model: nn.Module, count: int) -> list[str]:
    """The names of the first `count` arguments of the forward, made up where it has none."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in inspect.signature(model.forward).parameters.items() if p.kind in kinds]
    return [*names, *(f"input_{i}" for i in range(len(names), count))][:count]


def _axes(tensors: Tensors) -> dict[str, dict[int, str]]:
    """The batch, and the lengths of tokens: the second dimension of whole numbers, with the masks that go with it."""
    batch = next(len(tensor) for tensor in tensors.values() if tensor.ndim)
    lengths: dict[tuple[bool, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and not tensor.is_floating_point():
            key = name.startswith("decoder_"), tensor.shape[1]
            place = sum(is_decoder == key[0] for is_decoder, _ in lengths) + 1
            stem = "decoder_length" if key[0] else "length"
            lengths.setdefault(key, stem if place == 1 else f"{stem}_{place}")
    axes: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        axes[name] = {0: "batch"} if tensor.ndim and len(tensor) == batch else {}
        key = name.startswith("decoder_"), tensor.shape[1] if tensor.ndim == 2 else -1
        if key in lengths:
            axes[name][1] = lengths[key]
    return axes


class Batches:
    """Iterates over data of any form as batches of a model's inputs, each with its labels (None without any).

    `data`: a data set, a DataLoader or any other iterable of dicts, tuples or tensors, a batch or a single item each:
    an item that lacks the example's batch dimension becomes a batch of one.
    """

    def __init__(self, data: Iterable, name: str, model: nn.Module, example: Example):
        if isinstance(data, (Mapping, str)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise ValueError(
                f"{name} must be a data set, a DataLoader or another iterable of inputs, not a {type(data).__name__}. "
                "A single batch goes into a list: [batch]."
            )
        self.data, self.name, self.model, self.example = data, name, model, example

    def __iter__(self) -> Iterator[tuple[Tensors, Any]]:
        return map(self._read, _iterate(self.data))

    def __len__(self) -> int:
        return len(self.data) if isinstance(self.data, Sized) else 0

    def spread(self, rows: int) -> list[Tensors]:
        """Inputs of about that many rows: evenly from a data set of single items, else the first batches."""
        data: Any = self.data
        first = next(_iterate(data), None) if isinstance(data, Sized) and hasattr(data, "__getitem__") else None
        if first is not None and len(data) > rows and self._is_item(first):
            return [self._read(data[i * len(data) // rows])[0] for i in range(rows)]
        found: list[Tensors] = []
        count = 0
        for inputs, _ in self:
            found.append(inputs)
            count += next(len(inputs[name]) for name, tensor in self.example.tensors.items() if tensor.ndim)
            if count >= rows:
                break
        return found

    def _is_item(self, item: Any) -> bool:
        inputs, _ = self._named(item)
        name, example = next(iter(self.example.tensors.items()))
        return name in inputs and np.ndim(inputs[name]) == example.ndim - 1

    def _named(self, item: Any) -> tuple[dict[str, Any], Any]:
        names = list(self.example.tensors)
        if isinstance(item, Mapping):
            labels = next((item[name] for name in LABELS if item.get(name) is not None), None)
            inputs = without_labels(self.model, dict(item))
            others = [name for name in inputs if name not in self.example.constants]
            if len(names) == 1 and names[0] not in inputs and len(others) == 1:
                inputs = {names[0]: inputs[others[0]]}  # as BIMPTrainer has it: the only column is the only input
            return inputs, labels
        values = item if isinstance(item, (tuple, list)) else (item,)
        inputs = dict(zip(names, values, strict=False))
        return inputs, values[len(names)] if len(values) > len(names) else None

    def _read(self, item: Any) -> tuple[Tensors, Any]:
        inputs, labels = self._named(item)
        if missing := [name for name in self.example.tensors if name not in inputs]:
            held = ", ".join(map(str, inputs)) or "nothing"
            raise ValueError(
                f"{self.name} holds items with {held}, but the model is exported with the inputs "
                f"{', '.join(self.example.tensors)}: {missing[0]} is missing. Give items with these names, or in this "
                "order."
            )
        alone = self._is_item(item)
        tensors = {name: self._tensor(name, inputs[name], alone) for name in self.example.tensors}
        if labels is not None:
            labels = torch.as_tensor(labels).cpu().numpy()
            labels = labels[None] if alone else labels
        return tensors, labels

    def _tensor(self, name: str, value: Any, alone: bool) -> Tensor:
        example, axes = self.example.tensors[name], self.example.axes[name]
        try:
            tensor = as_cpu(torch.as_tensor(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.name}: {name} is a {type(value).__name__}, which is no tensor ({error}). Transform or "
                "tokenize the data first."
            ) from error
        tensor = tensor.to(example.dtype)
        tensor = tensor[None] if alone else tensor
        fits = tensor.ndim == example.ndim and all(
            d in axes or tensor.shape[d] == example.shape[d] for d in range(example.ndim)
        )
        if not fits:
            raise ValueError(
                f"{self.name}: {name} has the shape {tuple(tensor.shape)}, and the exported model takes "
                f"({', '.join(str(axes.get(d, size)) for d, size in enumerate(example.shape))})."
            )
        return tensor


def _iterate(data: Any) -> Iterator[Any]:
    """Data sets of PyTorch that have no `__iter__` end with their length, not with an `IndexError`."""
    if hasattr(data, "__iter__"):
        return iter(data)
    return (data[i] for i in (range(len(data)) if isinstance(data, Sized) else itertools.count()))
