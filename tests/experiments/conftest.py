import jax
import pytest


@pytest.fixture
def promotion():
    """Standard dtype promotion: optax.adam has a float to the power of an int, which the strict kind refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield
