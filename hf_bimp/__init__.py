"""Sparse models out of Hugging Face training scripts: iterative magnitude pruning in one training budget (BIMP)."""

from .arguments import BIMPArguments, BIMPSeq2SeqArguments
from .dense import DenseHistory
from .masks import Masks
from .methods import IterativeMagnitudePruning, Pruning
from .plan import Plan, make_plan
from .prunable import find_prunable
from .trainer import BIMPSeq2SeqTrainer, BIMPTrainer

__version__ = "0.1.0"

__all__ = [
    "BIMPArguments",
    "BIMPSeq2SeqArguments",
    "BIMPSeq2SeqTrainer",
    "BIMPTrainer",
    "DenseHistory",
    "IterativeMagnitudePruning",
    "Masks",
    "Plan",
    "Pruning",
    "find_prunable",
    "make_plan",
]
