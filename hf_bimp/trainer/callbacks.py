"""Trainer events, handed on to the hooks of a run; the callbacks hold no state."""

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RunHooks(Protocol):
    """What the events of a run are for."""

    def announce_run(self) -> None: ...

    def begin_step(self, step: int) -> None: ...

    def before_update(self) -> None: ...

    def after_update(self) -> None: ...

    def end_step(self, step: int) -> None: ...

    def interrupted(self) -> None: ...

    def saved(self) -> None: ...

    def finish_run(self) -> None: ...


class PruningCallback(TrainerCallback):
    """Hands on the events around a step."""

    def __init__(self, hooks: RunHooks):
        self.hooks = hooks

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.begin_step(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.after_update()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.end_step(state.global_step)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.interrupted()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.hooks.saved()


class ReportingCallback(TrainerCallback):
    """Announces a run and sums it up; first of all callbacks, while the trackers are open still."""

    def __init__(self, hooks: RunHooks):
        self.hooks = hooks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.announce_run()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.finish_run()
