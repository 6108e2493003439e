"""What the zeros of a model save on this machine: its size compressed, and its speed as it measures."""

import functools
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..pruning.structured.shrink import shrink
from ..pruning.structured.surgery import frozen_copy
from ..pruning.structured.tracing import Inputs, call
from ..reproducibility import preserved_random_state
from ..storage.model_formats import savable_state
from .acceleration import AccelerationReport, accelerate
from .compact import LEVEL, can_be_compact, encode, level_here
from .compressed_files import STORED
from .inputs import read_example
from .latency import median_ratio, processor, take_turns

MOST_WEIGHTS = 300_000_000
SECONDS = 2.0  # of the measurement of a shrunk model


@dataclass(frozen=True)
class Size:
    """Bytes of the weights as they are and as `compress` stores them, with `compression` ("zstd") or without (None).

    `is_shrunk`: the latter of the shrunk model.
    """

    dense_bytes: int
    compressed_bytes: int
    compression: str | None
    is_shrunk: bool


@dataclass(frozen=True)
class Speed:
    """How many times faster a forward pass is by `means` ("accelerate" or "shrink"); None where it was not measured.

    `reason`: why there is no speedup, or none was measured. `example`: shapes of the inputs.
    """

    means: str
    speedup: float | None
    dense_ms: float | None
    sparse_ms: float | None
    reason: str
    example: dict[str, list[int]]
    processor: str
    threads: int


@dataclass(frozen=True)
class Savings:
    """What `measure_savings` found: sizes, which are always the same, and speeds, which a clock decides."""

    size: Size
    speed: Speed

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """For JSON."""
        return asdict(self)


def measure_savings(model: nn.Module, example_inputs: Inputs | None, whole_filters: bool = False) -> Savings:
    """Measures what the zeros of `model` save on this CPU; that takes a few seconds.

    The model is left as it is, in whatever mode. `example_inputs`: what its forward takes; None where that is not
    known, and only the size is measured. `whole_filters`: whether filters are wholly zero, so that the model is
    shrunk; else it is accelerated. What these refuse is the `reason`.
    """
    model = frozen_copy(model).eval()
    means, reason, small, times = ("shrink" if whole_filters else "accelerate"), "", model, {}
    example: dict[str, list[int]] = {}
    try:
        if example_inputs is None:
            raise ValueError("the model does not take the first training items as they are.")
        read = read_example(model, example_inputs)
        example = {name: list(tensor.shape) for name, tensor in read.tensors.items()}
        if whole_filters:
            small = shrink(model, example_inputs)
            times = _shrunk_times(model, small, example_inputs)
        else:
            times, reason = _accelerated_times(model, example_inputs)
    except (ValueError, RuntimeError) as error:  # what shrink and accelerate refuse, and say why
        reason = str(error)
    return Savings(
        Size(
            dense_bytes=sum(tensor.nbytes for tensor in _tensors(model)),
            compressed_bytes=compressed_bytes(small),
            compression=None if level_here(LEVEL) is None else "zstd",
            is_shrunk=small is not model,
        ),
        Speed(
            means=means,
            **({"speedup": None, "dense_ms": None, "sparse_ms": None} | times),
            reason=reason,
            example=example,
            processor=processor(),
            threads=torch.get_num_threads(),
        ),
    )


def _accelerated_times(model: nn.Module, inputs: Inputs) -> tuple[dict[str, float], str]:
    report: AccelerationReport = vars(accelerate(model, inputs))["acceleration_report"]
    times = {"speedup": report.speedup, "dense_ms": report.dense_ms, "sparse_ms": report.accelerated_ms}
    return times, report.reason


def _shrunk_times(model: nn.Module, small: nn.Module, inputs: Inputs) -> dict[str, float]:
    calls = {
        "dense": functools.partial(call, model, inputs),
        "shrunk": functools.partial(call, small.eval(), inputs),
    }
    with preserved_random_state(), torch.inference_mode():
        times = take_turns(calls, seconds=SECONDS)
    return {
        "speedup": median_ratio(times["dense"], times["shrunk"]),
        "dense_ms": median(times["dense"]) * 1e3,
        "sparse_ms": median(times["shrunk"]) * 1e3,
    }


def compressed_bytes(model: nn.Module) -> int:
    """The bytes that the weights of `model` take as `compress` stores them; nothing is written."""
    level, total = level_here(LEVEL), 0
    for tensor in logging.tqdm(_tensors(model), desc="Size compressed", leave=False):
        is_float = can_be_compact(STORED.get(tensor.dtype, ""), tensor.shape)
        compact = encode(tensor, level) if is_float else None
        total += tensor.nbytes if compact is None else len(compact)
    return total


def _tensors(model: nn.Module) -> list[Tensor]:
    """Those of the state dict, on the CPU, tied ones once."""
    found = {(t.data_ptr(), t.shape, t.stride()): t for t in savable_state(model).values() if torch.is_tensor(t)}
    return [tensor.detach().cpu() for tensor in found.values()]
