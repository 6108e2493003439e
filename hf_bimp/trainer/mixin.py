"""`BIMPMixin`: makes any `Trainer`'s `train()` one whole run of training, prunings and retrainings."""

from dataclasses import asdict
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import TrainOutput, has_length
from transformers.utils import logging

from ..arguments import BIMPArgumentsMixin
from ..pruning.layers import find_prunable
from ..reporting.results import (
    final_metrics,
    plan_table,
)
from ..reporting.throughput import Throughput
from ..reproducibility import align_memory
from ..storage.disk import check_folder, full_disk_named, remove_leftovers
from ..storage.model_formats import let_trainer_configure
from ..support import check_devices, check_model, check_optimizer, check_scheduler, check_sharding
from .callbacks import PruningCallback, ReportingCallback
from .checks import check_ranks_agree, report_collapse
from .divergence import DivergenceWatch
from .finishing import FinishingHooks
from .identity import identity
from .lr_scheduler import PlannedScheduler
from .setup import set_up_run

logger = logging.get_logger(__name__)


class BIMPMixin(FinishingHooks):
    """Trains, prunes and retrains within one `train()` call, as the arguments of `BIMPArgumentsMixin` say.

    To put before any subclass of `Trainer`; it takes what that takes, except for a learning-rate scheduler of one's
    own. Once training has begun, `plan` holds the steps of all prunings and the sparsities they reach, and
    `method.masks` what is pruned.

        class SparseSFTTrainer(BIMPMixin, SFTTrainer): ...
    """

    _resumed_from: str | None = None  # the checkpoint that the run continues

    def __init__(self, *args, **kwargs):
        let_trainer_configure(kwargs["model"] if "model" in kwargs else next(iter(args), None))
        self.throughput = Throughput()
        arguments = kwargs["args"] if "args" in kwargs else next(iter(args[1:]), None)
        if (folder := getattr(arguments, "output_dir", None)) is not None:
            check_folder(folder)
        super().__init__(*args, **kwargs)
        # As it was given: other trainers map it, by functions that are not the same in every process.
        self._given_data = {id(self.train_dataset): kwargs.get("train_dataset", self.train_dataset)}
        self._admit(self.model)  # the parent may have made another one of what it was given
        check_devices(self.args.n_gpu)
        check_sharding(self.is_fsdp_enabled, self.is_deepspeed_enabled)
        check_scheduler(self.lr_scheduler)
        if self.optimizer is not None:
            check_optimizer(self.optimizer)
        if self.optimizer_cls_and_kwargs is not None:
            check_optimizer(self.optimizer_cls_and_kwargs[0])
        self.add_callback(PruningCallback(self))
        self.callback_handler.callbacks.insert(0, ReportingCallback(self))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A model of `model_init`, adapted and checked as a given one is: every `train()` and every trial has its own.

        Raises `ValueError` for a model that cannot be pruned.
        """
        model = super().call_model_init(trial)
        self._admit(model)
        return model

    def _admit(self, model: nn.Module) -> None:
        if not isinstance(self.args, BIMPArgumentsMixin):
            raise ValueError(
                f"{type(self).__name__} needs BIMPArguments (BIMPSeq2SeqArguments), or your arguments with "
                f"BIMPArgumentsMixin before them, which say how much to prune, not {type(self.args).__name__}."
            )
        let_trainer_configure(model)
        check_model(model)
        find_prunable(model, self.args.prune_modules, self.args.skip_modules)

    @property
    def base_learning_rate(self) -> float:
        """The unit of the method's rates: the optimizer's own learning rate."""
        return self._bimp_run.learning_rate

    # ---- Setting up a run ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **kwargs: Any,
    ) -> TrainOutput:
        """One whole run. With `resume_from_checkpoint=True` it goes on from the newest complete checkpoint.

        At its end `bimp_results.json` and `bimp_run.png` are in the output directory and, unless
        `save_strategy="no"`, the model. Raises `ValueError` where the arguments, the model and a checkpoint to resume
        from do not go together, and where nothing can be written to the output directory, before anything is trained
        or written; `FullDiskError`, an `OSError`, where the disk is full.
        """
        if self.args.should_save:
            check_folder(self.args.output_dir, to_write=True)
        self._resumed_from = resume_from_checkpoint = self.choose_checkpoint(resume_from_checkpoint)
        if self.args.should_save:
            remove_leftovers(self.args.output_dir)
        self._ignore_keys_around_pruning, self._bimp_trial = ignore_keys_for_eval, trial
        with full_disk_named(self.args.output_dir):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        check_optimizer(self.plain_optimizer)
        return optimizer

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer out of Accelerate's wrapper."""
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> PlannedScheduler:
        """Makes the plan, the method and the scheduler that follows them."""
        self.args.validate()
        check_model(self.model)  # an adapter may have come in since
        align_memory(self.model)
        if self.method is not None:  # of an earlier train() with the same optimizer
            self.method.detach(self.plain_optimizer)
        measurable = has_length(self.train_dataset) or self.train_dataset is None
        self._bimp_run = set_up_run(
            self.args,
            self.bare_model,
            self.plain_optimizer,
            num_training_steps,
            self._bimp_example_inputs,
            self._bimp_train_accuracy if measurable else None,
            self.resumed,
            self._identity(),
        )
        if self.method.needs_train_accuracy:
            self.check_train_accuracy()
        self.method.attach(self.plain_optimizer)
        self.lr_scheduler = PlannedScheduler(self.optimizer if optimizer is None else optimizer, self.method.rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _identity(self) -> dict[str, Any]:
        data = self._given_data.get(id(self.train_dataset), self.train_dataset)
        return identity(self.args, data, self.plain_optimizer, self.accelerator.mixed_precision)

    def announce_run(self) -> None:
        """Prints the plan, and what a resumed run cannot promise; counts what the model has to compute."""
        self.throughput = Throughput()
        self.divergence = DivergenceWatch(self.bare_model, self.method, self.state.global_step, self._resumed_from)
        self.count_multiply_adds()
        if self.is_world_process_zero():
            print(plan_table(self.method, self._bimp_run.stays_dense), flush=True)
        is_between_epochs = float(self.state.epoch or 0).is_integer()
        restarts_workers = self.args.dataloader_persistent_workers and self.args.dataloader_num_workers > 0
        if self.resumed and not (is_between_epochs and not restarts_workers):
            where = "with workers that persist" if is_between_epochs else "in the middle of an epoch"
            what = "Items that draw random numbers (augmentation) come out differently than without the interruption"
            if self.args.train_sampling_strategy == "group_by_length" and not is_between_epochs:
                what = "train_sampling_strategy='group_by_length' shuffles differently after a resume"
            only = (
                "only from a checkpoint at the end of an epoch is the result exactly the same (save_strategy='epoch')"
            )
            if restarts_workers:
                only = "with dataloader_persistent_workers=True, as workers start anew, also from the end of an epoch"
            logger.warning(f"Resuming {where}. {what}; {only}.")

    # ---- Steps ----

    def begin_step(self, step: int) -> None:
        """Before optimizer step `step`: the pruning that is due, then the learning rate.

        Evaluation and checkpoints of the step before have seen the finished phase, and a run resumed from such a
        checkpoint does the pruning again.
        """
        self.method.begin_step(step)
        if self.method.is_due(step):
            self._prune_and_report()
        self.lr_scheduler.set_step(step)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self.throughput.trained_on(find_batch_size(inputs) or 0)
        with self.counted_if_waiting(inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        # Here and not in on_pre_optimizer_step: clipping comes between, and its norm must not see pruned weights.
        if self.accelerator.sync_gradients:
            self.method.edit_gradients()
        return loss

    # Private: gradients of what the method trains are clipped as if they were parameters of the model.
    def _clip_grad_norm(self, model):
        if not self.method.extra_parameters:
            return super()._clip_grad_norm(model)
        parameters = [*model.parameters(), *self.method.extra_parameters]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def before_update(self) -> None:
        self.method.before_update(self.plain_optimizer)

    def after_update(self) -> None:
        try:
            self.method.after_update()
        except ValueError:  # of weights that cannot be ranked, by methods that renew their masks at every step
            self.check_weights(self.state.global_step + 1)
            raise

    def end_step(self, step: int) -> None:
        """After optimizer step `step` - 1, before any evaluation: a pruning that comes after the last one."""
        self.throughput.step_ended()
        if step == self.plan.total_steps and self.method.is_due(step):
            should_log = self.control.should_log
            self._prune_and_report()
            self.control.should_log = should_log  # logging the pruning has taken it for done

    def interrupted(self) -> None:
        """Something else than training takes time."""
        self.throughput.interrupted()

    def _prune_and_report(self) -> None:
        self.check_weights()
        measured = self.method.is_measured and self.args.evaluate_prunings
        before: dict[str, Any] = {}
        after: dict[str, Any] = {}
        if measured:
            self.throughput.interrupted()
            done = final_metrics(self.state.log_history, self.state.global_step)  # of an evaluation just before
            before = done or self._metrics_around_pruning()
        pruning = self.method.prune(self.plain_optimizer)
        check_ranks_agree(self.accelerator, self.method.masks, pruning)
        if self.method.traits.is_hard or self.method.is_complete:
            report_collapse(self.method.masks, pruning, self.args.on_collapse)
        record = {
            f"prune_{key}": value for key, value in asdict(pruning).items() if key != "step" and value is not None
        }
        if pruning.retrain_peak is not None:
            record["prune_retrain_peak"] = pruning.retrain_peak * self.base_learning_rate
        if (speedup := self.theoretical_speedup()) is not None:
            record["prune_theoretical_speedup"] = speedup
        if measured:
            after = self._metrics_around_pruning()
        record |= {f"before_prune_{name}": value for name, value in before.items()}
        self.log(record | {f"after_prune_{name}": value for name, value in after.items()})

    # Private: before the last pruning nothing is best. EarlyStoppingCallback waits too, for its patience starts there.
    def _determine_best_metric(self, metrics, trial):
        return self.method.is_complete and super()._determine_best_metric(metrics, trial)
