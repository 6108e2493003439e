"""How fast a run trains, without the time that evaluation, pruning and saving take."""

import time


class Throughput:
    """Times the optimizer steps of this process that follow each other with nothing in between."""

    def __init__(self) -> None:
        self.samples, self.seconds = 0, 0.0
        self._pending = 0  # samples of the step that is going on
        self._last: float | None = None

    def trained_on(self, samples: int) -> None:
        self._pending += samples

    def step_ended(self) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.samples += self._pending
            self.seconds += now - self._last
        self._last, self._pending = now, 0

    def interrupted(self) -> None:
        """Something else than training took time: the step that ends next does not count."""
        self._last = None

    def per_second(self) -> float | None:
        """Samples a second in this process; None where no two steps followed each other."""
        return self.samples / self.seconds if self.samples else None
