"""How a run ends: well, with model, metrics, results, pictures and card; or because its weights are no numbers."""

import contextlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..deployment.compress import compress
from ..deployment.savings import MOST_WEIGHTS, measure_savings
from ..reporting.deployment_table import savings_text
from ..reporting.model_card import CardSource, add_to_model_card, write_model_card
from ..reporting.plots import write_layer_plot, write_plot
from ..reporting.results import collect_results, final_metrics, measures, read_results, sparsities, write_results
from ..reporting.throughput import Throughput
from ..reproducibility import preserved_random_state
from ..storage import integrity
from .divergence import DivergenceWatch
from .example_inputs import check_readable_twice, fitting_example
from .measuring import MeasuringHooks, only_a_measure

logger = logging.get_logger(__name__)


@contextlib.contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """In it, Transformers' progress bars are shown only if `shown`, and if they were before."""
    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


class FinishingHooks(MeasuringHooks):
    """A mixin over `Trainer`: checks that there are weights to go on with, and sums a run up."""

    _bimp_trial = None  # of a hyperparameter search
    divergence: DivergenceWatch | None = None  # while a run trains
    _bimp_upload: str | None = None  # the folder to push in place of output_dir
    results: dict | None = None  # of the finished run, as in bimp_results.json
    throughput: Throughput

    # ---- While it goes on ----

    def saved(self) -> None:
        """A checkpoint is whole on the disk."""
        self.throughput.interrupted()
        folder = Path(self._get_output_dir(self._bimp_trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.divergence.checkpoint = str(folder)
        if self.args.should_save and not self.args.save_only_model:
            integrity.list_files(folder, 0, self.args.world_size)  # again, with what Trainer has written last

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        if "loss" in logs or "train_loss" in logs:
            self.check_weights()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        self.check_weights()
        super().save_model(*args, **kwargs)

    def check_weights(self, step: int | None = None) -> None:
        """Raises `FloatingPointError` where they are NaN or infinite, once results have been written that say so.

        `step` counts the optimizer steps done (default: as Trainer's state has it).
        """
        if self.divergence is None or not self.is_in_train:
            return
        watch, self.divergence = self.divergence, None  # what follows saves and logs what there is
        try:
            watch.check(self.state.global_step if step is None else step)
        except FloatingPointError:
            self._write_results(diverged=True)
            raise
        self.divergence = watch

    # ---- The end ----

    def finish_run(self) -> None:
        """Saves the final model, then measures it where that was not done, and writes results and pictures."""
        self.check_weights()
        if not self.method.is_complete:
            logger.warning(
                f"Training stopped after {self.method.cycle} of {self.plan.num_cycles} prunings: the model is "
                f"{sparsities(self.bare_model, self.method.masks)['prunable']:.2%} sparse."
            )
        if self.args.save_strategy != "no" and self._bimp_trial is None:
            self.save_model(self.args.output_dir, _internal_call=True)
        history = self.state.log_history
        summary = next((entry for entry in reversed(history) if "train_loss" in entry), None)
        savings = self._measured_savings()
        try:
            if self.eval_dataset is not None and not self._metrics_of_final_model():
                with only_a_measure("The evaluation of the final model"), self.measured_model():
                    self.evaluate(ignore_keys=self._ignore_keys_around_pruning)
            with only_a_measure("Summing the run up"):
                self._write_results(savings=savings)
                self.log(measures(self.results))
        finally:
            if summary is not None:  # scripts read Trainer's own summary off the end
                history[:] = [entry for entry in history if entry is not summary] + [summary]

    def _measured_savings(self) -> dict[str, Any]:
        """What the zeros save on this machine; empty where `measure_deployment` is off or has no use."""
        model = self.bare_model
        weights = list(model.parameters())
        is_wanted = self.args.measure_deployment and self._bimp_trial is None
        is_small = sum(weight.numel() for weight in weights) <= MOST_WEIGHTS
        is_here = all(weight.device.type == "cpu" for weight in weights)
        if not (is_wanted and is_small and is_here and self.method.masks.sparsity):
            return {}
        with only_a_measure("Measuring what the zeros save"), preserved_random_state(), self.measured_model():
            inputs = self._inputs_to_measure_on()  # in every process: their loaders share out what one has read
            if not self.is_world_process_zero():
                return {}
            model.eval()  # a forward that another library has put in its place may run in a copy, too
            with _bars(not self.args.disable_tqdm):
                savings = measure_savings(model, inputs, self.args.granularity == "filter").to_dict()
            print(savings_text(savings["size"], savings["speed"]), flush=True)
            return savings
        return {}

    def _inputs_to_measure_on(self) -> Any:
        """The first training items; None where the model does not take them as they are, or they come only once."""
        with contextlib.suppress(Exception):  # data and models are anybody's code
            check_readable_twice(self.train_dataset)
            return fitting_example(self.bare_model, self._first_batch(), lambda: None)
        return None

    def _write_results(self, diverged: bool = False, savings: dict[str, Any] | None = None) -> None:
        """Of the run as far as it got, with what the zeros save; pictures too, unless it has diverged."""
        rate = self.throughput.per_second()
        self.results = collect_results(
            self.method,
            self._bimp_run.settings,
            self.bare_model,
            self.state.log_history,
            self._metrics_of_final_model(),
            None if diverged else self.theoretical_speedup(),
            rate and rate * self.args.world_size,
            self.args,
            self._bimp_run.stays_dense,
            diverged,
        )
        if savings:  # what a clock decides is kept apart from what is the same in every run
            self.results["deployment"] = {"size": savings["size"]}
            self.results["throughput"]["inference"] = savings["speed"]
        if not self.is_world_process_zero():
            return
        directory = self._get_output_dir(self._bimp_trial)
        with only_a_measure("Writing the results"):
            write_results(directory, self.results)
        if not diverged:
            with only_a_measure("Drawing the pictures"):
                write_layer_plot(directory, self.results)
                write_plot(directory, self.results, self.state.log_history, self.method)

    def _metrics_of_final_model(self) -> dict[str, float]:
        """Of the model as it is now: the best one, if that was loaded, or the last."""
        is_best = self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None
        step = self.state.best_global_step if is_best else self.state.global_step
        return final_metrics(self.state.log_history, step)

    def push_to_hub(self, *args: Any, compressed: bool = False, **kwargs: Any) -> Any:
        """As `Trainer.push_to_hub`; with `compressed` what is pushed is what `hf_bimp.compress` makes of output_dir.

        Such a model is loaded after `import hf_bimp`. output_dir keeps the plain checkpoint.
        """
        if not compressed:
            return super().push_to_hub(*args, **kwargs)
        output_dir, folder = self.args.output_dir, tempfile.TemporaryDirectory(prefix="bimp-push-")
        self._bimp_upload, pushed = folder.name, None
        try:
            pushed = super().push_to_hub(*args, **kwargs)
        finally:
            self.args.output_dir, self._bimp_upload = output_dir, None
            if isinstance(pushed, Future):  # blocking=False: files are read while others go on
                pushed.add_done_callback(lambda _: folder.cleanup())
            else:
                folder.cleanup()
        return pushed

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes README.md: of its own where the parent's is plain `Trainer`'s, else the parent's with more in it.

        It is the last thing before a push, so that there the folder to push is compressed with it.
        """
        parent = super().create_model_card
        is_plain = parent.__func__ is Trainer.create_model_card
        with only_a_measure("Writing the model card"):
            if not is_plain:
                parent(*args, **kwargs)
            if self.is_world_process_zero():
                where = self.hub_model_id or self.args.hub_model_id or self.args.output_dir
                source = CardSource(self.bare_model, self.args, self._results_for_card(), where)
                write_model_card(source, *args, **kwargs) if is_plain else add_to_model_card(source)
        if self._bimp_upload is not None and self.is_world_process_zero():
            logger.info(str(compress(self.args.output_dir, self._bimp_upload)))
            self.args.output_dir = self._bimp_upload

    def _results_for_card(self) -> dict[str, Any] | None:
        """Those of the finished run, with what an export has added to the file since."""
        if self.results is None or self.results["diverged"]:
            return None
        on_disk = read_results(Path(self.args.output_dir)) or self.results
        return self.results | {"deployment": on_disk.get("deployment", {})}
