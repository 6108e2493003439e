"""ONNX from torch: a dynamic batch and lengths where the model allows them, and outputs that are compared."""

import contextlib
import logging as python_logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..pruning.structured.surgery import cpu_copy
from ..reproducibility import preserved_random_state
from ..storage.model_formats import out_of_wrappers
from .inputs import Example, Tensors

TOLERANCE = 1e-4  # largest difference of outputs that count as equal, relative to the largest magnitude of each
TALKATIVE = ("torch.onnx", "torch.export", "torch._export", "torch.fx", "onnxscript", "onnx_ir", "nncf", "torch.utils")

logger = logging.get_logger(__name__)

Run = Callable[[Tensors], list[Tensor]]


class TensorsOnly(nn.Module):
    """A model's copy for exporters, on the CPU and in float32: tensors go in by their order, tensors alone come out.

    Caches are turned off, and `attn_implementation`s that are not torch's own become eager; the given model is left
    as it is.
    """

    def __init__(self, model: nn.Module, example: Example):
        super().__init__()
        self.model, self.example = cpu_copy(out_of_wrappers(model)), example
        if isinstance(self.model, PreTrainedModel):
            if self.model.config._attn_implementation not in ("sdpa", "eager", None):
                self.model.set_attn_implementation("eager")
            for part in self.model.modules():
                if isinstance(part, PreTrainedModel) and hasattr(part.config, "use_cache"):
                    part.config.use_cache = False
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(dict(zip(self.example.tensors, tensors, strict=True))).values())

    def named(self, tensors: Tensors) -> Tensors:
        """The output tensors by name."""
        values = {**self.example.constants, **tensors}
        order = self.example.order
        outputs = self.model(*(values[name] for name in order)) if order else self.model(**values)
        return dict(_named(outputs, ""))

    @torch.no_grad()
    def run(self, tensors: Tensors) -> list[Tensor]:
        return list(self.named(tensors).values())


def _named(outputs: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors in outputs of any form, by keys and places: logits, hidden_states_0, output."""
    if torch.is_tensor(outputs):
        yield name or "output", outputs
    elif isinstance(outputs, Mapping):
        for key, value in outputs.items():
            yield from _named(value, f"{name}_{key}" if name else str(key))
    elif isinstance(outputs, (tuple, list)):
        for i, value in enumerate(outputs):
            yield from _named(value, f"{name or 'output'}_{i}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell of every step: only errors are heard inside, and what is drawn leaves no trace."""
    loggers = [python_logging.getLogger(name) for name in TALKATIVE]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(python_logging.ERROR)
    try:
        with warnings.catch_warnings(), preserved_random_state():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            if each.level == python_logging.ERROR:  # else a library that was imported inside has set its own
                each.setLevel(level)


def free_axes(model: TensorsOnly, example: Example) -> tuple[Example, dict[str, str]]:
    """The example with the axes along which torch itself takes another size, and why each other one is fixed.

    Raises `ValueError` where the model does not take the example.
    """
    try:
        model.run(example.tensors)
    except Exception as error:  # any model's code
        raise ValueError(
            f"{type(model.model).__name__} does not take the example_inputs "
            f"({', '.join(f'{name} {tuple(t.shape)}' for name, t in example.tensors.items())}): "
            f"{type(error).__name__}: {error}. Give what its forward takes, as a tensor, a tuple or a dict."
        ) from error
    fixed = {}
    for axis, size in other_sizes(example).items():
        try:
            model.run(example.resized(**{axis: size}))
        except Exception as error:  # any model's code
            fixed[axis] = f"the model takes no other: {first_cause(error)}"
    return example.without_axes(fixed), fixed


def other_sizes(example: Example) -> dict[str, int]:
    """Sizes other than the exporter's to try: three rows, and lengths a little shorter, which every model takes."""
    sizes = {axis: size - 1 if size > 2 else size + 1 for axis, size in example.sizes.items()}
    return sizes | ({"batch": 3} if "batch" in sizes else {})


def export_onnx(model: TensorsOnly, example: Example, path: Path) -> tuple[Example, dict[str, str]]:
    """Writes `model` to `path`; the example with the axes that are dynamic in the file, and why each other one is not.

    Where the exporter fails, lengths are fixed first, then the batch. Raises `RuntimeError` where it fails with all.
    """
    lengths = [axis for axis in example.sizes if axis != "batch"]
    fixed: dict[str, str] = {}
    reason, failed = "", Exception()
    for axes in [[], *([lengths] if lengths else []), *([["batch"]] if "batch" in example.sizes else [])]:
        example = example.without_axes(axes)
        fixed |= dict.fromkeys(axes, f"torch.onnx.export fails with a dynamic one: {reason}")
        try:
            _export(model, example, path)
            return example, fixed
        except Exception as error:  # of the exporter, or any model's code
            reason, failed = first_cause(error), error
    raise RuntimeError(
        f"torch.onnx.export cannot export {type(model.model).__name__}: {reason} Change the model's code so that its "
        "path does not depend on the values of its inputs."
    ) from failed


def _export(model: TensorsOnly, example: Example, path: Path) -> None:
    tensors = example.resized(**{axis: 2 if axis == "batch" else max(size, 2) for axis, size in example.sizes.items()})
    model.example = example
    with quiet(), _unprinted(), torch.no_grad():  # with gradients T5's attention is traced to a view that does not fit
        names = list(model.named(tensors))
        program = torch.onnx.export(
            model,
            tuple(tensors.values()),
            dynamo=True,
            dynamic_shapes=(tuple(example.axes[name] for name in tensors),),
            input_names=list(tensors),
            output_names=names,
            verbose=False,
        )
        if program is None:
            raise RuntimeError("torch.onnx.export returned nothing.")
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with the paths of this machine
        program.save(path)


@contextlib.contextmanager
def _unprinted() -> Iterator[None]:
    """torch prints whole graphs before it raises what is wrong with them."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def of_library(name: str, where: str = "") -> Iterator[None]:
    """Raises `RuntimeError` that says which library could not work with the exported model."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{name} cannot work with the exported model{where}: {first_cause(error)}") from error


def first_cause(error: BaseException) -> str:
    """The error that the others came from, cut short: exporters wrap errors into pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(line.strip() for line in str(error).splitlines() if not line.startswith("Exception from"))
    return f"{type(error).__name__}: {text.strip():.300}"


@torch.no_grad()
def difference(expected: list[Tensor], outputs: list[Tensor]) -> float:
    """The largest difference relative to the largest magnitude of each output; infinite where shapes differ or NaN."""
    largest = 0.0
    for want, have in zip(expected, outputs, strict=True):
        if want.shape != have.shape:
            return float("inf")
        want, have = want.double(), have.double()
        scale = want.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if want.numel() else torch.tensor(1.0)
        distance = ((want - have).abs().max() / scale).item() if want.numel() else 0.0
        largest = max(largest, distance if distance == distance else float("inf"))
    return largest


def _without_padding(outputs: list[Tensor], tensors: Tensors) -> list[Tensor]:
    """The outputs at what `attention_mask` has as tokens: what others attend to, nothing at all, is left open."""
    mask = tensors.get("attention_mask")
    if mask is None or mask.ndim != 2 or any(name.startswith("decoder_") for name in tensors):
        return outputs
    return [output[mask != 0] if output.shape[:2] == mask.shape else output for output in outputs]


def compare(model: TensorsOnly, run: Run, example: Example, what: str, tolerance: float = TOLERANCE) -> float:
    """The largest difference between the outputs of torch and `run`, on the example, at other sizes and of one row.

    Raises `RuntimeError` where it is over `tolerance`, or `run` does not take the other sizes.
    """
    largest = 0.0
    one_row = [{"batch": 1}] if "batch" in example.sizes else []  # exporters may take a row's dimension for none
    for sizes in ({}, other_sizes(example), *one_row):
        tensors = example.resized(**sizes)
        told = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        with of_library(what, f" on {told}"):
            outputs = run(tensors)
        found = difference(*(_without_padding(each, tensors) for each in (model.run(tensors), outputs)))
        if not found <= tolerance:
            raise RuntimeError(
                f"{what} and torch put out different things on {told}: outputs differ by {found:.1e} of their "
                f"magnitude, where {tolerance:.0e} is allowed. Nothing was written; report the model to hf_bimp."
            )
        largest = max(largest, found)
    return largest
