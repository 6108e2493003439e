"""2:4 for sparse tensor cores: which layers can run on them, and their weights in torch's format for a GPU."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as CuSparseLt
from torch.sparse import SparseSemiStructuredTensorCUTLASS as Cutlass
from transformers.pytorch_utils import Conv1D

from ..pruning.layers import PRUNABLE_MODULES, check_layers, layer_infos, weight_of
from ..pruning.structured.surgery import frozen_copy
from ..pruning.structured.tracing import shared_weights
from ..reporting.markdown import table
from ..storage.model_formats import out_of_wrappers
from ..support import check_model
from .checks import check_inference

BACKENDS = {"cuSPARSELt": CuSparseLt, "CUTLASS": Cutlass}  # in the order in which they are taken
HALF = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)  # of the first GPUs with sparse tensor cores


@dataclass(frozen=True)
class SemiStructuredLayer:
    """Whether a layer can run on sparse tensor cores.

    `shape`: (outputs, inputs) of linear layers, that of the weight otherwise; `is_2_of_4`: whether at least two of
    every four consecutive inputs are zero (of convolutions: input channels, at each place of the kernel), which is all
    that TensorRT asks for. `backends`: those of torch that take this size and type; `can_run`: whether torch runs the
    layer sparse, and else `reasons` why not.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    is_2_of_4: bool
    backends: tuple[str, ...]
    can_run: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class SemiStructuredReport:
    """Every linear and convolution layer of a model, and `reasons` why this machine cannot run any of them sparse."""

    layers: list[SemiStructuredLayer]
    reasons: list[str]

    @property
    def can_run(self) -> list[str]:
        """The names of the layers that a GPU with sparse tensor cores can run."""
        return [layer.name for layer in self.layers if layer.can_run]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def markdown(self) -> str:
        """A count, and a table of the layers."""
        rows = [
            [
                layer.name,
                f"{layer.kind} {' x '.join(map(str, layer.shape))}",
                layer.dtype,
                "yes" if layer.is_2_of_4 else "no",
                "yes: " + " or ".join(layer.backends) if layer.can_run else "no",
                "; ".join(layer.reasons),
            ]
            for layer in self.layers
        ]
        here = f" Not on this machine: {'; '.join(self.reasons)}." if self.reasons else ""
        told = f"{len(self.can_run)} of {len(self.layers)} layers can run on sparse tensor cores.{here}"
        return f"{told}\n\n{table(['layer', 'weight', 'type', '2 of 4', 'sparse in torch', 'why not'], rows)}"

    __str__ = markdown


def check_semi_structured(model: nn.Module) -> SemiStructuredReport:
    """Which layers of `model` can run on sparse tensor cores, and why each other one cannot; nothing is changed.

    A layer can where two of every four consecutive inputs are zero (train with granularity="2:4"), its sizes are
    multiples of what one of torch's backends wants (16 x 16 for cuSPARSELt, 32 x 64 for CUTLASS), and its weight is in
    float16 or bfloat16. Sizes of other types are checked as those of float16. Needs no GPU.
    Raises `ValueError` for adapters (PEFT) and for weights that are not made yet or are masked by torch's pruning.

        print(hf_bimp.check_semi_structured(model.half()))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an nn.Module, not a {type(model).__name__}. Load the model first.")
    check_model(model)
    model = out_of_wrappers(model)
    check_layers(model)
    shared = shared_weights(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PRUNABLE_MODULES)}
    dims = {id(weight_of(layer)): info.input_dim for layer, info in _infos(model)}
    found = [_check_layer(name, layer, dims.get(id(weight_of(layer)), 1), shared) for name, layer in layers.items()]
    return SemiStructuredReport(found, _why_not_here())


def to_semi_structured(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference whose layers that can run on sparse tensor cores have their weights in 2:4.

    `model`: in evaluation mode, in float16 or bfloat16, on a CUDA GPU of compute capability 8.0 or more. It is left as
    it is, and the copy shares the memory of all that stays dense. Transformers' `Conv1D` become linear layers. What
    was checked is in the copy's `semi_structured_report`. Save the given model, not the copy.

    Raises `RuntimeError` without such a GPU, and `ValueError` for a model in training mode, on another device, with
    adapters, or without any layer that can run.

        fast = hf_bimp.to_semi_structured(model.half().cuda().eval())
    """
    check_inference("model", model, "converted")
    report = check_semi_structured(model)
    if report.reasons:
        raise RuntimeError(
            "2:4 needs a CUDA GPU with sparse tensor cores (compute capability 8.0 or more), but "
            f"{'; '.join(report.reasons)}. Call it on a machine that has one; hf_bimp.check_semi_structured tells "
            "anywhere which layers could run there."
        )
    model = out_of_wrappers(model)
    if not report.can_run:
        raise ValueError(f"{type(model).__name__} has no layer that can run on sparse tensor cores.\n\n{report}")
    elsewhere = [name for name, parameter in model.named_parameters() if not parameter.is_cuda]
    if elsewhere:
        raise ValueError(f"{elsewhere[0]} is not on a GPU. Call model.cuda() first.")
    fast = frozen_copy(model)
    for layer in report.layers:
        if layer.can_run:
            _convert(fast, layer)
    vars(fast)["semi_structured_report"] = report
    return fast


def _infos(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The layers that own their weight, with what is known of them."""
    infos = layer_infos(model)
    return [(model.get_submodule(name.rpartition(".")[0]), info) for name, info in infos.items()]


def _check_layer(name: str, layer: nn.Module, input_dim: int, shared: set[int]) -> SemiStructuredLayer:
    kind, weight = type(layer).__name__, weight_of(layer)
    if weight is None:
        return SemiStructuredLayer(
            name, kind, (), "", False, (), False, ("its weight is computed anew at each access",)
        )
    fits = is_2_of_4(weight, input_dim, _inputs(layer, weight, input_dim))
    shape = (weight.shape[1], weight.shape[0]) if isinstance(layer, Conv1D) else tuple(weight.shape)
    reasons = [] if fits else ["not two of every four consecutive inputs are zero"]
    backends: tuple[str, ...] = ()
    if type(layer) not in (nn.Linear, Conv1D):
        what = "for linear layers alone, and TensorRT takes convolutions" if isinstance(layer, _ConvNd) else ""
        reasons.append(f"torch has sparse kernels {what or 'only for plain linear layers'}")
    else:
        backends = _backends(shape, weight.dtype)
        if not backends:
            wanted = " or ".join(
                f"{rows} x {columns} ({name})" for name, (rows, columns) in _sizes(weight.dtype).items()
            )
            reasons.append(f"{shape[0]} x {shape[1]} are no multiples of {wanted}")
        if weight.dtype not in HALF:
            reasons.append(f"it is {_name(weight.dtype)}: call model.half() or model.bfloat16()")
    if id(weight) in shared:
        reasons.append("its weight is shared with another module, such as an embedding")
    return SemiStructuredLayer(name, kind, shape, _name(weight.dtype), fits, backends, not reasons, tuple(reasons))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inputs(layer: nn.Module, weight: Tensor, input_dim: int) -> int:
    """The inputs of one output: of transposed convolutions those of one group, which lie one after the other."""
    groups = layer.groups if isinstance(layer, _ConvNd) and input_dim == 0 else 1
    return weight.shape[input_dim] // groups


def is_2_of_4(weight: Tensor, input_dim: int, inputs: int) -> bool:
    """Whether in all blocks of four along `input_dim` at most two are not zero; False where blocks would not fit."""
    if not weight.numel() or inputs % 4:
        return False
    blocks = (weight.detach() != 0).movedim(input_dim, -1).reshape(-1, 4)
    return bool((blocks.sum(-1) <= 2).all())


def _sizes(dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """What the sizes of a weight (outputs, inputs) are multiples of, by backend."""
    known = dtype if dtype in HALF else torch.float16
    limits = {name: backend._DTYPE_SHAPE_CONSTRAINTS[known] for name, backend in BACKENDS.items()}
    return {name: (limit.sparse_min_rows, limit.sparse_min_cols) for name, limit in limits.items()}


def _backends(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, ...]:
    fits = {
        name: all(n and not n % of for n, of in zip(shape, sizes, strict=True))
        for name, sizes in _sizes(dtype).items()
    }
    return tuple(name for name, fit in fits.items() if fit)


def _why_not_here() -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no CUDA GPU"]
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        return [f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}"]
    return []


def _convert(model: nn.Module, checked: SemiStructuredLayer) -> None:
    layer: Any = model.get_submodule(checked.name)
    weight = layer.weight.detach()
    if isinstance(layer, Conv1D):
        linear = nn.Linear(layer.nx, layer.nf, device="meta")
        linear.bias, weight = layer.bias, weight.t()
        linear.train(layer.training)
        layer = linear
        model.set_submodule(checked.name, layer)
    backend = BACKENDS[checked.backends[0]]
    if not torch.backends.cusparselt.is_available() and "CUTLASS" in checked.backends:
        backend = Cutlass
    layer.weight = nn.Parameter(backend.from_dense(weight.contiguous()), requires_grad=False)
