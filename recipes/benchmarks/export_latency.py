"""From filters to int8: latency and size of a shrunk model in torch, ONNX Runtime and OpenVINO beside the dense one.

    OMP_NUM_THREADS=1 python recipes/benchmarks/export_latency.py                       # ResNet-56, a minute
    OMP_NUM_THREADS=1 python recipes/benchmarks/export_latency.py --model resnet50 --size 224 --batch_size 16

The weights and the calibration images are random, as neither speed nor size depends on them; the accuracy of a trained
model is measured by recipes/export_int8.py. All take turns in one run; images lie channels last, which is faster for
torch. Needs hf_bimp[deploy].
"""

import argparse
import tempfile

import timm
import torch

import hf_bimp
import hf_bimp.models  # noqa: F401, registers cifar_resnet56 and the like with timm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet56", help="of timm (cifar_resnet56)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the filters that go (0.5)")
    parser.add_argument("--batch_size", type=int, default=128, help="images of a batch (128)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images (32)")
    return parser.parse_args()


def exported(name: str, sparsity: float, batch_size: int, size: int) -> hf_bimp.ExportReport:
    """The report of a timm model that has lost a share of its filters, in OpenVINO and int8."""
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    dense, masked = (timm.create_model(name).eval() for _ in range(2))
    masks, _ = hf_bimp.make_masks(masked, lambda: batch[:2], granularity="filter")
    masks.prune(sparsity)
    small = hf_bimp.shrink(masked, batch[:2])
    with tempfile.TemporaryDirectory() as folder:
        return hf_bimp.export(small, folder, batch, "openvino", batch[:64], dense_model=dense)


def main() -> None:
    args = parse_arguments()
    report = exported(args.model, args.sparsity, args.batch_size, args.size)
    print(f"\n{args.model}, {args.sparsity:.0%} of the filters gone, torch {torch.__version__}\n\n{report.markdown()}")


if __name__ == "__main__":
    main()
