"""Sparsification methods: each one a file, driven by plain values, without the trainer or its arguments."""

from .base import LayerCollapseError, Method, Pruning
from .cs import ContinuousSparsification
from .dnw import DiscoveringNeuralWirings
from .dpf import DynamicPruningWithFeedback
from .dst import DynamicSparseTraining
from .gmp import GradualMagnitudePruning
from .gsm import GlobalSparseMomentum
from .imp import IterativeMagnitudePruning
from .lc import LearningCompression
from .str import SoftThreshold

# What the argument `method` can be; "dense" is "bimp" without a pruning.
METHODS: dict[str, type[Method]] = {
    "bimp": IterativeMagnitudePruning,
    "dense": IterativeMagnitudePruning,
    "gmp": GradualMagnitudePruning,
    "gsm": GlobalSparseMomentum,
    "lc": LearningCompression,
    "dpf": DynamicPruningWithFeedback,
    "dnw": DiscoveringNeuralWirings,
    "cs": ContinuousSparsification,
    "str": SoftThreshold,
    "dst": DynamicSparseTraining,
}

__all__ = ["METHODS", "IterativeMagnitudePruning", "LayerCollapseError", "Method", "Pruning"]
