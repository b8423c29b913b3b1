"""The methods on show, and how each is put together for an experiment.

One convention for all: what a paper writes as weights on the *losses* weights trunk and heads alike; what a paper does
to the *gradients of the shared parameters* is done to the trunk, and each head gets its own task's gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax

import optax_mtl as mtl


@dataclass(frozen=True)
class Setting:
    """What an experiment gives to every method alike.

    Attributes:
      num_tasks: number of tasks `T`.
      learning_rate: of the optimiser, of MAO and of HydaLearn's trial steps.
      optimizer: what turns the balanced gradient into a step.
      key: a random key, another for each seed.
      steps_per_epoch: optimiser steps in an epoch.
      form: `"classification"` or `"regression"`, what the losses are.
      primary: the task that the methods with a main task serve.
    """

    num_tasks: int
    learning_rate: float
    optimizer: optax.GradientTransformation
    key: jax.Array
    steps_per_epoch: int
    form: str
    primary: int = 0


@dataclass(frozen=True)
class Method:
    """A method on show.

    Attributes:
      build: makes the whole optimiser.
      summary: one line for `--list`.
      serves_primary: whether it serves one main task rather than all.
    """

    build: Callable[[Setting], optax.GradientTransformation]
    summary: str
    serves_primary: bool = False


def is_shared(path: str) -> bool:
    """Whether the parameter at `path` belongs to the trunk."""
    return path.startswith("trunk")


def _weighted(make: Callable[[Setting], optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """Weights the losses: trunk and heads."""
    return lambda s: optax.chain(make(s), s.optimizer)


def _balanced(make: Callable[[Setting], optax.GradientTransformation]) -> Callable[..., optax.GradientTransformation]:
    """Balances the trunk's gradients; the heads' are their own."""
    return lambda s: optax.chain(mtl.shared_and_heads(make(s), shared=is_shared), s.optimizer)


METHODS = {
    "linear_scalarization": Method(
        _weighted(lambda s: mtl.linear_scalarization(s.num_tasks)),
        "equal weighting: the sum of the losses",
    ),
    "rlw": Method(
        _weighted(lambda s: mtl.rlw(s.num_tasks, s.key)),
        "random weights, new ones at every step",
    ),
    "uncertainty": Method(
        _weighted(lambda s: mtl.uncertainty(s.num_tasks, form=s.form)),
        "weights learned as the noise level of each task",
    ),
    "dwa": Method(
        _weighted(lambda s: mtl.dwa(s.num_tasks, steps_per_epoch=s.steps_per_epoch)),
        "more weight where the loss falls more slowly",
    ),
    "adaptive_weight_assignment": Method(
        _weighted(lambda s: mtl.adaptive_weight_assignment(s.num_tasks)),
        "weights proportional to the losses",
    ),
    "gradnorm": Method(
        _balanced(lambda s: mtl.gradnorm(s.num_tasks)),
        "weights learned so that gradient norms follow training rates",
    ),
    "mgda": Method(
        _balanced(lambda s: mtl.mgda(s.num_tasks)),
        "the shortest convex combination of the gradients",
    ),
    "pcgrad": Method(
        _balanced(lambda s: mtl.pcgrad(s.num_tasks, s.key)),
        "projects conflicting gradients off each other",
    ),
    "cagrad": Method(
        _balanced(lambda s: mtl.cagrad(s.num_tasks)),
        "helps the worst task, near the mean gradient",
    ),
    "edm": Method(
        _balanced(lambda s: mtl.edm(s.num_tasks)),
        "the central direction: equal angles to all gradients",
    ),
    "cdtt": Method(
        _balanced(lambda s: mtl.cdtt(s.num_tasks)),
        "the central direction, pulled towards tasks that lag",
    ),
    "mao": Method(
        lambda s: mtl.mao(s.learning_rate, s.num_tasks),
        "one Adam a task, their steps summed",
    ),
    "ial": Method(
        lambda s: optax.chain(mtl.ial(s.num_tasks, primary=s.primary, shared=is_shared), s.optimizer),
        "auxiliary gradients rescaled to the primary task's",
        serves_primary=True,
    ),
    "hydalearn": Method(
        _weighted(lambda s: mtl.hydalearn(s.num_tasks, learning_rate=s.learning_rate, primary=s.primary)),
        "weights by what a trial step on each task gains the primary one",
        serves_primary=True,
    ),
}
BASELINE = "linear_scalarization"
