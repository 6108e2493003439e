"""Sparse models out of Hugging Face training scripts: iterative magnitude pruning in one training budget (BIMP)."""

from .arguments import BIMPArguments, BIMPSeq2SeqArguments
from .methods import IterativeMagnitudePruning, LayerCollapseError, Pruning
from .pruning.build import make_masks
from .pruning.layers import find_prunable
from .pruning.masks import Masks
from .pruning.structured.shrink import load_shrunk, save_shrunk, shrink
from .reporting.flops import theoretical_speedup
from .schedules.dense_history import DenseHistory
from .schedules.plan import Plan, make_plan
from .trainer.mixin import BIMPSeq2SeqTrainer, BIMPTrainer

__version__ = "0.1.0"

__all__ = [
    "BIMPArguments",
    "BIMPSeq2SeqArguments",
    "BIMPSeq2SeqTrainer",
    "BIMPTrainer",
    "DenseHistory",
    "IterativeMagnitudePruning",
    "LayerCollapseError",
    "Masks",
    "Plan",
    "Pruning",
    "find_prunable",
    "load_shrunk",
    "make_masks",
    "make_plan",
    "save_shrunk",
    "shrink",
    "theoretical_speedup",
]
