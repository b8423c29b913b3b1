"""Mistakes that the type checker must find; it is run on this file together with the package.

Each wrong line carries the `type: ignore` that silences it. mypy refuses an ignore that silences
nothing, so it fails here as soon as it no longer sees the mistake: when its settings, or a new
optax, have turned what it compares with into `Any`. Nothing runs this file.
"""

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

import optax_mtl


class State(NamedTuple):
    """Some state."""

    task_weights: jax.Array


def init(params: optax.Params) -> State:
    """The right `init`."""
    return State(jnp.zeros(2))


def right(
    updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
) -> tuple[optax.Updates, State]:
    """The right `update`."""
    return updates, state


def required_argument(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
    *,
    losses: jax.Array,
    **extra_args: Any,
) -> tuple[optax.Updates, State]:
    """Nobody need give an extra argument."""
    return updates, state


def own_state_only(
    updates: optax.Updates, state: State, params: optax.Params | None = None, **extra_args: Any
) -> tuple[optax.Updates, State]:
    """Optax may pass any state."""
    return updates, state


def no_state(
    updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
) -> optax.Updates:
    """The new state is forgotten."""
    return updates


optax.GradientTransformationExtraArgs(init, right)
optax.GradientTransformationExtraArgs(init, required_argument)  # type: ignore[arg-type]
optax.GradientTransformationExtraArgs(init, own_state_only)  # type: ignore[arg-type]
optax.GradientTransformationExtraArgs(init, no_state)  # type: ignore[arg-type]
optax.GradientTransformationExtraArgs(right, right)  # type: ignore[arg-type]

optax_mtl.mgda(num_tasks=2)
optax_mtl.mgda(num_tasks="two")  # type: ignore[arg-type]
optax_mtl.mgda(number_of_tasks=2)  # type: ignore[call-arg]
optax_mtl.mgda(2).init()  # type: ignore[call-arg]
