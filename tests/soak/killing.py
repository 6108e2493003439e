"""Runs in processes of their own that are killed: at their n-th file operation, or at a random time."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from processes import PATIENCE

# Children come from a server that has the libraries imported and no threads yet, so that starting one takes no time.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_bimp.trainer", "matplotlib.figure", "soak.scenarios"])

KILLED = (-signal.SIGKILL, -signal.SIGALRM)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Kill:
    """When a run dies: before its n-th operation on files of its folder, or some seconds after training has begun."""

    operation: int | None = None
    seconds: float | None = None
    rank: int = 0


class RunFailed(RuntimeError):
    """A run ended by itself, and not well."""


def run(folder: Path, scenario: dict[str, Any], resume: bool, kill: Kill | None = None) -> bool:
    """Whether the run came to its end before the kill. Raises `RunFailed` with what it printed, if it failed."""
    count, log = scenario.get("processes", 1), folder.with_suffix(".log")
    environments: list[dict[str, str]] = [{}]
    if count > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            shared["MASTER_PORT"] = str(free.getsockname()[1])
        environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    children = []
    for rank, environment in enumerate(environments):
        own = kill if kill is not None and kill.rank == rank else None
        children.append(
            PROCESSES.Process(target=_child, args=(str(folder), scenario, resume, own, environment, str(log)))
        )
        children[-1].start()
    end = time.monotonic() + PATIENCE
    try:
        while alive := [child for child in children if child.is_alive()]:
            wait([child.sentinel for child in alive], timeout=1)
            if time.monotonic() > end or any(child.exitcode for child in children):  # the others would wait for it
                break
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with the workers of its loaders
            child.join()
    codes = [child.exitcode for child in children]
    if any(codes) and (kill is None or codes[kill.rank] not in KILLED):
        raise RunFailed(f"exit codes {codes}\n{log.read_text(errors='replace')[-4000:]}")
    return not any(codes)


def _child(folder: str, scenario: dict, resume: bool, kill: Kill | None, environment: dict, log: str) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # of workers of loaders; a fork server each would take memory
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        import torch

        from soak.scenarios import build

        torch.set_num_threads(1)
        if kill is not None and kill.operation is not None:
            _kill_at_operation(folder, kill.operation)
        trainer = build(folder, scenario)
        if kill is not None and kill.seconds is not None:
            trainer.add_callback(_Alarm(kill.seconds))
        trainer.train(resume_from_checkpoint=resume)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


class _Alarm(TrainerCallback):
    """Nothing handles the signal, so that the kernel ends the process wherever it is, in safetensors' code too."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(seconds, 1e-6)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, self.seconds)


def _kill_at_operation(folder: str, number: int) -> None:
    count, process = 0, os.getpid()

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if os.getpid() != process:  # a worker of a loader, which inherits the hook
            return
        if event == "open":
            mode, flags = args[1], args[2]
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
            if not writes:
                return
        elif event not in CHANGES:
            return
        # Deletions of a tree name its entries alone, beside the descriptor of their folder.
        if folder in os.fsdecode(args[0] if not isinstance(args[0], int) else b"") or event in (
            "os.remove",
            "os.rmdir",
        ):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
