"""OpenVINO's IR from ONNX, and int8 by nncf with a calibration set."""

import contextlib
import os
import sys
from pathlib import Path

from torch import nn
from transformers.utils import logging

from .inputs import Tensors
from .onnx_export import quiet
from .runtimes import as_numpy


def write_openvino(onnx_path: Path, path: Path) -> None:
    """Writes the IR of a file of ONNX, in float32: the .xml at `path` and a .bin beside it."""
    import openvino

    with quiet():
        model = openvino.Core().read_model(str(onnx_path))
        openvino.save_model(model, str(path), compress_to_fp16=False)


def write_int8(ir_path: Path, path: Path, model: nn.Module, calibration: list[Tensors]) -> None:
    """Writes the IR at `ir_path` with weights and activations in int8, whose ranges come from `calibration`.

    `model` is what was exported: where it has attention, nncf keeps the parts in float that transformers need so.
    """
    with quiet():
        import nncf
        import openvino

    has_attention = any("Attention" in type(module).__name__ for module in model.modules())
    with quiet(), _progress():
        ir = openvino.Core().read_model(str(ir_path))
        names = [port.any_name for port in ir.inputs]
        batches = [{name: values for name, values in as_numpy(b).items() if name in names} for b in calibration]
        quantized = nncf.quantize(
            ir,
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if has_attention else None,
        )
        openvino.save_model(quantized, str(path))


@contextlib.contextmanager
def _progress():
    """nncf's progress bars go where tqdm's go, and nowhere where Transformers' are turned off."""
    with contextlib.ExitStack() as stack:
        shown = sys.stderr if logging.is_progress_bar_enabled() else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(shown))
        yield
