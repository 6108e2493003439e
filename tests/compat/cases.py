"""What every situation of a script has to pass: exact sparsity, a model that loads equal, a resume that is equal."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers import run_arguments
from hf_bimp import BIMPArguments, BIMPSeq2SeqArguments, BIMPSeq2SeqTrainer, BIMPTrainer, find_prunable
from trainers import assert_same_tensors

STEPS, MIDDLE, SPARSITY = 10, 6, 0.6
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    """A script of its own: what it trains, on what, and with what trainer.

    `model()` and `data()` are made anew for each run; `trainer` and `arguments` are the classes, `settings` what the
    script sets, `parts` what it passes to its trainer beside model, arguments and data.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], Any]
    trainer: type = BIMPTrainer
    arguments: type = BIMPArguments
    settings: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[], dict[str, Any]] = dict
    load: Callable[[Path, nn.Module], nn.Module] | None = None  # by default as its library loads

    def make(self, folder: Path, **changes: Any) -> BIMPTrainer:
        torch.manual_seed(0)
        budget = {"max_steps": STEPS, "target_sparsity": SPARSITY, "num_cycles": 2}
        saving = {"save_strategy": "steps", "save_steps": MIDDLE, "per_device_train_batch_size": 4}
        args = self.arguments(**run_arguments(folder, **(budget | saving | self.settings | changes)))
        data = self.data()
        given = {"train_dataset": data, "eval_dataset": data} | self.parts()
        return self.trainer(model=self.model(), args=args, **given)


def seq2seq(**changes: Any) -> dict[str, Any]:
    """The classes of a case that generates."""
    return {"trainer": BIMPSeq2SeqTrainer, "arguments": BIMPSeq2SeqArguments} | changes


def check(case: Case, folder: Path) -> BIMPTrainer:
    """Trains a case twice, the second time from the middle of the first; the trainer of the first."""
    whole = case.make(folder / "whole")
    whole.train()
    masks = whole.method.masks
    assert masks.num_pruned == round(SPARSITY * masks.num_weights)
    assert zeros(whole.model) == masks.num_pruned
    assert whole.results["theoretical_speedup"] is None or whole.results["theoretical_speedup"] > 1
    assert "train_loss" in whole.state.log_history[-1]
    loaded = loaded_by_its_library(case, folder / "whole", whole.model)
    assert_same_tensors(dict(loaded.state_dict()), dict(whole.model.state_dict()))
    assert zeros(loaded) == masks.num_pruned
    resumed = case.make(folder / "resumed")
    resumed.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{MIDDLE}"))
    assert_same_tensors(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    return whole


def zeros(model: nn.Module) -> int:
    """Of the weights that are pruned by default."""
    return sum(int((weight == 0).sum()) for weight in find_prunable(model).weights.values())


def loaded_by_its_library(case: Case, folder: Path, model: nn.Module) -> nn.Module:
    if case.load is not None:
        return case.load(folder, model)
    assert isinstance(model, PreTrainedModel)
    return type(model).from_pretrained(folder)


def tokens(count: int, length: int = 8, vocabulary: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for _ in range(count)]
