"""What zeros are worth on this machine, in one run: compressed sizes, CSR products, whole models, shrunk ones in int8.

    OMP_NUM_THREADS=1 python recipes/benchmarks/deployment.py [--only sizes products models exports]

Four minutes on one thread. The weights are random, and the smallest of each layer zero: speed does not depend on their
values, and trained ones compress a little better. All that is compared takes turns in the same run. The section
"Smaller and faster" of README has this run's figures. Needs hf_bimp[deploy].
"""

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from acceleration import models, products, prune
from export_latency import exported
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel
from transformers.utils.logging import disable_progress_bar

import hf_bimp
from hf_bimp.deployment.compressed_files import read_compressed
from hf_bimp.deployment.latency import median_ratio, processor, take_turns

SPARSITIES = (0.8, 0.9, 0.95)
EXPORTS = {"cifar_resnet56": (128, 32), "resnet50": (16, 224)}  # images of a batch, their height and width


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts of the run (all)")
    return parser.parse_args()


def sizes() -> None:
    """Of the linear layers of BERT-base with 4 layers, without its embeddings, and of the whole model."""
    torch.manual_seed(0)
    bert = BertModel(BertConfig(num_hidden_layers=4)).eval()
    print("\nBERT-base of 4 layers: times smaller, and the time to load as a multiple of the dense file's\n")
    print("| zeros | type | layers | layers, zstd-3 | whole model, zstd-3 (cap) | load | load, zstd-3 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for sparsity in SPARSITIES:
        prune(bert, sparsity)
        for dtype in (torch.float32, torch.bfloat16):
            model = copy.deepcopy(bert).to(dtype)
            with tempfile.TemporaryDirectory() as folder:
                print(row_of_sizes(model, Path(folder), sparsity), flush=True)


def row_of_sizes(model: BertModel, folder: Path, sparsity: float) -> str:
    layers, levels = model.encoder.layer, (None, 3)
    alone = [hf_bimp.compress(layers, folder / str(level), level=level) for level in levels]
    whole, dense = hf_bimp.compress(model, folder / "whole"), folder / "dense.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in layers.state_dict().items()}, dense)
    # From memory to memory: safetensors alone maps the file, and reads it only when a tensor is used.
    calls: dict[str, Callable[[], Any]] = {"dense": lambda: {n: t.clone() for n, t in load_file(dense).items()}}
    for level in levels:
        calls[str(level)] = functools.partial(read_compressed, folder / str(level) / "model.safetensors")
    taken = take_turns(calls, (5, 10), 5.0, disable_bar=True)
    cells = [f"{1 / report.ratio:.2f}" for report in alone] + [f"{1 / whole.ratio:.2f} ({whole.cap:.2f})"]
    cells += [f"{median_ratio(taken[str(level)], taken['dense']):.2f}" for level in levels]
    return f"| {sparsity:.0%} | {str(model.dtype).removeprefix('torch.')} | {' | '.join(cells)} |"


def exports() -> None:
    """Half of the filters gone, beside the dense model in torch."""
    for name, (batch_size, size) in EXPORTS.items():
        print(f"\n{name}, half of the filters gone\n\n{exported(name, 0.5, batch_size, size).markdown()}", flush=True)


PARTS: dict[str, Callable[[], None]] = {
    "sizes": sizes,
    "products": functools.partial(products, seconds=1.0),
    "models": functools.partial(models, tokens=[16, 128, 512]),
    "exports": exports,
}


def main() -> None:
    args = parse_arguments()
    disable_progress_bar()
    threads = torch.get_num_threads()
    print(f"{processor()}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}")
    for part in args.only:
        torch.manual_seed(0)
        PARTS[part]()


if __name__ == "__main__":
    main()
