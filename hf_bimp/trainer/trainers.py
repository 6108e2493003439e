"""`BIMPTrainer` and `BIMPSeq2SeqTrainer`: the mixin over Transformers' own trainers."""

from transformers import Seq2SeqTrainer, Trainer

from .loss import LabelWeightedLoss
from .mixin import BIMPMixin
from .plain_models import PlainModels


class BIMPTrainer(LabelWeightedLoss, PlainModels, BIMPMixin, Trainer):
    """`Trainer` that trains, prunes and retrains within one `train()` call, as `BIMPArguments` says.

    Its loss is the mean per label of the whole accumulated batch (`LabelWeightedLoss`), and cross-entropy for models
    that know of no labels (`PlainModels`); with `class PlainLossTrainer(BIMPMixin, Trainer)` it is Transformers' own.
    """


class BIMPSeq2SeqTrainer(BIMPTrainer, Seq2SeqTrainer):
    """`BIMPTrainer` that evaluates by generating, as `Seq2SeqTrainer` does."""
