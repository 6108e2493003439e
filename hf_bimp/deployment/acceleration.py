"""`hf_bimp.accelerate`: sparse layers by CSR where that measures faster, compared, measured as a whole and told."""

import dataclasses
import functools
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from accelerate.utils import has_compiled_regions
from torch import nn
from transformers.utils import logging

from ..pruning.layers import check_layers
from ..pruning.structured.surgery import frozen_copy, output_difference
from ..pruning.structured.tracing import Inputs, call
from ..reporting.deployment_table import acceleration_section
from ..reproducibility import preserved_random_state, untouched
from ..storage.model_formats import out_of_wrappers
from .checks import check_inference
from .csr import CsrLayer, turn_into_csr, turn_into_dense
from .csr_choice import AcceleratedLayer, choose, record_calls
from .inputs import read_example
from .latency import median_ratio, processor, take_turns

WORTH = 1.02  # times as fast as the dense model; less is lost in what machines vary by
SECONDS = 4.0  # of the whole model's measurement
TOLERANCE = 1e-5  # largest difference of outputs that count as equal, relative to the largest magnitude of each

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate` tried and measured, in one run.

    `layers`: every linear and convolution layer. `dense_ms`, `accelerated_ms`: median milliseconds of a forward pass
    of the given and of the returned model; `speedup`: the median of their ratios. `reason`: why all layers stay dense,
    "" where some do not. `max_difference`: of the outputs, relative to their largest magnitude. `extra_bytes`: what
    the CSR takes beside the dense weights. `example`: the shapes of the inputs.
    """

    layers: list[AcceleratedLayer]
    dense_ms: float
    accelerated_ms: float
    speedup: float
    reason: str
    max_difference: float
    extra_bytes: int
    example: dict[str, list[int]]
    threads: int
    processor: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def markdown(self) -> str:
        """The whole model's figures and a table of the layers."""
        return acceleration_section(self.to_dict())

    __str__ = markdown


def accelerate(model: nn.Module, example_inputs: Inputs, *, min_speedup: float = 1.1) -> nn.Module:
    """A copy of `model` for inference on this CPU, whose sparse layers compute by CSR where that measures faster.

    `model`: in evaluation mode, float32, on the CPU; it is left as it is. The copy shares its memory, so that both
    always have the same weights (but for changes through `.data`, which torch does not count: the CSR misses them),
    and takes more for the CSR alone (about a fifth of the dense weights at 90 % zeros).
    `example_inputs`: what its forward takes, as a tensor, a tuple or a dict of tensors (labels are dropped). Layers
        are chosen at their sizes; other sizes work too, and may gain less.
    `min_speedup`: how many times faster a layer has to be by CSR (1.1). Where the whole model is not at least 1.02
        times as fast as the dense one, all layers stay dense. With 0 CSR is taken for every layer with at least half
        of its weights zero, whatever is measured.

    Linear layers, Transformers' `Conv1D` and 1x1 convolutions are tried, each on the rows that it gets of the example.
    The copy's `acceleration_report` tells what was measured and chosen. Its state dict, and what `save_pretrained`
    writes, are those of the dense model. Its parameters take no gradients; where its inputs do, in training mode,
    under autocast, on other devices, and compiled or exported, it computes as the dense model does. torch without MKL
    leaves all dense.

    Raises `ValueError` for a model in training mode, with adapters, compiled, on another device or not in float32, and
    for inputs that it does not take; `RuntimeError` where outputs differ by more than 1e-5 of their magnitude.

        fast = hf_bimp.accelerate(model.eval(), batch)
        print(fast.acceleration_report)
    """
    _check(model, min_speedup)
    model = out_of_wrappers(model)
    example = read_example(model, example_inputs)
    values = {**example.constants, **example.tensors}
    inputs: Any = tuple(values[name] for name in example.order) if example.order else values
    with preserved_random_state(), untouched(model, written=()), torch.no_grad():
        layers = choose(model, record_calls(model, inputs), min_speedup)
        fast = _with_csr(model, layers)
        difference = _checked_difference(model, fast, inputs)
        layers, times = _measure(model, fast, inputs, layers, min_speedup)
    report = AccelerationReport(
        layers=layers,
        **times,
        max_difference=difference,
        extra_bytes=sum(m.csr_bytes for m in fast.modules() if isinstance(m, CsrLayer)),
        example={name: list(tensor.shape) for name, tensor in example.tensors.items()},
        threads=torch.get_num_threads(),
        processor=processor(),
    )
    vars(fast)["acceleration_report"] = report
    logger.info(f"{type(model).__name__} accelerated: {report.markdown()}")
    return fast


def _check(model: nn.Module, min_speedup: float) -> None:
    check_inference("model", model, "accelerated")
    if not isinstance(min_speedup, (int, float)) or not 0 <= min_speedup < float("inf"):
        raise ValueError(f"min_speedup={min_speedup!r} must be a number from 0 on, such as 1.1.")
    if has_compiled_regions(model) or any(m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError("model is compiled by torch.compile, which has fixed its kernels. Give it as it was before.")
    model = out_of_wrappers(model)
    if any(isinstance(module, CsrLayer) for module in model.modules()):
        raise ValueError("model is accelerated already. Give the model that it was made of.")
    parameters = dict(model.named_parameters())
    for name, tensor in {**parameters, **dict(model.named_buffers())}.items():
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} is on {tensor.device}, and accelerate is for CPUs. Call model.cpu() first; for GPUs see "
                "hf_bimp.check_semi_structured."
            )
        if name in parameters and tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype}, and MKL computes CSR in float32 (half precision gains nothing). Call "
                "model.float() first."
            )
    check_layers(model)


def _with_csr(model: nn.Module, layers: list[AcceleratedLayer]) -> nn.Module:
    """A copy over the memory of `model` with CSR for the layers that are chosen."""
    fast = frozen_copy(model)
    for layer in layers:
        if layer.chosen == "csr":
            turn_into_csr(fast.get_submodule(layer.name))
    return fast


def _checked_difference(model: nn.Module, fast: nn.Module, inputs: Inputs) -> float:
    difference = output_difference(model, fast, inputs)
    if not difference <= TOLERANCE:  # NaN is no agreement either
        raise RuntimeError(
            f"The accelerated {type(model).__name__} puts out something else than the dense one: outputs differ by "
            f"{difference:.1e} of their largest magnitude, where {TOLERANCE:.0e} is allowed. Sums of other orders "
            "alone differ by less: use the dense model, and check that its outputs are numbers and the same twice."
        )
    return difference


def _measure(
    model: nn.Module, fast: nn.Module, inputs: Inputs, layers: list[AcceleratedLayer], min_speedup: float
) -> tuple[list[AcceleratedLayer], dict[str, Any]]:
    """Both models in turns; where `fast` is not faster all its layers become dense."""
    chosen = [layer.name for layer in layers if layer.chosen == "csr"]
    calls = {"dense": functools.partial(call, model, inputs)}
    if chosen:
        calls["accelerated"] = functools.partial(call, fast, inputs)
    times = take_turns(calls, seconds=SECONDS)
    dense = median(times["dense"]) * 1e3
    if not chosen:
        if not torch.backends.mkl.is_available():
            reason = "this torch is built without MKL, which computes CSR: install one that has it"
        else:
            reason = "no layer is faster by CSR at these inputs' sizes"
        return layers, {"dense_ms": dense, "accelerated_ms": dense, "speedup": 1.0, "reason": reason}
    speedup = median_ratio(times["dense"], times["accelerated"])
    if speedup < min(WORTH, min_speedup):
        for name in chosen:
            turn_into_dense(fast.get_submodule(name))
        reason = f"with CSR in {len(chosen)} layers the whole model measured {speedup:.2f} times as fast"
        layers = [
            dataclasses.replace(layer, chosen="dense", reason=reason) if layer.name in chosen else layer
            for layer in layers
        ]
        return layers, {"dense_ms": dense, "accelerated_ms": dense, "speedup": 1.0, "reason": reason}
    accelerated = median(times["accelerated"]) * 1e3
    return layers, {"dense_ms": dense, "accelerated_ms": accelerated, "speedup": speedup, "reason": ""}
