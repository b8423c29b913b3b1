"""Times of several ways to do one thing, taken in turn; what a program costs besides; and the machine."""

from collections.abc import Callable, Hashable
import os
import pathlib
import platform
import time
from typing import Any, TypeVar

import jax

WARM_UP = 1  # rounds

_Name = TypeVar("_Name", bound=Hashable)


class Seconds(float):
    """What a way returns that has timed itself, in another process say."""


def interleaved(ways: dict[_Name, Callable[[], Any]], rounds: int) -> dict[_Name, list[float]]:
    """Runs every way in turn, round after round, so that whatever slows the machine down slows all of them.

    At its turn a way runs twice, and the second time counts: the caches are as its own last step has left them.

    Args:
      ways: functions without arguments, each waited for until its arrays are there.
      rounds: how many are counted, after one that is not.

    Returns:
      For each way the seconds it took, one number a round.
    """
    seconds: dict[_Name, list[float]] = {name: [] for name in ways}
    for _ in range(WARM_UP + rounds):
        for name, way in ways.items():
            jax.block_until_ready(way())
            start = time.perf_counter()
            done = jax.block_until_ready(way())
            elapsed = time.perf_counter() - start
            seconds[name].append(float(done) if isinstance(done, Seconds) else elapsed)
            del done  # or the next way would pay for giving its memory back
    return {name: taken[WARM_UP:] for name, taken in seconds.items()}


class Program:
    """A function compiled for what it is given, and what of it does not vary from run to run.

    Attributes:
      compile_seconds: tracing, lowering and compiling.
      temporary_bytes: what it allocates beside its arguments and results; None where the platform does not tell.
      flops: floating-point operations as XLA counts them (the body of a loop once); None where it does not tell.
      traces: how often the function has been traced, so far.
    """

    def __init__(self, function: Callable[..., Any], *given: Any) -> None:
        self.traces = 0

        def counted(*given: Any) -> Any:
            self.traces += 1
            return function(*given)

        self._jitted = jax.jit(counted)
        start = time.perf_counter()
        program = self._jitted.lower(*given).compile()
        self.compile_seconds = time.perf_counter() - start
        memory, cost = program.memory_analysis(), program.cost_analysis()
        self.temporary_bytes = None if memory is None else int(memory.temp_size_in_bytes)
        self.flops = None if not cost or "flops" not in cost else float(cost["flops"])

    def __call__(self, *given: Any) -> Any:
        """Runs it, as `jax.jit` would."""
        return self._jitted(*given)

    def costs(self) -> dict[str, Any]:
        """Its attributes."""
        return {
            "compile_seconds": self.compile_seconds,
            "temporary_bytes": self.temporary_bytes,
            "flops": self.flops,
            "traces": self.traces,
        }


def machine() -> dict[str, Any]:
    """What times depend on besides the code."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        **{name: os.environ[name] for name in ("XLA_FLAGS", "OMP_WAIT_POLICY") if name in os.environ},
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
