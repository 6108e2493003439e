"""The file formats of the libraries that models come from: writing, building and loading a model in each.

Transformers writes its own files. For models of timm and segmentation-models-pytorch a `config.json` is written beside
the weights; any other module leaves a plain state dict.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import extract_model_from_parallel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .files import write_json

LIBRARIES = ("transformers", "timm", "segmentation_models_pytorch")


def out_of_wrappers(model: nn.Module) -> nn.Module:
    """The user's own module: out of DDP, and of what `torch.compile` returned for it."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def library_of(model: nn.Module) -> str | None:
    """transformers, timm or segmentation_models_pytorch; None for a module of the user's own."""
    if isinstance(model, PreTrainedModel):
        return "transformers"
    if type(model).__module__.startswith("segmentation_models_pytorch."):
        return "segmentation_models_pytorch"
    # timm gives every model that its registry builds, ours too, the configuration that it was built from.
    return "timm" if "architecture" in (vars(model).get("pretrained_cfg") or {}) else None


class _Config(dict):
    """A dict that takes attributes."""


def let_trainer_configure(model: nn.Module | str | None) -> None:
    """Trainer sets attributes on `model.config`, which segmentation-models-pytorch has as a plain dict.

    Doing it again changes nothing.
    """
    if not isinstance(model, nn.Module) or library_of(model) != "segmentation_models_pytorch":
        return
    if not isinstance(model.config, _Config):
        model._hub_mixin_config = _Config(model.config)  # what model.config gives; it cannot be set itself


def is_own(model: nn.Module) -> bool:
    """Whether the architecture is one of `hf_bimp.models`, which timm does not know by itself."""
    return type(model).__module__.startswith("hf_bimp.")


def write_config(model: nn.Module, directory: Path) -> dict[str, str] | None:
    """Writes the architecture in its library's own format; what `build` needs beside it, None for other modules."""
    library, name = library_of(model), type(model).__name__
    if library == "transformers" and type(model).__module__.startswith("transformers."):
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
        return {"library": library, "name": name}
    if library == "segmentation_models_pytorch":
        write_json(directory / CONFIG_NAME, {"_model_class": name, **model.config})
        return {"library": library, "name": name}
    if library == "timm":
        from timm.models._hub import save_config_for_hf  # what its public save_for_hf writes beside the weights

        save_config_for_hf(model, str(directory / CONFIG_NAME))
        return {"library": library, "name": model.pretrained_cfg["architecture"]}
    return None


def build(origin: dict[str, str], directory: Path) -> nn.Module:
    """The architecture that `write_config` left in `directory`, with random weights; `origin` is what it returned."""
    with torch.random.fork_rng(devices=[]):
        if origin["library"] == "transformers":
            kind = _class(transformers, origin["name"], PreTrainedModel, directory)
            model = kind(transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False))
            if (directory / GENERATION_CONFIG_NAME).is_file():
                model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
            return model
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        if origin["library"] == "segmentation_models_pytorch":
            import segmentation_models_pytorch

            arguments = {name: value for name, value in config.items() if not name.startswith("_")}
            arguments["encoder_weights"] = None  # nothing to download: all weights are replaced
            return _class(segmentation_models_pytorch, origin["name"], nn.Module, directory)(**arguments)
        import timm

        from .. import models  # noqa: F401  registers the CIFAR models

        return timm.create_model(origin["name"], pretrained=False, **config.get("model_args", {}))


def _class(module: Any, name: str, base: type, directory: Path) -> Any:
    """The class `name` of a library. Raises `ValueError` where it is no such model: a file must not name any code."""
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{directory}: {name!r} is no model of {module.__name__}. Save the model anew.")
    return found


def savable_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with what safetensors asks for: every tensor contiguous, and none over another one's memory.

    A module under two names is saved under both, so that `load_state_dict` finds all that it asks for. Transformers'
    models see to that themselves.
    """
    state, seen = model.state_dict(), set()
    if isinstance(model, PreTrainedModel):
        return state
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):  # of get_extra_state
            raise ValueError(
                f"{type(model).__name__} keeps {name} ({type(tensor).__name__}) in its state dict, and safetensors "
                "saves tensors alone. Keep it elsewhere, such as in an attribute."
            )
        state[name] = tensor = tensor.contiguous()
        memory = tensor.untyped_storage().data_ptr()
        if memory in seen:
            state[name] = tensor.clone()
        seen.add(memory)
    return state


def weights_trainer_misses(model: nn.Module, checkpoint: str) -> dict[str, Tensor] | None:
    """The state dict of a saved model that `Trainer` would not load when it resumes; None where it does.

    Transformers writes some models (Segformer) under the names that the Hub knows. `from_pretrained` translates them
    back, but `Trainer` warns of missing keys and goes on with the weights that it was given. So it does where
    `torch.compile` has put a prefix before all names. Models of segmentation-models-pytorch do not take the arguments
    with which it loads.
    """
    bare = out_of_wrappers(model)
    if not any((Path(checkpoint) / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return None  # of a trainer with a format of its own
    if library_of(bare) == "segmentation_models_pytorch":
        return load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME)
    if not isinstance(bare, PreTrainedModel):
        return None if bare is model else load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME)
    index = Path(checkpoint) / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    else:
        with safe_open(Path(checkpoint) / SAFE_WEIGHTS_NAME, "pt") as file:
            names = set(file.keys())
    if bare is model and names <= bare.state_dict().keys():
        return None
    return type(bare).from_pretrained(checkpoint, config=bare.config, dtype=bare.dtype).state_dict()


def loading_code(model: nn.Module, where: str) -> str:
    """Python that loads the saved model from `where`, a folder or a Hub id."""
    library, name = library_of(model), type(model).__name__
    if library == "transformers":
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{where}")'
    if library == "segmentation_models_pytorch":
        load = f'smp.from_pretrained("{where}", encoder_weights=None)'  # else it would download the encoder's first
        return f"import segmentation_models_pytorch as smp\n\nmodel = {load}"
    if library == "timm":
        scheme = "local-dir" if Path(where).exists() else "hf-hub"
        registers = "\n\nimport hf_bimp.models  # registers this architecture with timm" if is_own(model) else ""
        return f'import timm{registers}\n\nmodel = timm.create_model("{scheme}:{where}", pretrained=True)'
    return 'from safetensors.torch import load_file\n\nmodel.load_state_dict(load_file("model.safetensors"))'
