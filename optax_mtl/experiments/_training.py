"""Training: one compiled program a method, all seeds at once."""

from collections.abc import Callable
from dataclasses import dataclass
import math
import time
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax, numpy as jnp
import numpy as np
import optax

import optax_mtl as mtl

Build = Callable[..., optax.GradientTransformation]  # from a random key; and from what is varied, if anything is
Advance = Callable[[int], object]


class Recorded:
    """A configuration with `steps`, of which about `most_records` records are kept: its `steps` are rounded up."""

    steps: int
    most_records: ClassVar[int]

    @property
    def steps_per_record(self) -> int:
        """Steps over which a record averages."""
        return math.ceil(self.steps / self.most_records)

    @property
    def records(self) -> int:
        """Number of records."""
        return math.ceil(self.steps / self.steps_per_record)


@dataclass(frozen=True)
class Problem:
    """What is trained on, the same for every method.

    The parameters are a dict, with whatever all tasks share under `"trunk"`.

    Attributes:
      losses: `losses(params, data, batch)` returns the tasks' losses `(T,)`.
      evaluate: `evaluate(params, data)` returns one number a task, `(T,)`, or whatever else is to be kept, as a tree.
      params: first parameters of every seed, leaves `(S, *shape)`.
      data: whatever `losses` and `evaluate` look at, leaves `(S, ...)`.
      batches: `(S, records, steps, ...)`: what `losses` is given at each step; one record is kept every `steps` steps.
    """

    losses: Callable[[Any, Any, jax.Array], jax.Array]
    evaluate: Callable[[Any, Any], Any]
    params: Any
    data: Any
    batches: np.ndarray


class Record(NamedTuple):
    """What is kept of a run.

    Attributes:
      losses: `(S, records, T)`, mean over the steps of a record.
      weights: `(S, records, T)` of the method's task weights, likewise.
      cosines: `(S, records, T, T)` between the tasks' gradients on the trunk, likewise.
      scores: `(S, records, T)`, or a tree of `(S, records, ...)`: what `evaluate` returned after these steps.
      shares: `(S, records, B, T)`, each task's share of the update of each leaf, likewise; None unless asked for. See
        `optax_mtl.monitor`, for this and the next.
      update_cosines: `(S, records, B, T)`, between the update of each leaf and the tasks' gradients, likewise.
    """

    losses: Any
    weights: Any
    cosines: Any
    scores: Any
    shares: Any = None
    update_cosines: Any = None


@dataclass(frozen=True)
class Run:
    """A record and what it took: seconds for all seeds together, compilation apart."""

    record: Record
    seconds: float
    compile_seconds: float


def train(
    build: Build,
    problem: Problem,
    *,
    chunks: int,
    monitored: int | None = None,
    varied: Any = None,
    advance: Advance = lambda ticks: None,
) -> Run:
    """Trains every seed with one method.

    Args:
      build: makes the optimiser from a random key; every seed has its own.
      problem: what to train on.
      chunks: the program is called so many times; divides the number of records.
      monitored: the number of tasks, if the update is to be looked at, leaf by leaf; else None. It makes a step slower.
      varied: hyper-parameters that are not the same for all runs, leaves `(S, ...)`; `build` is then given each run's
        own as its second argument.
      advance: called with 0 before compilation and with 1 after each chunk, for a progress bar.

    Returns:
      A `Run`.
    """

    def optimiser(own: tuple[Any, ...]) -> optax.GradientTransformationExtraArgs:
        tx = build(*own)
        # Under `vmap` every step costs as much as a recorded one; so each is recorded, for the mean over them.
        return optax.with_extra_args_support(tx if monitored is None else mtl.monitor(tx, monitored, capacity=1))

    num_seeds = problem.batches.shape[0]
    data = jax.device_put(problem.data)
    keys = jax.vmap(jax.random.key)(jnp.arange(num_seeds, dtype=jnp.uint32))
    own = (keys,) if varied is None else (keys, jax.device_put(varied))

    def step(carry: Any, batch: jax.Array, data: Any, tx: Any) -> tuple[Any, Any]:
        params, opt_state = carry

        def losses_of(params: Any) -> jax.Array:
            return problem.losses(params, data, batch)

        task_grads: Any
        losses, task_grads = mtl.value_and_task_grads(losses_of)(params)
        updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses, value_fn=losses_of)
        weights = optax.tree.get(opt_state, "task_weights")
        cosines = mtl.task_cosines(task_grads["trunk"])
        update_seen = () if monitored is None else (opt_state.shares[0], opt_state.update_cosines[0])
        return (optax.apply_updates(params, updates), opt_state), (losses, weights, cosines, *update_seen)

    def program(carry: Any, own: Any, data: Any, batches: jax.Array) -> tuple[Any, Record]:
        tx = optimiser(own)

        def record(carry: Any, batches: jax.Array) -> tuple[Any, Record]:
            carry, seen = lax.scan(lambda c, batch: step(c, batch, data, tx), carry, batches)
            losses, weights, cosines, *update_seen = (jnp.mean(x, axis=0) for x in seen)
            return carry, Record(losses, weights, cosines, problem.evaluate(carry[0], data), *update_seen)

        return lax.scan(record, carry, batches)

    advance(0)
    start = time.perf_counter()
    opt_state = jax.jit(jax.vmap(lambda own, params: optimiser(own).init(params)))(own, problem.params)
    carry = (problem.params, opt_state)
    parts = np.split(problem.batches, chunks, axis=1)
    compiled = jax.jit(jax.vmap(program)).lower(carry, own, data, parts[0]).compile()
    compile_seconds = time.perf_counter() - start

    start = time.perf_counter()
    seen = []
    for part in parts:
        carry, record = jax.block_until_ready(compiled(carry, own, data, part))
        seen.append(record)
        advance(1)
    record = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *seen)
    return Run(record, time.perf_counter() - start, compile_seconds)
