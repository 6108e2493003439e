"""What `export`, `compress` and `accelerate` cannot work with, refused before anything is done."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import CONFIG_NAME

from ..reporting.results import read_results
from ..storage.disk import check_folder
from ..support import check_model
from .compressed_files import STORED, compact_version, weight_files

_ONNX = ("onnx", "onnxscript", "onnxruntime")
HIGHEST_LEVEL = 22  # of zstd
DTYPES = [str(dtype).removeprefix("torch.") for dtype in STORED]
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


def check_inference(name: str, model: nn.Module, done: str = "exported") -> None:
    """Raises `ValueError` for a model that is not ready for inference, and to be `done`."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} must be an nn.Module, not a {type(model).__name__}. Load the model first.")
    check_model(model)
    trains = next((child for child, module in model.named_modules() if module.training), None)
    if trains is not None:
        where = f"its {trains}" if trains else "it"
        raise ValueError(f"{name} cannot be {done} while {where} is in training mode. Call {name}.eval() first.")


def check_packages(names: list[str]) -> None:
    """Raises `ImportError` that names the packages that are missing, and the extra that brings them."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"hf_bimp.export needs {', '.join(missing)}. Install with: pip install 'hf_bimp[deploy]'")


def check_compress(model_or_directory: Any, output_dir: Path, dtype: Any, level: Any) -> None:
    """Raises `ValueError` for what `compress` cannot work with."""
    if not (dtype is None or isinstance(dtype, (str, torch.dtype))) or (
        dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES
    ):
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}. Give one, or None to change nothing.")
    if level is not None and (type(level) is not int or not 1 <= level <= HIGHEST_LEVEL):
        raise ValueError(f"level={level!r} must be from 1 to {HIGHEST_LEVEL}, or None for no zstd.")
    if isinstance(model_or_directory, nn.Module):
        _check_compressible(model_or_directory)
    elif isinstance(model_or_directory, (str, Path)):
        _check_source(Path(model_or_directory), output_dir)
    else:
        raise ValueError(
            f"model_or_directory must be an nn.Module or a folder, not a {type(model_or_directory).__name__}."
        )
    check_folder(output_dir)
    for path in (
        *output_dir.glob("*.safetensors"),
        *output_dir.glob("*.bin.index.json"),
        *output_dir.glob("pytorch_model*.bin"),
    ):
        if path.suffix != ".safetensors" or compact_version(path) is None:
            raise ValueError(
                f"output_dir={str(output_dir)!r} holds {path.name}, weights that are not of hf_bimp.compress. Give "
                "another folder."
            )


def _check_compressible(model: nn.Module) -> None:
    check_inference("model", model, "compressed")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantized. Compress it before it is quantized.")
    abstract = next((name for name, tensor in model.state_dict().items() if getattr(tensor, "is_meta", False)), None)
    if abstract is not None:
        raise ValueError(f"{abstract} is on the meta device and has no values. Load the whole model first.")


def _check_source(source: Path, output_dir: Path) -> None:
    if not source.is_dir():
        raise ValueError(
            f"model_or_directory={str(source)!r} is no folder. Give one with a checkpoint, or a model (one of the Hub "
            "is loaded by from_pretrained first)."
        )
    if source.resolve() == output_dir.resolve():
        raise ValueError(f"output_dir={str(output_dir)!r} is the folder to compress. Give another one.")
    if (source / "adapter_config.json").is_file():
        raise ValueError(f"{source} holds adapters of PEFT. Merge them first (model.merge_and_unload()).")
    for path in weight_files(source):
        if compact_version(path) is not None:
            raise ValueError(f"{source} is compressed already. Give the dense checkpoint that it was made of.")
    config = source / CONFIG_NAME
    if config.is_file():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is no JSON: {error}. Restore it first.") from error
        if isinstance(content, dict) and content.get("quantization_config"):
            raise ValueError(
                f"{config} says that the weights are quantized. Compress the model before it is quantized."
            )
