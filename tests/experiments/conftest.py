import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_fast():
    """These tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def promotion():
    """Standard dtype promotion: optax.adam has a float to the power of an int, which the strict kind refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
