"""The same bits again: what is computed without leaving a trace, and weights at addresses of torch's own."""

import contextlib
import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Container, Iterator
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
        is_plain = tensor.device.type == "cpu" and tensor.layout == torch.strided
        if is_plain and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.detach().clone()


@contextlib.contextmanager
def untouched(model: nn.Module, written: Container[str] | None = None) -> Iterator["Watch"]:
    """Forward passes inside leave `model` as it was: modes, parameters, buffers, attributes of its modules.

    Every operation is watched, and what it writes to is copied just before, so that nothing but that costs memory.
    Watching takes time. Where the names of the parameters that forward passes write to are given as `written`, these
    and the buffers are copied beforehand instead.
    """
    attributes: list[tuple[Any, dict]] = [(vars(module), dict(vars(module))) for module in model.modules()]
    held = [value for _, before in attributes for value in before.values() if torch.is_tensor(value)]
    buffers = [*model.buffers(), *held]
    tensors = [(tensor, tensor.detach()) for tensor in chain(model.parameters(), buffers)]
    containers = [(value, copy.copy(value)) for _, before in attributes for value in _containers(before)]
    modes = [(module, module.training) for module in model.modules()]  # scripted ones have no such attribute in vars
    watch = Watch(tensors)
    if written is not None:
        changing = [*buffers, *(parameter for name, parameter in model.named_parameters() if name in written)]
        watch.copies = [(tensor.detach(), tensor.detach().clone()) for tensor in changing]
    try:
        with contextlib.nullcontext() if written is not None else watch:
            yield watch
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


def _containers(value: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """The lists, dicts, sets and deques in a dict of attributes, nested ones too, each once."""
    seen = set() if seen is None else seen
    for item in list(value.values()) if isinstance(value, dict) else list(value):
        if type(item) in _CONTAINERS and id(item) not in seen:
            seen.add(id(item))
            yield item
            yield from _containers(item, seen)


def _memory(tensor: Tensor) -> int:
    """Where its storage lies, which views share; 0 where it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


class Watch(TorchDispatchMode):
    """Notes which tensors operations use and write to, by id, and copies each before one writes to it."""

    def __init__(self, tensors: list[tuple[Tensor, Tensor]]):
        """`tensors`: each with a view of it, whose copy is kept."""
        super().__init__()
        self.used: set[int] = set()
        self.written: set[int] = set()
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
                    self.written.update(id(tensor) for tensor, _ in self.watched.get(memory, ()))
                    self.copies += [(alias, alias.clone()) for _, alias in self.watched.get(memory, ())]
        return func(*args, **kwargs)
