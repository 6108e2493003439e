"""The same run on one process or two, in one micro-batch or two, learns the same and prunes the same weights."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import At, classification_items, classifier, matrices, run_arguments, tiny_t5, translation_items
from safetensors.torch import load_file, save_file

from hf_bimp import BIMPArguments, BIMPTrainer

STEPS, BOUNDARIES = 12, (4, 8)
MODELS = {"classifier": (classifier, classification_items), "t5": (tiny_t5, translation_items)}
SCHEDULES = {"classifier": "acc_allr", "t5": "allr"}
ITEMS = 37  # the last global batch of an epoch is smaller


def train(folder: Path, name: str, batch: int, accumulation: int, rank: int = 0, **changes) -> None:
    """Trains and leaves in `folder` the losses and, by rank, the weights before and after each pruning."""
    make_model, make_items = MODELS[name]
    seen: dict[str, torch.Tensor] = {}
    defaults = dict(
        max_steps=STEPS,
        dense_ratio=BOUNDARIES[0] / STEPS,
        num_cycles=2,
        target_sparsity=0.8,
        retrain_schedule=SCHEDULES[name],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        optim="sgd",
        optim_args="momentum=0.9",
        learning_rate=0.1,
        max_grad_norm=1.0,
    )
    trainer = BIMPTrainer(
        model=make_model(),
        args=BIMPArguments(**run_arguments(folder, **(defaults | changes))),
        train_dataset=make_items(ITEMS if accumulation == 1 or batch * accumulation == 8 else ITEMS),
    )

    def keep(prefix: str):
        def action(model: torch.nn.Module, step: int) -> None:
            if step in BOUNDARIES:
                weights = matrices(getattr(model, "module", model))
                seen.update({f"{prefix} {step} {n}": w.detach().clone() for n, w in weights.items()})

        return action

    trainer.add_callback(At("on_step_end", keep("before")))
    trainer.add_callback(At("on_pre_optimizer_step", keep("after")))
    trainer.train()
    save_file(seen, folder / f"weights-{rank}.safetensors")
    if rank == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


def launch(folder: Path, name: str, batch: int, accumulation: int, **changes) -> Path:
    """The same in two processes, as `torchrun` starts them."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    task = json.dumps([str(folder), name, batch, accumulation, changes])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, task], env=environment, timeout=240, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def log_of(folder: Path, key: str) -> list[float]:
    return [entry[key] for entry in json.loads((folder / "log.json").read_text()) if key in entry]


def assert_equivalent(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    losses = log_of(one, "loss"), log_of(other, "loss")
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=tolerance)
    for key in ("prune_d1", "prune_threshold", "prune_retrain_peak"):
        values = log_of(one, key), log_of(other, key)
        assert len(values[0]) == 2 and values[0] == pytest.approx(values[1], rel=1e-3)
    weights = load_file(one / "weights-0.safetensors"), load_file(other / "weights-0.safetensors")
    assert len(weights[0]) == len(weights[1]) > 0
    for boundary, threshold in zip(BOUNDARIES, log_of(one, "prune_threshold"), strict=True):
        pruned = 0
        for name in (n for n in weights[0] if n.startswith(f"after {boundary} ")):
            masks = [after[name] == 0 for after in weights]
            pruned += int(masks[0].sum())
            differing = masks[0] != masks[1]
            magnitudes = weights[0][name.replace("after", "before")][differing].abs()
            assert ((magnitudes - threshold).abs() < 1e-5).all()
        assert pruned > 0


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory) -> tuple[str, Path]:
    """One process, batches of 8 at once."""
    folder = tmp_path_factory.mktemp(request.param)
    train(folder, request.param, batch=8, accumulation=1)
    return request.param, folder


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_batches_learn_the_same(tmp_path, reference, accumulation):
    name, whole = reference
    train(tmp_path, name, batch=8 // accumulation, accumulation=accumulation)
    assert_equivalent(whole, tmp_path)


def test_label_smoothing_is_normalised_alike(tmp_path):
    for accumulation in (1, 2):
        folder = tmp_path / str(accumulation)
        folder.mkdir()
        train(folder, "t5", batch=8 // accumulation, accumulation=accumulation, label_smoothing_factor=0.1)
    assert_equivalent(tmp_path / "1", tmp_path / "2")


def assert_ranks_agree(folder: Path) -> None:
    ranks = [load_file(folder / f"weights-{rank}.safetensors") for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys() and len(ranks[0]) > 0
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])


def test_two_processes_learn_the_same_as_one(tmp_path, reference):
    name, whole = reference
    # Epochs of an even number of items, since Accelerate repeats items to fill up the last batch of two processes.
    two = launch(tmp_path / "two", name, batch=4, accumulation=1)
    assert_ranks_agree(two)
    assert_equivalent(whole, two)


def test_two_processes_that_accumulate_learn_the_same(tmp_path, reference):
    name, whole = reference
    if name == "classifier":
        pytest.skip("the T5's ragged labels show it")
    two = launch(tmp_path / "two", name, batch=2, accumulation=2)
    assert_ranks_agree(two)
    assert_equivalent(whole, two)


if __name__ == "__main__":
    folder, name, batch, accumulation, changes = json.loads(sys.argv[1])
    train(Path(folder), name, batch, accumulation, rank=int(os.environ["RANK"]), **changes)
