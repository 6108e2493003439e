"""Sparse models out of Hugging Face training scripts: iterative magnitude pruning in one training budget (BIMP)."""

from .arguments import BIMPArguments, BIMPSeq2SeqArguments
from .dense import DenseHistory
from .masks import Masks
from .methods import IterativeMagnitudePruning, LayerCollapseError, Pruning
from .plan import Plan, make_plan
from .prunable import find_prunable
from .shrinking import load_shrunk, save_shrunk, shrink
from .speedup import theoretical_speedup
from .targets import make_masks
from .trainer import BIMPSeq2SeqTrainer, BIMPTrainer

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
