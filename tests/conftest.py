"""Settings of every test process: threads, marks, and hypothesis without a clock."""

import gc
import os

# As `make test` has it: the tests run side by side, on as many processes as there are cores. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# A busy machine is slow, which is no failure of what is tested.
settings.register_profile(
    "hf_bimp", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("hf_bimp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is not marked `slow` is `fast`."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


def pytest_collection_finish() -> None:
    """Trainer collects garbage at its end: a quarter of a second if it looks at all that the imports left."""
    gc.freeze()
