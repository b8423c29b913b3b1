"""Inputs for the laws: gradient matrices of every kind, the trees they are cut into, and dtype contexts."""

import contextlib

import jax
from jax import numpy as jnp
import numpy as np

# Leaves of two shapes, one of them absent. SIZE is the number of parameters.
SHAPES = {"a": (4,), "b": [(2, 2), None]}
SIZE = 8


def tree_of(matrix, dtype=jnp.float32):
    """Cuts the last axis, of length SIZE, of an array into the leaves of SHAPES."""
    matrix = np.asarray(matrix)
    lead = matrix.shape[:-1]
    return {
        "a": jnp.asarray(matrix[..., :4], dtype),
        "b": [jnp.asarray(matrix[..., 4:].reshape(*lead, 2, 2), dtype), None],
    }


def vector_of(tree):
    """The inverse of `tree_of`, in float64."""
    return np.concatenate(
        [np.asarray(tree["a"], np.float64), np.asarray(tree["b"][0], np.float64).reshape(*tree["a"].shape[:-1], 4)], -1
    )


def params(dtype=jnp.float32):
    return tree_of(np.linspace(-1, 1, SIZE), dtype)


def gradients(kind="gaussian", num_tasks=3, seed=0):
    """A gradient matrix `(num_tasks, SIZE)`, float64."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((num_tasks, SIZE))
    if kind == "zeros":
        return np.zeros_like(matrix)
    if kind == "duplicate":
        matrix[-1] = matrix[0]
    elif kind == "opposite":
        matrix[-1] = -matrix[0]
    elif kind == "parallel":
        matrix = matrix[:1] * (1 + 1e-6 * rng.standard_normal(matrix.shape))
    elif kind == "low_rank":
        matrix = rng.standard_normal((num_tasks, 1)) @ rng.standard_normal((1, SIZE))
    elif kind == "zero_row":
        matrix[-1] = 0
    elif kind == "badly_scaled":
        matrix *= np.logspace(-4, 4, num_tasks)[:, None]
    elif kind == "extremely_scaled":
        matrix *= np.logspace(-14, 14, num_tasks)[:, None]
    elif kind == "conflicting":
        matrix = matrix - matrix.mean(0) + 0.1 * rng.standard_normal(SIZE)
    elif kind == "stationary":
        matrix[-1] = -matrix[:-1].sum(0) / 2  # 0 is in the convex hull
    elif kind != "gaussian":
        raise ValueError(kind)
    return matrix


KINDS = (
    "gaussian",
    "zeros",
    "duplicate",
    "opposite",
    "parallel",
    "low_rank",
    "zero_row",
    "badly_scaled",
    "extremely_scaled",
    "conflicting",
    "stationary",
)


def losses(num_tasks=3, seed=0):
    return np.random.default_rng(100 + seed).uniform(0.05, 3, num_tasks)


def extra_args(losses):
    """What single methods ask for beside the losses, made from them."""
    return {"kpis": jnp.exp(-jnp.abs(losses)), "gradient_variance": jnp.abs(losses)}


def value_fn(num_tasks):
    """Losses with a minimum each, for methods that look at the loss elsewhere."""

    def losses_at(tree):
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        scale = jnp.arange(1, num_tasks + 1).astype(flat.dtype)
        centres = jnp.outer(scale, jnp.ones_like(flat))
        return jnp.sum((flat[None] - centres) ** 2, axis=1) * scale

    return losses_at


def enable_x64():
    """A context with float64, wherever this version of JAX keeps it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


@contextlib.contextmanager
def relaxed_promotion():
    """JAX's own default promotion, for Optax's code, which is not written for the strict one."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
