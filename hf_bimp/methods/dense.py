"""No pruning, only training: the dense model that later runs start from, and compare with."""

from ..schedules.plan import Budget, Plan
from .bimp import BIMPConfig, IterativeMagnitudePruning, check_schedule
from .registry import register_method


@register_method
class DenseTraining(IterativeMagnitudePruning):
    """Trains, and records the history that later runs with dense_ratio=0 need. BIMP's settings have no effect."""

    name = "dense"

    @classmethod
    def check(cls, config: BIMPConfig, budget: Budget) -> None:
        if budget.target_sparsity is not None or budget.keep_zeros:
            raise ValueError("method='dense' prunes nothing: leave target_sparsity and keep_zeros out.")
        if config.dense_steps is not None:
            raise ValueError(
                f"dense_steps={config.dense_steps} is the length of an earlier dense training, and method='dense' is "
                "one. Leave it out."
            )
        check_schedule(config)

    @classmethod
    def prunes(cls, config: BIMPConfig) -> bool:
        return False

    @classmethod
    def make_plan(cls, budget: Budget, config: BIMPConfig) -> Plan:
        return Plan(budget.steps)
