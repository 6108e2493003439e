"""The same bits again: what is computed without leaving a trace, and weights at addresses of torch's own."""

import contextlib
import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALIGNMENT = 64  # bytes, of torch's allocator on the CPU
_CONTAINERS = (list, dict, OrderedDict, set, deque)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside leaves Python's, NumPy's and torch's random numbers as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@torch.no_grad()
def align_memory(model: nn.Module) -> None:
    """Copies weights and buffers that lie elsewhere, as those do that safetensors maps from a file.

    On some processors the address decides which kernel computes, and so the last bits of a result: a resumed run
    would differ from an uninterrupted one whose model was made in another way.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.detach().clone()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[set[int]]:
    """Forward passes inside leave `model` as it was: modes, parameters, buffers, attributes of its modules.

    Gives the ids of the parameters and buffers that operations have used so far. What is written to is copied just
    before, so that nothing but that costs memory.
    """
    tensors = [(tensor, tensor.detach()) for tensor in chain(model.parameters(), model.buffers())]
    attributes: list[tuple[Any, dict]] = [(vars(module), dict(vars(module))) for module in model.modules()]
    values = [value for _, before in attributes for value in before.values() if type(value) in _CONTAINERS]
    containers = [(value, copy.copy(value)) for value in values]
    modes = [(module, module.training) for module in model.modules()]  # scripted ones have no such attribute in vars
    watch = _Watch(tensors)
    try:
        with watch:
            yield watch.used
    finally:
        for container, before in containers:
            container.clear()
            (container.update if hasattr(container, "update") else container.extend)(before)
        for live, before in attributes:
            live.clear()
            live.update(before)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for tensor, alias in tensors:
                if _memory(tensor) != _memory(alias):
                    tensor.data = alias
            for alias, before in watch.copies:
                alias.copy_(before)


def _memory(tensor: Tensor) -> int:
    """Where its storage lies, which views share; 0 where it has none."""
    return tensor.untyped_storage().data_ptr()


class _Watch(TorchDispatchMode):
    """Notes which tensors operations use, by id, and copies each before one writes to it."""

    def __init__(self, tensors: list[tuple[Tensor, Tensor]]):
        """`tensors`: each with a view of it, whose copy is kept."""
        super().__init__()
        self.used: set[int] = set()
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.watched: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.copied: set[int] = set()
        for tensor, alias in tensors:
            if memory := _memory(tensor):
                self.watched[memory].append((tensor, alias))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        for i, argument in enumerate(func._schema.arguments):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            for value in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                memory = _memory(value) if torch.is_tensor(value) else 0
                self.used.update(id(tensor) for tensor, _ in self.watched.get(memory, ()))
                if is_written and memory not in self.copied:
                    self.copied.add(memory)
                    self.copies += [(alias, alias.clone()) for _, alias in self.watched.get(memory, ())]
        return func(*args, **kwargs)
