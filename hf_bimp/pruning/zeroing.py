"""Zeroing masked elements in place, at the speed of the memory."""

import torch
from torch import Tensor

from .ranking import CHUNK

_BITS = {4: torch.int32, 2: torch.int16}  # of a float of so many bytes


def zero_masked(tensor: Tensor, mask: Tensor) -> None:
    """Sets `tensor` to 0 where the boolean `mask` of its shape is True; NaNs and infinities go too.

    On the CPU torch's masked_fill_ takes three times as long as this: ands of the floats' bits with all ones or none.
    """
    bits = _BITS.get(tensor.element_size())
    is_plain = tensor.device.type == "cpu" and tensor.is_floating_point() and type(tensor.data) is Tensor
    if bits is None or not (is_plain and tensor.is_contiguous() and mask.is_contiguous()):
        tensor.masked_fill_(mask, 0)
        return
    kept = torch.empty(min(CHUNK, tensor.numel()), dtype=bits)
    floats, marks = tensor.detach().view(-1).view(bits), mask.view(-1).view(torch.uint8)
    for chunk, chunk_marks in zip(floats.split(CHUNK), marks.split(CHUNK), strict=True):
        ones = kept[: len(chunk)]
        ones.copy_(chunk_marks)
        chunk.bitwise_and_(ones.sub_(1))  # 0 - 1 is all ones, 1 - 1 none
