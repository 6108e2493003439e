"""Which layers of a model compute faster by CSR: what each is called with, and both ways measured in turns."""

import copy
import functools
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from ..pruning.layers import PRUNABLE_MODULES, weight_of
from ..pruning.structured.tracing import Inputs, call
from .csr import turn_into_csr, why_not_csr
from .latency import median_ratio, take_turns

WORTH_TRYING = 0.5  # share of zeros below which CSR is larger than the dense matrix
ROUNDS, SECONDS = (5, 30), 0.06  # of one layer

Calls = Counter[tuple[tuple[int, ...], tuple[int, ...]]]  # shapes of inputs, and how they lie in memory


@dataclass(frozen=True)
class AcceleratedLayer:
    """What was tried of a layer: the milliseconds of its calls in one forward pass, None where it was not measured.

    `shape`: that of its weight; `sparsity`: the share of zeros; `rows`: how many rows (tokens, pixels) each of its
    calls has; `chosen`: "csr" or "dense".
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    rows: tuple[int, ...]
    dense_ms: float | None
    csr_ms: float | None
    chosen: str
    reason: str


def record_calls(model: nn.Module, inputs: Inputs) -> dict[str, Calls]:
    """What each linear and convolution layer is called with in one forward pass, by its name.

    Raises `ValueError` where the model does not take the inputs.
    """
    calls: dict[str, Calls] = {name: Counter() for name, m in model.named_modules() if isinstance(m, PRUNABLE_MODULES)}

    def watch(name: str) -> Any:
        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x: Tensor = (*args, *kwargs.values())[0]
            calls[name][tuple(x.shape), x.dim_order()] += 1

        return model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)

    handles = [watch(name) for name in calls]
    try:
        call(model, inputs)
    except Exception as error:  # any model's code
        raise ValueError(
            f"{type(model).__name__} does not take the example_inputs: {type(error).__name__}: {error}. Give what its "
            "forward takes, as a tensor, a tuple or a dict."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls


def choose(model: nn.Module, calls: dict[str, Calls], min_speedup: float) -> list[AcceleratedLayer]:
    """Every layer of `calls`, tried by itself: CSR is chosen where it is `min_speedup` times as fast."""
    return [
        _try(name, model.get_submodule(name), own, min_speedup)
        for name, own in tqdm(calls.items(), unit="layer", desc="acceleration", leave=False)
    ]


def _try(name: str, layer: nn.Module, calls: Calls, min_speedup: float) -> AcceleratedLayer:
    weight = weight_of(layer)
    shape: tuple[int, ...] = ()
    sparsity = 0.0
    if weight is not None and weight.numel():
        shape, sparsity = tuple(weight.shape), 1 - int(weight.count_nonzero()) / weight.numel()
    rows = tuple(_rows(layer, shape) for shape, _ in calls.elements())
    reason = why_not_csr(layer) or _why_not_tried(sparsity, calls)
    if reason is not None:
        return AcceleratedLayer(name, shape, sparsity, rows, None, None, "dense", reason)
    times = _measure(layer, calls)
    speedup = median_ratio(times["dense"], times["csr"])
    dense_ms, csr_ms = median(times["dense"]) * 1e3, median(times["csr"]) * 1e3
    wins = speedup >= min_speedup
    reason = f"CSR measured {speedup:.2f} times as fast" + ("" if wins else f", where {min_speedup:g} is asked for")
    return AcceleratedLayer(name, shape, sparsity, rows, dense_ms, csr_ms, "csr" if wins else "dense", reason)


def _rows(layer: nn.Module, shape: tuple[int, ...]) -> int:
    """How many vectors of inputs a tensor of this shape holds."""
    features = shape[-1] if isinstance(layer, (nn.Linear, Conv1D)) else shape[1] if len(shape) > 1 else 1
    return torch.Size(shape).numel() // max(features, 1)


def _why_not_tried(sparsity: float, calls: Calls) -> str | None:
    if not torch.backends.mkl.is_available():
        return "this torch is built without MKL"
    if sparsity < WORTH_TRYING:
        return f"{sparsity:.0%} of its weights are zero: in CSR it would be larger"
    if not any(torch.Size(shape).numel() for shape, _ in calls):
        return "a forward pass on the example inputs does not call it"
    return None


def _measure(layer: nn.Module, calls: Calls) -> dict[str, list[float]]:
    """Seconds of all calls of one forward pass, dense and by CSR in turns."""
    by_csr = copy.copy(layer)  # over the same tensors
    turn_into_csr(by_csr)
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for shape, order in calls.elements():
        places = [order.index(dim) for dim in range(len(order))]
        inputs.append(torch.randn([shape[dim] for dim in order], generator=generator).permute(places))

    def run(module: nn.Module) -> None:
        for x in inputs:
            module(x)

    runs = {"dense": functools.partial(run, layer), "csr": functools.partial(run, by_csr)}
    return take_turns(runs, ROUNDS, SECONDS, disable_bar=True)
