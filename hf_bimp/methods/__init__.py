"""Sparsification methods: each one a file, driven by plain values, without the trainer or its arguments."""

from .imp import IterativeMagnitudePruning, Pruning

__all__ = ["IterativeMagnitudePruning", "Pruning"]
