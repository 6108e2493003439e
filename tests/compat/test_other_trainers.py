"""The mixin over other libraries' trainers: exact sparsity, zeros held, resume bit for bit, one forward a step."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from helpers import At, classification_items, classifier, run_arguments, tiny_t5, translation_items
from hf_bimp import BIMPArguments, BIMPArgumentsMixin, BIMPMixin, BIMPTrainer, find_prunable
from trainers import assert_same_tensors

WORDS = ["<pad>", "<unk>", "<s>", "</s>", *"the a cat dog bird sat ran flew on over under mat tree house".split()]
STEPS = 8
PLAIN = {"bf16": False, "gradient_checkpointing": False}  # TRL's configurations have both on by default
# TRL sets an argument that Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **special)


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(WORDS[i] for i in torch.randint(4, len(WORDS), (6,), generator=generator)) for _ in range(count)]


def llama(kind: type[nn.Module] = LlamaForCausalLM, **changes) -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return kind(LlamaConfig(**size, **tokens, max_position_embeddings=32, tie_word_embeddings=False, **changes))


@dataclass
class SparseSFTConfig(BIMPArgumentsMixin, SFTConfig):
    pass


class SparseSFTTrainer(BIMPMixin, SFTTrainer):
    pass


@dataclass
class SparseDPOConfig(BIMPArgumentsMixin, DPOConfig):
    pass


class SparseDPOTrainer(BIMPMixin, DPOTrainer):
    pass


@dataclass
class SparseRewardConfig(BIMPArgumentsMixin, RewardConfig):
    pass


class SparseRewardTrainer(BIMPMixin, RewardTrainer):
    pass


@dataclass
class SparseSentenceArguments(BIMPArgumentsMixin, SentenceTransformerTrainingArguments):
    pass


class SparseSentenceTrainer(BIMPMixin, SentenceTransformerTrainer):
    pass


@dataclass
class SparseArguments(BIMPArgumentsMixin, TrainingArguments):
    pass


class OwnLossTrainer(BIMPMixin, Trainer):
    """A user's own subclass with a loss of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = 2 * outputs["loss"]
        return (loss, outputs) if return_outputs else loss


class AnsweringTrainer(Trainer):
    """`evaluate` and `predict` as transformers' question-answering example has them."""

    def __init__(self, *args, eval_examples=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        loader = self.get_eval_dataloader(self.eval_dataset if eval_dataset is None else eval_dataset)
        examples = self.eval_examples if eval_examples is None else eval_examples
        output = self.evaluation_loop(loader, description="Evaluation", prediction_loss_only=None)
        right = (output.predictions.argmax(-1) == [example["labels"] for example in examples]).mean()
        metrics = {f"{metric_key_prefix}_exact": float(right)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="test"):
        raise AssertionError("nobody has asked for predictions")


class SparseAnsweringTrainer(BIMPMixin, AnsweringTrainer):
    pass


def arguments(kind: type, folder: Path, **changes) -> BIMPArgumentsMixin:
    settings = {"max_steps": STEPS, "target_sparsity": 0.6, "num_cycles": 2, "save_strategy": "steps", "save_steps": 5}
    given = settings | {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05} | changes
    return kind(**run_arguments(folder, per_device_train_batch_size=4, **given))


def sft(folder: Path, **changes) -> SparseSFTTrainer:
    args = arguments(SparseSFTConfig, folder, **PLAIN, **changes)
    data = Dataset.from_dict({"text": sentences(32)})
    return SparseSFTTrainer(llama(), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def preferences() -> Dataset:
    prompts, chosen, rejected = (sentences(32, seed) for seed in range(3))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def dpo(folder: Path) -> SparseDPOTrainer:
    args = arguments(SparseDPOConfig, folder, **PLAIN)
    llama().save_pretrained(folder.parent / "model")  # the reference model is loaded from where the model came from
    model = LlamaForCausalLM.from_pretrained(folder.parent / "model")
    return SparseDPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer())


def reward(folder: Path) -> SparseRewardTrainer:
    args = arguments(SparseRewardConfig, folder, **PLAIN)
    model = llama(LlamaForSequenceClassification, num_labels=1)
    return SparseRewardTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer())


def sentence(folder: Path, kind: type = SparseSentenceTrainer) -> SentenceTransformerTrainer:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = folder.parent / "bert"
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **size)).save_pretrained(bert)
    tokenizer().save_pretrained(bert)
    model = SentenceTransformer(modules=[Transformer(str(bert), max_seq_length=16), Pooling(16)], device="cpu")
    data = Dataset.from_dict({"anchor": sentences(32), "positive": sentences(32, 1)})
    args, loss = arguments(SparseSentenceArguments, folder), MultipleNegativesRankingLoss(model)
    return kind(model=model, args=args, train_dataset=data, eval_dataset=data, loss=loss)


def own_loss(folder: Path) -> OwnLossTrainer:
    args = arguments(SparseArguments, folder)
    return OwnLossTrainer(model=classifier(), args=args, train_dataset=classification_items())


def answering(folder: Path) -> SparseAnsweringTrainer:
    args, held_out = (
        arguments(SparseArguments, folder, eval_strategy="steps", eval_steps=4),
        classification_items(9, 2),
    )
    return SparseAnsweringTrainer(
        model=classifier(),
        args=args,
        train_dataset=classification_items(),
        eval_dataset=held_out,
        eval_examples=held_out,
    )


class SentenceTrainerFirst(SentenceTransformerTrainer, BIMPTrainer):
    """The other way round, in which nobody calls a `_save` of ours."""


def sentence_first(folder: Path) -> SentenceTrainerFirst:
    return sentence(folder, SentenceTrainerFirst)


COMBINED = {f.__name__: f for f in (sft, dpo, reward, sentence, sentence_first, own_loss, answering)}


@pytest.mark.parametrize("name", COMBINED)
def test_prunes_exactly_holds_zeros_and_resumes(tmp_path, name) -> None:
    whole = COMBINED[name](tmp_path / "whole")
    held: list[bool] = []

    def look(model: nn.Module, step: int) -> None:
        masks = whole.method.masks
        held.append(all(not masks.weights[n][mask].any() for n, mask in masks.pruned.items()))

    whole.add_callback(At("on_step_end", look))
    whole.train()
    weights = find_prunable(whole.model).weights
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == round(0.6 * sum(weight.numel() for weight in weights.values()))
    assert len(held) == STEPS and all(held)
    assert whole.results["sparsity"]["prunable"] == whole.method.masks.sparsity

    resumed = COMBINED[name](tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same_tensors(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))


def test_metrics_around_prunings_are_those_of_the_overridden_evaluate(tmp_path) -> None:
    trainer = answering(tmp_path)
    trainer.train()
    for pruning in trainer.results["prunings"]:
        assert pruning["before"].keys() == pruning["after"].keys() == {"exact"}
    assert trainer.results["final"].keys() == {"exact"}
    evaluations = [entry["step"] for entry in trainer.state.log_history if "eval_exact" in entry]
    assert evaluations == [4, 8]  # those around prunings leave no trace


@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_forward_a_step_and_the_loss_of_the_parent(tmp_path, accumulation) -> None:
    def run(trainer: Trainer) -> tuple[int, list[float]]:
        forwards = []
        trainer.model.model.register_forward_hook(lambda module, *_: forwards.append(module.training))
        trainer.train()
        return sum(forwards), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    settings = {"gradient_accumulation_steps": accumulation, "logging_steps": 1, "dense_ratio": 0.9, "num_cycles": 1}
    ours = run(sft(tmp_path / "ours", **settings))
    plain_settings = {k: v for k, v in settings.items() if k not in ("dense_ratio", "num_cycles")}
    plain_args = SFTConfig(
        **run_arguments(tmp_path / "plain", max_steps=STEPS, per_device_train_batch_size=4, **plain_settings)
        | {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05},
        **PLAIN,
    )
    data = Dataset.from_dict({"text": sentences(32)})
    plain = run(SFTTrainer(llama(), plain_args, train_dataset=data, processing_class=tokenizer()))
    assert ours[0] == plain[0] == STEPS * accumulation
    # The learning rates of the dense phase are over its own steps: only the first loss is the same.
    assert ours[1][0] == pytest.approx(plain[1][0], rel=1e-5)  # outputs of two objects


def test_the_model_card_is_that_of_both_parents(tmp_path) -> None:
    trainer = sft(tmp_path / "run")
    trainer.train()
    trainer.create_model_card(model_name="sparse-llama", tags=["mine"])
    card = (tmp_path / "run" / "README.md").read_text()
    for part in (
        "trl",
        "sft",
        "mine",
        "hf_bimp",
        "pruned",
        f"{trainer.results['sparsity']['prunable']:.2%} of the prunable weights",
        "How it was pruned",
        "TRL",
    ):
        assert part in card


def test_a_model_is_given_by_its_folder_too(tmp_path) -> None:
    llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    args = arguments(SparseSFTConfig, tmp_path / "out", **PLAIN)
    data = Dataset.from_dict({"text": sentences(32)})
    trainer = SparseSFTTrainer(str(tmp_path / "model"), args, train_dataset=data)
    trainer.train()
    assert trainer.results["sparsity"]["prunable"] == pytest.approx(0.6, abs=1e-3)


def test_adapters_are_refused(tmp_path) -> None:
    from peft import LoraConfig

    args = arguments(SparseSFTConfig, tmp_path, **PLAIN)
    data = Dataset.from_dict({"text": sentences(8)})
    peft_config = LoraConfig(r=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="PEFT models are not supported.*Merge first"):
        SparseSFTTrainer(llama(), args, train_dataset=data, processing_class=tokenizer(), peft_config=peft_config)


def test_arguments_without_the_mixin_are_refused(tmp_path) -> None:
    args = TrainingArguments(**run_arguments(tmp_path))
    with pytest.raises(ValueError, match="BIMPArgumentsMixin before them.*not TrainingArguments"):
        OwnLossTrainer(model=classifier(), args=args, train_dataset=classification_items())


def test_what_a_parent_logs_beside_its_evaluation_is_measured_too(tmp_path) -> None:
    trainer = sft(tmp_path, eval_strategy="steps", eval_steps=STEPS)
    trainer.train()
    for pruning in trainer.results["prunings"]:
        assert {"loss", "entropy", "mean_token_accuracy"} <= pruning["before"].keys() == pruning["after"].keys()
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [STEPS]
    # As of an evaluation of its own: nothing of those around prunings is left to be averaged in.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(entries[0]["eval_loss"])
    again = trainer.state.log_history[-1]
    assert again["eval_entropy"] == pytest.approx(entries[0]["eval_entropy"])


def test_bimp_trainer_itself_goes_before_another_too(tmp_path) -> None:
    """With its loss per label of the accumulated batch, in one forward a step."""

    class Both(BIMPTrainer, SFTTrainer):
        pass

    args = arguments(SparseSFTConfig, tmp_path, gradient_accumulation_steps=2, **PLAIN)
    data, forwards = Dataset.from_dict({"text": sentences(32)}), []
    trainer = Both(llama(), args, train_dataset=data, processing_class=tokenizer())
    trainer.model.model.register_forward_hook(lambda module, *_: forwards.append(module.training))
    trainer.train()
    assert sum(forwards) == 2 * STEPS
    assert trainer.results["sparsity"]["prunable"] == pytest.approx(0.6, abs=1e-3)


def test_without_the_weighted_loss_it_is_that_of_trainer(tmp_path) -> None:
    class PlainLossTrainer(BIMPMixin, Trainer):
        pass

    def losses(kind: type[Trainer], args: TrainingArguments) -> list[float]:
        trainer = kind(model=tiny_t5(), args=args, train_dataset=translation_items())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    common = run_arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-3)
    plain = losses(Trainer, TrainingArguments(**common))
    assert losses(PlainLossTrainer, SparseArguments(**common, method="dense")) == pytest.approx(plain, rel=1e-6)
    assert losses(BIMPTrainer, BIMPArguments(**common, method="dense")) != pytest.approx(plain, rel=0.1)


class OwnFormatTrainer(Trainer):
    """Saves and loads in its own way, by signatures of its own."""

    def save_model(self, output_dir, _internal_call=False):
        super().save_model(output_dir, _internal_call=_internal_call)

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), Path(output_dir) / "own.pt")

    def _load_from_checkpoint(self, folder, model=None):
        self.model.load_state_dict(torch.load(Path(folder) / "own.pt"))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class SparseOwnFormatTrainer(BIMPMixin, OwnFormatTrainer):
    pass


def test_a_format_of_ones_own_is_resumed_and_the_best_is_loaded(tmp_path) -> None:
    def run(folder: str, resume: str | None = None) -> SparseOwnFormatTrainer:
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
        args = arguments(SparseArguments, tmp_path / folder, **best)
        items = classification_items()
        trainer = SparseOwnFormatTrainer(model=classifier(), args=args, train_dataset=items, eval_dataset=items)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    assert (tmp_path / "whole" / "own.pt").is_file() and whole.results["final"]
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert_same_tensors(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
