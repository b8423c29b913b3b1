"""HydaLearn: do weights that are chosen anew for every batch follow auxiliary tasks whose relevance drifts?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import itertools
import math
from typing import Any

import jax
from jax import flatten_util, lax, numpy as jnp
from matplotlib import figure
import numpy as np
import optax

import optax_mtl as mtl
from optax_mtl.experiments import _data, _plots, _registry, _report, _statistics, _training
from optax_mtl.experiments.evidence import _drift_data, _study

SETTINGS = _drift_data.SETTINGS
TASKS = 1 + _drift_data.AUXILIARIES
_FIXED = "fixed weights"  # the cell
_KNOWN = "known relevance"
_TUNED = "fixed, tuned"
_ALONE_NAME = "main task alone"
_EQUAL_WEIGHTS = "equal weights"
_TASK_NAMES = ("main", *(f"auxiliary {k + 1}" for k in range(_drift_data.AUXILIARIES)))
_MEASURES = ("at the end", "on average")
_SIMPLEX = np.array(  # weights that are tried on every batch, and equal ones at the end
    [(10 - a - b, a, b) for a in range(11) for b in range(11 - a)] + [(10 / 3,) * TASKS], np.float32
) / np.float32(10)
_ALONE, _EQUAL = 0, len(_SIMPLEX) - 1  # their places there
_STEP = 1e-3  # length of the steps tried on a batch, short enough to gain to first order
_CHOICES = ("best for the batch", "best for all batches", "hydalearn", "equal", "main task alone")


@dataclass(frozen=True)
class Config:
    """The same for every method.

    Attributes:
      seeds: number of seeds in each setting.
      first_seed: so that pilots have seeds of their own.
      records: points on a curve.
      steps_per_record: optimiser steps in each.
      batch_size: examples in a batch.
      learning_rate: of Adam, and of HydaLearn's trial steps.
      features: length of an input.
      directions: projections of each kind that the targets are made of.
      width: units in the trunk's one layer.
      noise: standard deviation of the noise in the main task's labels, whose own is 1.
      train_size: number of training examples.
      held_out_size: number of validation examples, and of test examples.
      grid: fixed weights of each auxiliary task that are tried, all pairs.
      methods: beside fixed weights.
      batches: number of batches at each of `moments` for which the best weights are sought.
      moments: shares of the training after which they are.
    """

    seeds: int = 20
    first_seed: int = 100
    records: int = 40
    steps_per_record: int = 40
    batch_size: int = 32
    learning_rate: float = 1e-2
    features: int = 16
    directions: int = 3
    width: int = 4
    noise: float = 1.5
    train_size: int = 6_000
    held_out_size: int = 500
    grid: tuple[float, ...] = (0, 0.1, 0.3, 1, 3)
    methods: tuple[str, ...] = ("dwa", "gradnorm", "grad_cosine", "ol_aux", "hydalearn", "hydalearn_first_order")
    batches: int = 24
    moments: tuple[float, ...] = (0.1, 0.5, 0.9)

    @property
    def steps(self) -> int:
        """Optimiser steps of a run."""
        return self.records * self.steps_per_record

    @property
    def candidates(self) -> list[tuple[float, ...]]:
        """Weights of all tasks that are tried as fixed weights."""
        return [(1.0, *pair) for pair in itertools.product(self.grid, repeat=_drift_data.AUXILIARIES)]


QUICK = Config(
    seeds=2,
    records=4,
    steps_per_record=3,
    train_size=64,
    held_out_size=32,
    grid=(0, 1),
    methods=("grad_cosine", "hydalearn"),
    batches=2,
    moments=(0.5, 1.0),
)


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    grid = ", ".join(f"{w:g}" for w in config.grid)
    moments = ", ".join(f"{100 * m:.0f}" for m in config.moments)
    return [
        "The paper simulates too, in a way that its abstract does not tell and that we have not read; what is built "
        "here follows the abstract: auxiliary tasks whose relevance drifts during training, and weights that should "
        "depend on the batch.",
        f"Inputs are {config.features} standard normal numbers. The main target is a sum of {config.directions} "
        "projections, each through a hyperbolic tangent; its labels carry noise of "
        f"{config.noise:g} times its standard deviation. An auxiliary target is sqrt(r) times another sum of the same "
        f"{config.directions}, plus sqrt(1 - r) times a sum of {config.directions} of its own, without noise: r is its "
        "relevance, the share of its variance that comes from what the main task needs.",
        *(f"Setting *{name}*: {drift.text}." for name, drift in SETTINGS.items()),
        "A drifting relevance goes from 1 to 0, or from 0 to 1, on half a wave of the cosine over the whole training; "
        "the auxiliary labels change with it, on the same inputs.",
        f"A trunk of one layer of {config.width} units (tanh), narrower than what the three tasks need together, and "
        "one linear head a task. Squared errors.",
        f"{config.steps:,} steps of Adam, learning rate {config.learning_rate:g}, batches of {config.batch_size} of "
        f"{config.train_size:,} training examples, every method with its default arguments (dwa is told how long an "
        "epoch is). The learning rate was chosen from 0.003, 0.01 and 0.03 on other seeds, for the smallest error of "
        "the main task alone and of equal weights. Noise, width, examples and steps were settled in pilots "
        "too, so that a relevant auxiliary task helps and an irrelevant one does harm; HydaLearn's results there were "
        "seen, and nothing was changed after them but the number of seeds, raised after a run with twelve others.",
        f"HydaLearn's trial steps are plain gradient steps of {config.learning_rate:g} (the library's reading; the "
        "paper's constants, and what it does about negative gains, are not known to us), its weights apply to trunk "
        "and heads. grad_cosine and gradnorm act on the trunk, each head gets its own gradient.",
        f"Fixed weights: main task 1, each auxiliary task one of {grid}, all {len(config.candidates)} pairs. Each seed "
        f"takes the pair with the smallest error on {config.held_out_size} validation examples with noisy labels "
        f"({_TUNED}), at the end or on average; the pair 0, 0 is the main task alone, and 1, 1 is equal weighting.",
        f"{_KNOWN}: weights that are the true relevance at every step, which nobody has outside a simulation.",
        f"Error: mean squared error of the main task on {config.held_out_size} test examples without noise, in percent "
        "of the target's variance: 100 % is the error of the mean. At the end is after the last step, no early "
        "stopping; on average is over the last three quarters of the training, the network being used while the "
        "world drifts.",
        f"Seeds: {config.seeds} in each setting. A seed fixes tasks, examples, first parameters and order of batches, "
        "the same for every method and setting. Student's t-test for pairs, p-values after Holm for all comparisons "
        "of a kind, in all settings.",
        f"Best weights of a batch: HydaLearn's own run is stopped after {moments} % of the steps; for each of "
        f"{config.batches} batches, steps of the length {_STEP:g} along the weighted sum of the batch's gradients are "
        f"tried, with weights on a grid of {len(_SIMPLEX) - 1} points (tenths that sum to one). Gain is by how much "
        "the error on the test examples falls, in percent of what the steepest step of that length gains, along the "
        "gradient of that very error. One length for all, since Adam takes no notice of a common factor.",
    ]


def cells(config: Config) -> list[_study.Cell]:
    """All fixed weights in one program, and one program a method."""
    fixed = _study.Cell(_FIXED, lambda advance: _fixed(config, advance), ticks=2)

    def cell(method: str) -> _study.Cell:
        return _study.Cell(method, lambda advance: _method(config, method, advance), ticks=2)

    return [fixed, *(cell(method) for method in config.methods)]


# -- Training --------------------------------------------------------------------------------------------------------


def make_problem(config: Config, weights: np.ndarray | None = None) -> _training.Problem:
    """What is trained on; the axis of the seeds holds all weights, settings and seeds, in this order.

    Args:
      config: the settings.
      weights: `(W, T)`, by which the losses are multiplied; not a number for the known relevance. All one if None.

    Returns:
      A `Problem` whose `evaluate` returns the main task's error on the test and on the validation examples, and the
      parameters if `weights` is None.
    """
    keep_params = weights is None
    weights = np.ones((1, TASKS), np.float32) if weights is None else weights
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    sizes = {"train": config.train_size, "validation": config.held_out_size, "test": config.held_out_size}
    of_seeds = [
        _drift_data.examples(seed, sizes, features=config.features, directions=config.directions, noise=config.noise)
        for seed in seeds
    ]
    # Constants of the program, in which each run looks up its own seed: in `data`, every run would have a copy.
    train, validation, test = (
        jax.tree.map(lambda *arrays: jnp.asarray(np.stack(arrays)), *(sets[name] for sets in of_seeds))
        for name in sizes
    )
    shape = (len(weights), len(SETTINGS), config.seeds)

    def along(values: Any, axis: int) -> np.ndarray:
        """Repeats `values`, one a seed, setting or weight, for all runs."""
        values = np.asarray(values)
        lead = [1, 1, 1]
        lead[axis] = len(values)
        return np.broadcast_to(values.reshape(*lead, *values.shape[1:]), shape + values.shape[1:]).reshape(
            -1, *values.shape[1:]
        )

    def losses(params: Any, data: Any, batch: jax.Array) -> jax.Array:
        step, rows = batch[0], batch[1:]
        seed = data["seed"]
        progress = step.astype(jnp.float32) / max(1, config.steps - 1)
        relevant = _drift_data.relevance(data["start"], data["end"], progress)
        main = train.main[seed, rows] + train.noise[seed, rows]
        shared, own = train.shared[seed][:, rows], train.own[seed][:, rows]
        auxiliary = jnp.sqrt(relevant)[:, None] * shared + jnp.sqrt(1 - relevant)[:, None] * own
        targets = jnp.concatenate([main[None], auxiliary])
        errors = jnp.mean(jnp.square(outputs(params, train.inputs[seed, rows]) - targets), axis=1)
        known = jnp.concatenate([jnp.ones(1), relevant])
        return errors * jnp.where(jnp.isnan(data["weights"]), known, data["weights"])

    def evaluate(params: Any, data: Any) -> Any:
        seed = data["seed"]
        on_test = main_error(params, test.inputs[seed], test.main[seed])
        on_validation = main_error(params, validation.inputs[seed], validation.main[seed] + validation.noise[seed])
        errors = jnp.stack([on_test, on_validation])
        return {"errors": errors, "params": params} if keep_params else {"errors": errors}

    return _training.Problem(
        losses=losses,
        evaluate=evaluate,
        params=jax.tree.map(lambda *leaves: along(np.stack(leaves), 2), *(first_params(config, s) for s in seeds)),
        data={
            "seed": along(np.arange(config.seeds, dtype=np.int32), 2),
            "start": along(np.array([drift.start for drift in SETTINGS.values()], np.float32), 1),
            "end": along(np.array([drift.end for drift in SETTINGS.values()], np.float32), 1),
            "weights": along(np.asarray(weights, np.float32), 0),
        },
        batches=along(np.stack([_batches(config, seed) for seed in seeds]), 2),
    )


def outputs(params: Any, inputs: jax.Array) -> jax.Array:
    """`(T, B)` for inputs `(B, features)`."""
    trunk, heads = params["trunk"], params["heads"]
    hidden = jnp.tanh(inputs @ trunk["kernel"] + trunk["bias"][None])
    return heads["kernel"] @ hidden.T + heads["bias"][:, None]


def main_error(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The main task's mean squared error, `()`."""
    return jnp.mean(jnp.square(outputs(params, inputs)[0] - targets))


def first_params(config: Config, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """A seed's first parameters."""
    rng = np.random.default_rng([seed, 3])

    def normal(rows: int, columns: int, fan_in: int) -> np.ndarray:
        return (rng.normal(size=(rows, columns)) / math.sqrt(fan_in)).astype(np.float32)

    return {
        "trunk": {
            "kernel": normal(config.features, config.width, config.features),
            "bias": np.zeros(config.width, np.float32),
        },
        "heads": {"kernel": normal(TASKS, config.width, config.width), "bias": np.zeros(TASKS, np.float32)},
    }


def _batches(config: Config, seed: int) -> np.ndarray:
    """`(records, steps, 1 + B)`: the step's number, and rows of the training examples."""
    rows = _data.epochs(seed, config.train_size, config.batch_size, config.steps)
    numbered = np.concatenate([np.arange(config.steps, dtype=np.int32)[:, None], rows], axis=1)
    return numbered.reshape(config.records, config.steps_per_record, -1)


def _fixed(config: Config, advance: _training.Advance) -> _study.Arrays:
    """All fixed weights, and the known relevance as the last."""
    weights = np.array([*config.candidates, (np.nan,) * TASKS], np.float32)
    problem = make_problem(config, weights)
    run = _training.train(lambda key: _optimiser(config, "sum", key), problem, chunks=1, advance=advance)
    errors = run.record.scores["errors"].reshape(len(weights), len(SETTINGS), config.seeds, config.records, 2)
    advance(1)
    kept = (0, config.candidates.index((1.0,) * TASKS), -1)  # whose curves are drawn; of the others, the end is enough
    return {"errors": measured(errors), "curves": errors[kept, ..., 0]}


def _method(config: Config, method: str, advance: _training.Advance) -> _study.Arrays:
    problem = make_problem(config)
    run = _training.train(lambda key: _optimiser(config, method, key), problem, chunks=1, advance=advance)
    lead = (len(SETTINGS), config.seeds)
    found = {
        "errors": run.record.scores["errors"].reshape(*lead, config.records, 2),
        "weights": run.record.weights.reshape(*lead, config.records, TASKS),
    }
    if method == "hydalearn":
        found |= {
            name: values.reshape(*lead, *values.shape[1:])
            for name, values in _best_weights(config, problem, run.record.scores["params"]).items()
        }
    advance(1)
    return found


def _optimiser(config: Config, method: str, key: jax.Array) -> optax.GradientTransformation:
    adam = optax.adam(config.learning_rate)
    if method == "sum":
        return optax.chain(mtl.sum_tasks(TASKS), adam)
    if method == "hydalearn_first_order":
        first_order = mtl.hydalearn(TASKS, learning_rate=config.learning_rate, lookahead="first_order")
        return optax.chain(first_order, adam)
    setting = _registry.Setting(
        num_tasks=TASKS,
        learning_rate=config.learning_rate,
        optimizer=adam,
        key=key,
        steps_per_epoch=config.train_size // config.batch_size,
        form="regression",
    )
    return _registry.METHODS[method].build(setting)


def _best_weights(config: Config, problem: _training.Problem, params: Any) -> dict[str, np.ndarray]:
    """The best weights of single batches, beside HydaLearn's.

    Args:
      config: the settings.
      problem: the one that was trained on.
      params: leaves `(S, records, *shape)`, HydaLearn's after each record.

    Returns:
      `batch_weights` `(S, moments, batches, 2, T)`, the best for each batch and HydaLearn's, and `batch_gains`
      `(S, moments, batches, choices)`, of steps by each of `_CHOICES`, where the steepest step gains 1.
    """
    method = mtl.hydalearn(TASKS, learning_rate=config.learning_rate)
    records = [max(0, round(moment * config.records) - 1) for moment in config.moments]
    params = jax.tree.map(lambda leaf: leaf[:, records], params)
    rng = np.random.default_rng(config.first_seed)
    rows = rng.integers(config.train_size, size=(config.batches, config.batch_size), dtype=np.int32)
    steps = (np.array(records, np.int32) + 1) * config.steps_per_record - 1
    batches = np.concatenate(
        [
            np.broadcast_to(steps[:, None, None], (len(steps), config.batches, 1)),
            np.broadcast_to(rows, (len(steps), *rows.shape)),
        ],
        axis=2,
    )

    def at_moment(params: Any, data: Any, batches: jax.Array) -> tuple[jax.Array, jax.Array]:
        flat, unravel = flatten_util.ravel_pytree(params)

        def test_error(flat: jax.Array) -> jax.Array:
            return problem.evaluate(unravel(flat), data)["errors"][0]

        def gain(direction: jax.Array) -> jax.Array:
            step = _STEP * direction / jnp.maximum(jnp.linalg.norm(direction), jnp.finfo(direction.dtype).tiny)
            return error - test_error(flat - step)

        error, steepest = jax.value_and_grad(test_error)(flat)

        def of_batch(batch: jax.Array) -> tuple[jax.Array, jax.Array]:
            def losses_of(params: Any) -> jax.Array:
                return problem.losses(params, data, batch)

            losses, task_grads = mtl.value_and_task_grads(losses_of)(params)
            _, state = method.update(task_grads, method.init(params), params, losses=losses, value_fn=losses_of)
            chosen = optax.tree.get(state, "task_weights")
            rows = jax.vmap(lambda grads: flatten_util.ravel_pytree(grads)[0])(task_grads)  # (T, P)

            weights = jnp.concatenate([jnp.asarray(_SIMPLEX), chosen[None]])
            return jax.vmap(lambda w: gain(w @ rows))(weights) / gain(steepest), chosen

        gains, chosen = lax.map(of_batch, batches)  # (batches, candidates + 1), (batches, T)
        tried = gains[:, :-1]
        best = jnp.argmax(tried, axis=1)
        constant = jnp.argmax(jnp.mean(tried, axis=0))
        of_choices = [jnp.max(tried, axis=1), tried[:, constant], gains[:, -1], tried[:, _EQUAL], tried[:, _ALONE]]
        return jnp.stack([jnp.asarray(_SIMPLEX)[best], chosen], axis=1), jnp.stack(of_choices, axis=1)

    def of_run(params: Any, data: Any) -> tuple[jax.Array, jax.Array]:
        return lax.map(lambda at: at_moment(at[0], data, at[1]), (params, jnp.asarray(batches)))

    weights, gains = jax.jit(jax.vmap(of_run))(params, jax.device_put(problem.data))
    return {"batch_weights": np.asarray(weights), "batch_gains": np.asarray(gains)}


# -- Report ----------------------------------------------------------------------------------------------------------


def measured(curves: np.ndarray) -> np.ndarray:
    """Errors `(..., _MEASURES, K)` at the end and on average, from `(..., records, K)`."""
    return np.stack([curves[..., -1, :], curves[..., curves.shape[-2] // 4 :, :].mean(axis=-2)], axis=-2)


def tuned(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What fixed weights give that are chosen on the validation examples.

    Args:
      errors: `(W, ..., 2)`, on test and on validation examples.

    Returns:
      Test errors `(...)`, and which weights were chosen, likewise.
    """
    chosen = np.argmin(errors[..., 1], axis=0)
    return np.take_along_axis(errors[..., 0], chosen[None], axis=0)[0], chosen


def following(weights: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """How well the weights follow the relevance: their correlation over time and auxiliary tasks, one number a seed.

    Args:
      weights: `(S, records, T)`, the main task's first.
      relevance: `(records, A)`.

    Returns:
      `(S,)`, of the auxiliary tasks' shares in the sum of the weights; not a number where either does not vary.
    """
    shares = _shares(weights)[:, :, 1:]
    varied = shares - shares.mean(axis=(1, 2), keepdims=True)
    drift = relevance - relevance.mean()
    spread = np.sqrt((varied**2).sum(axis=(1, 2)) * (drift**2).sum())
    known = spread > 1e-6
    return np.where(known, (varied * drift).sum(axis=(1, 2)) / np.where(known, spread, 1), np.nan)


def _shares(weights: np.ndarray) -> np.ndarray:
    """Weights that sum to one over the tasks; zero where all are."""
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def _relevance(config: Config) -> np.ndarray:
    """`(settings, records, A)`, in the middle of each record."""
    progress = (jnp.arange(config.records, dtype=jnp.float32)[:, None] + 0.5) / config.records
    of_settings = [
        _drift_data.relevance(jnp.array([drift.start], jnp.float32), jnp.array([drift.end], jnp.float32), progress)
        for drift in SETTINGS.values()
    ]
    return np.stack(of_settings)


def report(config: Config, results: _study.Results) -> _study.Report:
    """Tables, findings, pictures."""
    fixed = results[_FIXED]["errors"]  # (W + 1, settings, S, measures, 2)
    tuned_errors, chosen = tuned(fixed[:-1])
    of_all = {
        _ALONE_NAME: fixed[0, ..., 0],
        _EQUAL_WEIGHTS: fixed[config.candidates.index((1.0,) * TASKS), ..., 0],
        _TUNED: tuned_errors,
        **{method: measured(results[method]["errors"])[..., 0] for method in config.methods},
        _KNOWN: fixed[-1, ..., 0],
    }
    errors = {  # percent, each (settings, S)
        measure: {name: 100 * values[..., k] for name, values in of_all.items()} for k, measure in enumerate(_MEASURES)
    }
    relevance = _relevance(config)
    follows = {
        method: np.array([following(w, r) for w, r in zip(results[method]["weights"], relevance, strict=True)])
        for method in config.methods
    }
    shares = {method: _shares(results[method]["weights"]) for method in config.methods}
    compared = _comparisons(errors)
    at_end, on_average = (_error_table(errors[m], compared[m]) for m in _MEASURES)
    batches = _batch_numbers(results["hydalearn"])

    findings = [
        *_on_the_data(errors[_MEASURES[1]]),
        *_against_rivals(compared),
        *_on_following(follows),
        _on_shares(shares),
        *_on_batches(batches),
        _on_cost(config, errors[_MEASURES[0]][_TUNED], fixed[:-1, ..., 0, 0], chosen[..., 0]),
    ]
    section = _report.Section(
        title="HydaLearn: auxiliary tasks whose relevance drifts",
        introduction="The paper's claims: fixed weights do poorly because the relevance of auxiliary tasks drifts "
        "during training, and because the best weights vary from batch to batch; weights in the ratio of the main "
        "task's gains, computed anew for each batch, do better (Verboven et al., "
        "[arXiv 2008.11643](https://arxiv.org/abs/2008.11643)). Here the relevance is known, and can be compared.",
        protocol=protocol(config),
        table=at_end,
        legend="Error of the main task at the end, in percent, mean and standard error over seeds; lower is better. "
        "* marks what differs from hydalearn, p < 0.05 after Holm.",
        details=[
            (on_average, "The same on average over the last three quarters of the training."),
            (
                _following_table(follows),
                "Correlation of the auxiliary tasks' shares of the weights with their true relevance, over time and "
                "both auxiliary tasks; mean and standard error over seeds. 1 is perfect.",
            ),
            (
                _batch_table(config, batches),
                "Gain of one step of a fixed length, in percent of the steepest step's; best for all batches are the "
                "weights that are best for the batches of that moment together. Then the standard deviation over "
                "batches of the weights (mean over tasks) that are best for a batch, and of HydaLearn's; and how far "
                "these two agree: their correlation over batches (mean over tasks). Best weights are the best in "
                "hindsight.",
            ),
        ],
        findings=findings,
        pictures=[
            _report.Picture(
                "hydalearn.png",
                _picture(config, results, relevance),
                "Shares of the weights (solid) and the true relevance of the auxiliary tasks (dashed), and the main "
                "task's error, over training. Mean over seeds and one standard error.",
                dots_per_inch=75,
            ),
            _report.Picture(
                "hydalearn-batches.png",
                _batch_picture(config, results["hydalearn"]),
                "Setting rotating: the weight of the first auxiliary task that is best for a batch, and HydaLearn's "
                "for that batch; one dot a batch, all seeds.",
                dots_per_inch=75,
            ),
        ],
        data={},
    )
    rows = _rows(config, errors, fixed, follows, batches)
    return _study.Report(section, rows, _verdict(compared, follows, shares["hydalearn"]))


_Errors = Mapping[str, Mapping[str, np.ndarray]]  # by measure, and by weights, (settings, S)
_Compared = Mapping[str, Mapping[str, Mapping[str, _statistics.Comparison]]]  # by measure, setting and rival


def _comparisons(errors: _Errors) -> _Compared:
    """HydaLearn's error minus each rival's, in each setting; p after Holm for all of them."""
    rivals = [name for name in errors[_MEASURES[0]] if name != "hydalearn"]
    keys = list(itertools.product(_MEASURES, enumerate(SETTINGS), rivals))
    raw = [_statistics.paired(errors[m]["hydalearn"][i], errors[m][rival][i]) for m, (i, _), rival in keys]
    compared: dict[str, dict[str, dict[str, _statistics.Comparison]]] = {}
    for (measure, (_, setting), rival), comparison in zip(keys, _statistics.holm(raw), strict=True):
        compared.setdefault(measure, {}).setdefault(setting, {})[rival] = comparison
    return compared


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _on_the_data(errors: Mapping[str, np.ndarray]) -> list[str]:
    """Whether relevance matters here at all: what those who know it, and who ignore it, get."""
    said = {_EQUAL_WEIGHTS: "equal weights", _KNOWN: "weights that are the true relevance"}
    keys = [
        (i, name)
        for i, setting in enumerate(SETTINGS)
        for name in said
        if (setting, name) != ("irrelevant", _KNOWN)  # the same as the main task alone
    ]
    raw = [_statistics.paired(errors[name][i], errors[_ALONE_NAME][i]) for i, name in keys]
    parts: dict[int, list[str]] = {i: [] for i in range(len(SETTINGS))}
    for (i, name), comparison in zip(keys, _statistics.holm(raw), strict=True):
        parts[i].append(f"{said[name]} {_change(comparison)}")
    return [
        f"Setting {setting}, {_MEASURES[1]}: beside the {_ALONE_NAME}, {_listed(parts[i])}."
        for i, setting in enumerate(SETTINGS)
    ]


def _change(comparison: _statistics.Comparison) -> str:
    if not _statistics.significant(comparison):
        return f"change nothing that can be told: {comparison.text()}"
    word = "lower" if comparison.difference.mean < 0 else "raise"
    return f"{word} the error by {abs(comparison.difference.mean):.1f} points ({comparison.text()})"


def _sorted_by_verdict(against: Mapping[str, _statistics.Comparison]) -> dict[str, list[str]]:
    """Rivals by what hydalearn is beside them, each with the difference."""
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not distinguishable from": []}
    for rival, comparison in against.items():
        if not _statistics.significant(comparison):
            group = "not distinguishable from"
        else:
            group = "better than" if comparison.difference.mean < 0 else "worse than"
        groups[group].append(f"{rival} ({comparison.difference.mean:+.1f})")
    return {group: names for group, names in groups.items() if names}


def _against_rivals(compared: _Compared) -> list[str]:
    """HydaLearn's place in each setting, by both measures."""
    return [
        f"Setting {setting}, {measure}: hydalearn's error is "
        + "; ".join(f"{group} {_listed(names)}" for group, names in _sorted_by_verdict(against).items())
        + "."
        for measure, of_settings in compared.items()
        for setting, against in of_settings.items()
    ]


def _on_following(follows: Mapping[str, np.ndarray]) -> list[str]:
    findings = []
    for i, setting in enumerate(SETTINGS):
        of_methods = {m: values[i][np.isfinite(values[i])] for m, values in follows.items()}
        of_methods = {m: values for m, values in of_methods.items() if values.size}
        if "hydalearn" not in of_methods:
            continue
        own = of_methods["hydalearn"]
        best = max(of_methods, key=lambda m: of_methods[m].mean())
        finding = (
            f"Setting {setting}: hydalearn's weights follow the true relevance with a correlation of "
            f"{_statistics.estimate(own).text(2)}, positive in {int((own > 0).sum())} of {len(own)} seeds"
        )
        if of_methods[best].mean() > own.mean() + 0.005:
            finding += f"; {best}'s, the highest, with {_statistics.estimate(of_methods[best]).text(2)}"
        findings.append(finding + ".")
    return findings


def _on_shares(shares: Mapping[str, np.ndarray]) -> str:
    """What is left to the auxiliary tasks; `(settings, S, records, T)` of each method."""
    parts = []
    for method, values in shares.items():
        of_main = values[..., 0].mean(axis=2)
        low, high = 100 * of_main.mean(axis=1).min(), 100 * of_main.mean(axis=1).max()
        parts.append(
            f"{low:.0f} % by {method}" if round(low) == round(high) else f"{low:.0f} to {high:.0f} % by {method}"
        )
    return (
        f"Share of the weight that the main task is given, mean over training and seeds, by setting: {_listed(parts)}."
    )


_BatchNumbers = Mapping[str, np.ndarray]  # each (settings, S, moments), gains with the choices last


def _batch_numbers(found: _study.Arrays) -> _BatchNumbers:
    """What the best weights of batches come to, for each seed and moment."""
    weights, gains = found["batch_weights"].astype(float), found["batch_gains"].astype(float)
    spread = weights.std(axis=3).mean(axis=-1)  # (settings, S, moments, 2)
    centred = weights - weights.mean(axis=3, keepdims=True)
    product = (centred[..., 0, :] * centred[..., 1, :]).sum(axis=3)
    norms = np.sqrt((centred**2).sum(axis=3)).prod(axis=-2)
    agreement = np.where(norms > 1e-9, product / np.where(norms > 1e-9, norms, 1), np.nan)
    return {
        "gains": 100 * gains.mean(axis=3),  # (settings, S, moments, choices)
        "spread of the best": spread[..., 0],
        "spread of hydalearn": spread[..., 1],
        "agreement": _mean_of_known(agreement),
    }


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis of what is a number; not a number if nothing is."""
    known = np.isfinite(values)
    number = known.sum(axis=-1)
    total = np.where(known, values, 0).sum(axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _known_estimate(values: np.ndarray) -> _statistics.Estimate:
    known = values[np.isfinite(values)]
    return _statistics.estimate(known) if known.size else _statistics.Estimate(float("nan"), float("nan"))


def _on_batches(batches: _BatchNumbers) -> list[str]:
    """Whether the best weights vary, what that is worth, and how much of it HydaLearn gets."""
    gains = [dict(zip(_CHOICES, g.mean(axis=1).T, strict=True)) for g in batches["gains"]]  # of each setting, (S,)
    compared = _statistics.holm([_statistics.paired(of["hydalearn"], of["best for all batches"]) for of in gains])
    findings = []
    for i, (setting, of, against) in enumerate(zip(SETTINGS, gains, compared, strict=True)):
        mean = {choice: f"{_statistics.estimate(values).text(0)} %" for choice, values in of.items()}
        spread = _statistics.estimate(batches["spread of the best"][i].mean(axis=1))
        agreement = _known_estimate(_mean_of_known(batches["agreement"][i]))
        word = "more" if against.difference.mean > 0 else "less"
        findings.append(
            f"Setting {setting}: from batch to batch the best weights have a standard deviation of {spread.text(2)}. "
            f"Of the steepest step's gain, the best weights of each batch get {mean['best for the batch']}, the best "
            f"constant ones {mean['best for all batches']}, the main task alone {mean['main task alone']}, and "
            f"hydalearn's {mean['hydalearn']}, "
            + (f"significantly {word}" if _statistics.significant(against) else "not distinguishable from")
            + (" than the constant ones." if _statistics.significant(against) else " the constant ones.")
            + f" Over batches, its weights and the best have a correlation of {agreement.text(2)}."
        )
    return findings


def _on_cost(config: Config, errors: np.ndarray, fixed: np.ndarray, chosen: np.ndarray) -> str:
    """What tuning cost, and what it missed; `errors` and `chosen` `(settings, S)`, `fixed` `(W, settings, S)`."""
    hindsight = 100 * fixed.mean(axis=2).min(axis=0)
    missed = [f"{s} {errors[i].mean():.1f} against {hindsight[i]:.1f}" for i, s in enumerate(SETTINGS)]
    different = [f"{len(np.unique(of_setting))} in {s}" for s, of_setting in zip(SETTINGS, chosen, strict=True)]
    return (
        f"Tuned fixed weights cost {len(config.candidates)} runs; hydalearn costs one, of {TASKS + 1} more forward "
        f"passes a step. The {config.seeds} seeds chose so many different pairs for the end: {_listed(different)}. "
        f"Mean error beside that of the one pair that is best on the test examples: {_listed(missed)}."
    )


def _verdict(compared: _Compared, follows: Mapping[str, np.ndarray], shares: np.ndarray) -> str:
    """Two sentences; `shares` are HydaLearn's weights, as for `_on_shares`."""
    places = []
    for setting in ("rotating", "fading"):
        own = {r: compared[_MEASURES[1]][setting][r] for r in (_TUNED, _EQUAL_WEIGHTS, _ALONE_NAME)}
        places.append(f"{setting}: {'; '.join(f'{g} {_listed(n)}' for g, n in _sorted_by_verdict(own).items())}")
    rotating = _known_estimate(follows["hydalearn"][list(SETTINGS).index("rotating")])
    return (
        "HydaLearn's error on average over the training where relevance drifts, in points, "
        f"{' – '.join(places)}. Its weights follow a rotating relevance with a correlation of {rotating.text(2)}, "
        f"and leave {100 * (1 - shares[..., 0].mean()):.0f} % to the auxiliary tasks."
    )


def _error_table(
    errors: Mapping[str, np.ndarray], compared: Mapping[str, Mapping[str, _statistics.Comparison]]
) -> _report.Table:
    rows = []
    for name, values in errors.items():
        cells = [name]
        for setting, of_setting in zip(SETTINGS, values, strict=True):
            differs = name != "hydalearn" and _statistics.significant(compared[setting][name])
            cells.append(_statistics.estimate(of_setting).text(1) + ("*" if differs else ""))
        rows.append(cells)
    return _report.Table(["weights", *SETTINGS], rows)


def _following_table(follows: Mapping[str, np.ndarray]) -> _report.Table:
    settings = [name for name in SETTINGS if name != "irrelevant"]
    rows = []
    for method, values in follows.items():
        of_settings = [_known_estimate(values[list(SETTINGS).index(name)]) for name in settings]
        rows.append([method, *("–" if math.isnan(e.mean) else e.text(2) for e in of_settings)])
    return _report.Table(["method", *settings], rows)


def _batch_table(config: Config, batches: _BatchNumbers) -> _report.Table:
    rows = []
    for i, setting in enumerate(SETTINGS):
        for m, moment in enumerate(config.moments):
            gains = [f"{_known_estimate(g).mean:.0f}" for g in batches["gains"][i, :, m].T]
            of_best, of_own = (_statistics.estimate(batches[f"spread of {who}"][i, :, m]).mean for who in _WHO)
            agreement = _known_estimate(batches["agreement"][i, :, m])
            agree = "–" if math.isnan(agreement.mean) else agreement.text(2)
            rows.append([f"{setting}, {100 * moment:.0f} %", *gains, f"{of_best:.2f}", f"{of_own:.2f}", agree])
    headers = ["setting and moment", *_CHOICES, "spread: best", "hydalearn", "agreement"]
    return _report.Table(headers, rows)


_WHO = ("the best", "hydalearn")


def _rows(
    config: Config,
    errors: _Errors,
    fixed: np.ndarray,
    follows: Mapping[str, np.ndarray],
    batches: _BatchNumbers,
) -> list[dict[str, str | float]]:
    """One row a setting, weights and seed; choices of weights for single batches have rows of their own."""
    moments = [f"gain of a step after {100 * moment:.0f} %" for moment in config.moments]
    columns = [*(f"error {measure}" for measure in _MEASURES), "correlation with relevance", *moments]
    rows: list[dict[str, str | float]] = []

    def add(name: str, found: Mapping[str, np.ndarray]) -> None:
        for i, setting in enumerate(SETTINGS):
            for s in range(config.seeds):
                row: dict[str, str | float] = {"setting": setting, "weights": name, "seed": config.first_seed + s}
                values = {c: float(v[i, s]) for c, v in found.items() if np.isfinite(v[i, s])}
                rows.append(row | {column: values.get(column, "") for column in columns})

    for name in errors[_MEASURES[0]]:
        found = {f"error {measure}": of_measure[name] for measure, of_measure in errors.items()}
        add(name, found | ({columns[2]: follows[name]} if name in follows else {}))
    for candidate, values in zip(config.candidates, fixed[:-1], strict=True):
        name = "fixed " + " : ".join(f"{w:g}" for w in candidate)
        add(name, {columns[0]: 100 * values[..., 0, 0]})
    for k, choice in enumerate(_CHOICES):
        add(f"batches: {choice}", {moment: batches["gains"][:, :, m, k] for m, moment in enumerate(moments)})
    return rows


def _picture(config: Config, results: _study.Results, relevance: np.ndarray) -> figure.Figure:
    """A row a setting: HydaLearn's weights, two rivals', the main task's error."""
    shown = [m for m in ("hydalearn", "grad_cosine", "ol_aux") if m in config.methods]
    fig = figure.Figure(figsize=(3.1 * (len(shown) + 1), 2.1 * len(SETTINGS) + 0.6), layout="constrained")
    grid = fig.subplots(len(SETTINGS), len(shown) + 1, sharex=True, squeeze=False)
    steps = (np.arange(config.records) + 1) * config.steps_per_record
    colors = _plots.TASK_COLORS[:TASKS]
    alone, equal, known = results[_FIXED]["curves"]
    for i, (setting, line) in enumerate(zip(SETTINGS, grid, strict=True)):
        for method, ax in zip(shown, line, strict=False):
            shares = _shares(results[method]["weights"][i])
            for task in range(TASKS):
                label = _TASK_NAMES[task]
                _plots.curve(ax, steps, shares[:, :, task], color=colors[task], label=label)
                if task:
                    ax.plot(steps, relevance[i, :, task - 1], color=colors[task], linewidth=1, linestyle=(0, (4, 2)))
            ax.set_ylim(-0.03, 1.03)
            if i == 0:
                ax.set_title(f"{method}: weights", fontsize=10)
        curves: dict[str, np.ndarray] = {
            _ALONE_NAME: alone[i],
            _EQUAL_WEIGHTS: equal[i],
            **{method: results[method]["errors"][i, :, :, 0] for method in shown},
            _KNOWN: known[i],
        }
        for (name, values), color in zip(curves.items(), _ERROR_COLORS, strict=False):
            _plots.curve(line[-1], steps, 100 * values, color=color, label=name)
        line[-1].set_yscale("log")
        line[-1].set_yticks([2, 5, 10, 20, 50], labels=["2", "5", "10", "20", "50"])
        line[-1].set_yticks([], minor=True)
        line[0].set_ylabel(setting, fontsize=11, weight="bold")
        for ax in line:
            _plots.plain(ax)
    grid[0, -1].set_title("main task: test error, %", fontsize=10)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles.append(grid[0, 0].plot([], [], color="black", linewidth=1, linestyle=(0, (4, 2)))[0])
    labels.append("true relevance")
    others, names = grid[0, -1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    fig.legend(others, names, loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    return fig


_ERROR_COLORS = tuple(_plots.LINE_COLORS[k] for k in (0, 6, 2, 4, 8, 7))


def _batch_picture(config: Config, found: _study.Arrays) -> figure.Figure:
    """The best weight of a batch against HydaLearn's, a panel a moment."""
    fig = figure.Figure(figsize=(3.1 * len(config.moments) + 0.4, 3.2), layout="constrained")
    weights = found["batch_weights"][list(SETTINGS).index("rotating"), ..., 1]  # (S, moments, batches, 2)
    axes = fig.subplots(1, len(config.moments), sharex=True, sharey=True, squeeze=False)[0]
    rng = np.random.default_rng(0)
    for m, (moment, ax) in enumerate(zip(config.moments, axes, strict=True)):
        best, own = weights[:, m].reshape(-1, 2).T
        # The best weights are tenths: spread a little, so that dots do not hide each other.
        ax.plot(best + rng.uniform(-0.03, 0.03, best.shape), own, ".", color=_plots.LINE_COLORS[1], alpha=0.4, mew=0)
        ax.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        ax.set(title=f"after {100 * moment:.0f} % of the steps", xlabel="best for the batch")
        ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        _plots.plain(ax)
    axes[0].set_ylabel("hydalearn's")
    return fig
