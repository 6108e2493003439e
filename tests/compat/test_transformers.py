"""The shapes of Transformers' example scripts, each with its own models, labels and collators."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from compat.cases import SIZE, Case, check, seq2seq, tokens
from helpers import tiny_t5, translation_items
from hf_bimp import BIMPTrainer

COUNT = 24
BERT = SIZE | {"vocab_size": 32, "max_position_embeddings": 32}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<mask>", *(f"w{i}" for i in range(29))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def texts(label) -> list[dict]:
    return [{"input_ids": ids, "labels": label(i)} for i, ids in enumerate(tokens(COUNT))]


def words(count: int = COUNT) -> list[dict]:
    """Of ragged lengths, for collators that pad."""
    return [{"input_ids": ids[: 4 + i % 4].tolist()} for i, ids in enumerate(tokens(count))]


def tagged() -> list[dict]:
    return [item | {"labels": [-100, *(t % 3 for t in item["input_ids"][1:])]} for item in words()]


def choices() -> list[dict]:
    return [{"input_ids": torch.stack(tokens(4, seed=i)), "labels": i % 4} for i in range(COUNT)]


def questions() -> list[dict]:
    return [{"input_ids": ids, "start_positions": i % 8, "end_positions": 7} for i, ids in enumerate(tokens(COUNT))]


def images(label, size: int = 16) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, size, size, generator=generator), "labels": label(i)} for i in range(COUNT)
    ]


def segmented() -> list[dict]:
    return images(lambda i: torch.randint(0, 3, (32, 32), generator=torch.Generator().manual_seed(i)), 32)


def spoken() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_features": torch.randn(8, 16, generator=generator), "labels": ids} for ids in tokens(COUNT, length=6)
    ]


def bert(kind: type, **changes):
    return lambda: kind(BertConfig(**BERT, **changes))


def padding(collator: type, **settings):
    return lambda: {"data_collator": collator(tokenizer(), **settings)}


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32))


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZE, vocab_size=32, max_position_embeddings=32))


def deberta() -> DebertaV2ForSequenceClassification:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    return DebertaV2ForSequenceClassification(DebertaV2Config(**BERT, **relative, position_buckets=4))


def resnet() -> ResNetForImageClassification:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=4))


def segformer() -> SegformerForSemanticSegmentation:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    reduced = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **reduced, decoder_hidden_size=8, num_labels=3))


def whisper() -> WhisperForConditionalGeneration:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    limits = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
    return WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **heads, **ids, **limits, vocab_size=32, suppress_tokens=[], begin_suppress_tokens=[])
    )


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


REGRESSION = {"num_labels": 1, "problem_type": "regression"}
SEVERAL = {"num_labels": 3, "problem_type": "multi_label_classification"}
LM = {"mlm": False}

CASES = {
    "text classification": Case(
        bert(BertForSequenceClassification, num_labels=2),
        lambda: texts(lambda i: i % 2),
        settings={"eval_strategy": "steps", "eval_steps": 5},
        parts=lambda: {"compute_metrics": accuracy},
    ),
    "regression": Case(bert(BertForSequenceClassification, **REGRESSION), lambda: texts(lambda i: i / COUNT)),
    "several labels": Case(
        bert(BertForSequenceClassification, **SEVERAL), lambda: texts(lambda i: torch.eye(3)[i % 3])
    ),
    "causal language model, Conv1D": Case(gpt2, words, parts=padding(DataCollatorForLanguageModeling, **LM)),
    "causal language model": Case(llama, words, parts=padding(DataCollatorForLanguageModeling, **LM)),
    "masked language model": Case(
        bert(BertForMaskedLM), words, parts=padding(DataCollatorForLanguageModeling, mlm_probability=0.4)
    ),
    "translation, generating": Case(
        tiny_t5,
        lambda: translation_items(COUNT),
        **seq2seq(settings={"predict_with_generate": True, "eval_strategy": "steps", "eval_steps": 5}),
        parts=padding(DataCollatorForSeq2Seq),
    ),
    "token classification": Case(
        bert(BertForTokenClassification, num_labels=3), tagged, parts=padding(DataCollatorForTokenClassification)
    ),
    "multiple choice": Case(bert(BertForMultipleChoice), choices),
    "question answering": Case(bert(BertForQuestionAnswering), questions),
    "relative attention": Case(deberta, lambda: texts(lambda i: i % 2)),
    "image classification": Case(
        lambda: ViTForImageClassification(ViTConfig(**SIZE, image_size=16, patch_size=8, num_labels=4)),
        lambda: images(lambda i: i % 4),
    ),
    "image classification, convolutions": Case(resnet, lambda: images(lambda i: i % 4, 32)),
    "semantic segmentation": Case(segformer, segmented),
    "speech recognition": Case(whisper, spoken, **seq2seq()),
}
FAST = ("text classification", "causal language model, Conv1D")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_it_prunes_exactly_loads_equal_and_resumes_equal(tmp_path, name) -> None:
    trainer = check(CASES[name], tmp_path)
    assert trainer.results["theoretical_speedup"] is not None


class QuestionAnsweringTrainer(BIMPTrainer):
    """As the example's: `evaluate` and `predict` take the examples too, and post-process what the model puts out."""

    def __init__(self, *args, eval_examples=None, post_process_function=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.eval_examples, self.post_process_function = eval_examples, post_process_function

    def outputs(self, loader, ignore_keys, metric_key_prefix):
        metrics, self.compute_metrics = self.compute_metrics, None  # they are for answers
        try:
            return self.evaluation_loop(loader, "", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        finally:
            self.compute_metrics = metrics

    def evaluate(self, eval_dataset=None, eval_examples=None, ignore_keys=None, metric_key_prefix="eval"):
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        examples = self.eval_examples if eval_examples is None else eval_examples
        output = self.outputs(self.get_eval_dataloader(data), ignore_keys, metric_key_prefix)
        answers = self.post_process_function(examples, data, output.predictions)
        found = {f"{metric_key_prefix}_{name}": value for name, value in self.compute_metrics(answers).items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def predict(self, predict_dataset, predict_examples, ignore_keys=None, metric_key_prefix="test"):
        output = self.outputs(self.get_test_dataloader(predict_dataset), ignore_keys, metric_key_prefix)
        return self.post_process_function(predict_examples, predict_dataset, output.predictions)


def answers(examples, data, predictions):
    return list(zip(examples, *predictions, strict=True))


def exact(found: list) -> dict[str, float]:
    right = [example["start_positions"] == start.argmax() for example, start, _ in found]
    return {"exact": sum(right) / len(found)}


def test_question_answering_with_its_own_trainer(tmp_path) -> None:
    case = Case(
        bert(BertForQuestionAnswering),
        questions,
        trainer=QuestionAnsweringTrainer,
        settings={"eval_strategy": "steps", "eval_steps": 5},
        parts=lambda: {
            "eval_examples": questions(),
            "post_process_function": answers,
            "compute_metrics": exact,
        },
    )
    trainer = check(case, tmp_path)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_exact" in entry] == [5, 10]
    assert all(pruning["before"].keys() == {"exact"} for pruning in trainer.results["prunings"])
    assert len(trainer.predict(questions(), questions())) == COUNT
