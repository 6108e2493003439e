"""Compressed checkpoints in Transformers' own loading: registered as a quantizer that leaves a plain dense model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .compact import VERSION, is_compact, read_header, read_streams
from .compressed_files import check_compressed, compact_version, decoded, where

NAME = "hf_bimp"
_TRACES = ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions")

for _mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
    _mapping.pop(NAME, None)  # of an hf_bimp that is imported anew


@register_quantization_config(NAME)
class CompactConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of config.json: the format's name and version.

    Raises `ValueError` for a version that this hf_bimp does not know.
    """

    def __init__(self, format: str = "compact", version: int = VERSION, **kwargs: Any):
        self.quant_method: Any = NAME  # Transformers' own are an enumeration
        self.format, self.version = format, version
        if format != "compact" or type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(
                f"quantization_config in config.json says format={format!r}, version={version!r}, and this hf_bimp "
                f"reads 'compact' up to {VERSION}. Upgrade hf_bimp, or compress the model anew."
            )


class _AsItIs(ConversionOps):
    """One stored tensor is one weight."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **kwargs: Any
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        return {kwargs["full_layer_name"]: tensors[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class _Decoding(WeightConverter):
    """A converter that decodes the tensors that it has collected before its operations see them.

    Whatever Transformers makes of a stored name (experts are merged) it makes of compact tensors too, as they have
    the names of their weights. What is wrong with one is raised here, where Transformers wraps no errors.
    """

    __slots__ = ("path", "dtype", "names", "expected")

    def __init__(self, source_patterns: Any, target_patterns: Any, operations: list[ConversionOps], **kwargs: Any):
        super().__init__(source_patterns, target_patterns, operations, force_cpu=True)
        self.path = "the compressed model"  # told in errors
        self.dtype: torch.dtype | None = None
        self.names: dict[str, list[str]] = {}  # stored, by the pattern that they match
        self.expected: torch.Size | None = None

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.names.setdefault(source_pattern, []).append(source_key)

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        if isinstance(self.operations[0], _AsItIs):
            self.expected = getattr(model.get_parameter_or_buffer(layer_name), "shape", None)
        return super().convert(layer_name, model, config, hf_quantizer, loading_info)

    def materialize_tensors(self) -> dict[str, list[Tensor]]:
        collected = super().materialize_tensors()
        return {
            pattern: [self._decoded(tensor, name) for tensor, name in zip(tensors, self.names[pattern], strict=True)]
            for pattern, tensors in collected.items()
        }

    def _decoded(self, tensor: Tensor, name: str) -> Tensor:
        if not is_compact("U8" if tensor.dtype == torch.uint8 else "", tensor.shape):
            return tensor
        what = where(self.path, name)
        if self.expected is not None:
            shape = read_header(tensor.numpy(), len(tensor), what)[0].shape
            if shape != self.expected:
                read_streams(tensor.numpy(), what)
                return torch.zeros(()).expand(shape)  # for Transformers' own error of sizes; nothing is allocated
        weight = decoded(tensor, what)
        return weight if self.dtype is None or not weight.is_floating_point() else weight.to(self.dtype)


@register_quantizer(NAME)
class CompactQuantizer(HfQuantizer):
    """Decodes what `hf_bimp.compress` has written while Transformers loads it, and then goes without a trace."""

    path: str | None = None  # of the compressed file

    def preprocess_model(
        self, model: PreTrainedModel, dtype: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> None:
        """Raises `ValueError` where a file is damaged, `ImportError` where zstandard is missing; reads no weights."""
        for path in checkpoint_files or ():
            if str(path).endswith(".safetensors") and compact_version(path) is not None:
                check_compressed(path)
                self.path = str(path)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        if not (hasattr(param, "get_dtype") and is_compact(param.get_dtype(), param.get_shape())):
            return super().get_new_dtype(converter, param, dtype)
        if isinstance(converter, _Decoding):
            converter.dtype = dtype
        return None

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: Any
    ) -> list[WeightTransform]:
        """The model's own converters, with decoding before them, and one for all other names."""
        updated = [self._decoding(c) if isinstance(c, WeightConverter) else c for c in weight_conversions]
        return [*updated, *self.get_weight_conversions()]

    def get_weight_conversions(self) -> list[WeightTransform]:
        return [self._decoding(WeightConverter(r"^(.+)$", r"\1", [_AsItIs()]))]

    def _decoding(self, converter: WeightConverter) -> WeightConverter:
        sources, targets = converter._original_source_patterns, converter._original_target_patterns
        new = _Decoding(list(sources), list(targets), converter.operations)
        new.scope_prefix, new.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
        new.path = self.path or new.path
        return new

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """The model is as if it had been loaded from a plain checkpoint."""
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("quantization_config", None)
                for name in _TRACES:
                    vars(module).pop(name, None)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
