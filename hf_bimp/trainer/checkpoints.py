"""What a run saves, and how another one goes on from it: the checkpoint hooks of `Trainer`."""

import os
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME

from ..methods import Method
from ..schedules.dense_history import DenseHistory
from ..storage import run_state as ckpt
from ..storage.model_formats import weights_trainer_misses, write_config


class ResumableTrainer(Trainer):
    """Saves method, masks and plan with the model; resumes from a complete checkpoint of such a run alone."""

    method: Method | None = None
    resumed: dict | None = None  # the state of the checkpoint that this run continues
    _history: DenseHistory | None = None  # of the dense phase, planned or long past
    _recorded: DenseHistory | None = None  # what checkpoints tell later runs

    def choose_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The folder to go on from, by what `train()` was given; reads its state. Raises `ValueError` for none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = ckpt.last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no complete checkpoint of hf_bimp to resume from "
                    "(save_only_model=True leaves none). Call train() without resume_from_checkpoint to start afresh."
                )
        elif resume_from_checkpoint and not ckpt.is_complete(Path(resume_from_checkpoint)):
            raise ValueError(
                f"{resume_from_checkpoint} is no complete checkpoint: its {TRAINER_STATE_NAME}, written last, is "
                "missing or cut off. Give another one, or resume_from_checkpoint=True for the newest complete one."
            )
        self.resumed = ckpt.read_state(resume_from_checkpoint) if resume_from_checkpoint else None
        return resume_from_checkpoint or None

    def run_settings(self) -> dict:
        """What a resumed run must share with the one it continues."""
        args, history = self.args, self._history
        default_allocation = "global" if args.granularity == "weight" else "uniform"
        return {
            "method": args.method,
            "plan": self.method.plan.to_dict(),
            **self.method.settings,
            "dense_schedule": history and asdict(history),
            "keep_zeros": args.keep_zeros,
            "learning_rate": self.base_learning_rate if history is None else None,
            "granularity": args.granularity,
            "allocation": None if self.method.implicit_sparsity else args.allocation or default_allocation,
            "criterion": args.criterion,
            "random_seed": args.seed if args.criterion == "random" else None,
            "prune_modules": args.prune_modules,
            "skip_modules": args.skip_modules,
        }

    def _save(self, output_dir=None, state_dict=None):
        output_dir = output_dir or self.args.output_dir
        if self.args.should_save:
            ckpt.forget_completion(output_dir)
        super()._save(output_dir, state_dict)
        if self.args.should_save and not isinstance(self.model, PreTrainedModel):  # they have written theirs
            write_config(self.model, Path(output_dir))
        if self.args.should_save and self.method is not None:
            is_dense_over = (
                self.state.global_step >= self.method.plan.schedule_steps or self._recorded is not self._history
            )
            history = self._recorded if is_dense_over else None
            progress, has_tensors = self.method.state_dict(), bool(self.method.tensors())
            ckpt.write_state(output_dir, self.run_settings(), progress, history, self.args.world_size, has_tensors)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.method.masks.save(os.path.join(output_dir, ckpt.MASKS_NAME))
            ckpt.write_tensors(output_dir, self.method.tensors())

    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, checkpoint, trial):
        epochs, batches = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        # Trainer would do one step too many where the last checkpoint lies within an epoch.
        return (num_epochs, 0) if self.state.global_step >= max_steps else (epochs, batches)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        weights = weights_trainer_misses(self.model, resume_from_checkpoint)
        if weights is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_state_dict(weights)

    def _load_best_model(self):
        weights = weights_trainer_misses(self.model, self.state.best_model_checkpoint)
        if weights is None:
            super()._load_best_model()
        else:
            self.model.load_state_dict(weights)

    def _load_optimizer_and_scheduler(self, checkpoint):
        ckpt.check_same_settings(checkpoint, self.resumed["settings"], self.run_settings())
        super()._load_optimizer_and_scheduler(checkpoint)
        self.method.masks.load(os.path.join(checkpoint, ckpt.MASKS_NAME))
        self.method.load_state_dict(self.resumed["progress"])
        self.method.load_tensors(ckpt.read_tensors(checkpoint, self.args.device))
