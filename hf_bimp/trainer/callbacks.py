"""Trainer events, handed on to the trainer's own hooks; the callbacks hold no state."""

from transformers import TrainerCallback


class PruningCallback(TrainerCallback):
    """Hands the events around a step on to the method, and times the steps."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.begin_step(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.method.before_update(self.trainer.plain_optimizer)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.method.after_update()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.trainer.throughput.interrupted()

    def on_save(self, args, state, control, **kwargs):
        self.trainer.throughput.interrupted()


class ReportingCallback(TrainerCallback):
    """Announces a run and sums it up; first of all callbacks, while the trackers are open still."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.announce_run()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.finish_run()
