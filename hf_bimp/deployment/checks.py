"""What `export` cannot work with, refused before anything is written."""

import importlib.util
from pathlib import Path
from typing import Any

from torch import nn

from ..reporting.results import read_results
from ..support import check_model

_ONNX = ("onnx", "onnxscript", "onnxruntime")
PACKAGES = {"onnx": _ONNX, "openvino": (*_ONNX, "openvino")}


def check_export(
    models: dict[str, nn.Module],
    directory: Path,
    format: str,
    int8_calibration: Any,
    eval_dataset: Any,
    compute_metrics: Any,
) -> None:
    """Raises `ValueError` for what does not fit, and `ImportError` where packages are missing.

    `models`: the one to export and the dense one, by the names of the arguments.
    """
    if format not in PACKAGES:
        raise ValueError(f"format={format!r} is none of {', '.join(map(repr, PACKAGES))}.")
    for name, model in models.items():
        check_inference(name, model)
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"directory={str(directory)!r} cannot be written to: {existing} is a file. Give a folder.")
    if int8_calibration is not None and format != "openvino":
        raise ValueError(f"int8_calibration needs format='openvino' (given: {format!r}): int8 is written as its IR.")
    if (eval_dataset is None) != (compute_metrics is None):
        missing = "compute_metrics" if compute_metrics is None else "eval_dataset"
        raise ValueError(f"eval_dataset and compute_metrics go together: {missing} is missing.")
    if compute_metrics is not None and not callable(compute_metrics):
        raise ValueError(f"compute_metrics must be a function of an EvalPrediction, not {compute_metrics!r:.60}.")
    check_packages([*PACKAGES[format], *(["nncf"] if int8_calibration is not None else [])])
    read_results(directory)


def check_inference(name: str, model: nn.Module) -> None:
    """Raises `ValueError` for a model that is not ready for inference."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must be an nn.Module, not a {type(model).__name__}. Load the model first.")
    check_model(model)
    trains = next((child for child, module in model.named_modules() if module.training), None)
    if trains is not None:
        where = f"its {trains}" if trains else "it"
        raise ValueError(f"{name} cannot be exported while {where} is in training mode. Call {name}.eval() first.")


def check_packages(names: list[str]) -> None:
    """Raises `ImportError` that names the packages that are missing, and the extra that brings them."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"hf_bimp.export needs {', '.join(missing)}. Install with: pip install 'hf_bimp[deploy]'")
