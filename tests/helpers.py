"""Tiny models, data and arguments that several test files share."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration, TrainerCallback

FEATURES, CLASSES, VOCABULARY = 8, 4, 32


class Classifier(nn.Module):
    """Two linear layers with normalisation and dropout between; ignores `num_items_in_batch` as most heads do."""

    def __init__(self, dropout: float = 0.0, hidden: int = 16):
        super().__init__()
        self.first = nn.Linear(FEATURES, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(self.dropout(self.norm(self.first(x)).relu()))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def classifier(dropout: float = 0.0, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(dropout)


def tiny_t5(dropout: float = 0.0, seed: int = 0) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def classification_items(count: int = 32, seed: int = 1) -> list[dict]:
    """Points whose class a linear rule decides, so that some training already learns it."""
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99))
    points = torch.randn(count, FEATURES, generator=generator)
    return [{"x": x, "labels": int((x @ rule).argmax())} for x in points]


def translation_items(count: int = 32, seed: int = 1) -> list[dict]:
    """Sources of one length; targets, the source's first tokens, of ragged lengths padded with -100."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        source = torch.randint(3, VOCABULARY, (7,), generator=generator)
        length = int(torch.randint(1, 8, (1,), generator=generator))
        labels = torch.cat([source[:length], torch.full((7 - length,), -100)])
        items.append({"input_ids": source, "attention_mask": torch.ones(7, dtype=torch.long), "labels": labels})
    return items


def run_arguments(output_dir: Path | str, **changes) -> dict:
    """Keyword arguments for `TrainingArguments` and its subclasses: on the CPU, quiet, nothing saved by default."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
    }
    return defaults | changes


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are pruned by default, found without the library: all linear ones that no embedding shares."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return {n: p for n, p in model.named_parameters() if id(p) in linear - embeddings}


def sparsity(model: nn.Module) -> float:
    weights = matrices(model).values()
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class At(TrainerCallback):
    """Calls `action(model, step)` at one Trainer event; registered before the library's own callback."""

    def __init__(self, event: str, action):
        self.action = action
        setattr(self, event, self._call)

    def _call(self, args, state, control, model=None, **kwargs):
        self.action(model, state.global_step)
