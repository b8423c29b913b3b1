"""No surprises: dtype promotion is strict, rank promotion an error. (Warnings are errors in pyproject.toml.)"""

import contextlib
import pathlib

import hypothesis
import jax
import pytest

# The first example of a test compiles a program, so there is no deadline; seeds are fixed, as CI must not waver.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """For the tests of this folder only: docstrings' examples run as a user would run them."""
    with contextlib.ExitStack() as stack:
        if pathlib.Path(__file__).parent in item.path.parents:
            stack.enter_context(jax.numpy_dtype_promotion("strict"))
            stack.enter_context(jax.numpy_rank_promotion("raise"))
        return (yield)
