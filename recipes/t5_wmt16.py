"""Prune T5 while training it to translate, and score it with BLEU.

    accelerate launch recipes/t5_wmt16.py  # offline sample, tiny T5, 2-4 minutes
    accelerate launch --mixed_precision bf16 recipes/t5_wmt16.py recipes/configs/t5_small_wmt16_de_en.yaml
    accelerate launch recipes/t5_wmt16.py recipes/configs/t5_multi30k.yaml --dataset_name path/to/multi30k

Any field of `BIMPSeq2SeqArguments`, `DataArguments` or `ModelArguments` can be given in the file and overridden on the
command line. The offline sample and its tiny T5 need no network.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_bimp import BIMPSeq2SeqArguments, BIMPSeq2SeqTrainer
from hf_bimp.metrics import Bleu
from shared.cli import parse
from shared.outcome import Task, report, train_and_test
from shared.tiny_t5 import tiny_t5, train_tokenizer
from shared.translation_data import DataArguments, load_pairs, sentences, tokenize

DEFAULT_CONFIG = "t5_sample.yaml"
METRIC = "bleu"
WMT16_COMMAND = "accelerate launch recipes/t5_wmt16.py recipes/configs/t5_small_wmt16_de_en.yaml"


@dataclass
class ModelArguments:
    """Which model to train: a checkpoint, or a tiny T5 from scratch with a tokenizer trained on the data."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Any seq2seq checkpoint (google-t5/t5-small). By default the tiny T5 below."}
    )
    tiny_vocab_size: int = field(default=400, metadata={"help": "Tokens of the trained unigram vocabulary."})
    tiny_d_model: int = field(default=64, metadata={"help": "Width; the feed-forward layers have four times as much."})
    tiny_num_layers: int = field(default=2, metadata={"help": "Layers in the encoder, and in the decoder."})
    tiny_num_heads: int = field(default=4, metadata={"help": "Attention heads."})
    tiny_dropout: float = field(default=0.0, metadata={"help": "Dropout rate."})


ARGUMENTS = (DataArguments, ModelArguments, BIMPSeq2SeqArguments)


def build_model(
    args: ModelArguments, texts: Callable[[], list[str]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; `texts` gives what a new tokenizer is trained on."""
    if args.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        return AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path), tokenizer
    tokenizer = train_tokenizer(texts(), args.tiny_vocab_size)
    model = tiny_t5(
        tokenizer,
        d_model=args.tiny_d_model,
        d_ff=4 * args.tiny_d_model,
        num_layers=args.tiny_num_layers,
        num_heads=args.tiny_num_heads,
        dropout_rate=args.tiny_dropout,
    )
    return model, tokenizer


class BleuOfTokens:
    """`compute_metrics` for generated token ids; `signature` is sacrebleu's, of the last score."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.metric, self.signature = tokenizer, Bleu(keep_in_memory=True), None

    def __call__(self, evaluated: EvalPrediction) -> dict[str, float]:
        predictions, references = self._decode(evaluated.predictions), self._decode(evaluated.label_ids)
        result = self.metric.compute(predictions=predictions, references=references)
        self.signature = result["signature"]
        return {"bleu": result["bleu"]}

    def _decode(self, tokens: np.ndarray) -> list[str]:
        padded = np.where(tokens == -100, self.tokenizer.pad_token_id, tokens)  # -100 fills up shorter rows
        return [text.strip() for text in self.tokenizer.batch_decode(padded, skip_special_tokens=True)]


@dataclass
class Translation(Task):
    """A task whose results tell how BLEU was computed."""

    bleu: BleuOfTokens | None = None

    def run(self) -> dict:
        results = train_and_test(self.trainer, self.test)
        results["bleu_signature"] = self.bleu.signature
        report(self.trainer, self.metric, self.card)
        return results


def build_task(
    data_args: DataArguments, model_args: ModelArguments, args: BIMPSeq2SeqArguments, restarts: bool = False
) -> Translation:
    """The whole task; with `restarts` every `train()` starts from a new model, as hyperparameter search wants it."""
    set_seed(args.seed)
    pairs = load_pairs(data_args)

    def texts() -> list[str]:
        return sentences(data_args, pairs["train"])

    model, tokenizer = build_model(model_args, texts)
    encoded = tokenize(data_args, pairs, tokenizer)
    bleu = BleuOfTokens(tokenizer)
    trainer = BIMPSeq2SeqTrainer(
        **({"model_init": lambda: build_model(model_args, texts)[0]} if restarts else {"model": model}),
        args=args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=bleu,
    )
    card = {
        "tasks": "translation",
        "language": [data_args.source_lang, data_args.target_lang],
        "dataset": data_args.dataset_name or "Unicode CLDR sample",
        "dataset_tags": data_args.dataset_name if data_args.dataset_name == "wmt/wmt16" else None,
        "dataset_args": data_args.dataset_config,
        "finetuned_from": model_args.model_name_or_path,
    }
    return Translation(trainer, encoded.get("test"), METRIC, card, bleu)


def main() -> None:
    data_args, model_args, args = parse(ARGUMENTS, DEFAULT_CONFIG)
    if data_args.dataset_name is None and args.should_log:
        print("Using the offline English-German sample (Unicode CLDR). To prune T5-small on WMT16, run:")
        print(f"    {WMT16_COMMAND}")
    build_task(data_args, model_args, args).run()


if __name__ == "__main__":
    main()
