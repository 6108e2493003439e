"""Sparse models out of Hugging Face training scripts: iterative magnitude pruning in one training budget (BIMP)."""

from .arguments import BIMPArguments, BIMPArgumentsMixin, BIMPSeq2SeqArguments
from .deployment.acceleration import AcceleratedLayer, AccelerationReport, accelerate
from .deployment.compress import CompressionReport, compress
from .deployment.export import ExportReport, export
from .deployment.load import load_compressed
from .deployment.semi_structured import SemiStructuredReport, check_semi_structured, to_semi_structured
from .methods import (
    BIMPConfig,
    IterativeMagnitudePruning,
    LayerCollapseError,
    Method,
    Pruning,
    Run,
    Traits,
    register_method,
)
from .pruning.build import make_masks
from .pruning.criteria import register_criterion
from .pruning.layers import LayerInfo, find_prunable
from .pruning.masks import Masks
from .pruning.structured.shrink import load_shrunk, save_shrunk, shrink
from .reporting.flops import theoretical_speedup
from .schedules.dense_history import DenseHistory
from .schedules.plan import Budget, Plan, make_plan
from .trainer import BIMPMixin, BIMPSeq2SeqTrainer, BIMPTrainer, CrossEntropy

__version__ = "0.1.0"

__all__ = [
    "AcceleratedLayer",
    "AccelerationReport",
    "BIMPArguments",
    "BIMPArgumentsMixin",
    "BIMPConfig",
    "BIMPMixin",
    "BIMPSeq2SeqArguments",
    "BIMPSeq2SeqTrainer",
    "BIMPTrainer",
    "Budget",
    "CompressionReport",
    "CrossEntropy",
    "DenseHistory",
    "ExportReport",
    "IterativeMagnitudePruning",
    "LayerCollapseError",
    "LayerInfo",
    "Masks",
    "Method",
    "Plan",
    "Pruning",
    "Run",
    "SemiStructuredReport",
    "Traits",
    "accelerate",
    "check_semi_structured",
    "compress",
    "export",
    "find_prunable",
    "load_compressed",
    "load_shrunk",
    "make_masks",
    "make_plan",
    "register_criterion",
    "register_method",
    "save_shrunk",
    "shrink",
    "theoretical_speedup",
    "to_semi_structured",
]
