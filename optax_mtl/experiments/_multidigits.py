"""MultiDigits: which method trains one trunk for three tasks best, and against single-task networks?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flax import nnx
import jax
import numpy as np
import optax

import optax_mtl as mtl
from optax_mtl.experiments import _data, _models, _registry, _training

TASKS = tuple(_data.TASKS)
DEFAULT_METHODS = (  # the baselines, one or two of each family, and those whose papers are at the heart of the library
    "linear_scalarization",
    "rlw",
    "uncertainty",
    "dwa",
    "adaptive_weight_assignment",
    "famo",
    "gradnorm",
    "mgda",
    "pcgrad",
    "cagrad",
    "nash_mtl",
    "upgrad",
    "upgrad_by_leaf",
    "con_fig",
    "edm",
    "cdtt",
    "mao",
    "ial",
    "hydalearn",
)
_LOOKED_INTO = (  # whose updates are recorded and drawn, leaf by leaf
    "linear_scalarization",
    "mao",
    "upgrad",
    "upgrad_by_leaf",
    "upgrad_preconditioned",
    "upgrad_in_metric",
    "apt",
)


@dataclass(frozen=True)
class Config(_training.Recorded):
    """The same for every method.

    Attributes:
      seeds: number of seeds.
      steps: optimiser steps, rounded up to a multiple of `steps_per_record`.
      batch_size: canvases in a batch.
      learning_rate: of Adam.
      width: units in each of the trunk's two hidden layers.
      train_size: number of training canvases.
      test_size: number of test canvases.
    """

    most_records: ClassVar[int] = 30
    seeds: int = 8
    steps: int = 1_500
    batch_size: int = 128
    learning_rate: float = 2e-3
    width: int = 64
    train_size: int = 10_000
    test_size: int = 2_000


@dataclass(frozen=True)
class Runs:
    """All runs.

    Attributes:
      single: of each task's single-task networks, in the order of `TASKS`.
      methods: of each method.
      leaves: names of the parameters' leaves.
    """

    single: Sequence[_training.Run]
    methods: dict[str, _training.Run]
    leaves: Sequence[str]


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    primary = ", ".join(name for name, m in _registry.METHODS.items() if m.serves_primary)
    weights_losses = ", ".join(name for name, m in _registry.METHODS.items() if m.weights_losses)
    return [
        f"Two 8 x 8 digits on a {_data.SIDE} x {_data.SIDE} canvas, the second {_data.SHIFT} pixels further right and "
        "down, the brighter of the two at every pixel. Tasks: left digit, right digit, parity of their sum.",
        "The source images are split two to one before any canvas is made, so that no digit image is in both: "
        f"{config.train_size:,} training and {config.test_size:,} test canvases.",
        f"One trunk of two hidden layers of {config.width} units (ReLU), one linear head a task, mean cross-entropies.",
        f"{config.records * config.steps_per_record:,} steps of Adam with learning rate {config.learning_rate:g} and "
        f"batches of {config.batch_size} for every method, and every method's default arguments (but dwa, igb and stch "
        "are told how long an epoch is, and uncertainty that the tasks are classifications).",
        "The defaults for learning rate, width and steps were settled once, after pilot runs of equal weighting and "
        "single-task networks alone, whose test accuracies were seen.",
        "mao is itself one Adam a task with that learning rate, their steps summed, so that its trunk moves up to "
        "three times as far in a step.",
        f"Seeds: {config.seeds}. A seed fixes split, canvases, initial weights and order of the batches, the same for "
        "every method: methods are compared seed by seed.",
        f"Methods that weight losses ({weights_losses}) weight trunk and heads; the others act on the trunk only, and "
        "each head gets its own gradient (in ial and imtl, weighted by what is learned of the task's loss).",
        "Those named by_layer or by_leaf give every layer or leaf of the trunk weights of its own; those named "
        "preconditioned balance the steps of one Adam a task, and in_metric means that inner products are taken in the "
        "metric of the Adam that follows.",
        f"Some methods serve a primary task, here the {TASKS[0]} digit ({primary}); the others serve all tasks.",
        "Single-task networks: the same trunk with one head, as many steps; three networks instead of one.",
        "Scores are test accuracies after the last step, with no early stopping. Δm is the gain in accuracy relative "
        "to the single-task network of the same seed, averaged over the three tasks.",
    ]


def ticks(config: Config, methods: Sequence[str]) -> int:
    """The sum of the ticks that `run` announces by `advance`."""
    return (len(TASKS) + len(methods)) * config.records


def run(config: Config, methods: Sequence[str], advance: Callable[[str, int], object]) -> Runs:
    """Trains the single-task networks and every method; `advance(name, ticks)` is called as it goes."""
    problem = make_problem(config)

    def ticker(name: str) -> _training.Advance:
        return lambda ticks: advance(name, ticks)

    single = [
        train(config, _only(problem, task), _registry.BASELINE, num_tasks=1, advance=ticker(f"only {name}"))
        for task, name in enumerate(TASKS)
    ]
    looked_into = set(_LOOKED_INTO).intersection(methods) or methods[:4]
    runs = {
        method: train(config, problem, method, monitored=method in looked_into, advance=ticker(method))
        for method in methods
    }
    return Runs(single, runs, mtl.block_names(problem.params))


def train(
    config: Config,
    problem: _training.Problem,
    method: str,
    *,
    num_tasks: int = len(TASKS),
    monitored: bool = False,
    advance: _training.Advance = lambda ticks: None,
) -> _training.Run:
    """Trains all seeds with one method; `monitored` says whether its updates are looked into, leaf by leaf."""

    def build(key: jax.Array) -> optax.GradientTransformation:
        setting = _registry.Setting(
            num_tasks=num_tasks,
            learning_rate=config.learning_rate,
            optimizer=optax.adam(config.learning_rate),
            key=key,
            steps_per_epoch=config.train_size // config.batch_size,
            form="classification",
        )
        return _registry.METHODS[method].build(setting)

    return _training.train(
        build, problem, chunks=config.records, monitored=num_tasks if monitored else None, advance=advance
    )


def make_problem(config: Config) -> _training.Problem:
    """Data, batches and initial weights of all seeds."""
    seeds = range(config.seeds)
    data = [_data.multi_digits(seed, config.train_size, config.test_size) for seed in seeds]
    steps = config.records * config.steps_per_record
    orders = [_data.epochs(seed, config.train_size, config.batch_size, steps) for seed in seeds]

    def network(key: jax.Array) -> tuple[Any, Any]:
        return nnx.split(_models.TrunkAndHeads(_data.SIDE**2, config.width, _data.TASKS, rngs=nnx.Rngs(key)))

    graph, _ = network(jax.random.key(0))
    keys = jax.vmap(jax.random.key)(np.arange(config.seeds, dtype=np.uint32))

    def losses(params: Any, data: Any, batch: jax.Array) -> jax.Array:
        images, labels = data["train"]
        return _models.cross_entropies(nnx.merge(graph, params)(images[batch]), labels[batch])

    def evaluate(params: Any, data: Any) -> jax.Array:
        images, labels = data["test"]
        return _models.accuracies(nnx.merge(graph, params)(images), labels)

    return _training.Problem(
        losses=losses,
        evaluate=evaluate,
        params=jax.jit(jax.vmap(lambda key: nnx.to_pure_dict(network(key)[1])))(keys),
        data={
            "train": (np.stack([d.train.images for d in data]), np.stack([d.train.labels for d in data])),
            "test": (np.stack([d.test.images for d in data]), np.stack([d.test.labels for d in data])),
        },
        batches=np.stack(orders).reshape(config.seeds, config.records, config.steps_per_record, -1),
    )


def _only(problem: _training.Problem, task: int) -> _training.Problem:
    """The problem with one task: the other heads are left as they are."""
    one = slice(task, task + 1)
    return replace(
        problem,
        losses=lambda *args: problem.losses(*args)[one],
        evaluate=lambda *args: problem.evaluate(*args)[one],
    )
