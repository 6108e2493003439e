"""What removing filters is worth: latency, file size and multiply-adds of a shrunk model beside the dense one.

    python recipes/benchmarks/shrink_latency.py                        # ResNet-56, half of the filters, 1-2 minutes
    python recipes/benchmarks/shrink_latency.py --model resnet50 --size 224 --batch_size 16

The weights are random, as neither speed nor size depends on them. Dense, masked and shrunk model take turns, so that a
machine that grows slower or faster favours none. Two theoretical speedups are given: of the masked model, where zeros
cost nothing, and by the multiply-adds of the shrunk one, which is larger, as a removed filter takes the inputs of the
next layer along. How much of it is measured depends on the layers that are left: normalisation and activations
shrink in one dimension only, and narrow convolutions keep a processor less busy.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import hf_bimp.models  # noqa: F401, registers cifar_resnet56 and the like with timm
from hf_bimp import make_masks, save_shrunk, shrink, theoretical_speedup
from hf_bimp.reporting.flops import count_multiply_adds


def seconds(model: nn.Module, batch: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        model(batch)
    return time.perf_counter() - start


def megabytes(directory: str) -> float:
    return (Path(directory) / "model.safetensors").stat().st_size / 1e6


def image_parser(description: str | None) -> argparse.ArgumentParser:
    """The model, how much of it goes, and the batch."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet56", help="of timm (cifar_resnet56)")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the filters that go (0.5)")
    parser.add_argument("--batch_size", type=int, default=128, help="images of a batch (128)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the images (32)")
    return parser


def dense_and_masked(
    name: str, sparsity: float, batch_size: int, size: int
) -> tuple[nn.Module, nn.Module, torch.Tensor, int, int]:
    """Two models of random weights, of one of which a share of the filters is zero, and a batch, channels last.

    With how many weights were pruned, and how many stay dense.
    """
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
    dense, masked = (timm.create_model(name).eval() for _ in range(2))
    masks, stay_dense = make_masks(masked, lambda: batch[:2], granularity="filter")
    masks.prune(sparsity)
    return dense, masked, batch, len(masks.weights), len(stay_dense)


def main() -> None:
    parser = image_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=20, help="counted passes of each model (20)")
    args = parser.parse_args()
    dense, masked, batch, pruned, stay_dense = dense_and_masked(args.model, args.sparsity, args.batch_size, args.size)
    small = shrink(masked, batch[:2])
    models = {"dense": dense, "masked": masked, "shrunk": small}
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in tqdm(range(args.repeats + 2), unit="round"):
        for name, model in models.items():
            spent = seconds(model, batch)
            if repeat >= 2:  # warm by then
                times[name].append(spent)
    adds = {name: count_multiply_adds(model, batch[:1]).total for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(dense.state_dict(), Path(folder) / "model.safetensors")
        sizes = {"dense": megabytes(folder), "masked": megabytes(folder)}
        save_shrunk(small, folder)
        sizes["shrunk"] = megabytes(folder)
    print(
        f"\n{args.model}, {args.sparsity:.0%} of the filters in {pruned} layers gone ({stay_dense} "
        f"weights stay dense); batches of {args.batch_size} x {args.size} x {args.size}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'':8}{'median':>10}{'file':>11}{'multiply-adds':>18}")
    for name in models:
        print(f"{name:8}{median(times[name]) * 1e3:7.1f} ms{sizes[name]:8.2f} MB{adds[name] / 1e6:16.1f} M")
    ratios = [d / s for d, s in zip(times["dense"], times["shrunk"], strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    theory, measured = adds["dense"] / adds["shrunk"], median(ratios)
    by_zeros = theoretical_speedup(masked, batch[:1])
    print(f"measured speedup {measured:.2f} (middle half of {len(ratios)} rounds: {low:.2f} to {high:.2f})")
    print(f"theoretical speedup by zeros {by_zeros:.2f}: {measured / by_zeros:.0%} of it")
    print(f"by multiply-adds of the shrunk model, whose inputs go too, {theory:.2f}: {measured / theory:.0%} of it")


if __name__ == "__main__":
    main()
