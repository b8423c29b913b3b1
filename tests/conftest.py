"""No surprises: dtype promotion is strict, rank promotion an error. (Warnings are errors in pyproject.toml.)"""

import hypothesis
import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles a program, so there is no deadline; seeds are fixed, as CI must not waver.
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("default")
