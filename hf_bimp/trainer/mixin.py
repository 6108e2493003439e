"""`BIMPTrainer`: a `Trainer` whose `train()` is one whole run of dense training, prunings and retrainings."""

from dataclasses import asdict

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Seq2SeqTrainer
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..arguments import BIMPArguments
from ..pruning.layers import find_prunable
from ..reporting.flops import MultiplyAdds
from ..reporting.model_card import write_model_card
from ..reporting.plots import write_layer_plot, write_plot
from ..reporting.results import (
    collect_results,
    final_metrics,
    measures,
    plan_table,
    sparsities,
    write_results,
)
from ..reporting.throughput import Throughput
from ..reproducibility import align_memory
from ..schedules.plan import Plan
from ..storage.model_formats import let_trainer_configure
from .callbacks import PruningCallback, ReportingCallback
from .checkpoints import ResumableTrainer
from .checks import (
    check_devices,
    check_model,
    check_optimizer,
    check_ranks_agree,
    check_scheduler,
    report_collapse,
    warn_of_unused,
)
from .lr_scheduler import PlannedScheduler
from .measuring import (
    example_inputs,
    first_items,
    metrics_before_pruning,
    pruning_metrics,
    try_to_count,
)
from .setup import dense_history, given_history, make_method, run_masks, run_plan

logger = logging.get_logger(__name__)


class BIMPTrainer(ResumableTrainer):
    """Trains, prunes and retrains within one `train()` call, as `BIMPArguments` says.

    It takes what `Trainer` takes, except for a learning-rate scheduler of one's own. Once training has begun, `plan`
    holds the steps of all prunings and the sparsities they reach, and `method.masks` what is pruned.
    """

    _trial = None  # of a hyperparameter search
    is_measuring = False  # whether metrics around a pruning are being taken
    ignore_keys_for_eval: list[str] | None = None  # as given to train()
    _multiply_adds: MultiplyAdds | None = None  # of one pass over two training items
    _waits_for_batch = False  # whether they are counted on the first batch
    results: dict | None = None  # of the finished run, as in bimp_results.json

    def __init__(self, model=None, *args, **kwargs):
        let_trainer_configure(model)
        self.throughput = Throughput()
        super().__init__(model, *args, **kwargs)
        if not isinstance(self.args, BIMPArguments):
            raise ValueError(
                f"{type(self).__name__} needs BIMPArguments (BIMPSeq2SeqArguments), which say how much to prune, not "
                f"{type(self.args).__name__}."
            )
        check_devices(self.args.n_gpu, self.is_fsdp_enabled, self.is_deepspeed_enabled)
        check_model(self.model)
        check_scheduler(self.lr_scheduler)
        if self.optimizer is not None:
            check_optimizer(self.optimizer)
        if self.optimizer_cls_and_kwargs is not None:
            check_optimizer(self.optimizer_cls_and_kwargs[0])
        find_prunable(self.model, self.args.prune_modules, self.args.skip_modules)
        if self.compute_loss_func is None and type(self).compute_loss is BIMPTrainer.compute_loss:
            # Has Trainer count the items of a whole batch; compute_loss then normalises by them for any model.
            self.model_accepts_loss_kwargs = True
        self.add_callback(PruningCallback(self))
        self.callback_handler.callbacks.insert(0, ReportingCallback(self))

    @property
    def plan(self) -> Plan | None:
        """The plan of the run; None until `train()` has made it."""
        return self.method and self.method.plan

    # ---- Setting up a run ----

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        """One whole run. With `resume_from_checkpoint=True` it goes on from the newest complete checkpoint.

        At its end `bimp_results.json` and `bimp_run.png` are in the output directory and, unless
        `save_strategy="no"`, the model. Raises `ValueError` where the arguments, the model and a checkpoint to resume
        from do not go together, before anything is trained or written.
        """
        resume_from_checkpoint = self.choose_checkpoint(resume_from_checkpoint)
        self.ignore_keys_for_eval, self._trial = ignore_keys_for_eval, trial
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        check_optimizer(self.plain_optimizer)
        return optimizer

    @property
    def plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer out of Accelerate's wrapper."""
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Makes the plan, the method and the scheduler that follows them."""
        args = self.args
        args.validate()
        align_memory(self.model)
        optimizer = self.optimizer if optimizer is None else optimizer
        if self.method is not None:  # of an earlier train() with the same optimizer
            self.method.detach(self.plain_optimizer)
        masks, self._dense = run_masks(self)
        plan = run_plan(self, masks, num_training_steps)
        masks.mask_optimizer_state(optimizer)  # one passed by hand may have moved the zeros to keep before
        base = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
        self._history = dense_history(self, plan, base)
        # Fine-tuning a sparse model is no dense training: its checkpoint goes on telling of the one before.
        self._recorded = given_history(self) if args.keep_zeros and not plan.num_cycles else self._history
        self.method = make_method(self, plan, masks, self._history, base)
        self.method.attach(self.plain_optimizer)
        self.lr_scheduler = PlannedScheduler(optimizer, self.method.rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def announce_run(self) -> None:
        """Prints the plan, and what a resumed run cannot promise; counts what the model has to compute."""
        self._multiply_adds, self.throughput = None, Throughput()
        # Data without a length may be a stream that gives every item once: counted on its first batch, when it comes.
        self._waits_for_batch = not has_length(self.train_dataset)
        if not self._waits_for_batch:
            self._count(example_inputs(self))
        if self.is_world_process_zero():
            print(plan_table(self.method, self.base_learning_rate, self._dense), flush=True)
        if self.resumed and not float(self.state.epoch or 0).is_integer():
            what = "Items that draw random numbers (augmentation) come out differently than without the interruption"
            if self.args.train_sampling_strategy == "group_by_length":
                what = "train_sampling_strategy='group_by_length' shuffles differently after a resume"
            logger.warning(
                f"Resuming in the middle of an epoch. {what}; only from a checkpoint at the end of an epoch is the "
                "result exactly the same (save_strategy='epoch')."
            )

    @property
    def base_learning_rate(self) -> float:
        """The unit of the method's rates: the optimizer's own learning rate."""
        return max(self.lr_scheduler.base_lrs)

    # ---- Steps ----

    def begin_step(self, step: int) -> None:
        """Before optimizer step `step`: the pruning that is due, then the learning rate.

        Evaluation and checkpoints of the step before have seen the finished phase, and a run resumed from such a
        checkpoint does the pruning again.
        """
        self.method.begin_step(step)
        if self.method.is_due(step):
            self._prune()
        self.lr_scheduler.set_step(step)

    def end_step(self, step: int) -> None:
        """After optimizer step `step` - 1, before any evaluation: a pruning that comes after the last one."""
        self.throughput.step_ended()
        if step == self.plan.total_steps and self.method.is_due(step):
            should_log = self.control.should_log
            self._prune()
            self.control.should_log = should_log  # logging the pruning has taken it for done

    def _prune(self) -> None:
        measured, before, after = self.method.is_measured, {}, {}
        if measured:
            self.throughput.interrupted()
            before = metrics_before_pruning(self)
        pruning = self.method.prune(self.optimizer)
        check_ranks_agree(self.accelerator, self.method.masks, pruning)
        if self.method.is_hard or self.method.is_complete:
            report_collapse(self.method.masks, pruning, self.args.on_collapse)
        record = {
            f"prune_{key}": value for key, value in asdict(pruning).items() if key != "step" and value is not None
        }
        if pruning.retrain_peak is not None:
            record["prune_retrain_peak"] = pruning.retrain_peak * self.base_learning_rate
        if (speedup := self.theoretical_speedup()) is not None:
            record["prune_theoretical_speedup"] = speedup
        if measured:
            after = pruning_metrics(self, "after_prune")
        self.log(record | before | after)

    def theoretical_speedup(self) -> float | None:
        """Multiply-adds of the dense model over those of the model as it is; None where they cannot be counted."""
        if self._multiply_adds is None:
            return None
        weights = self.method.masks.weights
        return self._multiply_adds.speedup({n: int(w.count_nonzero()) / w.numel() for n, w in weights.items()})

    def _count(self, inputs: dict) -> None:
        self._multiply_adds = try_to_count(self.model, inputs)
        warn_of_unused(self.model, self.method.masks, self._multiply_adds)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._waits_for_batch:
            self._waits_for_batch = False
            self._count(first_items(self, inputs))
        self.throughput.trained_on(find_batch_size(inputs) or 0)
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Here and not in on_pre_optimizer_step: clipping comes between, and its norm must not see pruned weights.
        if self.accelerator.sync_gradients:
            self.method.edit_gradients()
        return loss

    def _clip_grad_norm(self, model):
        # As if what the method trains were parameters of the model.
        parameters = [*model.parameters(), *self.method.extra_parameters]
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss per label of the whole accumulated batch, on all processes.

        Models return the mean over their own micro-batch, and many (T5, BART, classification heads) ignore
        `num_items_in_batch`; weighting it with the micro-batch's share of the labels is right for all of them.
        """
        if self.compute_loss_func is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = None
        if num_items_in_batch is not None and self.model.training:
            labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"]
            if self._loss_shifts_labels and "shift_labels" not in inputs:
                labels = labels[..., 1:]
            share = labels.ne(-100).sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                share = share * self.accelerator.num_processes  # DDP averages the gradients of the processes
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if share is not None:
            # The mean over no label is NaN: a zero that depends on every parameter keeps DDP's processes in step.
            loss = loss * share if share > 0 else 0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
        return (loss, outputs) if return_outputs else loss

    def _determine_best_metric(self, metrics, trial):
        # Before the last pruning nothing is best. EarlyStoppingCallback waits too: its patience starts with a best.
        return self.method.is_complete and super()._determine_best_metric(metrics, trial)

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        if self.is_measuring:
            description = "Measuring a pruning"  # under "Prediction" Trainer would keep every batch's predictions
        return super().evaluation_loop(dataloader, description, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self.method is not None and self.method.implicit_sparsity:
            logs = logs | {"sparsity": self.method.sparsity}  # what its knobs are tuned by
        super().log(logs, *args, **kwargs)

    # ---- The end ----

    def finish_run(self) -> None:
        """Saves the final model, measures it where that was not done, and writes results and picture."""
        if not self.method.is_complete:
            logger.warning(
                f"Training stopped after {self.method.cycle} of {self.plan.num_cycles} prunings: the model is "
                f"{sparsities(self)['prunable']:.2%} sparse."
            )
        if self.eval_dataset is not None and not self._final_metrics():
            self.evaluate(ignore_keys=self.ignore_keys_for_eval)
        directory = self._get_output_dir(self._trial)
        if self.args.save_strategy != "no" and self._trial is None:
            self.save_model(_internal_call=True)
        self.results = collect_results(self, self._final_metrics())
        self.log(measures(self.results))
        if self.is_world_process_zero():
            write_results(directory, self.results)
            write_layer_plot(directory, self.results)
            write_plot(directory, self.results, self.state.log_history, self.method, self.base_learning_rate)

    def _final_metrics(self) -> dict[str, float]:
        """Of the model as it is now: the best one, if that was loaded, or the last."""
        is_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        step = self.state.best_global_step if is_best else self.state.global_step
        return final_metrics(self.state.log_history, step)

    def create_model_card(self, *args, **kwargs):
        write_model_card(self, *args, **kwargs)


class BIMPSeq2SeqTrainer(BIMPTrainer, Seq2SeqTrainer):
    """`BIMPTrainer` that evaluates by generating, as `Seq2SeqTrainer` does."""
