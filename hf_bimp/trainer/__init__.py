"""Everything that ties a run to `transformers.Trainer`."""

from .cross_entropy import CrossEntropy
from .mixin import BIMPMixin
from .trainers import BIMPSeq2SeqTrainer, BIMPTrainer

__all__ = ["BIMPMixin", "BIMPSeq2SeqTrainer", "BIMPTrainer", "CrossEntropy"]
