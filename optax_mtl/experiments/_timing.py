"""Times of several ways to do one thing, taken in turn; what a program costs besides; and the machine."""

from collections.abc import Callable
import os
import pathlib
import platform
import time
from typing import Any, NamedTuple

import jax
import numpy as np

_WARM_UP = 2


class Seconds(float):
    """What a way returns that has timed itself, in another process say."""


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Runs every way in turn, round after round, so that whatever slows the machine down slows all of them.

    Args:
      ways: functions without arguments, each waited for until its arrays are there.
      rounds: how many are counted, after two that are not.

    Returns:
      For each way the seconds it took, one number a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(_WARM_UP + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            done = jax.block_until_ready(way())
            elapsed = time.perf_counter() - start
            seconds[name].append(float(done) if isinstance(done, Seconds) else elapsed)
    return {name: taken[_WARM_UP:] for name, taken in seconds.items()}


def ratio(taken: list[float], floor: list[float]) -> float:
    """How many times as long as `floor`: the ratio of the medians."""
    return float(np.median(taken) / np.median(floor))


class Program(NamedTuple):
    """A compiled program, and what of it does not vary from run to run.

    Attributes:
      run: the program.
      compile_seconds: tracing, lowering and compiling.
      temporary_bytes: what it allocates beside its arguments and results; None where the platform does not tell.
      flops: floating-point operations as XLA counts them (the body of a loop once); None where it does not tell.
    """

    run: Callable[..., Any]
    compile_seconds: float
    temporary_bytes: int | None
    flops: float | None


def compiled(function: Callable[..., Any], *given: Any) -> Program:
    """Compiles `function` for what it is given."""
    start = time.perf_counter()
    program = jax.jit(function).lower(*given).compile()
    seconds = time.perf_counter() - start
    memory, cost = program.memory_analysis(), program.cost_analysis()
    return Program(
        run=program,
        compile_seconds=seconds,
        temporary_bytes=None if memory is None else int(memory.temp_size_in_bytes),
        flops=None if not cost else float(cost.get("flops", np.nan)),
    )


def machine() -> dict[str, Any]:
    """What times depend on besides the code."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
