"""How fast a run trains, without the time that evaluation, pruning and saving take."""

import time


class Throughput:
    """Times the optimizer steps of this process that follow each other with nothing in between."""

    def __init__(self):
        self.steps, self.seconds = 0, 0.0
        self._last: float | None = None

    def step_ended(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.steps += 1
            self.seconds += now - self._last
        self._last = now

    def interrupted(self) -> None:
        """Something else than training took time: the step that ends next does not count."""
        self._last = None

    def per_second(self, samples_per_step: int) -> float | None:
        """Samples a second; None where no two steps followed each other."""
        return samples_per_step * self.steps / self.seconds if self.steps else None
