"""Sparsification methods, a file each, driven by plain values without the trainer or its arguments.

Every module of this folder is imported, so that a method is in once its file lies here.
"""

import importlib
import pkgutil

from .base import LayerCollapseError, Method, NoConfig, Pruning, Run, Traits
from .bimp import BIMPConfig, IterativeMagnitudePruning
from .registry import METHODS, make_config, method_named, parse_mapping, register_method, setting_names

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "BIMPConfig",
    "IterativeMagnitudePruning",
    "LayerCollapseError",
    "Method",
    "NoConfig",
    "Pruning",
    "Run",
    "Traits",
    "make_config",
    "method_named",
    "parse_mapping",
    "register_method",
    "setting_names",
]
