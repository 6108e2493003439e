"""What CSR is worth on this CPU: single products, and whole models through `hf_bimp.accelerate`.

    OMP_NUM_THREADS=1 python recipes/benchmarks/acceleration.py    # two minutes

The weights are random, with the smallest magnitudes of each linear layer zero; embeddings stay dense. All that is
compared takes turns in one run, and every figure is a median of ratios to dense torch. `accelerate` measures each
layer before it takes CSR for it, and the whole model in the end.
"""

import argparse
import functools
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

import hf_bimp
from hf_bimp.deployment.csr import linear, to_csr
from hf_bimp.deployment.latency import median_ratio, processor, take_turns

SPARSITIES = (0.8, 0.9, 0.95)
ROWS = (1, 8, 128, 512)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 128, 512], help="of the models (16 128 512)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (1)")
    return parser.parse_args()


def prune(model: nn.Module, sparsity: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            masks = hf_bimp.Masks({"weight": module.weight})
            masks.prune(sparsity)


def products(seconds: float) -> None:
    """3072 x 768, dense against CSR in blocks of rows as `accelerate` has it, in one piece, and as F.linear has it."""
    print("\n3072 x 768: times as fast as F.linear\n")
    print(f"{'zeros':>6}{'rows':>6}{'dense ms':>10}{'accelerate':>12}{'W @ x.T':>9}{'F.linear':>10}")
    for sparsity in SPARSITIES:
        layer = nn.Linear(768, 3072, bias=False)
        prune(layer, sparsity)
        weight = layer.weight.detach()
        csr = to_csr(weight)
        for rows in ROWS:
            x = torch.randn(rows, 768)
            others: dict[str, Callable] = {
                "accelerate": functools.partial(linear, csr, x, None),
                "W @ x.T": lambda csr=csr, x=x: (csr @ x.T).T,
                "F.linear": functools.partial(F.linear, x, csr),
            }
            ratios = []
            for other in others.values():  # each after a dense one, which leaves the same in the caches
                calls = {"dense": functools.partial(F.linear, x, weight), "other": other}
                times = take_turns(calls, (10, 200), seconds / 2, disable_bar=True)
                ratios.append(median_ratio(times["dense"], times["other"]))
            dense = median(times["dense"]) * 1e3
            print(f"{sparsity:>6.0%}{rows:>6}{dense:>10.3f}{ratios[0]:>12.2f}{ratios[1]:>9.2f}{ratios[2]:>10.2f}")


def models(tokens: list[int]) -> None:
    print("\nWhole models: times as fast as dense, and how many layers compute by CSR\n")
    print(f"{'':18}{'tokens':>8}{'zeros':>7}{'dense ms':>10}{'speedup':>9}{'layers':>10}{'difference':>12}")
    t5 = T5Config(d_model=512, d_ff=2048, d_kv=64, num_layers=6, num_heads=8)
    makers = {
        "T5-small's encoder": lambda: T5EncoderModel(t5),
        "BERT, 4 layers": lambda: BertModel(BertConfig(num_hidden_layers=4)),
    }
    for name, make in makers.items():
        model = make().eval()
        for sparsity in SPARSITIES:
            prune(model, sparsity)
            for length in tokens:
                ids = torch.randint(0, 1000, (1, length))
                report = hf_bimp.accelerate(model, {"input_ids": ids}).acceleration_report
                chosen = f"{sum(layer.chosen == 'csr' for layer in report.layers)}/{len(report.layers)}"
                print(
                    f"{name:18}{length:>8}{sparsity:>7.0%}{report.dense_ms:>10.1f}{report.speedup:>9.2f}{chosen:>10}"
                    f"{report.max_difference:>12.1e}"
                )


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"{processor()}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}")
    with torch.inference_mode():
        products(args.seconds)
    models(args.tokens)


if __name__ == "__main__":
    main()
