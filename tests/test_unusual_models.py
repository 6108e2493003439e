"""Models of every make: trained, saved so that they load, or refused with the way out before any training."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import BertConfig, BertForSequenceClassification, DebertaV2Config, DebertaV2ForSequenceClassification

from helpers import classification_items, classifier, matrices, snapshot, sparsity, tiny_t5, translation_items
from hf_bimp import make_masks
from hf_bimp.reporting.flops import count_multiply_adds
from trainers import assert_same_tensors, make_trainer

SAVING = {"save_strategy": "steps", "save_steps": 8}
BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def tokens(count: int = 32) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 32, (8,), generator=generator), "labels": i % 2} for i in range(count)]


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(**BERT, max_position_embeddings=16))


# ---- Adapters ----

# PEFT asks Transformers for what that has renamed.
renamed = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")


def with_adapter(way: str) -> nn.Module:
    model, config = tiny_t5(), LoraConfig(r=2, target_modules=["q", "v"])
    if way == "add_adapter":
        model.add_adapter(config)
        return model
    return get_peft_model(model, config) if way == "get_peft_model" else inject_adapter_in_model(config, model)


@renamed
@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model", "inject_adapter_in_model"])
def test_adapters_are_refused_however_they_came_in(tmp_path, way) -> None:
    with pytest.raises(ValueError, match="PEFT models are not supported.*has adapters.*Merge first"):
        make_trainer(tmp_path, with_adapter(way), translation_items())


@renamed
def test_adapters_within_a_model_and_those_that_come_later(tmp_path) -> None:
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = with_adapter("get_peft_model"), nn.Linear(4, 4)

    with pytest.raises(ValueError, match="inner has adapters"):
        make_trainer(tmp_path, Wrapped(), translation_items())
    trainer = make_trainer(tmp_path, tiny_t5(), translation_items())
    trainer.model.add_adapter(LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match="adapters"):
        trainer.train()


# ---- torch.compile ----


@pytest.mark.parametrize("make", [classifier, bert], ids=["module", "transformers"])
def test_a_compiled_model_has_its_own_names(tmp_path, make) -> None:
    items, columns = (classification_items(), {}) if make is classifier else (tokens(), {})
    columns |= {"remove_unused_columns": False, "label_names": ["labels"]}  # compiling hides the signature
    whole = make_trainer(tmp_path / "whole", torch.compile(make(), backend="eager"), items, **SAVING, **columns)
    whole.train()
    bare = whole.bare_model
    assert not any("_orig_mod" in name for name in whole.method.masks.weights)
    assert whole.results["theoretical_speedup"] > 2
    saved = load_file(tmp_path / "whole" / "model.safetensors")
    assert_same_tensors(saved, {name: tensor for name, tensor in bare.state_dict().items() if name in saved})
    assert saved.keys() == set(bare.state_dict()) and sparsity(bare) == pytest.approx(0.8, abs=0.01)
    again = make_trainer(tmp_path / "again", torch.compile(make(seed=3), backend="eager"), items, **SAVING, **columns)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same_tensors(again.bare_model.state_dict(), bare.state_dict())


# ---- Weights in odd places ----


class Twice(nn.Module):
    """A layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b, self.c = self.a, nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.c(self.b(self.a(x).relu()).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Linear(8, 4)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(self.convolution(x.view(-1, 2, 2, 2)).relu().mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class WithEmptyHead(Twice):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(8, 0)


@pytest.mark.parametrize("make", [Twice, ChannelsLast, WithEmptyHead])
def test_they_are_saved_so_that_they_load(tmp_path, make) -> None:
    trainer = make_trainer(tmp_path / "whole", make(), **SAVING)
    trainer.train()
    masks = trainer.method.masks
    assert masks.num_pruned == round(0.8 * masks.num_weights)
    loaded = make()
    loaded.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    assert_same_tensors(loaded.state_dict(), trainer.model.state_dict())
    again = make_trainer(tmp_path / "again", make(), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert_same_tensors(again.model.state_dict(), trainer.model.state_dict())


def test_a_weight_without_elements_stays_dense(tmp_path) -> None:
    trainer = make_trainer(tmp_path, WithEmptyHead())
    trainer.train()
    assert trainer.results["stays_dense"] == {"spare.weight": "it has no elements"}


def test_lazy_layers_are_refused_until_a_batch_has_passed(tmp_path) -> None:
    model = classifier()
    model.first = nn.LazyLinear(16)
    with pytest.raises(ValueError, match="first is a lazy .*Run a batch through"):
        make_trainer(tmp_path, model)
    model(torch.zeros(2, 8))
    make_trainer(tmp_path, model).train()
    model.norm = nn.LazyBatchNorm1d()
    with pytest.raises(ValueError, match="norm is a lazy"):
        make_trainer(tmp_path, model)


def test_hooks_of_torch_prune_are_refused_until_they_are_made_permanent(tmp_path) -> None:
    model = classifier()
    prune.l1_unstructured(model.first, "weight", 0.5)
    with pytest.raises(ValueError, match=r"first is pruned by torch.nn.utils.prune.*prune.remove.*keep_zeros"):
        make_trainer(tmp_path, model)
    prune.remove(model.first, "weight")
    trainer = make_trainer(tmp_path, model, keep_zeros=True)
    trainer.train()
    assert trainer.plan.initial_sparsity == 64 / 192 and sparsity(model) == pytest.approx(0.8, abs=0.005)


# ---- Weights that are computed ----


class Normed(nn.Module):
    """a is reparametrized, b and c are not."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = norm(nn.Conv1d(8, 8, 1)), nn.Conv1d(8, 16, 1), nn.Conv1d(16, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.c(self.b(self.a(x[..., None])).relu()).relu()
        logits = self.last(x.mean(-1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


NORMS = [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{norm.__module__}.{norm.__name__}")
def test_one_computed_weight_leaves_the_other_filters(tmp_path, norm) -> None:
    model = Normed(norm)
    model(torch.zeros(2, 8))  # the older ones hold a tensor of the last pass, which cannot be copied
    masks, reasons = make_masks(model, lambda: {"x": torch.randn(2, 8)}, "filter")
    assert list(masks.weights) == ["b.weight", "c.weight"]
    assert all("is computed" in reason for name, reason in reasons.items() if name.startswith("a."))
    trainer = make_trainer(tmp_path, model, granularity="filter", target_sparsity=0.5, num_cycles=1)
    trainer.train()
    assert sum(bool((row == 0).all()) for row in model.b.weight) == 8


# ---- Counting ----


def test_a_parameter_that_is_a_modules_input_can_be_counted(tmp_path) -> None:
    torch.manual_seed(0)
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    config = DebertaV2Config(**BERT, **relative, max_position_embeddings=16, position_buckets=4)
    trainer = make_trainer(tmp_path, DebertaV2ForSequenceClassification(config), tokens())
    trainer.train()
    assert trainer.results["theoretical_speedup"] > 2
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class Restless(nn.Module):
    """Every forward pass changes it, whatever its mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.slow = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(8, 16).requires_grad_(False)
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("queue", torch.zeros(4, 8))
        self.register_buffer("codes", torch.ones(16))
        self.register_buffer("mean", None)
        self.calls, self.seen = 0, []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        self.queue[:2] = x[:2]
        self.codes = self.codes * 0.9
        self.mean = x.mean(0)
        self.calls += 1
        self.seen.append(len(x))
        with torch.no_grad():
            self.slow.weight.lerp_(self.first.weight, 0.1)
            self.slow.bias.data = self.slow.bias.data + 1
        logits = nn.functional.linear((self.first(x) * self.codes).relu(), self.last.weight, self.last.bias)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_counting_leaves_no_trace() -> None:
    model = Restless()
    before, tensors = snapshot(model), [*model.buffers(), *model.parameters()]
    batch = {"x": torch.randn(4, 8), "labels": torch.zeros(4, dtype=torch.long)}
    counted = count_multiply_adds(model, batch)
    assert counted.per_weight["first.weight"] == 4 * 8 * 16
    assert_same_tensors(model.state_dict(), before)
    assert all(one is other for one, other in zip([*model.buffers(), *model.parameters()], tensors, strict=True))
    assert (model.calls, model.seen, model.mean, model.training) == (0, [], None, True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_counting_leaves_scripted_modules_and_power_iterations_as_they_were() -> None:
    layers = torch.jit.script(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 4)
    model = nn.Sequential(*layers)
    before = snapshot(model)
    assert count_multiply_adds(model, torch.randn(2, 8)).total > 0
    assert_same_tensors(model.state_dict(), before)
    assert all(module.training for module in model.modules())


def test_a_run_counts_the_passes_of_plain_training(tmp_path) -> None:
    whole = make_trainer(tmp_path / "whole", Restless(), **SAVING)
    whole.train()
    assert whole.model.passes == whole.model.calls == 12 and whole.results["theoretical_speedup"] > 1
    again = make_trainer(tmp_path / "again", Restless(), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-8"))
    assert again.model.passes == 12
    assert_same_tensors(again.model.state_dict(), whole.model.state_dict())


def test_a_weight_that_is_used_without_its_layer_is_used(tmp_path, caplog) -> None:
    model = Restless()
    model.spare = nn.Linear(4, 4)
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert "does not use 1 of its prunable weights" in caplog.text and "elements): spare.weight." in caplog.text
    assert matrices(model)["last.weight"].shape == (4, 16)


class Hoarding(Restless):
    """Keeps what no state dict holds, and a sparse buffer."""

    def __init__(self):
        super().__init__()
        self.total, self.nested = torch.zeros(8), {"seen": [[]]}
        self.register_buffer("adjacency", torch.eye(8).to_sparse(), persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.total += x.detach().sum(0)
        self.nested["seen"][0].append(1)
        return super().forward(torch.sparse.mm(self.adjacency, x.T).T, labels)


@pytest.mark.parametrize("changes", [{}, {"retrain_schedule": "acc_allr"}], ids=str)
def test_measuring_leaves_a_model_that_every_pass_changes_as_training_alone_does(tmp_path, changes) -> None:
    data = {"eval_dataset": classification_items(16)}
    runs = []
    for evaluated in (True, False):
        trainer = make_trainer(tmp_path, Hoarding(), evaluate_prunings=evaluated, **changes, **data)
        trainer.train()
        runs.append(trainer.model)
        assert trainer.model.passes == trainer.model.calls == len(trainer.model.nested["seen"][0]) == 12
    assert_same_tensors(runs[0].state_dict(), runs[1].state_dict())
    assert torch.equal(runs[0].total, runs[1].total)
