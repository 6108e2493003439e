"""Latencies of several runtimes in one run: they take turns, so that a machine that slows down favours none."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from transformers.utils.logging import tqdm

WARM_UP, ROUNDS, SECONDS = 2, (5, 30), 10.0  # rounds are as many as fit into the seconds, within these bounds


@dataclass(frozen=True)
class LatencyRow:
    """One runtime: the median `milliseconds` of a call, the median ratio to the first one, and the size in `bytes`."""

    name: str
    milliseconds: float
    speedup: float
    bytes: int


def measure(calls: Mapping[str, Callable[[], Any]], sizes: Mapping[str, int]) -> list[LatencyRow]:
    """A row for each of `calls` (name: call), all measured alternately; `sizes` are in bytes, by the same names."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), ROUNDS[1]
    with tqdm(total=WARM_UP + rounds, unit="round", desc="latency", leave=False) as bar:
        for done in range(WARM_UP + rounds):
            if done == WARM_UP:  # the first ones, which are slower, say how many rounds there can be
                once = (time.perf_counter() - start) / WARM_UP
                rounds = min(max(int(SECONDS / max(once, 1e-9)), ROUNDS[0]), ROUNDS[1])
                bar.total = WARM_UP + rounds
            if done >= WARM_UP + rounds:
                break
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
            bar.update()
    times = {name: values[WARM_UP:] for name, values in seconds.items()}
    first = next(iter(times.values()))
    return [
        LatencyRow(name, median(own) * 1e3, median(a / b for a, b in zip(first, own, strict=True)), sizes[name])
        for name, own in times.items()
    ]


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
