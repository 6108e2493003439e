"""Weights at the addresses where torch itself would have put them, however the model was loaded."""

from itertools import chain

import torch
from torch import nn

ALIGNMENT = 64  # bytes, of torch's allocator on the CPU


@torch.no_grad()
def align_memory(model: nn.Module) -> None:
    """Copies weights and buffers that lie elsewhere, as those do that safetensors maps from a file.

    On some processors the address decides which kernel computes, and so the last bits of a result: a resumed run
    would differ from an uninterrupted one whose model was made in another way.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.detach().clone()
