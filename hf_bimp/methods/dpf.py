"""DPF: dynamic pruning with feedback (Lin et al., 2020)."""

from dataclasses import dataclass, field

from .dense_behind import DenseBehind
from .gmp import Gradual, GradualArguments


@dataclass
class DPFArguments(GradualArguments):
    """The knobs of DPF."""

    dpf_interval: int = field(
        default=16, metadata={"help": "dpf: optimizer steps after which the masks are renewed (the original: 16)."}
    )


class DynamicPruningWithFeedback(DenseBehind, Gradual):
    """Gradual pruning whose gradient, taken at the masked weights, is applied unmasked to the dense ones.

    That is its error feedback: differentiating through w * mask would leave masked weights where they are. The masks
    are taken anew from the dense weights every `dpf_interval` steps, at the sparsity that GMP's schedule has reached.
    """

    description = "Dynamic pruning with feedback (DPF, Lin et al., 2020)"
    Arguments = DPFArguments

    @classmethod
    def check(cls, args) -> None:
        super().check(args)
        if args.dpf_interval < 1:
            raise ValueError(f"dpf_interval={args.dpf_interval} must be at least 1 optimizer step.")

    @classmethod
    def prunings(cls, steps, target_sparsity, **knobs):
        times, sparsities = super().prunings(steps, target_sparsity, **knobs)
        return (*times, steps), (*sparsities, target_sparsity)  # the last one is hard

    def renew(self) -> None:
        if self.cycle and self.step % self.knobs["dpf_interval"] == 0:
            self.masks.renew(self.plan.sparsities[self.cycle - 1], self.behind)
