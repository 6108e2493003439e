"""Other processes that tests start: recipes, plain Python, torchrun."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
# Only against hanging for ever: no machine that is merely busy may come near it.
PATIENCE = 1800  # seconds
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(*command: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `command` to its end, without the Hub and on the CPU unless `environment` says otherwise."""
    environment = os.environ | OFFLINE if environment is None else environment
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=PATIENCE)


def output_of(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """What `command` prints; it must succeed."""
    done = run(*command, environment=environment)
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def run_recipe(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, RECIPES / script, *arguments)


def output_of_recipe(script: str, *arguments: str | Path) -> str:
    return output_of(sys.executable, RECIPES / script, *arguments)


@contextlib.contextmanager
def started(*command: str | Path, log: Path) -> Iterator[subprocess.Popen]:
    """`command` in the background, offline; what it prints goes to `log`. It does not outlive the block."""
    with log.open("w") as file:
        process = subprocess.Popen([*map(str, command)], env=os.environ | OFFLINE, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], object], process: subprocess.Popen, log: Path) -> None:
    """Waits for what `process` is going to do; fails if it ends before."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-8000:]
        time.sleep(0.05)
