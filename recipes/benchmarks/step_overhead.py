"""Compare the time of a training step of `BIMPTrainer`, 90 % sparse, with that of plain `transformers.Trainer`.

    python recipes/benchmarks/step_overhead.py             # a T5 of T5-small's size, four runs, 15-20 minutes on a CPU
    python recipes/benchmarks/step_overhead.py --runs small --repeats 1

The runs are: `weights` at the given batch, `small` with a quarter of its tokens, at which masking weighs most, and at
those `n:m` (2:4, 50 % sparse) and `filters` (whole filters, as sparse as the weights).

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

MAX_RATIO = 1.03  # the target, of every run
# Each run's share of the given tokens, and what it prunes.
RUNS = {"weights": (1.0, "weight"), "small": (0.25, "weight"), "n:m": (0.25, "2:4"), "filters": (0.25, "filter")}
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


def build_trainer(cls: type[Trainer], arguments: TrainingArguments, args: argparse.Namespace, tokens: int) -> Trainer:
    """A trainer of either kind, for the same model and data."""
    set_seed(0)
    config = T5Config(
        d_model=args.d_model,
        d_ff=4 * args.d_model,
        num_layers=args.num_layers,
        vocab_size=args.vocab_size,
        decoder_start_token_id=0,
    )
    data = RandomPairs(arguments.max_steps * args.batch_size, tokens, args.vocab_size)
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


def ratios(comparisons: list[Comparison], clock: int) -> tuple[float, float, float]:
    """The median of sparse over plain on that clock, and the bounds of the middle half of the steps."""
    low, middle, high = quantiles([c.sparse[clock] / c.plain[clock] for c in comparisons], n=4, method="inclusive")
    return middle, low, high


def report(name: str, comparisons: list[Comparison], added: dict[str, float]) -> str:
    """The ratio of a run with its spread, and where the time goes."""
    step = Times(*(median(c.plain[clock] for c in comparisons) for clock in (0, 1)))
    sparse_step = Times(*(median(c.sparse[clock] for c in comparisons) for clock in (0, 1)))
    wall = ratios(comparisons, 0)
    lines = [f"{'median step':16}{'wall':>10}{'CPU':>12}"]
    for trainer, times in (("Trainer", step), ("BIMPTrainer", sparse_step)):
        lines.append(f"{trainer:16}{times.wall * 1e3:7.1f} ms{times.cpu * 1e3:9.1f} ms")
    for clock, what in enumerate(("wall time", "CPU time")):
        middle, low, high = ratios(comparisons, clock)
        spread = f"middle half of {len(comparisons)} steps: {low:.4f} to {high:.4f}"
        lines.append(f"{what} ratio: {middle:.4f} ({spread})")
    met = "met" if wall[0] <= MAX_RATIO else "MISSED"
    lines.append(f"target {met} by {name}: a wall time ratio of at most {MAX_RATIO}")
    lines.append("each part alone, and as a share of a plain step:")
    lines += [f"    {part:38}{value * 1e3:9.2f} ms{value / step.wall:9.2%}" for part, value in added.items()]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=[*RUNS], help="which of them (all)")
    parser.add_argument("--steps", type=int, default=20, help="counted steps of each trainer in a repeat (20)")
    parser.add_argument("--repeats", type=int, default=2, help="how often both train anew (2)")
    parser.add_argument("--sparsity", type=float, default=0.9, help="of the prunable weights (0.9)")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences of a batch (8)")
    parser.add_argument("--tokens", type=int, default=128, help="of a source, and of a target (128)")
    parser.add_argument("--d_model", type=int, default=512, help="width (T5-small's 512)")
    parser.add_argument("--num_layers", type=int, default=6, help="of the encoder, and of the decoder (6)")
    parser.add_argument("--vocab_size", type=int, default=32128, help="T5's 32128")
    return parser.parse_args()


def run(name: str, args: argparse.Namespace, folder: str) -> tuple[list[Comparison], BIMPTrainer]:
    """All steps of a run, and its last sparse trainer."""
    share, granularity = RUNS[name]
    shared = SHARED_ARGUMENTS | {
        "output_dir": folder,
        "max_steps": UNCOUNTED + args.steps + 1,  # a last one, while which the plain trainer is finishing
        "per_device_train_batch_size": args.batch_size,
    }
    target = {} if granularity == "2:4" else {"target_sparsity": args.sparsity}
    pruning = {"granularity": granularity, "num_cycles": 1, "dense_ratio": 0.0} | target
    schedule = {"retrain_schedule": "constant", "retrain_learning_rate": LEARNING_RATE}
    tokens = max(round(share * args.tokens), 1)
    plain = build_trainer(Trainer, TrainingArguments(**shared, lr_scheduler_type="constant"), args, tokens)
    sparse = build_trainer(BIMPTrainer, BIMPArguments(**shared, **pruning, **schedule), args, tokens)
    return [comparison for _ in range(args.repeats) for comparison in compare(plain, sparse)], sparse


def main() -> None:
    args = parse_arguments()
    table = [f"{'run':10}{'tokens':>10}{'sparsity':>10}{'wall ratio':>12}{'CPU ratio':>12}"]
    for name in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            comparisons, sparse = run(name, args, folder)
        masks, tokens = sparse.method.masks, sparse.train_dataset.tokens
        print(
            f"\n{name}: T5 of {sparse.model.num_parameters() / 1e6:.1f} M parameters, {masks.num_weights / 1e6:.1f} M "
            f"of them prunable, {masks.sparsity:.2%} pruned; {args.batch_size} x {tokens} tokens, "
            f"{sparse.args.optim.value}, torch {torch.__version__}, {torch.get_num_threads()} threads"
        )
        print(report(name, comparisons, parts(sparse, args.sparsity)))
        wall, cpu = (ratios(comparisons, clock)[0] for clock in (0, 1))
        table.append(f"{name:10}{f'{args.batch_size} x {tokens}':>10}{masks.sparsity:>10.2%}{wall:>12.4f}{cpu:>12.4f}")
    print("\n" + "\n".join(table))


if __name__ == "__main__":
    main()
