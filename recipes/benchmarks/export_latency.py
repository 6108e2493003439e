"""From filters to int8: latency and size of a shrunk model in torch, ONNX Runtime and OpenVINO beside the dense one.

    OMP_NUM_THREADS=1 python recipes/benchmarks/export_latency.py                       # ResNet-56, a minute
    OMP_NUM_THREADS=1 python recipes/benchmarks/export_latency.py --model resnet50 --size 224 --batch_size 16

The weights and the calibration images are random, as neither speed nor size depends on them; the accuracy of a trained
model is measured by recipes/export_int8.py. All take turns in one run; images lie channels last, which is faster for
torch. Needs hf_bimp[deploy].
"""

import tempfile

import torch
from shrink_latency import dense_and_masked, image_parser

import hf_bimp


def exported(name: str, sparsity: float, batch_size: int, size: int) -> hf_bimp.ExportReport:
    """The report of a timm model that has lost a share of its filters, in OpenVINO and int8."""
    dense, masked, batch, *_ = dense_and_masked(name, sparsity, batch_size, size)
    small = hf_bimp.shrink(masked, batch[:2])
    with tempfile.TemporaryDirectory() as folder:
        return hf_bimp.export(small, folder, batch, "openvino", batch[:64], dense_model=dense)


def main() -> None:
    args = image_parser(__doc__).parse_args()
    report = exported(args.model, args.sparsity, args.batch_size, args.size)
    print(f"\n{args.model}, {args.sparsity:.0%} of the filters gone, torch {torch.__version__}\n\n{report.markdown()}")


if __name__ == "__main__":
    main()
