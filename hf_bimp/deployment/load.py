"""`hf_bimp.load_compressed`: models of any library out of folders that `hf_bimp.compress` wrote."""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..pruning.structured.shrink import SHRUNK_NAME, load_shrunk
from ..storage.model_formats import build
from . import quantizer  # noqa: F401  registers the format with Transformers
from .compressed_files import compact_version, read_compressed


def load_compressed(directory: str | Path, model: nn.Module | None = None) -> Any:
    """The model that `compress` wrote to `directory`, dense, on the CPU and in evaluation mode.

    Models of Transformers, timm and segmentation-models-pytorch, shrunk or not, are built from their configs. Of any
    other module the folder has the weights alone: its state dict is returned, unless `model` gives the architecture,
    of which a copy gets the weights.
    Raises `ValueError` where the folder or the file is damaged, not of `compress`, or of another architecture, and
    `ImportError` where zstandard is needed and missing.

        model = hf_bimp.load_compressed("out-compressed")
        own.load_state_dict(hf_bimp.load_compressed("own-compressed"))
    """
    directory = Path(directory)
    _check(directory)
    weights = directory / SAFE_WEIGHTS_NAME
    if (directory / SHRUNK_NAME).is_file():
        with tempfile.TemporaryDirectory() as folder:
            for name in (SHRUNK_NAME, CONFIG_NAME, "generation_config.json"):
                if (directory / name).is_file():
                    (Path(folder) / name).write_bytes((directory / name).read_bytes())
            save_file(read_compressed(weights), Path(folder) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
            return load_shrunk(folder, model)
    if isinstance(model, PreTrainedModel):
        return type(model).from_pretrained(directory)
    if model is not None:
        return _filled(copy.deepcopy(model).cpu(), read_compressed(weights), weights)
    config = _config(directory)
    if "model_type" in config:
        kind = getattr(transformers, next(iter(config.get("architectures") or ["AutoModel"])), None)
        if not (isinstance(kind, type) and (issubclass(kind, PreTrainedModel) or kind is transformers.AutoModel)):
            raise ValueError(
                f"{directory}: its class {config['architectures'][0]} is none of Transformers. Call from_pretrained "
                "of its own class."
            )
        return kind.from_pretrained(directory)
    for library, key in (("timm", "architecture"), ("segmentation_models_pytorch", "_model_class")):
        if key in config:
            built = build({"library": library, "name": config[key]}, directory)
            return _filled(built, read_compressed(weights), weights)
    return read_compressed(weights)


def _check(directory: Path) -> None:
    if not (directory / SAFE_WEIGHTS_NAME).is_file():
        raise ValueError(f"{directory} has no {SAFE_WEIGHTS_NAME}. Give a folder that hf_bimp.compress has written.")
    if compact_version(directory / SAFE_WEIGHTS_NAME) is None:
        raise ValueError(
            f"{directory / SAFE_WEIGHTS_NAME} is a plain file, not one of hf_bimp.compress. Load it with its library: "
            "from_pretrained, timm.create_model, safetensors' load_file, or hf_bimp.load_shrunk."
        )


def _config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Compress the model anew.") from error
    return config if isinstance(config, dict) else {}


def _filled(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """The model with these weights, in their type where they have one. Raises `ValueError` where they do not fit."""
    types = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(types) == 1:
        model.to(next(iter(types)))
    try:
        with torch.no_grad():
            model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} belongs to another architecture than {type(model).__name__}: {error}") from error
    return model.eval()
