"""Compare the time of a training step of `BIMPTrainer`, 90 % sparse, with that of plain `transformers.Trainer`.

    python recipes/benchmarks/step_overhead.py                      # a T5 of T5-small's size, 5-15 minutes on a CPU
    python recipes/benchmarks/step_overhead.py --repeats 3 --steps 3

Both trainers live in one process and train by turns, a block of steps each (A B, B A, A B, ...), so that a machine
that grows slower or faster favours neither. A step lasts from the end of the one before to its own end, with all that
the trainer does in between. `BIMPTrainer` prunes before the first step of each of its blocks and has no other cycle,
so its other steps are those of a last cycle; the first steps of a block are not counted. Expect a ratio of at most
1.03. CPU time is shown too: where other programs use the machine it is the steadier of the two.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_bimp import BIMPArguments, BIMPTrainer, Masks, find_prunable

MAX_RATIO = 1.03  # the target
UNCOUNTED = 2  # steps at the start of a block: pruning, cold caches
SHARED_ARGUMENTS = {
    "learning_rate": 1e-3,
    "use_cpu": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class RandomPairs(Dataset):
    """Random token sequences, each with random labels, made when asked for."""

    def __init__(self, items: int, tokens: int, vocab_size: int):
        self.items, self.tokens, self.vocab_size = items, tokens, vocab_size

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        inputs, labels = torch.randint(2, self.vocab_size, (2, self.tokens), generator=generator)
        return {"input_ids": inputs, "labels": labels}


class StepTimer(TrainerCallback):
    """Wall and CPU seconds of every step of the last `train()`, from the end of the step before."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps: list[tuple[float, float]] = []
        self.last = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter(), time.process_time()
        self.steps.append((now[0] - self.last[0], now[1] - self.last[1]))
        self.last = now


def build_trainer(cls: type[Trainer], arguments: TrainingArguments, args: argparse.Namespace) -> Trainer:
    """A trainer of either kind, for the same model and data."""
    set_seed(0)
    config = T5Config(
        d_model=args.d_model,
        d_ff=4 * args.d_model,
        num_layers=args.num_layers,
        vocab_size=args.vocab_size,
        decoder_start_token_id=0,
    )
    data = RandomPairs(arguments.max_steps * args.batch_size, args.tokens, args.vocab_size)
    trainer = cls(T5ForConditionalGeneration(config), arguments, train_dataset=data, callbacks=[StepTimer])
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_block(trainer: Trainer) -> tuple[float, float]:
    """Median wall and CPU seconds of a step in one more `train()`."""
    with contextlib.redirect_stdout(io.StringIO()):  # the plan, the same each time
        trainer.train()
    timer = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StepTimer))
    wall, cpu = zip(*timer.steps[UNCOUNTED:], strict=True)
    return median(wall), median(cpu)


def compare(plain: Trainer, sparse: Trainer, repeats: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Seconds of a step of both, a pair each repeat, trained by turns."""
    pairs = []
    for index in tqdm(range(repeats), unit="pair of blocks"):
        order = [plain, sparse] if index % 2 == 0 else [sparse, plain]
        seconds = {trainer: train_block(trainer) for trainer in order}
        pairs.append((seconds[plain], seconds[sparse]))
    return pairs


def seconds_of(function: Callable[[], object], repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def parts(sparse: BIMPTrainer, sparsity: float) -> dict[str, float]:
    """Seconds of what `BIMPTrainer` adds to a step, each part alone, and of one pruning."""
    method, weights = sparse.method, sparse.method.masks.weights
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)
    last_step = sparse.plan.total_steps - 1
    labels = torch.zeros(sparse.args.per_device_train_batch_size, sparse.train_dataset.tokens, dtype=torch.long)
    result = {
        "masking gradients": seconds_of(method.edit_gradients),
        "masking weights": seconds_of(method.end_step),
        "setting the learning rate": seconds_of(lambda: sparse.begin_step(last_step)),
        "counting labels": seconds_of(lambda: labels.ne(-100).sum()),
    }
    masks = Masks(find_prunable(T5ForConditionalGeneration(sparse.model.config)).weights)  # dense
    start = time.perf_counter()
    masks.prune(sparsity)
    return result | {"one pruning (not part of a step)": time.perf_counter() - start}


def ratio_line(name: str, ratios: list[float]) -> str:
    return f"{name} ratio: {median(ratios):.4f} (from {min(ratios):.4f} to {max(ratios):.4f} in {len(ratios)} pairs)"


def report(pairs: list[tuple[tuple[float, float], tuple[float, float]]], added: dict[str, float]) -> str:
    """The table, the ratio with its spread, and where the time goes."""
    lines = [f"{'':24}{'wall':>10}{'CPU':>12}"]
    for name, side in (("Trainer", 0), ("BIMPTrainer", 1)):
        wall, cpu = (median(pair[side][clock] for pair in pairs) for clock in (0, 1))
        lines.append(f"{name:24}{wall * 1e3:7.1f} ms{cpu * 1e3:9.1f} ms")
    wall_ratios, cpu_ratios = ([pair[1][clock] / pair[0][clock] for pair in pairs] for clock in (0, 1))
    ratio, step = median(wall_ratios), median(pair[0][0] for pair in pairs)
    lines += [ratio_line("wall time", wall_ratios), ratio_line("CPU time", cpu_ratios)]
    lines.append(f"target {'met' if ratio <= MAX_RATIO else 'MISSED'}: a wall time ratio of at most {MAX_RATIO}")
    lines.append("each part alone, and as a share of a plain step:")
    lines += [f"    {name:36}{value * 1e3:9.2f} ms{value / step:10.2%}" for name, value in added.items()]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a block (5)")
    parser.add_argument("--repeats", type=int, default=10, help="blocks of each trainer (10)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the prunable weights (0.9)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a batch (8)")
    parser.add_argument("--tokens", type=int, default=128, help="of a source, and of a target (128)")
    parser.add_argument("--d_model", type=int, default=512, help="width (T5-small's 512)")
    parser.add_argument("--num_layers", type=int, default=6, help="of the encoder, and of the decoder (6)")
    parser.add_argument("--vocab_size", type=int, default=32128, help="T5's 32128")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        shared = SHARED_ARGUMENTS | {
            "output_dir": folder,
            "max_steps": UNCOUNTED + args.steps,
            "per_device_train_batch_size": args.batch_size,
        }
        pruning = {"target_sparsity": args.sparsity, "num_cycles": 1, "dense_ratio": 0.0}
        schedule = {"retrain_schedule": "constant", "retrain_learning_rate": shared["learning_rate"]}
        plain = build_trainer(Trainer, TrainingArguments(**shared, lr_scheduler_type="constant"), args)
        sparse = build_trainer(BIMPTrainer, BIMPArguments(**shared, **pruning, **schedule), args)
        pairs = compare(plain, sparse, args.repeats)
    masks = sparse.method.masks
    print(
        f"\nT5 of {sparse.model.num_parameters() / 1e6:.1f} M parameters, {masks.num_weights / 1e6:.1f} M of them "
        f"prunable, {masks.sparsity:.2%} pruned; {args.batch_size} x {args.tokens} tokens, {sparse.args.optim.value}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(report(pairs, parts(sparse, args.sparsity)))


if __name__ == "__main__":
    main()
