"""A tokenizer and a T5 small enough to be trained from scratch on a CPU within a minute or two."""

import math
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

PAD, EOS, UNK = SPECIALS = ["<pad>", "</s>", "<unk>"]


def _settled(tokenizer: Tokenizer, sentences: list[str]) -> models.Unigram:
    """Return the pieces of `tokenizer` ordered and scored by how often each stands in `sentences`.

    The trainer finds the same pieces every time, but walks its hash maps in a random order: the pieces' ids and the
    last digits of their scores differ from run to run. Counts do not.
    """
    counts = Counter(piece for encoding in tokenizer.encode_batch(sentences) for piece in encoding.tokens)
    pieces = sorted(tokenizer.get_vocab().keys() - set(SPECIALS), key=lambda piece: (-counts[piece], piece))
    # Half a count keeps the letters that no longer stand alone within reach of new words.
    scores = [(piece, math.log(max(counts[piece], 0.5) / counts.total())) for piece in pieces]
    return models.Unigram([(special, 0.0) for special in SPECIALS] + scores, unk_id=SPECIALS.index(UNK))


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a unigram tokenizer after T5's fashion: SentencePiece's space marks, and EOS after every sentence."""
    sentences = list(sentences)
    tokenizer = Tokenizer(models.Unigram())
    # Words are marked before digits are cut off, so that a digit within a word or a number gets no space of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.model = _settled(tokenizer, sentences)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    # Cleaning up would eat the spaces that some sentences do have before punctuation.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def tiny_t5(
    tokenizer: PreTrainedTokenizerFast,
    d_model: int = 64,
    d_ff: int = 256,
    num_layers: int = 2,
    num_heads: int = 4,
    dropout_rate: float = 0.0,
) -> T5ForConditionalGeneration:
    """Return a T5 for `tokenizer` with `num_layers` encoder and decoder layers, initialised from torch's seed."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=d_model,
        d_kv=d_model // num_heads,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        dropout_rate=dropout_rate,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)
