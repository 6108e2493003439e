"""Compare the time of a training step of `BIMPTrainer`, 90 % sparse, with that of plain `transformers.Trainer`.

    python recipes/benchmarks/step_overhead.py                      # a T5 of T5-small's size, 5-10 minutes on a CPU
    python recipes/benchmarks/step_overhead.py --steps 5 --repeats 1

Both trainers train at once in one process and take turns step by step, each in a thread that waits while the other
works, so that a machine that grows slower or faster favours neither: a sparse step is compared with the plain ones
just before and after it. A step is all that a trainer does from one `on_step_end` to its next. `BIMPTrainer` prunes
before its first step and has no other cycle, so all its later steps are those of a last cycle. Expect a ratio of at
most 1.03; on a busy machine the parts, measured alone, say more than the ratio. CPU time is shown for the same reason.
"""

import argparse
import contextlib
import io
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median, quantiles
from typing import NamedTuple

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
UNCOUNTED = 2  # first steps of a run: pruning, cold caches
LEARNING_RATE = 1e-3
SHARED_ARGUMENTS = {
    "learning_rate": LEARNING_RATE,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Times(NamedTuple):
    """Seconds on the wall clock, and of the CPU."""

    wall: float
    cpu: float


class Comparison(NamedTuple):
    """A sparse step, and the mean of the plain steps just before and after it."""

    plain: Times
    sparse: Times


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


def synchronized_clock() -> float:
    """Seconds on the wall clock, once an accelerator has done all that it was given."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class TakeTurns(TrainerCallback):
    """Times every step, and lets the other trainer do one step after each."""

    def __init__(self, progress: tqdm):
        self.progress = progress
        self.may_go_on = threading.Semaphore(0)
        self.other: TakeTurns | None = None
        self.steps: list[Times] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.wait()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(Times(synchronized_clock() - self.start.wall, time.process_time() - self.start.cpu))
        self.progress.update()
        self.other.may_go_on.release()
        if state.global_step < state.max_steps:
            self.wait()

    def wait(self) -> None:
        self.may_go_on.acquire()
        self.start = Times(synchronized_clock(), time.process_time())


def train(trainer: Trainer, turns: TakeTurns) -> None:
    trainer.add_callback(turns)
    try:
        trainer.train()
    finally:  # where this one fails, the other must not wait for ever
        turns.other.may_go_on.release(trainer.args.max_steps)
        trainer.remove_callback(turns)


def compare(plain: Trainer, sparse: Trainer) -> list[Comparison]:
    """One `train()` of both, by turns: plain, sparse, plain, sparse, ..."""
    with tqdm(total=2 * plain.args.max_steps, unit="step") as progress:
        a, b = TakeTurns(progress), TakeTurns(progress)
        a.other, b.other = b, a
        a.may_go_on.release()
        with ThreadPoolExecutor() as executor, contextlib.redirect_stdout(io.StringIO()):  # hides the plan
            for run in [executor.submit(train, plain, a), executor.submit(train, sparse, b)]:
                run.result()
    before, after, between = a.steps[UNCOUNTED:-1], a.steps[UNCOUNTED + 1 :], b.steps[UNCOUNTED:-1]
    return [
        Comparison(Times((p.wall + q.wall) / 2, (p.cpu + q.cpu) / 2), step)
        for p, q, step in zip(before, after, between, strict=True)
    ]


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
    trainer = cls(T5ForConditionalGeneration(config), arguments, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def seconds_of(function: Callable[[], object], repeats: int = 7) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = synchronized_clock()
        function()
        times.append(synchronized_clock() - start)
    return median(times)


def parts(sparse: BIMPTrainer, sparsity: float) -> dict[str, float]:
    """Seconds of what `BIMPTrainer` adds to a step, each part alone, and of what it does at a pruning only."""
    method = sparse.method
    for weight in method.masks.weights.values():
        weight.grad = torch.randn_like(weight)
    last_step = sparse.plan.total_steps - 1
    device = sparse.args.device
    labels = torch.zeros(sparse.args.per_device_train_batch_size, sparse.train_dataset.tokens, device=device).long()
    result = {
        "masking gradients": seconds_of(method.edit_gradients),
        "setting the learning rate": seconds_of(lambda: sparse.begin_step(last_step)),
        "counting labels": seconds_of(lambda: labels.ne(-100).sum()),
    }
    result["masking weights (not part of a step)"] = seconds_of(method.masks.mask_weights)
    masks = Masks(find_prunable(T5ForConditionalGeneration(sparse.model.config).to(device)).weights)  # dense
    start = synchronized_clock()
    masks.prune(sparsity)
    return result | {"one pruning (not part of a step)": synchronized_clock() - start}


def ratio_line(name: str, ratios: list[float]) -> str:
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return f"{name} ratio: {median(ratios):.4f} (middle half of {len(ratios)} steps: {low:.4f} to {high:.4f})"


def report(comparisons: list[Comparison], added: dict[str, float]) -> str:
    """The table, the ratio with its spread, and where the time goes."""
    wall = [c.sparse.wall / c.plain.wall for c in comparisons]
    cpu = [c.sparse.cpu / c.plain.cpu for c in comparisons]
    step = Times(*(median(c.plain[clock] for c in comparisons) for clock in (0, 1)))
    sparse_step = Times(*(median(c.sparse[clock] for c in comparisons) for clock in (0, 1)))
    return "\n".join(
        [
            f"{'median step':16}{'wall':>10}{'CPU':>12}",
            f"{'Trainer':16}{step.wall * 1e3:7.1f} ms{step.cpu * 1e3:9.1f} ms",
            f"{'BIMPTrainer':16}{sparse_step.wall * 1e3:7.1f} ms{sparse_step.cpu * 1e3:9.1f} ms",
            ratio_line("wall time", wall),
            ratio_line("CPU time", cpu),
            f"target {'met' if median(wall) <= MAX_RATIO else 'MISSED'}: a wall time ratio of at most {MAX_RATIO}",
            "each part alone, and as a share of a plain step:",
            *(f"    {name:38}{value * 1e3:9.2f} ms{value / step.wall:9.2%}" for name, value in added.items()),
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each trainer in a repeat (20)")
    parser.add_argument("--repeats", type=int, default=2, help="how often both train anew (2)")
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
            "max_steps": UNCOUNTED + args.steps + 1,  # a last one, while which the plain trainer is finishing
            "per_device_train_batch_size": args.batch_size,
        }
        pruning = {"target_sparsity": args.sparsity, "num_cycles": 1, "dense_ratio": 0.0}
        schedule = {"retrain_schedule": "constant", "retrain_learning_rate": LEARNING_RATE}
        plain = build_trainer(Trainer, TrainingArguments(**shared, lr_scheduler_type="constant"), args)
        sparse = build_trainer(BIMPTrainer, BIMPArguments(**shared, **pruning, **schedule), args)
        comparisons = [comparison for _ in range(args.repeats) for comparison in compare(plain, sparse)]
    masks = sparse.method.masks
    print(
        f"\nT5 of {sparse.model.num_parameters() / 1e6:.1f} M parameters, {masks.num_weights / 1e6:.1f} M of them "
        f"prunable, {masks.sparsity:.2%} pruned; {args.batch_size} x {args.tokens} tokens, {sparse.args.optim.value}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(report(comparisons, parts(sparse, args.sparsity)))


if __name__ == "__main__":
    main()
