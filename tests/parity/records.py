"""What the peers returned, and how far from it an answer is. `golden/README.md` describes the arrays."""

import pathlib

import jax
from jax import lax
import numpy as np

_GOLDEN = pathlib.Path(__file__).parent / "golden"


def load(name):
    """`{group: {field: array}}`; a group holds all cases of one number of tasks, stacked along axis 0."""
    groups = {}
    with np.load(_GOLDEN / f"{name}.npz") as arrays:
        for key in arrays:
            if key != "kinds":
                group, field = key.split(".", 1)
                groups.setdefault(group, {})[field] = arrays["kinds"][arrays[key]] if field == "kind" else arrays[key]
    return groups


def all_steps(method, grads, losses, *arguments):
    """Updates and states of `method(*arguments)`, over all steps of all runs; each run has its own arguments.

    A map over the runs, as it compiles faster than a vmap.
    """

    def one_run(inputs):
        grads, losses, *arguments = inputs
        tx = method(*arguments)

        def step(state, now):
            updates, state = tx.update(now[0], state, losses=now[1])
            return state, (updates, state)

        return lax.scan(step, tx.init(grads[0, 0]), (grads, losses))[1]

    return jax.jit(lambda *runs: lax.map(one_run, runs))(grads, losses, *arguments)


# What follows is for any number of leading axes, of cases and steps.


def norm(vectors):
    return np.linalg.norm(vectors, axis=-1)


def mix(weights, grads):
    """`sum_i weights[i] * grads[i]`."""
    return np.einsum("...t,...td->...d", weights, grads)


def inner(grads, vector):
    """The inner products `(T,)` of the gradients with a vector."""
    return np.einsum("...td,...d->...t", grads, vector)


def gramian(grads):
    return grads @ grads.swapaxes(-1, -2)


def min_norm_gap(grads, weights):
    """`|d|^2 - min_i <g_i, d>`, zero at the min-norm point only, and the size of the terms in it."""
    d = mix(weights, grads)
    return (d * d).sum(-1) - inner(grads, d).min(-1), norm(grads).max(-1) * (weights * norm(grads)).sum(-1)


def close(got, wanted, scale, tolerance):
    """Asserts that two stacks of vectors are within `tolerance` times `scale` of each other; NaN never is."""
    distance, scale = np.broadcast_arrays(norm(got - wanted), scale)
    wrong = ~(distance <= tolerance * scale)
    assert not wrong.any(), f"cases {np.argwhere(wrong).tolist()}: {distance[wrong]} at scales {scale[wrong]}"


def at_most(values, bounds):
    """Asserts `values <= bounds`; NaN never is."""
    wrong = ~(values <= bounds)
    assert not wrong.any(), f"cases {np.argwhere(wrong).tolist()}: {values[wrong]} over {bounds[wrong]}"
