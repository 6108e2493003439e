"""Smaller dense models out of models with zero filters: made, saved and loaded."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ...storage.files import write_json
from ...storage.model_formats import LIBRARIES, build, write_config
from ..layers import find_prunable
from .groups import find_filter_groups
from .heads import find_attentions, fit_heads
from .surgery import TOLERANCE, cpu_copy, cpu_inputs, deep_copy, output_difference, remove_channels, zero_filters
from .tracing import Inputs

SHRUNK_NAME = "shrunk.json"

WIDTHS = {
    nn.Linear: ("in_features", "out_features"),
    _ConvNd: ("in_channels", "out_channels", "groups"),
    Conv1D: ("nx", "nf"),
    _BatchNorm: ("num_features",),
}

logger = logging.get_logger(__name__)


def shrink(model: nn.Module, example_inputs: Inputs) -> nn.Module:
    """A smaller dense copy of `model`, without the filters that are wholly zero, biases and batch norms included.

    Attention heads go where their value rows, with the bias, or their columns of the output projection are zero. The
    config still tells the numbers of heads before.
    `example_inputs`: a tensor, a tuple of positional or a dict of keyword arguments; a batch of one or two is enough.
    Of filters or heads that are all zero one is kept. Raises `ValueError` where no filter can be removed, and
    `RuntimeError` where the smaller model's outputs on `example_inputs` are not those of `model`.
    """
    groups, _ = find_filter_groups(model, example_inputs, find_prunable(model).weights)
    choices = []
    for group in groups:
        zero = zero_filters(model, group)
        choices.append((group, zero[1:] if len(zero) == group.size else zero))
    choices = [(group, channels) for group, channels in choices if len(channels)]
    if not choices:
        raise ValueError(
            f"{type(model).__name__} has no filter that can be removed: none in its {len(groups)} groups of coupled "
            "filters or of attention heads is wholly zero, with its biases and batch norms. Train with "
            'granularity="filter".'
        )
    small = deep_copy(model)
    small.zero_grad()
    remove_channels(small, choices)
    difference = output_difference(cpu_copy(model), cpu_copy(small), cpu_inputs(example_inputs))
    if not difference <= TOLERANCE:  # NaN is no agreement either
        raise RuntimeError(
            f"The shrunk {type(model).__name__} puts out something else than the model with zeros: outputs differ by "
            f"{difference:.1e} of their magnitude. Use the model as it is, and report its architecture to hf_bimp."
        )
    return small


def save_shrunk(model: nn.Module, directory: str | Path) -> None:
    """Writes a model that `shrink` returned to `directory`; only `load_shrunk` can read it.

    Left are `model.safetensors`, `shrunk.json` with the widths, and config.json, which describes the architecture
    before shrinking where Transformers, timm or segmentation_models_pytorch made it: Transformers' `from_pretrained`
    would refuse the weights for their shapes. Other models are loaded with `load_shrunk(directory, dense_model)`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SHRUNK_NAME).unlink(missing_ok=True)  # its presence says that everything else is whole
    origin = write_config(model, directory)
    dense = None if origin is None else build(origin, directory)
    if dense is not None and list(dense.state_dict()) != list(model.state_dict()):
        logger.warning(
            f"{type(model).__name__} was changed after it was made, so that its config does not describe it. Load it "
            f"with load_shrunk({str(directory)!r}, model), where model is the dense architecture."
        )
        origin = dense = None
    widths, before = _widths(model), {} if dense is None else _widths(dense)
    save_model(model, str(directory / SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
    content = {
        "origin": origin,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "widths": {name: width for name, width in widths.items() if before.get(name) != width},
    }
    write_json(directory / SHRUNK_NAME, content)


def load_shrunk(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that `save_shrunk` wrote to `directory`, on the CPU and in evaluation mode.

    `model`, the dense architecture, is only needed where none of the known libraries made it; it is left as it is.
    Raises `ValueError` where the folder is not whole or the architecture is another one.
    """
    directory = Path(directory)
    if not (directory / SHRUNK_NAME).is_file():
        raise ValueError(
            f"{directory} has no {SHRUNK_NAME}: it was not written by hf_bimp.save_shrunk, or saving was cut off. "
            "Shrink and save the model anew; unshrunk models are loaded with from_pretrained."
        )
    content = _read(directory / SHRUNK_NAME)
    if model is None and content["origin"] is None:
        raise ValueError(
            f"{directory} does not say how its architecture is built. Build the dense model as before training, and "
            f"give it along: load_shrunk({str(directory)!r}, model)."
        )
    model = build(content["origin"], directory) if model is None else copy.deepcopy(model).cpu()
    model.to(getattr(torch, content["dtype"]))
    weights, attentions = directory / SAFE_WEIGHTS_NAME, find_attentions(model)
    _resize(model, content["widths"], weights)
    for attention in attentions:  # their numbers of heads follow from the widths of their layers
        try:
            fit_heads(model, attention)
        except ValueError as error:
            raise ValueError(f"{directory / SHRUNK_NAME}: {error} Shrink and save the model anew.") from error
    try:
        load_model(model, weights)
    except RuntimeError as error:
        raise ValueError(f"{weights} belongs to another architecture than {type(model).__name__}: {error}") from error
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    """What `save_shrunk` has written. Raises `ValueError` that names file and field where it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Shrink and save the model anew.") from error
    content = content if isinstance(content, dict) else {}
    origin, widths = content.get("origin"), content.get("widths")
    is_origin = isinstance(origin, dict) and origin.get("library") in LIBRARIES and isinstance(origin.get("name"), str)
    known = {attribute for attributes in WIDTHS.values() for attribute in attributes}
    problems = {
        "origin": not (origin is None or is_origin),
        "dtype": content.get("dtype") not in ("float32", "float64", "bfloat16", "float16"),
        "widths": not isinstance(widths, dict)
        or any(
            not isinstance(attributes, dict)
            or any(name not in known or type(width) is not int or width < 1 for name, width in attributes.items())
            for attributes in widths.values()
        ),
    }
    if wrong := [field for field, is_wrong in problems.items() if is_wrong]:
        raise ValueError(
            f"{path}: {wrong[0]} is not what save_shrunk writes ({str(content.get(wrong[0])):.60}). Shrink and save "
            "the model anew."
        )
    return content


def _widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """The widths of all layers that can shrink, by module and attribute."""
    return {
        name: {attribute: getattr(module, attribute) for attribute in attributes}
        for name, module in model.named_modules()
        for kind, attributes in WIDTHS.items()
        if isinstance(module, kind)
    }


def _check_widths(name: str, module: nn.Module, attributes: dict[str, int], file: Any) -> None:
    """Raises `ValueError` where the widths of a layer are not those of its saved weight, `file` being open."""
    if file is None:
        return
    shape = file.get_slice(f"{name}.weight").get_shape()
    sizes = {size * times for size in shape for times in (1, attributes.get("groups", getattr(module, "groups", 1)))}
    wrong = [a for a, width in attributes.items() if a != "groups" and width not in sizes]
    if wrong:
        raise ValueError(
            f"{SHRUNK_NAME}: {name}.{wrong[0]}={attributes[wrong[0]]} is no size of its saved weight {tuple(shape)}. "
            "Shrink and save the model anew."
        )


def _resize(model: nn.Module, widths: dict[str, dict[str, int]], weights: Path) -> None:
    """Gives the layers their widths, and empty parameters and buffers with the shapes they have in `weights`."""
    modules = dict(model.named_modules())
    if missing := sorted(set(widths) - set(modules)):
        raise ValueError(f"{type(model).__name__} is not the architecture of {weights}: it lacks {missing[:5]}.")
    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
        for name, attributes in widths.items():
            module = modules[name]
            allowed = {a for kind, own in WIDTHS.items() if isinstance(module, kind) for a in own}
            if foreign := sorted(attributes.keys() - allowed):
                raise ValueError(
                    f"{weights.with_name(SHRUNK_NAME)}: widths of {name} has {foreign[0]}, which a "
                    f"{type(module).__name__} has not. Shrink and save the model anew."
                )
            _check_widths(name, module, attributes, file if f"{name}.weight" in saved else None)
            for attribute, width in attributes.items():
                setattr(module, attribute, width)
            for kind, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if (key := f"{name}.{kind}") not in saved:  # tied weights are saved under one name, and never shrink
                    continue
                empty = tensor.new_empty(file.get_slice(key).get_shape())
                if empty.shape != tensor.shape:
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(module, kind, nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty)
