"""Compare the time and memory of hf_bimp's global pruning, and of its LAMP, with torch's `global_unstructured`.

    python recipes/benchmarks/global_selection.py                       # 200 M weights, 2-3 minutes, 12 GB of memory
    python recipes/benchmarks/global_selection.py --weights 2e7 --dtype bfloat16

All prune the same random weights, in layers of a transformer's sizes, to the same sparsity; each has a fresh process,
so that none profits from another's memory. Extra memory is the process's peak resident set above the weights, masks
included. The targets, for 200 M float32 weights: global pruning at least 15 times faster than torch's, with at most
1/20 of the extra memory, and the same weights pruned (where several weights have exactly the threshold's magnitude,
which of them go is any method's choice); LAMP within 4 times global's time.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn.utils import prune, skip_init
from tqdm import tqdm

from hf_bimp import Masks
from hf_bimp.pruning.granularity import WeightRule

MAX_WIDTH = 1024
WARM_UP_WEIGHTS = 200_000
PAGE = resource.getpagesize()
MIN_SPEEDUP, MIN_SAVING, MAX_SHARE, MAX_LAMP = 15, 20, 0.1, 4  # the targets, for 200 M weights
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Measurement:
    """`seconds` of each repeat; `extra_bytes`: peak resident set above the weights, over all repeats."""

    seconds: list[float]
    extra_bytes: int


def shapes(weights: int) -> list[tuple[int, int]]:
    """Output and input sizes of linear layers with about `weights` weights: attention and feed-forward blocks."""
    width = min(MAX_WIDTH, 1 << int((weights / 12) ** 0.5).bit_length() - 1)
    block = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    return block * max(1, round(weights / (12 * width**2)))


def build(weights: int, dtype: torch.dtype) -> nn.ModuleList:
    """The layers, uninitialised."""
    return nn.ModuleList(skip_init(nn.Linear, i, o, bias=False, dtype=dtype) for o, i in shapes(weights))


@torch.no_grad()
def fill(layers: nn.ModuleList) -> None:
    """Gives every process and repeat the same weights; the layers differ in scale, as those of real models do."""
    torch.manual_seed(0)
    for index, layer in enumerate(layers):
        layer.weight.normal_(std=0.02 * (1 + index % 6))


def prune_with_hf_bimp(layers: nn.ModuleList, sparsity: float) -> list[torch.Tensor]:
    masks = Masks(dict(layers.named_parameters()))
    masks.prune(sparsity)
    return list(masks.pruned.values())


def prune_by_lamp(layers: nn.ModuleList, sparsity: float) -> list[torch.Tensor]:
    masks = Masks(dict(layers.named_parameters()), WeightRule("lamp"))
    masks.prune(sparsity)
    return list(masks.pruned.values())


def prune_with_torch(layers: nn.ModuleList, sparsity: float) -> list[torch.Tensor]:
    amount = round(sparsity * sum(layer.weight.numel() for layer in layers))
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount)
    return [layer.weight_mask for layer in layers]  # 1 where a weight stays


def measure(
    method: Callable[[nn.ModuleList, float], list[torch.Tensor]],
    weights: int,
    dtype: torch.dtype,
    sparsity: float,
    repeats: int,
    masks_file: Path,
) -> Measurement:
    """Runs in a process of its own; writes which weights were pruned, one bit each, to `masks_file`."""
    small = build(WARM_UP_WEIGHTS, dtype)  # loads code and starts threads, which is neither time nor memory of pruning
    fill(small)
    method(small, sparsity)
    layers = build(weights, dtype)
    fill(layers)
    baseline = psutil.Process().memory_info().rss
    seconds: list[float] = []
    for _ in tqdm(range(repeats), desc=method.__name__, unit="pruning"):
        if seconds:
            masks = None  # of the repeat before: its memory is not this one's
            fill(layers)
        start = time.perf_counter()
        masks = method(layers, sparsity)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with masks_file.open("wb") as file:
        for mask in masks:
            pruned = mask if mask.dtype == torch.bool else mask == 0
            file.write(np.packbits(pruned.numpy()).tobytes())
    return Measurement(seconds, max(peak - baseline, PAGE))  # for few weights the kernel's counts can say less


def in_fresh_process(function: Callable[..., Measurement], *args) -> Measurement:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as executor:
        return executor.submit(function, *args).result()


def compare_masks(layers: nn.ModuleList, ours: Path, theirs: Path) -> str:
    """Says whether two masks prune the same weights but for the choice among those at the threshold."""
    counts, magnitudes = np.zeros(2, dtype=np.int64), set()
    with ours.open("rb") as a, theirs.open("rb") as b:
        for layer in layers:
            flat = layer.weight.detach().abs().flatten()
            rows = [np.frombuffer(file.read(-(-len(flat) // 8)), dtype=np.uint8) for file in (a, b)]
            first, second = (np.unpackbits(row, count=len(flat)).view(bool) for row in rows)
            counts += (first.sum(), second.sum())
            magnitudes.update(flat[torch.from_numpy(first != second)].tolist())
    if counts[0] != counts[1] or len(magnitudes) > 1:
        return f"NO ({counts[0]:,} and {counts[1]:,} pruned; {len(magnitudes)} magnitudes are treated differently)"
    ties = " (but for a choice among equal magnitudes at the threshold)" if magnitudes else ""
    return f"yes, all {counts[0]:,}{ties}"


def report(ours: Measurement, lamp: Measurement, theirs: Measurement, weight_bytes: int, mask_bytes: int) -> str:
    """The table, the ratios and the targets."""
    lines = [f"{'':28}{'time':>10}{'extra memory':>16}"]
    names = ("hf_bimp Masks.prune", "hf_bimp by LAMP", "torch global_unstructured")
    for name, result in zip(names, (ours, lamp, theirs), strict=True):
        lines.append(f"{name:28}{median(result.seconds):8.2f} s{result.extra_bytes / 1e9:13.3f} GB")
    speedup = median(theirs.seconds) / median(ours.seconds)
    saving = theirs.extra_bytes / ours.extra_bytes
    share, lamp_share = ((result.extra_bytes - mask_bytes) / weight_bytes for result in (ours, lamp))
    slower = median(lamp.seconds) / median(ours.seconds)
    return "\n".join(
        [
            *lines,
            f"repeats of hf_bimp: {min(ours.seconds):.2f} to {max(ours.seconds):.2f} s",
            f"speed: {speedup:.1f} times faster ({verdict(speedup >= MIN_SPEEDUP)}: at least {MIN_SPEEDUP})",
            f"memory: 1/{saving:.1f} of torch's ({verdict(saving >= MIN_SAVING)}: at most 1/{MIN_SAVING})",
            f"memory without the masks' {mask_bytes / 1e6:,.0f} MB: {share:.1%} of the weights' "
            f"{weight_bytes / 1e6:,.0f} MB ({verdict(share <= MAX_SHARE)}: at most {MAX_SHARE:.0%})",
            f"LAMP: {slower:.1f} times global's time ({verdict(slower <= MAX_LAMP)}: at most {MAX_LAMP}), "
            f"{lamp_share:.1%} of the weights without the masks ({verdict(lamp_share <= MAX_SHARE)})",
        ]
    )


def verdict(holds: bool) -> str:
    return "target met" if holds else "target MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, default=2e8, help="about how many weights to rank (2e8)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (float32)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of the weights to prune (0.9)")
    parser.add_argument("--repeats", type=int, default=3, help="prunings by hf_bimp; torch does one (3)")
    args = parser.parse_args()
    weights, dtype = int(args.weights), DTYPES[args.dtype]
    with tempfile.TemporaryDirectory() as folder:
        ours_file, theirs_file = Path(folder) / "hf_bimp", Path(folder) / "torch"
        setting = (weights, dtype, args.sparsity)
        ours = in_fresh_process(measure, prune_with_hf_bimp, *setting, args.repeats, ours_file)
        lamp = in_fresh_process(measure, prune_by_lamp, *setting, args.repeats, Path(folder) / "lamp")
        theirs = in_fresh_process(measure, prune_with_torch, *setting, 1, theirs_file)
        layers = build(weights, dtype)
        fill(layers)
        same = compare_masks(layers, ours_file, theirs_file)
    count = sum(layer.weight.numel() for layer in layers)
    print(
        f"\n{count:,} {args.dtype} weights in {len(layers)} layers, pruned to {args.sparsity:.0%}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(report(ours, lamp, theirs, weight_bytes=count * dtype.itemsize, mask_bytes=count))
    print(f"same weights pruned: {same}")


if __name__ == "__main__":
    main()
