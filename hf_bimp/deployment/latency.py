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
    times = take_turns(calls)
    first = next(iter(times))
    return [
        LatencyRow(name, median(own) * 1e3, median_ratio(times[first], own), sizes[name])
        for name, own in times.items()
    ]


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: tuple[int, int] = ROUNDS,
    seconds: float = SECONDS,
    disable_bar: bool = False,
) -> dict[str, list[float]]:
    """The seconds of each of `calls` in each round; there are as many as fit into `seconds`, within `rounds`."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, count = time.perf_counter(), rounds[1]
    with tqdm(total=WARM_UP + count, unit="round", desc="latency", leave=False, disable=disable_bar) as bar:
        for done in range(WARM_UP + rounds[1]):
            if done == WARM_UP:  # the first ones, which are slower, say how many rounds there can be
                once = (time.perf_counter() - start) / WARM_UP
                count = min(max(int(seconds / max(once, 1e-9)), rounds[0]), rounds[1])
                bar.total = WARM_UP + count
            if done >= WARM_UP + count:
                break
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
            bar.update()
    return {name: values[WARM_UP:] for name, values in times.items()}


def median_ratio(times: list[float], others: list[float]) -> float:
    """The median of time / other over the rounds."""
    return median(a / b for a, b in zip(times, others, strict=True))


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
