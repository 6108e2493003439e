"""Whatever else scripts do: data without a length, loaders and losses of their own, timm's models, searches."""

import pytest
import timm
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers import TrainerCallback

from compat.cases import Case, check, zeros
from helpers import classification_items, classifier, run_arguments
from hf_bimp import BIMPArguments, BIMPTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*experimental.*")


def into(folder, model: nn.Module) -> nn.Module:
    """The saved state dict, in a model of the script's own."""
    fresh = classifier(seed=9) if hasattr(model, "norm") else Plain()
    fresh.load_state_dict(load_file(folder / "model.safetensors"))
    return fresh


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from classification_items(64)


def rows():
    yield from ({"x": item["x"].tolist(), "labels": item["labels"]} for item in classification_items(64))


def streamed() -> IterableDataset:
    return IterableDataset.from_generator(rows).with_format("torch")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


class TupleTrainer(BIMPTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        points, labels = inputs
        logits = model(points)
        loss = nn.functional.cross_entropy(logits, labels)
        return (loss, logits) if return_outputs else loss


def pairs() -> TensorDataset:
    items = classification_items()
    return TensorDataset(torch.stack([item["x"] for item in items]), torch.tensor([item["labels"] for item in items]))


class LoaderTrainer(BIMPTrainer):
    def get_train_dataloader(self):
        return self.accelerator.prepare(DataLoader(classification_items(), batch_size=4, collate_fn=default_collate))


def photographs() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    rows = {"image": torch.randn(24, 3, 32, 32, generator=generator), "label": [i % 4 for i in range(24)]}
    return Dataset.from_dict({name: list(column) for name, column in rows.items()}).with_format("torch")


def by_timm(folder, model: nn.Module) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


CASES = {
    "a stream of torch": Case(classifier, Endless, load=into),
    "a stream of datasets": Case(classifier, streamed, load=into),
    "tuples": Case(Plain, pairs, TupleTrainer, parts=lambda: {"data_collator": default_collate}, load=into),
    "a loader of its own": Case(
        classifier, lambda: None, LoaderTrainer, parts=lambda: {"train_dataset": None}, load=into
    ),
    "timm": Case(lambda: timm.create_model("resnet10t", num_classes=4), photographs, load=by_timm),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "timm" else n for n in CASES])
def test_it_prunes_exactly_loads_equal_and_resumes_equal(tmp_path, name) -> None:
    check(CASES[name], tmp_path)


def test_an_optuna_search_prunes_every_trial(tmp_path) -> None:
    ends = []

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            ends.append((args.target_sparsity, zeros(model)))

    def space(trial) -> dict:
        return {
            "target_sparsity": trial.suggest_categorical("target_sparsity", [0.5, 0.9]),
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
        }

    args = BIMPArguments(**run_arguments(tmp_path, max_steps=6, target_sparsity=0.8, eval_strategy="epoch"))
    items = classification_items()
    trainer = BIMPTrainer(None, args, train_dataset=items, eval_dataset=items, model_init=lambda: classifier())
    trainer.add_callback(Look())
    best = trainer.hyperparameter_search(hp_space=space, n_trials=3, backend="optuna", direction="minimize")
    assert best.objective > 0 and len(ends) == 3
    assert all(count == round(goal * 192) for goal, count in ends)
