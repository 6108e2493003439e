"""The file formats of the libraries that models come from: what loads a saved model in another process.

Transformers writes its own files. For models of timm and segmentation-models-pytorch a `config.json` is written beside
the weights; any other module leaves a plain state dict.
"""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel


def library_of(model: nn.Module) -> str | None:
    """transformers, timm or segmentation_models_pytorch; None for a module of the user's own."""
    if isinstance(model, PreTrainedModel):
        return "transformers"
    if type(model).__module__.startswith("segmentation_models_pytorch."):
        return "segmentation_models_pytorch"
    # timm gives every model that its registry builds, ours too, the configuration that it was built from.
    return "timm" if isinstance(model.__dict__.get("pretrained_cfg"), dict) else None


class _Config(dict):
    """A dict that takes attributes."""


def let_trainer_configure(model: nn.Module | None) -> None:
    """Trainer sets attributes on `model.config`, which segmentation-models-pytorch has as a plain dict."""
    if model is not None and library_of(model) == "segmentation_models_pytorch":
        model._hub_mixin_config = _Config(model.config)  # what model.config gives; it cannot be set itself


def is_own(model: nn.Module) -> bool:
    """Whether the architecture is one of `hf_bimp.models`, which timm does not know by itself."""
    return type(model).__module__.startswith("hf_bimp.")


def write_config(model: nn.Module, directory: Path) -> None:
    """Writes `config.json` for a model of timm or segmentation-models-pytorch; nothing for others."""
    library = library_of(model)
    if library == "timm":
        from timm.models._hub import save_config_for_hf  # what its public save_for_hf writes beside the weights

        save_config_for_hf(model, directory / "config.json")
    elif library == "segmentation_models_pytorch":
        model.save_pretrained(directory)


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
