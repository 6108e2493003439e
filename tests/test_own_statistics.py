"""Two processes with batch norms: each measures with what a checkpoint holds, and so does a resumed run."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import FEATURES, run_arguments
from hf_bimp import BIMPArguments, BIMPTrainer
from processes import output_of
from trainers import assert_same_tensors

STEPS, MIDDLE = 48, 16
CLASSES = 4


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.norm(self.first(x)).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def items(count: int) -> list[dict]:
    """Of far apart means, so that the running statistics of two processes differ."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, FEATURES, generator=generator) * (1 + torch.arange(count)[:, None] % 7)
    return [{"x": x, "labels": int(x[:4].argmax())} for x in points]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def train(folder: Path, resume: str | None = None) -> None:
    saving = {"save_strategy": "steps", "save_steps": MIDDLE, "eval_strategy": "steps", "eval_steps": MIDDLE}
    budget = {"max_steps": STEPS, "num_cycles": 3, "target_sparsity": 0.95, "retrain_schedule": "acc_allr"}
    args = BIMPArguments(**run_arguments(folder, per_device_train_batch_size=4, **saving, **budget))
    data = {"train_dataset": items(200), "eval_dataset": items(64), "compute_metrics": accuracy}
    trainer = BIMPTrainer(Normed(), args, **data)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    output_of(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, folder)
    return folder


def test_a_resumed_run_measures_and_learns_the_same(runs) -> None:
    whole, resumed = (json.loads((runs / name / "bimp_results.json").read_text()) for name in ("whole", "resumed"))
    assert 0 < max(record["d1"] for record in whole["prunings"]) < 1
    assert whole["prunings"] == resumed["prunings"] and whole["final"] == resumed["final"]
    weights = (load_file(runs / name / "model.safetensors") for name in ("whole", "resumed"))
    assert_same_tensors(*weights)


def test_the_metrics_are_those_of_the_saved_model(runs) -> None:
    log = json.loads((runs / "whole" / "log.json").read_text())
    for step in (MIDDLE, 2 * MIDDLE):
        model = Normed().eval()
        model.load_state_dict(load_file(runs / "whole" / f"checkpoint-{step}" / "model.safetensors"))
        held_out = items(64)
        points, labels = torch.stack([i["x"] for i in held_out]), torch.tensor([i["labels"] for i in held_out])
        with torch.no_grad():
            share = float((model(points, labels)["logits"].argmax(-1) == labels).double().mean())
        logged = [entry["eval_accuracy"] for entry in log if entry["step"] == step and "eval_accuracy" in entry]
        assert logged == [pytest.approx(share, abs=1e-12)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train(folder / "whole")
    torch.distributed.barrier()
    train(folder / "resumed", str(folder / "whole" / f"checkpoint-{MIDDLE}"))
    assert os.environ["WORLD_SIZE"] == "2"
