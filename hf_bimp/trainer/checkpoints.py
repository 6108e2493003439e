"""What a run saves, and how another one goes on from it: the checkpoint hooks of `Trainer`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer

from ..methods import Method
from ..schedules.plan import Plan
from ..storage import integrity, run_state
from ..storage.disk import full_disk_named
from ..storage.model_formats import out_of_wrappers, savable_state, weights_trainer_misses, write_config
from .setup import RunSetup

_Base = Trainer if TYPE_CHECKING else object


class CheckpointHooks(_Base):
    """A mixin over `Trainer`: saves method, masks and plan with the model; resumes from complete checkpoints."""

    _bimp_run: RunSetup | None = None  # made when training begins
    resumed: dict | None = None  # the state of the checkpoint that this run continues

    @property
    def method(self) -> Method | None:
        """What prunes; None until `train()` has made it."""
        return None if self._bimp_run is None else self._bimp_run.method

    @property
    def plan(self) -> Plan | None:
        """The plan of the run; None until `train()` has made it."""
        return None if self._bimp_run is None else self._bimp_run.method.plan

    def choose_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The folder to go on from, by what `train()` was given; reads its state. Raises `ValueError` for none."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = run_state.last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"{self.args.output_dir} holds no complete checkpoint of hf_bimp to resume from "
                    "(save_only_model=True leaves none). Call train() without resume_from_checkpoint to start afresh."
                )
        elif resume_from_checkpoint and (reason := run_state.damage(Path(resume_from_checkpoint))):
            raise ValueError(
                f"{resume_from_checkpoint} is no complete checkpoint: {reason}. Give another one, or "
                "resume_from_checkpoint=True for the newest complete one."
            )
        self.resumed = run_state.read_state(resume_from_checkpoint) if resume_from_checkpoint else None
        return resume_from_checkpoint or None

    def get_train_dataloader(self) -> DataLoader:
        return self._without_draws(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return self._without_draws(super().get_eval_dataloader(*args, **kwargs))

    def _without_draws(self, loader: DataLoader) -> DataLoader:
        """Persistent workers are seeded once, when they start: a resumed run starts them at another time.

        From random numbers of their own, they leave those of the training (dropout) as they are.
        """
        if self.args.dataloader_persistent_workers and self.args.dataloader_num_workers:
            plain = getattr(loader, "base_dataloader", loader)  # out of Accelerate's
            plain.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    @property
    def bare_model(self) -> nn.Module:
        """The user's own module, out of `torch.compile`."""
        return out_of_wrappers(self.model)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As `Trainer`'s: every saved folder, of checkpoints and of the final model, gets what loading it needs."""
        directory = output_dir or self.args.output_dir
        with full_disk_named(self.args.output_dir):
            if self.args.should_save:
                run_state.forget_completion(directory)
            super().save_model(output_dir, *args, **kwargs)
            if self.args.should_save:
                if not isinstance(self.bare_model, PreTrainedModel):  # they have written theirs
                    write_config(self.bare_model, Path(directory))
                if self._bimp_run is not None:
                    self._save_bimp_run(directory)

    # Private: without it modules under two names, tensors in other memory formats and compiled models cannot be saved.
    def _save(self, output_dir=None, state_dict=None):
        if state_dict is None and not isinstance(self.model, PreTrainedModel):
            state_dict = savable_state(self.bare_model)
        token, self.args.hub_token = self.args.hub_token, None  # Trainer pickles its arguments beside the weights
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _save_bimp_run(self, output_dir: str) -> None:
        run, method = self._bimp_run, self._bimp_run.method
        is_dense_over = self.state.global_step >= method.plan.schedule_steps or run.recorded is not run.history
        history = run.recorded if is_dense_over else None
        state, statistics = method.state_dict(), method.masks.statistics
        run_state.write_state(output_dir, run.settings, state, statistics, history, self.args.world_size, run.identity)
        if run_state.is_checkpoint(output_dir) and not self.args.save_only_model:
            method.masks.save(Path(output_dir) / run_state.MASKS_NAME)
            run_state.write_tensors(output_dir, state, statistics)

    # Private: the last that each process writes before Trainer marks a checkpoint as whole, and deletes older ones.
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        integrity.list_files(Path(output_dir), self.args.process_index, self.args.world_size)

    # Private: without it Trainer does one step too many where the last checkpoint lies within an epoch.
    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, checkpoint, trial):
        epochs, batches = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        return (num_epochs, 0) if self.state.global_step >= max_steps else (epochs, batches)

    # Private: without it Trainer keeps the given weights where a model is saved under other names than its own.
    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        if not self._load_weights(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    # Private: as the one above.
    def _load_best_model(self):
        if not self._load_weights(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_weights(self, checkpoint: str) -> bool:
        """Whether it has loaded what `Trainer` would not."""
        weights = weights_trainer_misses(self.model, checkpoint)
        if weights is not None:
            self.bare_model.load_state_dict(weights)
        return weights is not None

    # Private: the moment when model, optimizer and method are there and nothing has been trained yet.
    def _load_optimizer_and_scheduler(self, checkpoint):
        run = self._bimp_run
        run_state.check_same_run(checkpoint, self.resumed, run.settings, run.identity, self.args.world_size)
        super()._load_optimizer_and_scheduler(checkpoint)
        method = self._bimp_run.method
        method.masks.load(Path(checkpoint) / run_state.MASKS_NAME)
        method.masks.statistics = run_state.read_statistics(checkpoint, self.args.device)
        tensors = run_state.read_tensors(checkpoint, self.args.device)
        method.load_state_dict(self.resumed["progress"] | tensors)
