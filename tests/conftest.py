"""No surprises: dtype promotion is strict, rank promotion an error. (Warnings are errors in pyproject.toml.)"""

import contextlib
import itertools
import os
import pathlib

import hypothesis
import jax
import pytest

# The first example of a test compiles a program, so there is no deadline; seeds are fixed, as CI must not waver.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("fuzz", deadline=None, max_examples=25, print_blob=True)  # others at every run
hypothesis.settings.load_profile("default")


# Compiling takes most of the time, and XLA's older emitters for the CPU do it in half of it. (That they exist is known
# of the versions up to this; a flag that XLA does not know would end the process.)
if jax.__version_info__ < (0, 11):
    _FAST = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}".strip()

collect_ignore = ["mesh"]  # programs for processes of their own: to look for doctests in them would be to run them

# These compile much and compute little, about maths that does not depend on it: XLA need not optimise. (All others, of
# the solvers, of each method by itself and of what is counted, run what users run.)
_COMPILE_FAST = (
    "test_laws.py",
    "test_fuzz.py",
    "test_change_tasks.py",
    "test_blockwise.py",
    "test_training_loops.py",
    "test_compositions.py",
    "test_deferred.py",
    "experiments",
    "parity",
)
_NEVER_OPTIMISE = jax.config.values["jax_disable_most_optimizations"]

# Each compiled program takes memory maps, of which Linux grants a process 65,530: thousands of tests are too many.
_TESTS_BETWEEN_CLEARANCES = 300
_count = itertools.count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """For the tests of this folder only: docstrings' examples run as a user would run them."""
    if next(_count) % _TESTS_BETWEEN_CLEARANCES == 0:
        jax.clear_caches()
    compile_fast = _NEVER_OPTIMISE or any(part in _COMPILE_FAST for part in item.path.parts)
    jax.config.update("jax_disable_most_optimizations", compile_fast)
    with contextlib.ExitStack() as stack:
        if pathlib.Path(__file__).parent in item.path.parents:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        return (yield)
