"""Layers that compute by compressed sparse rows (CSR): linear, Transformers' Conv1D and 1x1 convolutions."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

BLOCK = 32  # rows of a product: its dense operands stay in the processor's cache


def to_csr(matrix: Tensor) -> Tensor:
    """`matrix` (outputs, inputs) in CSR with int32 indices, which MKL takes as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls CSR beta
        csr = matrix.detach().to_sparse_csr()
        indices = csr.crow_indices().int(), csr.col_indices().int()
        return torch.sparse_csr_tensor(*indices, csr.values(), size=csr.shape, check_invariants=False)


def product(csr: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """csr @ columns + bias: (outputs, inputs) by (inputs, n) to (outputs, n)."""
    return csr @ columns if bias is None else torch.addmm(bias[:, None], csr, columns)


def linear(csr: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """What `F.linear` gives for `x` (..., inputs) and the dense matrix, contiguous; torch's own is slow with CSR."""
    rows, outputs = x.reshape(-1, x.shape[-1]), csr.shape[0]
    count = rows.shape[0]
    if count == 1:
        output = csr @ rows[0] if bias is None else torch.addmv(bias, csr, rows[0])
    elif count <= BLOCK:
        output = product(csr, rows.t(), bias).t().contiguous()
    else:
        output = x.new_empty(count, outputs)
        for i in range(0, count, BLOCK):
            output[i : i + BLOCK] = product(csr, rows[i : i + BLOCK].t(), bias).t()
    return output.view(*x.shape[:-1], outputs)


class CsrLayer(nn.Module):
    """What the layers below add to torch's: the CSR of their weight.

    `weight` stays the dense parameter, so that state dicts, files and ties are those of the dense layer. The CSR
    follows it: it is made anew when the weight has changed, and is neither copied nor pickled. In training, for other
    types than float32, under autocast, where gradients flow, compiled or exported the layer is the dense one.
    """

    weight: Tensor
    bias: Any  # Tensor | None
    _made: tuple[tuple[int, int], Tensor] | None = None  # of which version of the weight at which address

    def matrix(self) -> Tensor:
        """The weight as (outputs, inputs)."""
        return self.weight.flatten(1)

    def csr_for(self, x: Tensor) -> Tensor | None:
        """The weight in CSR, None where `x` takes the dense one."""
        fits = x.dtype == self.weight.dtype == torch.float32 and x.device == self.weight.device and x.numel() > 0
        if self.training or not fits or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return None
        version = 0 if self.weight.is_inference() else self.weight._version
        key = version, self.weight.data_ptr()
        if self._made is None or self._made[0] != key:
            self._made = key, to_csr(self.matrix())
        return self._made[1]

    @property
    def csr_bytes(self) -> int:
        """What the CSR takes, in bytes; 0 before it is needed."""
        if self._made is None:
            return 0
        csr = self._made[1]
        return sum(part.numel() * 4 for part in (csr.crow_indices(), csr.col_indices(), csr.values()))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_made"}


class CsrLinear(CsrLayer, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        csr = self.csr_for(input)
        return super().forward(input) if csr is None else linear(csr, input, self.bias)


class CsrConv1D(CsrLayer, Conv1D):
    def matrix(self) -> Tensor:
        return self.weight.t()

    def forward(self, x: Tensor) -> Tensor:
        csr = self.csr_for(x)
        return super().forward(x) if csr is None else linear(csr, x, self.bias)


class CsrPointwise(CsrLayer):
    """1x1 convolutions over (N, channels, ...)."""

    stride: tuple[int, ...]

    def forward(self, input: Tensor) -> Tensor:
        x, csr = input, self.csr_for(input) if input.ndim == len(self.stride) + 2 else None
        if csr is None:
            return super().forward(x)
        channels_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        if any(step > 1 for step in self.stride):
            steps = (slice(None, None, step) for step in self.stride)
            x = x[(slice(None), slice(None)) + tuple(steps)]
        if channels_last:  # and so is the output
            return linear(csr, x.movedim(1, -1), self.bias).movedim(-1, 1)
        columns = x.transpose(0, 1).reshape(x.shape[1], -1)
        output = product(csr, columns, self.bias).view(len(csr), len(x), *x.shape[2:])
        return output.transpose(0, 1).contiguous()


class CsrPointwise1d(CsrPointwise, nn.Conv1d): ...


class CsrPointwise2d(CsrPointwise, nn.Conv2d): ...


KINDS: dict[type[nn.Module], type[CsrLayer]] = {
    nn.Linear: CsrLinear,
    Conv1D: CsrConv1D,
    nn.Conv1d: CsrPointwise1d,
    nn.Conv2d: CsrPointwise2d,
}


def why_not_csr(layer: nn.Module) -> str | None:
    """Why a linear or convolution layer has no form in CSR here; None where it has one."""
    if type(layer) not in KINDS:
        return f"a {type(layer).__name__} may compute in a way of its own"
    if "weight" not in layer._parameters:
        return "its weight is computed anew at each access"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        if any(size != 1 for size in layer.kernel_size):
            return f"a {'x'.join(map(str, layer.kernel_size))} convolution: only 1x1 are matrices"
        if layer.groups > 1 or layer.padding == "valid" or any(layer.padding):
            return "a 1x1 convolution with groups or padding"
    if layer.weight.dtype != torch.float32:
        return f"its weight is {layer.weight.dtype}: only float32 is computed by CSR"
    return None


def turn_into_csr(layer: nn.Module) -> None:
    """Lets `layer`, for which `why_not_csr` is None, compute by CSR from now on; all else of it stays."""
    layer.__class__ = KINDS[type(layer)]


def turn_into_dense(layer: nn.Module) -> None:
    """Undoes `turn_into_csr`."""
    layer.__class__ = next(dense for dense, csr in KINDS.items() if csr is type(layer))  # type: ignore[assignment]
    vars(layer).pop("_made", None)
