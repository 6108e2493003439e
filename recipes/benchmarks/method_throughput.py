"""Compare the training throughput of every method with that of dense training, on ResNet-18 and a small T5.

    python recipes/benchmarks/method_throughput.py             # both models, 20-30 minutes on a CPU
    python recipes/benchmarks/method_throughput.py --models t5 --steps 16

For every method two trainers, it and a dense one, take turns step by step in one process (see step_overhead.py), so
that a machine that grows slower or faster favours neither. The counted steps hold a pruning and a renewal of DPF's
masks, where 16 steps of a real run hold one, and none of the few prunings of BIMP and GMP: their cost is apart.
"""

import argparse
import tempfile
from statistics import mean, quantiles

import timm
import torch
from step_overhead import (
    LEARNING_RATE,
    SHARED_ARGUMENTS,
    UNCOUNTED,
    Comparison,
    RandomPairs,
    compare,
    synchronized_clock,
)
from torch.utils.data import Dataset
from transformers import PrinterCallback, T5Config, T5ForConditionalGeneration, set_seed

import hf_bimp.models  # noqa: F401, registers cifar_resnet18 with timm
from hf_bimp import BIMPArguments, BIMPTrainer, Masks, find_prunable

GOAL = 0.95
METHODS: dict[str, dict] = {
    "bimp": {"target_sparsity": GOAL, "dense_ratio": 0.0, "dense_steps": 100},
    "gmp": {"target_sparsity": GOAL, "num_prunings": 1},
    "gsm": {"target_sparsity": GOAL},
    "lc": {"target_sparsity": GOAL},
    "dpf": {"target_sparsity": GOAL, "num_prunings": 1},
    "dnw": {"target_sparsity": GOAL},
    "cs": {},
    "str": {},
    "dst": {},
    "movement": {"target_sparsity": GOAL, "method_config": {"num_prunings": 1}},
    "rigl": {"target_sparsity": GOAL},
}
TARGETS = {"bimp": 0.97, "gmp": 0.97, "lc": 0.85, "gsm": 0.85, "dpf": 0.85}  # of dense throughput; 0.6 for the others


class RandomImages(Dataset):
    """Noise in the size of CIFAR-10's images, each with a random class, made when asked for."""

    def __init__(self, items: int):
        self.items = items

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 32, 32, generator=generator)
        return {"x": image, "labels": torch.randint(10, (), generator=generator)}


def classification_loss(outputs: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs, labels)


def small_t5() -> T5ForConditionalGeneration:
    config = T5Config(d_model=256, d_ff=1024, num_layers=3, vocab_size=4000, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def build_trainer(model: str, arguments: BIMPArguments) -> BIMPTrainer:
    set_seed(0)
    items = arguments.max_steps * arguments.per_device_train_batch_size
    if model == "t5":
        trainer = BIMPTrainer(small_t5(), arguments, train_dataset=RandomPairs(items, 64, 4000))
    else:
        resnet = timm.create_model("cifar_resnet18", num_classes=10)
        trainer = BIMPTrainer(
            resnet, arguments, train_dataset=RandomImages(items), compute_loss_func=classification_loss
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def throughput(comparisons: list[Comparison]) -> list[float]:
    """That of the method over that of dense training, step by step."""
    return [c.plain.wall / c.sparse.wall for c in comparisons]


def measure(model: str, method: str, args: argparse.Namespace, folder: str) -> list[float]:
    shared = SHARED_ARGUMENTS | {
        "output_dir": folder,
        "max_steps": UNCOUNTED + args.steps + 1,
        "per_device_train_batch_size": args.batch_size,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "learning_rate": LEARNING_RATE,
        "weight_decay": 5e-4,
        "lr_scheduler_type": "linear",
        "remove_unused_columns": False,  # a timm model's forward names no labels
    }
    settings = {"method": method} | METHODS[method]
    if method == "gmp":  # its pruning comes before the counted steps
        settings["finetune_ratio"] = 1 - UNCOUNTED / shared["max_steps"]
    dense = build_trainer(model, BIMPArguments(**shared, method="dense"))
    sparse = build_trainer(model, BIMPArguments(**shared, **settings))
    return throughput(compare(dense, sparse))


def seconds_of_pruning(model: str) -> float:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    pruned = (small_t5() if model == "t5" else timm.create_model("cifar_resnet18")).to(device)
    masks = Masks(find_prunable(pruned).weights)
    start = synchronized_clock()
    masks.prune(GOAL)
    return synchronized_clock() - start


def line(method: str, ratios: list[float]) -> str:
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    target = TARGETS.get(method, 0.6)
    ratio = len(ratios) / sum(1 / ratio for ratio in ratios)  # of the total times
    verdict = "met" if ratio >= target else "MISSED"
    return f"{method:8}{ratio:8.3f}   ({low:.3f} to {high:.3f})   target {target:.2f} {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("resnet18", "t5"), default=["resnet18", "t5"])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=16, help="counted steps of each trainer (16)")
    parser.add_argument("--batch_size", type=int, default=64, help="images, or sequences of 64 tokens (64)")
    args = parser.parse_args()
    for model in args.models:
        print(f"\n{model}, batch {args.batch_size}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        print("method  throughput of dense (middle half of the steps)")
        with tempfile.TemporaryDirectory() as folder:
            for method in args.methods:
                print(line(method, measure(model, method, args, folder)), flush=True)
        print(f"one pruning, of all weights: {mean(seconds_of_pruning(model) for _ in range(5)):.3f} s")


if __name__ == "__main__":
    main()
