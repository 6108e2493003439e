"""Sparsification methods: each one a file, driven by plain values, without the trainer or its arguments."""

from .imp import IterativeMagnitudePruning, LayerCollapseError, Pruning

__all__ = ["IterativeMagnitudePruning", "LayerCollapseError", "Pruning"]
