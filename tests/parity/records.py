"""What the peers returned, and how far from it an answer is. `golden/README.md` describes the arrays."""

import pathlib

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


def close(got, wanted, scale, tolerance):
    """Asserts that two stacks of vectors are within `tolerance` times `scale` of each other; NaN never is."""
    distance, scale = np.broadcast_arrays(norm(got - wanted), scale)
    wrong = ~(distance <= tolerance * scale)
    assert not wrong.any(), f"cases {np.argwhere(wrong).tolist()}: {distance[wrong]} at scales {scale[wrong]}"


def at_most(values, bounds):
    """Asserts `values <= bounds`; NaN never is."""
    wrong = ~(values <= bounds)
    assert not wrong.any(), f"cases {np.argwhere(wrong).tolist()}: {values[wrong]} over {bounds[wrong]}"
