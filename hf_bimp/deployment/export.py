"""`hf_bimp.export`: ONNX, OpenVINO and int8 files of a model, compared, measured and told."""

import functools
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import EvalPrediction
from transformers.utils import logging

from ..pruning.structured.tracing import Inputs
from ..reporting.deployment_table import deployment_section, write_into_card
from ..reporting.results import read_results, write_results
from ..reproducibility import preserved_random_state
from ..storage.files import moved_at_once
from ..storage.model_formats import out_of_wrappers
from .checks import check_export
from .evaluation import Evaluation
from .inputs import Batches, Example, Tensors, read_example
from .latency import LatencyRow, measure, processor
from .onnx_export import TOLERANCE, TensorsOnly, compare, export_onnx, free_axes, of_library
from .openvino_export import write_int8, write_openvino
from .runtimes import OnnxRuntime, OpenVino, as_numpy
from .signal_stack import preserved_signal_stack

ONNX, OPENVINO, INT8 = "model.onnx", "openvino_model.xml", "openvino_model_int8.xml"
FILES = {"onnx": (ONNX,), "openvino": (OPENVINO, INT8)}  # whose presence says that all else is whole
CALIBRATION_ROWS = 300  # nncf's own default

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote and measured.

    `files`: bytes of each file in `directory`. `inputs`: the size of each dimension of each input, by name where it is
    dynamic; `fixed`: why others are not. `max_difference`: the largest difference of outputs from torch's, relative to
    their largest magnitude, in float32; `int8_difference`: the same in int8. `latency`: a row a runtime, on the shapes
    in `example`. `metrics_before` are torch's, `metrics_after` those of the file to deploy, the last row of `latency`.
    """

    format: str
    directory: str
    files: dict[str, int]
    inputs: dict[str, list[int | str]]
    fixed: dict[str, str]
    max_difference: float
    int8_difference: float | None
    latency: list[LatencyRow]
    example: dict[str, list[int]]
    processor: str
    threads: int
    metrics_before: dict[str, Any]
    metrics_after: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The entry "deployment" of `bimp_results.json`, without the directory."""
        return {name: value for name, value in asdict(self).items() if name != "directory"}

    def markdown(self) -> str:
        """Latencies, sizes and metrics as Markdown tables, as the model card has them."""
        return deployment_section(self.to_dict())


def export(
    model: nn.Module,
    directory: str | Path,
    example_inputs: Inputs,
    format: str = "onnx",
    int8_calibration: Iterable | None = None,
    *,
    dense_model: nn.Module | None = None,
    eval_dataset: Iterable | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
) -> ExportReport:
    """Writes `model` (shrunk or any other) to `directory` for another runtime, and measures what that is worth.

    `model`: in evaluation mode; it is left as it is. Its weights are exported in float32.
    `example_inputs`: what its forward takes, as a tensor, a tuple or a dict of tensors; latencies are measured on this
        batch. Labels in a dict are dropped (encoder-decoders get the `decoder_input_ids` that they make of them), and
        outputs are all tensors that the forward returns, without caches.
    `format`: "onnx" (default) writes `model.onnx`; "openvino" writes `openvino_model.xml` and `.bin`.
    `int8_calibration`: for "openvino", a data set, a DataLoader or another iterable of inputs (dicts, tuples, tensors;
        labels are dropped), of which about 300 rows are read: `openvino_model_int8.xml` and `.bin`, with weights and
        activations in int8, are written too.
    `dense_model`: the model before shrinking; latencies are compared with its own, and else with that of `model`.
    `eval_dataset`, `compute_metrics`: as Trainer has them, though batches come from the data: a DataLoader or an
        iterable of dicts with labels, or of tuples whose last entry they are. Single items become batches of one.

    Any batch size, and any length of tokens, fits the exported model; where that is not possible a warning and the
    report's `fixed` say why. Outputs are compared with torch's on the example, at other batch sizes and another
    length, to 1e-4 of their largest magnitude (but not at padding). Nothing is in `directory` before all of it has
    succeeded. Where it holds `bimp_results.json`, the report is added to it under "deployment", and to the model card.
    Latencies are those of `torch.get_num_threads()` threads.

    Raises `ValueError` for arguments that do not fit and models in training or with adapters, `ImportError` where the
    packages of `hf_bimp[deploy]` are missing, `RuntimeError` where torch cannot export the model or outputs differ.

        small = hf_bimp.shrink(trainer.model, example_inputs)
        report = hf_bimp.export(small, "deploy", example_inputs, "openvino", calibration_loader)
        print(report.markdown())
    """
    directory = Path(directory).absolute()
    models = {"model": model} if dense_model is None else {"model": model, "dense_model": dense_model}
    check_export(models, directory, format, int8_calibration, eval_dataset, compute_metrics)
    model = out_of_wrappers(model)
    example = read_example(model, example_inputs)
    with preserved_random_state(), preserved_signal_stack():
        source = TensorsOnly(model, example)
        example, fixed = free_axes(source, example)
        dense = None if dense_model is None else TensorsOnly(dense_model, example)
        if dense is not None:
            free_axes(dense, example.without_axes(example.sizes))  # raises where it does not take the example
        calibration = _calibration(model, example, int8_calibration)
        evaluation = None
        if eval_dataset is not None and compute_metrics is not None:
            evaluation = Evaluation(Batches(eval_dataset, "eval_dataset", model, example), compute_metrics)
        with moved_at_once(directory, FILES[format], _beside(format)) as folder:
            exported = _Exported(folder, format, source, example, fixed, calibration)
            report = exported.report(directory, dense, evaluation)
    _tell(report, directory)
    return report


def _beside(format: str) -> list[str]:
    """What an older export may have left beside the files of a format: their weights."""
    return [beside for name in FILES[format] for beside in (f"{name}.data", str(Path(name).with_suffix(".bin")))]


def _calibration(model: nn.Module, example: Example, data: Iterable | None) -> list[Tensors]:
    if data is None:
        return []
    found = Batches(data, "int8_calibration", model, example).spread(CALIBRATION_ROWS)
    if not found:
        raise ValueError("int8_calibration is empty: give some hundred inputs, such as of the training set.")
    return found


class _Exported:
    """The files in a folder, compared with torch's outputs as they are made, and the runtimes that run them."""

    def __init__(
        self,
        folder: Path,
        format: str,
        source: TensorsOnly,
        example: Example,
        fixed: dict[str, str],
        calibration: list[Tensors],
    ):
        self.folder, self.format, self.source, self.threads = folder, format, source, torch.get_num_threads()
        self.int8_difference: float | None = None
        self.runtimes: dict[str, OnnxRuntime] = {}
        self.sizes: dict[str, int] = {}
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # gone before the others move
            onnx = (folder if format == "onnx" else Path(scratch)) / ONNX
            self.example, failed = export_onnx(source, example, onnx)
            self.fixed = fixed | failed
            self.max_difference = self._add("ONNX Runtime", OnnxRuntime, onnx)
            if format == "openvino":
                with of_library("OpenVINO"):
                    write_openvino(onnx, folder / OPENVINO)
                self.max_difference = max(self.max_difference, self._add("OpenVINO", OpenVino, folder / OPENVINO))
        if calibration:
            with of_library("nncf"):
                write_int8(folder / OPENVINO, folder / INT8, source, calibration)
            self.int8_difference = self._add("OpenVINO int8", OpenVino, folder / INT8, sys.float_info.max)

    def _add(self, name: str, runtime: type[OnnxRuntime], path: Path, tolerance: float = TOLERANCE) -> float:
        with of_library(name):
            self.runtimes[name], self.sizes[name] = runtime(path, self.threads), _bytes(path)
        return compare(self.source, self.runtimes[name], self.example, name, tolerance)

    def report(self, directory: Path, dense: TensorsOnly | None, evaluation: Evaluation | None) -> ExportReport:
        """Measures metrics, then latencies."""
        example, last = self.example, list(self.runtimes.values())[-1]
        before, after = evaluation.metrics(self.source.run, last) if evaluation else ({}, {})
        in_torch = {"torch": self.source} if dense is None else {"dense torch": dense, "shrunk torch": self.source}
        infer = torch.inference_mode()
        calls: dict[str, Callable] = {
            name: infer(functools.partial(model.run, example.tensors)) for name, model in in_torch.items()
        }
        arrays = as_numpy(example.tensors)
        calls |= {name: functools.partial(runtime.run, arrays) for name, runtime in self.runtimes.items()}
        sizes = {name: _weights(model) for name, model in in_torch.items()} | self.sizes
        return ExportReport(
            format=self.format,
            directory=str(directory),
            files={path.name: path.stat().st_size for path in sorted(self.folder.iterdir())},
            inputs={
                name: [example.axes[name].get(d, size) for d, size in enumerate(tensor.shape)]
                for name, tensor in example.tensors.items()
            },
            fixed=self.fixed,
            max_difference=self.max_difference,
            int8_difference=self.int8_difference,
            latency=measure(calls, sizes),
            example={name: list(tensor.shape) for name, tensor in example.tensors.items()},
            processor=processor(),
            threads=self.threads,
            metrics_before=before,
            metrics_after=after,
        )


def _bytes(path: Path) -> int:
    """Of a file with those that belong to it: weights of the same name lie in a .bin or .data."""
    return sum(
        other.stat().st_size for other in (path, path.with_suffix(".bin"), Path(f"{path}.data")) if other.exists()
    )


def _weights(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _tell(report: ExportReport, directory: Path) -> None:
    """Warns of what is not dynamic; the log, `bimp_results.json` and the card get the table."""
    for axis, reason in report.fixed.items():
        logger.warning(f"The exported model takes a single {axis}: {reason}")
    logger.info(f"Exported to {directory}:\n\n{report.markdown()}")
    results = read_results(directory)
    if results is not None:
        results["deployment"] = results.get("deployment", {}) | report.to_dict()
        write_results(str(directory), results)
        write_into_card(directory, results)
