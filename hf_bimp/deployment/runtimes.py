"""Exported models, run: by ONNX Runtime and OpenVINO, on a given number of threads and in float32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

OPENVINO_F32 = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}


class OnnxRuntime:
    """A file of ONNX in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [node.name for node in self.session.get_inputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        return self.session.run(None, {name: inputs[name] for name in self.names})

    def __call__(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [torch.from_numpy(output) for output in self.run(as_numpy(tensors))]


class OpenVino(OnnxRuntime):
    """An IR of OpenVINO on the CPU; in float32, as its own default is bfloat16 on processors that have it."""

    def __init__(self, path: Path, threads: int):
        import openvino

        config: dict[str, Any] = {**OPENVINO_F32, "INFERENCE_NUM_THREADS": threads}
        self.model = openvino.Core().compile_model(str(path), "CPU", config)
        self.request = self.model.create_infer_request()
        self.names = [port.any_name for port in self.model.inputs]

    def run(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        results = self.request.infer({name: inputs[name] for name in self.names}, share_inputs=True)
        return [results[port] for port in self.model.outputs]


def as_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
