"""One adaptive step a task (MAO): are tasks balanced across layers and steps, and is the result better?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
import functools
import math
from typing import Any, ClassVar, NamedTuple

from flax import nnx
import jax
from jax import lax, numpy as jnp
from matplotlib import figure
import numpy as np
import optax

import optax_mtl as mtl
from optax_mtl.experiments import _data, _models, _plots, _registry, _report, _statistics, _training
from optax_mtl.experiments.evidence import _mao_data, _study

Build = Callable[[int, Any, int], optax.GradientTransformation]  # from tasks, learning rate, steps in an epoch
Case = tuple[int, str]  # number of tasks, condition


def _registered(name: str) -> Build:
    def build(num_tasks: int, rate: Any, steps_per_epoch: int) -> optax.GradientTransformation:
        return _registry.METHODS[name].build(
            _registry.Setting(
                num_tasks=num_tasks,
                learning_rate=rate,
                optimizer=optax.adam(rate),
                key=jax.random.key(0),  # none of these draws anything
                steps_per_epoch=steps_per_epoch,
                form="classification",
            )
        )

    return build


METHODS: Mapping[str, Build] = {
    "linear_scalarization": _registered("linear_scalarization"),
    "uncertainty": lambda num_tasks, rate, _: optax.chain(
        mtl.uncertainty(num_tasks, form=_mao_data.FORMS[:num_tasks]), optax.adam(rate)
    ),
    **{name: _registered(name) for name in ("dwa", "scale_invariant", "gradnorm", "edm", "upgrad", "mao")},
    "mao_mean": lambda num_tasks, rate, _: mtl.mao(rate, num_tasks, reduction="mean"),
    "mao_by_leaf": lambda num_tasks, rate, _: mtl.mao(rate, num_tasks, grain="leaf"),
}
EQUAL = "linear_scalarization"
_VARIANTS = ("mao_mean", "mao_by_leaf")
_DRAWN = ("mao", "mao_by_leaf", "edm", "scale_invariant", "uncertainty", EQUAL)
CONDITIONS = {"equal": "losses as they are", "apart": "losses six orders apart"}
_ALONE = "alone"
_LOOK = 3  # one step in so many is looked at
_FIRST_PILOT = 100_000  # seeds from here on choose the learning rates


@dataclass(frozen=True)
class Config(_training.Recorded):
    """The same for every method.

    Attributes:
      seeds: number of seeds.
      steps: optimiser steps, rounded up to a multiple of `steps_per_record`.
      tasks: numbers of tasks.
      methods: see `METHODS`.
      rates: learning rates to choose from.
      batch_size: canvases in a batch.
      width: units in each hidden layer of the trunk.
      depth: hidden layers of the trunk.
      train_size: number of training canvases.
      held_size: number of canvases for validation, and for the test.
    """

    most_records: ClassVar[int] = 20
    seeds: int = 12
    steps: int = 400
    tasks: tuple[int, ...] = (2, 4, 8)
    methods: tuple[str, ...] = tuple(METHODS)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    batch_size: int = 64
    width: int = 32
    depth: int = 4
    train_size: int = 4_000
    held_size: int = 1_000

    @property
    def pilots(self) -> int:
        """Seeds that choose the learning rates: all rates of them are as many runs as the seeds, so one program."""
        return math.ceil(self.seeds / len(self.rates))


QUICK = Config(
    seeds=2, steps=4, tasks=(2,), methods=(EQUAL, "mao"), rates=(1e-3, 1e-2), width=8, depth=2, train_size=256
)


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    forms = zip(_mao_data.NAMES, _mao_data.FORMS, strict=True)
    tasks = ", ".join(f"{name} (regression)" if form == "regression" else name for name, form in forms)
    weights_losses = [m for m in config.methods if m in _registry.METHODS and _registry.METHODS[m].weights_losses]
    rates = ", ".join(f"{rate:g}" for rate in config.rates)
    numbers = " or ".join(map(str, config.tasks))
    return [
        f"Two of scikit-learn's handwritten digits on a {_data.SIDE} x {_data.SIDE} canvas, overlapping, and the "
        f"first {numbers} of {len(_mao_data.TASKS)} tasks: {tasks}. That is left and right digit, whether the left one "
        "is larger, their sum and its parity, the mean ink of the left image, whether the left digit has a closed "
        "loop, and the column of the right image's centre of gravity. Cross-entropies and squared errors (of numbers "
        "with variance one).",
        "Scales: equal (the losses as they are), or apart: the losses times 0.001 to 1,000, in equal ratios; "
        "which task gets which is by lot, anew for every seed. Scores are of the tasks as they are.",
        f"One trunk of {config.depth} hidden layers of {config.width} units (ReLU), one linear head a task; "
        f"{config.records * config.steps_per_record:,} steps with batches of {config.batch_size}, "
        f"{config.train_size:,} training canvases. Adam for all, behind the method; mao is itself one Adam a task, "
        "their steps summed, mao_mean the same with their mean, and mao_by_leaf has one second moment a task and leaf. "
        "Every method's default arguments (but dwa is told how long an epoch is, and uncertainty which tasks are "
        "regressions): uncertainty and gradnorm learn their weights at their own rates, for which six orders may be a "
        "long way.",
        f"Methods that weight losses ({', '.join(weights_losses)}) weight trunk and heads; the mao "
        "are complete optimisers; the others act on the trunk, and each head gets its own gradient.",
        "Learning rates: mao's steps are up to as many times as long as there are tasks, so that one rate for all "
        f"would not be fair. Every method in every setting, and every task alone, has the best of {rates}: best in "
        f"mean score on validation canvases, over {config.pilots} seeds that are used for nothing else.",
        "Images are split before canvases are made: a third is for the tests of all seeds; of the rest every seed "
        f"sets a quarter aside for validation. {config.held_size:,} test canvases; scores are accuracies and, of "
        "regressions, the share of the variance that is explained, after the last step.",
        "Δm is the gain in score relative to the single-task network of the same seed, averaged over the tasks: the "
        "same trunk, as many steps.",
        "Balance: each task's share of the step of each layer of the trunk (`optax_mtl.monitor`: what the tasks' "
        f"gradients of the same batch explain of it), of one step in {_LOOK}, averaged over "
        f"{config.steps_per_record} steps; negative shares count as none, the rest are made to sum to one, and the "
        "exponential of their entropy is the number of tasks that the step is made for: 1 if for one alone, all if for "
        "all alike.",
        f"Seeds: {config.seeds}. A seed fixes canvases, initial weights, order of the batches and lot, the same for "
        "every method: methods are compared seed by seed, by Student's t-test for pairs, p after Holm's correction "
        "for all comparisons of the same kind.",
        "The paper's own setting is larger: images of usual size, convolutional networks. Its code and its measures of "
        "balance could not be had; data, networks and measures here are ours.",
    ]


class _Runs(NamedTuple):
    """What tells one run from another, leaves `(R, ...)`; traced within a program, without `R`.

    Attributes:
      params: first parameters.
      rates: `(R,)` learning rates.
      scales: `(R, T)`, of the losses.
      batches: `(R, records, steps, B)`, row numbers.
      held: `(R, M)`, row numbers of what it is judged by.
    """

    params: Any
    rates: Any
    scales: Any
    batches: Any
    held: Any


class _Material(NamedTuple):
    """Canvases of all seeds, the pilots' last: one table, and every seed's rows in it."""

    images: np.ndarray
    targets: np.ndarray
    batches: np.ndarray  # (S + P, records, steps, B)
    held: np.ndarray  # (S + P, M)


def _seeds(config: Config) -> list[int]:
    return [*range(config.seeds), *range(_FIRST_PILOT, _FIRST_PILOT + config.pilots)]


@functools.lru_cache(maxsize=1)
def _material(config: Config) -> _Material:
    tables: list[_mao_data.Canvases] = []
    batches, held = [], []
    for i, seed in enumerate(_seeds(config)):
        judge = "test" if seed < _FIRST_PILOT else "validation"
        made = _mao_data.canvases(seed, config.train_size, config.held_size, held=judge)
        tables += made
        first = i * (config.train_size + config.held_size)
        order = _data.epochs(seed, config.train_size, config.batch_size, config.records * config.steps_per_record)
        batches.append(first + order.reshape(config.records, config.steps_per_record, -1))
        held.append(first + config.train_size + np.arange(config.held_size, dtype=np.int32))
    images = np.concatenate([table.images for table in tables])
    targets = np.concatenate([table.targets for table in tables])
    return _Material(images, targets, np.stack(batches), np.stack(held))


def _network(config: Config, num_tasks: int, key: jax.Array) -> tuple[Any, Any]:
    outputs = {name: _mao_data.TASKS[name] for name in _mao_data.NAMES[:num_tasks]}
    return nnx.split(_models.TrunkAndHeads(_data.SIDE**2, config.width, outputs, config.depth, rngs=nnx.Rngs(key)))


@functools.lru_cache(maxsize=4)
def _first_params(config: Config, num_tasks: int) -> Any:
    """Leaves `(S + P, ...)`."""
    keys = jax.vmap(jax.random.key)(np.array(_seeds(config), np.uint32))
    return jax.jit(jax.vmap(lambda key: nnx.to_pure_dict(_network(config, num_tasks, key)[1])))(keys)


def _runs(config: Config, num_tasks: int, of: Sequence[tuple[int, float, np.ndarray]]) -> _Runs:
    """Runs, each of a seed (by its place in `_seeds`) with a learning rate and scales `(T,)`."""
    seeds, rates, scales = zip(*of, strict=True)
    rows = np.array(seeds)
    material = _material(config)
    return _Runs(
        params=jax.tree.map(lambda leaf: leaf[rows], _first_params(config, num_tasks)),
        rates=np.array(rates, np.float32),
        scales=np.array(scales, np.float32),
        batches=material.batches[rows],
        held=material.held[rows],
    )


def scales(condition: str, num_tasks: int, seed: int) -> np.ndarray:
    """What the losses are multiplied with, `(T,)`."""
    if condition == "equal":
        return np.ones(num_tasks)
    return np.random.default_rng([seed, 3]).permutation(np.geomspace(1e-3, 1e3, num_tasks))


def _layer(path: str) -> str:
    return path.rpartition("/")[0]  # "layers/0/kernel" and "layers/0/bias" are one


def _given(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    """What `monitor` watches: the trunk's part of an update that has been made from all parameters."""
    return extra_args["update"], state


def _program(config: Config, method: str, num_tasks: int) -> Callable[[_Runs], dict[str, np.ndarray]]:
    """Trains runs; returns their `scores` `(R, T)` and `shares` `(R, records, layers, T)`."""
    graph, _ = _network(config, num_tasks, jax.random.key(0))
    steps_per_epoch = config.train_size // config.batch_size
    given = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), _given)
    watched = mtl.monitor(given, num_tasks, capacity=1, blocks=_layer)
    seen = np.arange(config.steps_per_record) % _LOOK == 0

    def train(run: _Runs, images: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        tx = optax.with_extra_args_support(METHODS[method](num_tasks, run.rates, steps_per_epoch))

        def losses_of(params: Any, rows: jax.Array) -> jax.Array:
            return run.scales * _mao_data.losses(nnx.merge(graph, params)(images[rows]), targets[rows])

        def shares_of(params: Any, task_grads: Any, updates: Any) -> jax.Array:
            state: Any = watched.init(params["trunk"])
            _, state = watched.update(task_grads["trunk"], state, update=updates["trunk"])
            return state.shares[0]

        def step(carry: Any, rows_and_look: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
            params, opt_state = carry
            rows, look = rows_and_look
            losses, task_grads = mtl.value_and_task_grads(losses_of)(params, rows)
            updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses)
            nothing = jnp.zeros((config.depth, num_tasks))
            shares = lax.cond(look, shares_of, lambda *_: nothing, params, task_grads, updates)
            return (optax.apply_updates(params, updates), opt_state), shares

        def record(carry: Any, batches: jax.Array) -> tuple[Any, jax.Array]:
            carry, shares = lax.scan(step, carry, (batches, jnp.array(seen)))
            return carry, jnp.sum(shares, axis=0) / int(seen.sum())

        start: Any = run.params, tx.init(run.params)
        (params, _), shares = lax.scan(record, start, run.batches)
        scores = _mao_data.scores(nnx.merge(graph, params)(images[run.held]), targets[run.held])
        return {"scores": scores, "shares": shares}

    return _compiled(config, train)


def _program_alone(config: Config, num_tasks: int) -> Callable[[_Runs], dict[str, np.ndarray]]:
    """Trains runs on the sum of the losses, of which one task is left where all other scales are zero."""
    graph, _ = _network(config, num_tasks, jax.random.key(0))

    def train(run: _Runs, images: jax.Array, targets: jax.Array) -> dict[str, jax.Array]:
        tx = optax.adam(run.rates)

        def loss_of(params: Any, rows: jax.Array) -> jax.Array:
            return jnp.sum(run.scales * _mao_data.losses(nnx.merge(graph, params)(images[rows]), targets[rows]))

        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss_of)(params, rows), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        batches = run.batches.reshape(-1, run.batches.shape[-1])
        start: Any = run.params, tx.init(run.params)
        (params, _), _ = lax.scan(step, start, batches)
        return {"scores": _mao_data.scores(nnx.merge(graph, params)(images[run.held]), targets[run.held])}

    return _compiled(config, train)


def _compiled(config: Config, train: Callable[..., Any]) -> Callable[[_Runs], dict[str, np.ndarray]]:
    material = _material(config)
    images, targets = jax.device_put((material.images, material.targets))
    compiled = jax.jit(jax.vmap(train, in_axes=(0, None, None)))
    return lambda runs: jax.tree.map(np.asarray, compiled(runs, images, targets))


def _tuned(
    config: Config,
    train: Callable[[_Runs], dict[str, np.ndarray]],
    settings: Sequence[Callable[[int], np.ndarray]],
    judged: np.ndarray,
    advance: _training.Advance,
) -> dict[str, np.ndarray]:
    """Trains the pilots with every learning rate, then the seeds with the best.

    Args:
      config: the sizes.
      train: a program.
      settings: the scales `(T,)` of the losses by seed, for each of `K` settings.
      judged: `(K, T)`, how a mean is taken over the tasks' scores.
      advance: called after each of the two.

    Returns:
      `validation` `(K, rates)`, the mean scores of the pilots; `rates` `(K,)`; and what the program has found for the
      seeds, `(K, S, ...)`.
    """
    seeds = _seeds(config)
    own, pilots = range(config.seeds), range(config.seeds, len(seeds))
    num_tasks, number = judged.shape[1], len(settings)
    grid = [(i, rate, scale(seeds[i])) for scale in settings for rate in config.rates for i in pilots]
    scores = train(_runs(config, num_tasks, grid))["scores"].reshape(number, len(config.rates), -1, num_tasks)
    validation = np.einsum("krpt,kt->kr", scores, judged) / config.pilots
    rates = np.array(config.rates)[validation.argmax(axis=1)]
    advance(1)
    chosen = [(i, rate, scale(seeds[i])) for scale, rate in zip(settings, rates, strict=True) for i in own]
    found = train(_runs(config, num_tasks, chosen))
    advance(1)
    found = {name: values.reshape(number, config.seeds, *values.shape[1:]) for name, values in found.items()}
    return {"validation": validation, "rates": rates, **found}


def cells(config: Config) -> list[_study.Cell]:
    """Every task alone, and every method for each number of tasks."""

    def alone(advance: _training.Advance) -> _study.Arrays:
        num_tasks = max(config.tasks)
        only = np.eye(num_tasks)
        settings = [lambda _, task=task: only[task] for task in range(num_tasks)]
        found = _tuned(config, _program_alone(config, num_tasks), settings, only, advance)
        return found | {"scores": np.stack([found["scores"][task, :, task] for task in range(num_tasks)], axis=1)}

    def together(method: str, num_tasks: int) -> Callable[[_training.Advance], _study.Arrays]:
        def run(advance: _training.Advance) -> _study.Arrays:
            settings = [functools.partial(scales, c, num_tasks) for c in CONDITIONS]
            judged = np.full((len(CONDITIONS), num_tasks), 1 / num_tasks)
            return _tuned(config, _program(config, method, num_tasks), settings, judged, advance)

        return run

    return [
        _study.Cell(_ALONE, alone, ticks=2),
        *(_study.Cell(_cell(m, n), together(m, n), ticks=2) for n in config.tasks for m in config.methods),
    ]


def _cell(method: str, num_tasks: int) -> str:
    return f"{num_tasks} tasks: {method}"


def effective_tasks(shares: np.ndarray) -> np.ndarray:
    """The exponential of the entropy of shares `(..., T)`, negative ones counted as none: from 1 to `T`."""
    shares = np.where(shares > 0, shares, 0)  # of what is not a number, too
    total = shares.sum(axis=-1, keepdims=True)
    parts = np.where(total > 0, shares / np.where(total > 0, total, 1), 0)
    return np.exp(-np.sum(parts * np.log(np.where(parts > 0, parts, 1)), axis=-1))


class _Found(NamedTuple):
    """What the report is on, of each setting: number of tasks and condition, then method.

    Attributes:
      gains: Δm, `(S,)`.
      balance: effective tasks, `(S, records, layers)`.
      rates: learning rate.
      scores: `(S, T)`.
    """

    gains: dict[Case, dict[str, np.ndarray]]
    balance: dict[Case, dict[str, np.ndarray]]
    rates: dict[Case, dict[str, float]]
    scores: dict[Case, dict[str, np.ndarray]]


def _gathered(config: Config, results: _study.Results) -> _Found:
    found = _Found({}, {}, {}, {})
    # A task that is not learnt alone at all has no say: nothing is to be divided by zero.
    single = np.maximum(results[_ALONE]["scores"], 1e-2)
    for num_tasks in config.tasks:
        for i, condition in enumerate(CONDITIONS):
            setting = num_tasks, condition
            of = {m: results[_cell(m, num_tasks)] for m in config.methods}
            found.scores[setting] = {m: cell["scores"][i] for m, cell in of.items()}
            found.gains[setting] = {
                m: _statistics.delta_m(scores, single[:, :num_tasks]) for m, scores in found.scores[setting].items()
            }
            found.balance[setting] = {m: effective_tasks(cell["shares"][i]) for m, cell in of.items()}
            found.rates[setting] = {m: float(cell["rates"][i]) for m, cell in of.items()}
    return found


def report(config: Config, results: _study.Results) -> _study.Report:
    """Who gains most, whose steps are made for how many tasks, at equal scales and six orders apart."""
    found = _gathered(config, results)
    rivals = tuple(m for m in config.methods if not m.startswith("mao"))
    most = max(config.tasks)
    beside = _against(found.gains, rivals)
    balance_beside = _against({s: _mean_balance(b) for s, b in found.balance.items()}, rivals)
    findings = [_balance_found(found, balance_beside, n) for n in config.tasks]
    findings.append(_where(found, most))
    findings += [_results_found(beside, setting) for setting in found.gains]
    findings += [_scales_found(found.gains, config.methods, n) for n in config.tasks]
    findings += _variants_found(found.gains, [v for v in _VARIANTS if v in config.methods])
    findings.append(_rates_found(config, found))
    section = _report.Section(
        title="One adaptive step a task (MAO)",
        introduction="Hervella et al. ([Neural Networks 170, 2024](https://doi.org/10.1016/j.neunet.2023.11.038)) "
        "adapt each task's contribution to every parameter at every step. Claims on trial: tasks are balanced across "
        "layers and steps, whatever the scales of their losses; and the result is better than with one weight a task.",
        protocol=protocol(config),
        table=_table(config, found, "Δm, %", lambda s, m: _statistics.estimate(found.gains[s][m]).text(1, sign=True)),
        legend="Δm by number of tasks and scales of the losses: mean ± standard error over the seeds; 0 is the level "
        "of single-task networks.",
        details=[
            (
                _table(
                    config,
                    found,
                    "effective tasks",
                    lambda s, m: _statistics.estimate(found.balance[s][m].mean(axis=(1, 2))).text(2),
                ),
                "The number of tasks that a step on the trunk is made for, mean over layers, steps and seeds: 1 for "
                "one alone, all for all alike.",
            ),
            (
                _table(config, found, "learning rate", lambda s, m: f"{found.rates[s][m]:g}"),
                "The learning rate that was best in validation.",
            ),
        ],
        findings=findings,
        pictures=[
            _report.Picture(
                "mao.png",
                _gains_figure(config, found),
                "Δm: mean over the seeds and two standard errors; losses as they are, and six orders of magnitude "
                "apart.",
            ),
            _report.Picture(
                "mao-balance.png",
                _balance_figure(config, found, most),
                f"How many of {most} tasks a step is made for, layer by layer of the trunk, from the input down; mean "
                "over the seeds.",
                dots_per_inch=110,
            ),
        ],
        data={},
    )
    return _study.Report(section, _rows(config, results, found), _verdict(found, beside, balance_beside, most))


_Against = dict[tuple[Case, str], _statistics.Comparison]


def _against(values: Mapping[Case, Mapping[str, np.ndarray]], rivals: Sequence[str]) -> _Against:
    """MAO less each rival, in every setting; p after Holm's correction for all."""
    pairs = [(setting, rival) for setting in values for rival in rivals]
    raised = _statistics.holm([_statistics.paired(values[s]["mao"], values[s][rival]) for s, rival in pairs])
    return dict(zip(pairs, raised, strict=True))


def _sorted_out(
    comparisons: Mapping[str, _statistics.Comparison], digits: int = 1
) -> tuple[list[str], list[str], list[str]]:
    """Those that are larger than zero, smaller, and not distinguishable from it; each with its numbers."""
    larger, smaller, neither = [], [], []
    for name, comparison in comparisons.items():
        text = f"{name} {comparison.text(digits)}"
        if not _statistics.significant(comparison):
            neither.append(text)
        elif comparison.difference.mean > 0:
            larger.append(text)
        else:
            smaller.append(text)
    return larger, smaller, neither


def _listed(parts: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts.items() if names)


def _of(beside: _Against, setting: Case) -> dict[str, _statistics.Comparison]:
    return {rival: comparison for (s, rival), comparison in beside.items() if s == setting}


def _setting(setting: Case) -> str:
    return f"{setting[0]} tasks, {CONDITIONS[setting[1]]}"


def _mean_balance(balance: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {method: values.mean(axis=(1, 2)) for method, values in balance.items()}


def _balance_found(found: _Found, beside: _Against, num_tasks: int) -> str:
    apart = _mean_balance(found.balance[num_tasks, "apart"])
    equal = _mean_balance(found.balance[num_tasks, "equal"])
    larger, smaller, neither = _sorted_out(_of(beside, (num_tasks, "apart")), digits=2)
    others = {
        "more even than those of": larger,
        "less even than those of": smaller,
        "not distinguishable from": neither,
    }
    return (
        f"Balance, {_setting((num_tasks, 'apart'))}: mao's steps are made for "
        f"{_statistics.estimate(apart['mao']).text(2)} tasks ({_statistics.estimate(equal['mao']).text(2)} with the "
        f"losses as they are): {_listed(others)}."
    )


def _where(found: _Found, num_tasks: int) -> str:
    """Across layers and steps."""
    balance = {m: values.mean(axis=0) for m, values in found.balance[num_tasks, "apart"].items()}  # (records, layers)
    sentences = []
    for method in [m for m in (EQUAL, "mao") if m in balance]:
        layers, quarter = balance[method].mean(axis=0), max(1, len(balance[method]) // 4)
        sentences.append(
            f"with {method} {layers.min():.1f} to {layers.max():.1f} over the layers (first {layers[0]:.1f}, last "
            f"{layers[-1]:.1f}), {balance[method][:quarter].mean():.1f} in the first quarter of training and "
            f"{balance[method][-quarter:].mean():.1f} in the last"
        )
    return f"Where and when, {_setting((num_tasks, 'apart'))}, tasks that a step is made for: {'; '.join(sentences)}."


def _results_found(beside: _Against, setting: Case) -> str:
    ahead, behind, level = _sorted_out(_of(beside, setting))
    parts = {"ahead of": ahead, "behind": behind, "not distinguishable from": level}
    return f"Δm, {_setting(setting)}: mao is {_listed(parts)}."


def _scales_found(gains: Mapping[Case, Mapping[str, np.ndarray]], methods: Sequence[str], num_tasks: int) -> str:
    """What scales apart do to each method."""
    pairs = [(n, m) for n in sorted({n for n, _ in gains}) for m in methods]
    raised = _statistics.holm([_statistics.paired(gains[n, "apart"][m], gains[n, "equal"][m]) for n, m in pairs])
    here = {m: comparison for (n, m), comparison in zip(pairs, raised, strict=True) if n == num_tasks}
    larger, smaller, neither = _sorted_out(here)
    parts = {"gain": larger, "lose": smaller, "no difference that can be told:": neither}
    return f"What scales six orders apart do to Δm, {num_tasks} tasks: {_listed(parts)}."


def _variants_found(gains: Mapping[Case, Mapping[str, np.ndarray]], variants: Sequence[str]) -> list[str]:
    pairs = [(variant, setting) for variant in variants for setting in gains]
    raised = _statistics.holm([_statistics.paired(gains[s][v], gains[s]["mao"]) for v, s in pairs])
    findings = []
    for variant in variants:
        here = {_setting(s): c for (v, s), c in zip(pairs, raised, strict=True) if v == variant}
        larger, smaller, neither = _sorted_out(here)
        parts = {"ahead with": larger, "behind with": smaller, "not distinguishable with": neither}
        findings.append(f"{variant} against mao, Δm: {_listed(parts)}.")
    return findings


def _rates_found(config: Config, found: _Found) -> str:
    chosen = [rate for rates in found.rates.values() for rate in rates.values()]
    ends = sum(rate in (min(config.rates), max(config.rates)) for rate in chosen)
    most = max(config.tasks)
    few = min(config.tasks)
    return (
        f"Learning rates: {ends} of {len(chosen)} choices are at an end of the grid. Losses as they are, mao chose "
        f"{found.rates[few, 'equal']['mao']:g} for {few} tasks and {found.rates[most, 'equal']['mao']:g} for {most}"
        + (
            f", {EQUAL} {found.rates[few, 'equal'][EQUAL]:g} and {found.rates[most, 'equal'][EQUAL]:g}."
            if EQUAL in config.methods
            else "."
        )
    )


def _verdict(found: _Found, beside: _Against, balance_beside: _Against, num_tasks: int) -> str:
    apart = num_tasks, "apart"
    balance = {m: _statistics.estimate(values).mean for m, values in _mean_balance(found.balance[apart]).items()}
    larger, smaller, _ = _sorted_out(_of(balance_beside, apart))
    rivals = _of(beside, apart)
    evener = f"more even than those of {len(larger)} of {len(rivals)} per-task methods, less even than those of "
    first = f"With {num_tasks} losses six orders apart, mao's steps are made for {balance['mao']:.1f} tasks"
    if EQUAL in balance:
        first += f" (equal weights: {balance[EQUAL]:.1f})"
    results = []
    for condition, words in (("apart", "there"), ("equal", "with the losses as they are")):
        ahead, behind, level = map(len, _sorted_out(_of(beside, (num_tasks, condition))))
        results.append(f"{words}, it is ahead of {ahead} of them, behind {behind}, level with {level}")
    return f"{first}, {evener}{len(smaller)}. In Δm, {'; '.join(results)}."


def _table(config: Config, found: _Found, corner: str, cell: Callable[[Case, str], str]) -> _report.Table:
    settings = list(found.gains)
    return _report.Table(
        [corner, *(f"{n}, {condition}" for n, condition in settings)],
        [[m, *(cell(setting, m) for setting in settings)] for m in config.methods],
    )


def _rows(config: Config, results: _study.Results, found: _Found) -> list[dict[str, str | float]]:
    names = _mao_data.NAMES[: max(config.tasks)]
    rows: list[dict[str, str | float]] = []
    for seed, scores in enumerate(results[_ALONE]["scores"]):
        row: dict[str, str | float] = {"tasks": 1, "scales": "equal", "method": _ALONE, "seed": seed}
        row |= {"learning_rate": "", "delta_m": 0.0, "effective_tasks": 1.0}
        rows.append(row | {name: float(score) for name, score in zip(names, scores, strict=True)})
    for (n, condition), gains in found.gains.items():
        setting = n, condition
        balance = _mean_balance(found.balance[setting])
        for method in config.methods:
            for seed in range(config.seeds):
                scores = found.scores[setting][method][seed]
                row = {"tasks": n, "scales": condition, "method": method, "seed": seed}
                row |= {"learning_rate": found.rates[setting][method], "delta_m": float(gains[method][seed])}
                row |= {"effective_tasks": float(balance[method][seed])}
                row |= {name: float(scores[i]) if i < n else "" for i, name in enumerate(names)}
                rows.append(row)
    return rows


def _gains_figure(config: Config, found: _Found) -> figure.Figure:
    methods = config.methods[::-1]
    fig = figure.Figure(figsize=(3.1 * len(config.tasks) + 1.6, 0.34 * len(methods) + 1.7), layout="constrained")
    fig.suptitle("Gain over single-task networks", x=0.01, ha="left", weight="bold")
    marks = {"equal": ("o", _plots.LINE_COLORS[1], 0.14), "apart": ("D", _plots.LINE_COLORS[2], -0.14)}
    axes = fig.subplots(1, len(config.tasks), sharey=True, squeeze=False)[0]
    for ax, n in zip(axes, config.tasks, strict=True):
        for condition, (marker, color, offset) in marks.items():
            estimates = [_statistics.estimate(found.gains[n, condition][m]) for m in methods]
            ax.errorbar(
                [e.mean for e in estimates],
                np.arange(len(methods)) + offset,
                xerr=[2 * np.nan_to_num(e.error) for e in estimates],
                fmt=marker,
                color=color,
                markersize=5,
                capsize=2,
                label=CONDITIONS[condition],
            )
        ax.axvline(0, color="black", linewidth=0.9)
        ax.set_yticks(range(len(methods)), methods)
        ax.set_title(f"{n} tasks", fontsize=10)
        ax.set_xlabel("Δm, %")
        _plots.plain(ax)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return fig


def _balance_figure(config: Config, found: _Found, num_tasks: int) -> figure.Figure:
    drawn = [m for m in _DRAWN if m in config.methods]
    values = {
        CONDITIONS[c]: np.stack([found.balance[num_tasks, c][m].mean(axis=0) for m in drawn], axis=2)
        for c in CONDITIONS
    }
    steps = (np.arange(config.records) + 1) * config.steps_per_record
    return _plots.heat_maps(
        values,
        steps,
        [f"layer {i + 1}" for i in range(config.depth)],
        drawn,
        title=f"How many of {num_tasks} tasks a step is made for",
        label="tasks",
        limits=(1, num_tasks),
    )
