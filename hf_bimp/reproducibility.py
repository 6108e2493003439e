"""The same bits again: random numbers that leave no trace, and weights at addresses of torch's own."""

import contextlib
import random
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch
from torch import nn

ALIGNMENT = 64  # bytes, of torch's allocator on the CPU


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
