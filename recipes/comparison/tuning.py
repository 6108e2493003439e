"""Grids of hyperparameters through Optuna and `Trainer.hyperparameter_search`, on the held-out data."""

import optuna
from optuna.pruners import NopPruner
from optuna.samplers import GridSampler
from optuna.trial import TrialState

from comparison.jobs import combinations
from comparison.recipe import Recipe
from shared.cli import parse_config


class Search:
    """Trains at every point of a grid that the study does not have yet; several processes may share its storage.

    A trial that was killed stays open in the storage; its point comes again when no other is left.
    """

    def __init__(self, recipe: Recipe, config: dict, grid: dict[str, list], metric: str, name: str, storage: str):
        self.recipe, self.config, self.grid, self.metric = recipe, config, grid, metric
        self.study = {
            "study_name": name,
            "storage": storage,
            "load_if_exists": True,
            "sampler": GridSampler(grid),
            # The dip after a pruning, or the noise of a soft mask, must not end a trial.
            "pruner": NopPruner(),
        }
        self.trial: optuna.Trial | None = None

    def run(self) -> dict:
        """{"trials": [{"params", "value", "sparsity"}]}, a trial for every point."""
        study = optuna.create_study(direction="maximize", **self.study)
        while missing := self._missing(study):
            # The sampler by itself would take points that failed for done.
            running = [trial.params for trial in study.get_trials(states=[TrialState.RUNNING])]
            study.enqueue_trial(next((point for point in missing if point not in running), missing[0]))
            task = self.recipe.build_task(*parse_config(self.recipe.ARGUMENTS, self.config), restarts=True)
            task.trainer.hyperparameter_search(
                hp_space=self._space,
                compute_objective=lambda metrics, trainer=task.trainer: self._objective(metrics, trainer),
                n_trials=1,
                direction="maximize",
                backend="optuna",
                **self.study,
            )
        return {"trials": [self._best_of_point(study, point) for point in combinations(self.grid)]}

    def _space(self, trial: optuna.Trial) -> dict:
        self.trial = trial
        return {name: trial.suggest_categorical(name, values) for name, values in self.grid.items()}

    def _objective(self, metrics: dict[str, float], trainer) -> float:
        """The metric of the last evaluation, after the end of the run."""
        if trainer.results is not None:
            self.trial.set_user_attr("sparsity", trainer.results["sparsity"]["prunable"])
        return metrics[f"eval_{self.metric}"]

    def _complete(self, study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
        return study.get_trials(states=[TrialState.COMPLETE])

    def _missing(self, study: optuna.Study) -> list[dict]:
        complete = [trial.params for trial in self._complete(study)]
        return [point for point in combinations(self.grid) if point not in complete]

    def _best_of_point(self, study: optuna.Study, point: dict) -> dict:
        trial = max((t for t in self._complete(study) if t.params == point), key=lambda t: t.value)
        return {"params": point, "value": trial.value, "sparsity": trial.user_attrs["sparsity"]}


def choose(trials: list[dict], goal: float | None, tolerance: float) -> dict:
    """The best of the trials that end within `tolerance` of the sparsity `goal`; where none does, the closest one.

    Without a goal, the best of all.
    """
    if goal is None:
        return max(trials, key=lambda trial: trial["value"])
    near = [trial for trial in trials if abs(trial["sparsity"] - goal) <= tolerance]
    if near:
        return max(near, key=lambda trial: trial["value"])
    return min(trials, key=lambda trial: abs(trial["sparsity"] - goal))
