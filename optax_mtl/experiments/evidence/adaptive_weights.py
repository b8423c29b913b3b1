"""Weights in proportion to the losses: do hard tasks get the weight, and does it help?

Huq and Pervin, "Adaptive weight assignment scheme for multi-task learning", IAES International Journal of Artificial
Intelligence 11(1), 2022, arXiv 2303.07278.
"""

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
from scipy import stats
from sklearn import datasets

import optax_mtl as mtl
from optax_mtl.experiments import _data, _models, _plots, _registry, _report, _statistics, _training
from optax_mtl.experiments.evidence import _study, _text

PROPORTIONAL, SOFTMAX = "losses over their sum", "softmax of the losses"
ON_TRIAL = (PROPORTIONAL, SOFTMAX)
_CHANGING = (*ON_TRIAL, "dwa", "uncertainty")  # whose weights are drawn
_TENFOLD = 10  # what one task's loss is multiplied by in the control


def _of_catalogue(name: str) -> Callable[[_registry.Setting, Sequence[int]], optax.GradientTransformation]:
    return lambda setting, classes: _registry.METHODS[name].build(setting)


# method: made from the setting and the tasks' numbers of classes
METHODS: dict[str, Callable[[_registry.Setting, Sequence[int]], optax.GradientTransformation]] = {
    "equal": _of_catalogue("linear_scalarization"),
    "rlw": _of_catalogue("rlw"),
    "dwa": _of_catalogue("dwa"),
    "uncertainty": _of_catalogue("uncertainty"),
    "log of classes": lambda s, classes: mtl.linear_scalarization(
        s.num_tasks, weights=jnp.log(jnp.array(classes, jnp.float32))
    ),
    PROPORTIONAL: _of_catalogue("adaptive_weight_assignment"),
    SOFTMAX: lambda s, classes: mtl.adaptive_weight_assignment(s.num_tasks, mode="softmax"),
}


@dataclass(frozen=True)
class Config(_training.Recorded):
    """The same for every method and both data sets.

    Attributes:
      seeds: number of seeds.
      steps: optimiser steps, rounded up to a multiple of `steps_per_record`.
      batch_size: examples in a batch.
      learning_rates: of Adam, to choose from.
      width: units in each of the trunk's two hidden layers.
      train_size: number of training examples.
      test_size: number of test examples, and of validation examples.
      methods: which of `METHODS`.
    """

    most_records: ClassVar[int] = 30
    seeds: int = 10
    steps: int = 1_000
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    width: int = 32
    train_size: int = 4_096
    test_size: int = 1_024
    methods: tuple[str, ...] = tuple(METHODS)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Numbers of examples: training, validation, test."""
        return self.train_size, self.test_size, self.test_size


QUICK = Config(
    seeds=2,
    steps=4,
    batch_size=8,
    learning_rates=(1e-3, 1e-2),
    width=8,
    train_size=64,
    test_size=32,
    methods=("equal", PROPORTIONAL),
)


class Split(NamedTuple):
    """Inputs `(N, features)` and labels `(N, T)`."""

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class _Source:
    """A data set.

    Attributes:
      tasks: number of classes of each task, by name.
      enlarged: the task whose loss is multiplied in the control.
      splits: from a seed and the sizes of the splits.
    """

    tasks: Mapping[str, int]
    enlarged: str
    splits: Callable[[int, Sequence[int]], list[Split]]

    @property
    def position(self) -> int:
        """Of `enlarged` among the tasks."""
        return list(self.tasks).index(self.enlarged)


def _images(seed: int, sizes: Sequence[int]) -> list[Split]:
    """MultiDigits with five tasks; no image of a digit is in two splits."""
    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    cuts = np.linspace(0.6, 1, len(sizes))[:-1]
    parts = np.split(rng.permutation(len(images)), (cuts * len(images)).astype(int))
    splits = []
    for part, size in zip(parts, sizes, strict=True):
        canvases = _data.compose(images, digits.target, rng.choice(part, (size, 2)))
        left, right, parity = canvases.labels.T
        splits.append(Split(canvases.images, np.stack([left, right, left + right, parity, left > right], axis=1)))
    return splits


def _words(seed: int, sizes: Sequence[int]) -> list[Split]:
    return [Split(w.counts, w.labels) for w in _text.windows(seed, sizes)]


SOURCES = {
    "images": _Source({"left": 10, "right": 10, "sum": 19, "parity": 2, "larger": 2}, "left", _images),
    "text": _Source(_text.TASKS, "kind", _words),
}


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    rates = ", ".join(f"{rate:g}" for rate in config.learning_rates)
    words, pairs = _text.BUCKETS
    return [
        "The paper's abstract says that harder tasks get larger weights, adaptively, and that this was tested on image "
        "and text data. Its exact formula and settings could not be checked: on trial are the two readings that the "
        "library offers, weights in proportion to the losses and the softmax of the losses, at every step.",
        f"Images: two handwritten digits of scikit-learn, 8 x 8 pixels, on one canvas of {_data.SIDE} x {_data.SIDE}. "
        "Tasks: the left digit, the right digit, their sum, the sum's parity, whether the left one is larger. No image "
        "of a digit is in two of training, validation and test set.",
        f"Text: windows of {_text.WINDOW} words from {len(_text.PROSE)} pages of Python's documentation "
        f"(pydoc_data.topics) and {len(_text.CODE)} modules of its library, letters only, in small letters, as counts "
        f"of words and pairs of neighbours in {words} + {pairs} hashed buckets. Tasks: code or prose, whether the "
        "words were shuffled (half of the windows are), which quarter of its file, which file. All files are in all "
        f"splits, but cut into spans of {_text.SPAN} words; each span, with all windows in it, is in one split only.",
        f"{config.train_size:,} training, {config.test_size:,} validation and {config.test_size:,} test examples. One "
        f"trunk of two hidden layers of {config.width} units (ReLU), one linear head a task, mean cross-entropies.",
        f"{config.records * config.steps_per_record:,} steps of Adam, batches of {config.batch_size}, for every method "
        "and every single-task network; scores are test accuracies after the last step.",
        f"The learning rate ({rates}) is chosen for each method in each setting, and for each single-task network, by "
        "the validation accuracy after the last step, averaged over seeds and tasks.",
        "Weights are on the losses, for trunk and heads alike; every method's defaults, but dwa is told how long an "
        "epoch is, and uncertainty that the tasks are classifications. 'log of classes' is a fixed weight for each "
        "task, the logarithm of its number of classes: what the losses, and so the weights on trial, are at the start.",
        f"Control: the loss of one task, not the hardest, times {_TENFOLD}, as in another unit "
        f"({'; '.join(f'{name}: {source.enlarged}' for name, source in SOURCES.items())}).",
        "Δm is the gain in accuracy relative to the single-task network of the same seed, averaged over the tasks, in "
        "percent. A task's difficulty is the test error of its single-task network; the hardest is the one with the "
        "largest mean error. Rank correlations are Spearman's, over the tasks, one for each seed, of the weight's mean "
        "over all steps, the weights divided by their sum at each.",
        f"Seeds: {config.seeds}. A seed fixes split, examples, initial weights and order of the batches, the same for "
        "all: differences are tested seed by seed (Student's t for pairs), p after Holm over all tests of a table.",
        "Tasks and sizes were settled before any run. A first run of all methods, with 600 steps and three learning "
        "rates, chose rates at the ends of that grid; so both were extended, once.",
    ]


def cells(config: Config) -> list[_study.Cell]:
    """One a method and data set, and the single-task networks of each data set."""

    def cell(name: str, method: str | None) -> _study.Cell:
        def run(advance: _training.Advance) -> _study.Arrays:
            found = _train(config, name, method)
            advance(1)
            return found

        return _study.Cell(f"{name}: {method or 'alone'}", run)

    return [cell(name, method) for name in SOURCES for method in (None, *config.methods)]


def _scales(source: _Source, alone: bool) -> np.ndarray:
    """`(C, T)`: what the losses are multiplied by in each setting.

    Plain and with one task's loss in another unit; or each task alone.
    """
    number = len(source.tasks)
    if alone:
        return np.eye(number, dtype=np.float32)
    enlarged = np.ones(number, np.float32)
    enlarged[source.position] = _TENFOLD
    return np.stack([np.ones_like(enlarged), enlarged])


def _train(config: Config, name: str, method: str | None) -> _study.Arrays:
    """Trains all settings, learning rates and seeds of one method (None: single tasks) in one program.

    Returns:
      `losses` and `weights`, `(C, R, S, records, T)`, means over the steps of a record; `validation` and `test`
      accuracies after the last step, `(C, R, S, T)`.
    """
    source, problem = SOURCES[name], _problem(config, name)
    number = len(source.tasks)

    def logits(params: Any, inputs: jax.Array) -> list[jax.Array]:
        return nnx.merge(problem.graph, params)(inputs.astype(jnp.float32))

    def one(scales: jax.Array, rate: jax.Array, key: jax.Array, params: Any, data: Any, orders: jax.Array) -> Any:
        train, *others = data
        setting = _registry.Setting(
            num_tasks=number,
            learning_rate=0.0,
            optimizer=optax.identity(),
            key=key,
            steps_per_epoch=config.train_size // config.batch_size,
            form="classification",
        )
        weighting = optax.with_extra_args_support(METHODS[method or "equal"](setting, list(source.tasks.values())))
        adam = optax.adam(rate)

        def step(carry: Any, rows: jax.Array) -> tuple[Any, Any]:
            params, state, adam_state = carry

            def loss(params: Any) -> tuple[jax.Array, Any]:
                losses = _models.cross_entropies(logits(params, train.inputs[rows]), train.labels[rows])
                weights, after = task_weights(weighting, state, scales * losses)
                return weights @ (scales * losses), (losses, weights, after)

            grads, (losses, weights, state) = jax.grad(loss, has_aux=True)(params)
            updates, adam_state = adam.update(grads, adam_state, params)
            return (optax.apply_updates(params, updates), state, adam_state), (losses, weights / jnp.sum(weights))

        def record(carry: Any, orders: jax.Array) -> tuple[Any, Any]:
            carry, seen = lax.scan(step, carry, orders)
            return carry, jax.tree.map(functools.partial(jnp.mean, axis=0), seen)

        carry = (params, weighting.init(jnp.zeros(1)), adam.init(params))
        (params, _, _), (losses, weights) = lax.scan(record, carry, orders)
        scores = [_models.accuracies(logits(params, split.inputs), split.labels) for split in others]
        return {"losses": losses, "weights": weights, "validation": scores[0], "test": scores[1]}

    over_seeds = jax.vmap(one, in_axes=(None, None, 0, 0, 0, 0))
    over_rates = jax.vmap(over_seeds, in_axes=(None, 0, *[None] * 4))
    over_scales = jax.jit(jax.vmap(over_rates, in_axes=(0, *[None] * 5)))
    rates = np.array(config.learning_rates, np.float32)
    return jax.device_get(over_scales(_scales(source, method is None), rates, *problem.of_seeds))


class _Problem(NamedTuple):
    """What all methods are given alike.

    Attributes:
      graph: what the network is beside its parameters.
      of_seeds: random keys, first parameters, data and batches of all seeds.
    """

    graph: Any
    of_seeds: tuple[jax.Array, Any, list[Split], np.ndarray]


@functools.lru_cache(maxsize=1)
def _problem(config: Config, name: str) -> _Problem:
    source = SOURCES[name]
    splits = [source.splits(seed, config.sizes) for seed in range(config.seeds)]
    steps = config.records * config.steps_per_record
    orders = np.stack([_data.epochs(seed, config.train_size, config.batch_size, steps) for seed in range(config.seeds)])
    features = splits[0][0].inputs.shape[1]

    def network(key: jax.Array) -> _models.TrunkAndHeads:
        return _models.TrunkAndHeads(features, config.width, source.tasks, rngs=nnx.Rngs(key))

    keys = jax.vmap(jax.random.key)(np.arange(config.seeds, dtype=np.uint32))
    graph, _ = nnx.split(nnx.eval_shape(lambda: network(jax.random.key(0))))
    params = jax.jit(jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(network(key)))))(keys)
    data = jax.tree.map(lambda *leaves: np.stack(leaves), *splits)
    orders = orders.reshape(config.seeds, config.records, config.steps_per_record, -1)
    return _Problem(graph, (keys, params, data, orders))


def task_weights(weighting: optax.GradientTransformationExtraArgs, state: Any, losses: jax.Array) -> tuple[Any, Any]:
    """The weights that a method would give to the tasks' gradients, if it looks at nothing but the losses.

    With them, one backward pass of the weighted loss does what the method would do with the gradients of all tasks,
    since both are linear: the same update at a fraction of the price.

    Returns:
      The weights `(T,)`, not to be differentiated, and the next state.
    """
    losses = lax.stop_gradient(losses)
    _, state = weighting.update(jnp.zeros((*losses.shape, 1)), state, losses=losses)
    return optax.tree.get(state, "task_weights"), state


class _Outcome(NamedTuple):
    """What one method reached in one setting.

    Attributes:
      rate: the chosen learning rate.
      scores: `(S, T)` test accuracies in percent.
      weights: `(S, records, T)`, summing to one.
      gains: `(S,)`, Δm.
    """

    rate: float
    scores: np.ndarray
    weights: np.ndarray
    gains: np.ndarray


class _Findings(NamedTuple):
    """What one data set shows.

    Attributes:
      tasks: their names.
      enlarged: position of the task of the control.
      alone: `(S, T)` test accuracies of single-task networks, in percent.
      alone_losses: `(S, T)`, their mean training losses in the last record.
      classes: `(T,)`.
      outcomes: of each method: plain, and with one loss enlarged.
    """

    tasks: Sequence[str]
    enlarged: int
    alone: np.ndarray
    alone_losses: np.ndarray
    classes: np.ndarray
    outcomes: Mapping[str, tuple[_Outcome, _Outcome]]

    @property
    def hardest(self) -> int:
        """Position of the task with the largest single-task error."""
        return int(self.alone.mean(axis=0).argmin())


def _findings(config: Config, name: str, results: _study.Results) -> _Findings:
    source = SOURCES[name]
    alone = results[f"{name}: alone"]
    tasks = range(len(source.tasks))
    best = [int(alone["validation"][t, :, :, t].mean(axis=1).argmax()) for t in tasks]
    single = 100 * np.stack([alone["test"][t, best[t], :, t] for t in tasks], axis=1)
    losses = np.stack([alone["losses"][t, best[t], :, -1, t] for t in tasks], axis=1)

    def outcome(found: _study.Arrays, setting: int) -> _Outcome:
        chosen = int(found["validation"][setting].mean(axis=(1, 2)).argmax())
        scores = 100 * found["test"][setting, chosen]
        weights = found["weights"][setting, chosen]
        return _Outcome(config.learning_rates[chosen], scores, weights, _statistics.delta_m(scores, single))

    outcomes = {m: (outcome(results[f"{name}: {m}"], 0), outcome(results[f"{name}: {m}"], 1)) for m in config.methods}
    classes = np.array(list(source.tasks.values()))
    return _Findings(tuple(source.tasks), source.position, single, losses, classes, outcomes)


def rank_correlation(values: np.ndarray, others: np.ndarray) -> float:
    """Spearman's, between two vectors; not a number if one of them is constant."""
    ranks = [stats.rankdata(v) for v in (values, others)]
    if any(np.ptp(r) == 0 for r in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _correlations(found: _Findings, method: str) -> dict[str, np.ndarray]:
    """`(S,)` each: between the mean weights and three things that they might follow."""
    weights = found.outcomes[method][0].weights.mean(axis=1)
    followed = {
        "error": 100 - found.alone,
        "training loss": found.alone_losses,
        "classes": np.broadcast_to(found.classes, found.alone.shape),
    }
    return {
        what: np.array([rank_correlation(w, v) for w, v in zip(weights, values, strict=True)])
        for what, values in followed.items()
    }


Tests = Mapping[tuple[str, ...], _statistics.Comparison]


def _holm(tests: Tests) -> dict[tuple[str, ...], _statistics.Comparison]:
    return dict(zip(tests, _statistics.holm(list(tests.values())), strict=True))


def report(config: Config, results: _study.Results) -> _study.Report:
    """Do hard tasks get the weight, does it help, and what if a loss comes in another unit?"""
    found = {name: _findings(config, name, results) for name in SOURCES}
    on_trial = [m for m in config.methods if m in ON_TRIAL]
    rivals = [m for m in config.methods if m not in ON_TRIAL]
    correlations = {(n, m): _correlations(f, m) for n, f in found.items() for m in config.methods if m in _CHANGING}
    followed = _holm(
        {
            (n, m, what): _statistics.paired(values, np.zeros_like(values))
            for (n, m), each in correlations.items()
            for what, values in each.items()
            if not np.isnan(values).any()
        }
    )
    helped = _holm(
        {
            (n, m, rival, what): _statistics.paired(*(_measure(f, f.outcomes[k][0], what) for k in (m, rival)))
            for n, f in found.items()
            for m in on_trial
            for rival in rivals
            for what in ("Δm", "hardest")
        }
    )
    changes = {(n, m): o[1].gains - o[0].gains for n, f in found.items() for m, o in f.outcomes.items()}
    against_equal = [(n, m, "equal") for n in found for m in on_trial if "equal" in rivals]
    moved = _holm(
        {key: _statistics.paired(change, np.zeros_like(change)) for key, change in changes.items()}
        | {(n, m, other): _statistics.paired(changes[n, m], changes[n, other]) for n, m, other in against_equal}
    )
    names, tables = list(found), [_table(f) for f in found.values()]
    legend = (
        "test accuracies of each task in percent, and Δm, mean ± standard error over seeds; 'alone' are the "
        f"single-task networks. Last column: Δm with the loss of one task times {_TENFOLD}."
    )
    section = _report.Section(
        title="Weights in proportion to the losses",
        introduction="Huq and Pervin ([arXiv 2303.07278](https://arxiv.org/abs/2303.07278)) give more weight to harder "
        "tasks, by their losses. Do hard tasks get the weight, and does it help, beside dwa, uncertainty weighting, "
        "random and equal weights?",
        protocol=protocol(config),
        table=tables[0],
        legend=f"{names[0].capitalize()}: {legend}",
        findings=[
            *_difficulty(found),
            *_who_gets_the_weight(found, followed, on_trial),
            *_does_it_help(found, helped, on_trial, rivals),
            *_other_unit(found, moved, on_trial, rivals),
        ],
        pictures=[
            _report.Picture(
                "adaptive-weights.png",
                _draw_weights(config, found),
                "Share of each task in the weights, mean and standard error over seeds; tasks in the order of their "
                "single-task errors, which stand beside them. Dotted: equal weights.",
                dots_per_inch=110,
            ),
            _report.Picture(
                "adaptive-weights-scores.png",
                _draw_scores(found),
                "Δm and the accuracy of the hardest task, mean and two standard errors. Hollow: the loss of one task "
                f"times {_TENFOLD}. Dotted: single-task networks.",
                dots_per_inch=110,
            ),
        ],
        data={},
        details=[
            *((table, f"{name.capitalize()}: {legend}") for name, table in zip(names[1:], tables[1:], strict=True)),
            (
                _correlation_table(correlations, followed),
                "Rank correlation of the tasks' mean weights with their single-task errors, with the training losses "
                "of single-task networks at the end, and with their numbers of classes, mean ± standard error over "
                "seeds (p after Holm, against none).",
            ),
            (
                _comparison_table(found, helped, on_trial, rivals),
                "Differences, seed by seed: Δm in percent, accuracy of the hardest task in points (p after Holm).",
            ),
        ],
    )
    return _study.Report(section, _rows(config, found), _verdict(found, followed, helped, moved, on_trial))


def _measure(found: _Findings, outcome: _Outcome, what: str) -> np.ndarray:
    return outcome.gains if what == "Δm" else outcome.scores[:, found.hardest]


def _listed(names: Sequence[str]) -> str:
    """Such as `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _by_error(found: _Findings) -> list[int]:
    """The tasks, hardest first."""
    return [int(t) for t in found.alone.mean(axis=0).argsort()]


def _difficulty(found: Mapping[str, _Findings]) -> list[str]:
    sentences = []
    for name, f in found.items():
        errors = [f"{f.tasks[t]} {_statistics.estimate(100 - f.alone[:, t]).text()}" for t in _by_error(f)]
        sentences.append(f"Difficulty in {name}, single-task test error in percent: {', '.join(errors)}.")
    return sentences


def _follows(comparison: _statistics.Comparison | None) -> str:
    if comparison is None or not _statistics.significant(comparison):
        return "not distinguishable from none"
    return "positive" if comparison.difference.mean > 0 else "negative"


def _who_gets_the_weight(found: Mapping[str, _Findings], followed: Tests, on_trial: Sequence[str]) -> list[str]:
    sentences = []
    for name, f in found.items():
        for method in on_trial:
            shares = f.outcomes[method][0].weights.mean(axis=(0, 1))
            most = int(shares.argmax())
            parts = []
            for what in ("error", "training loss", "classes"):
                test = followed.get((name, method, what))
                value = "undefined" if test is None else test.text(2)
                parts.append(f"{what} {value}, {_follows(test)}")
            sentences.append(
                f"{method}, {name}: {f.tasks[most]} gets most of the weight ({100 * shares[most]:.0f} %; equal would "
                f"be {100 / len(shares):.0f} %), and {f.tasks[f.hardest]}, the hardest task, "
                f"{100 * shares[f.hardest]:.0f} %. Rank correlation of the weights with the single-task "
                f"{'; '.join(parts)}."
            )
    return sentences


def _sorted_out(tests: Mapping[str, _statistics.Comparison]) -> str:
    """Such as `ahead of a and b, not distinguishable from c`."""
    groups = {
        "ahead of": [r for r, c in tests.items() if _statistics.significant(c) and c.difference.mean > 0],
        "behind": [r for r, c in tests.items() if _statistics.significant(c) and c.difference.mean < 0],
        "not distinguishable from": [r for r, c in tests.items() if not _statistics.significant(c)],
    }
    return ", ".join(f"{words} {_listed(names)}" for words, names in groups.items() if names)


def _does_it_help(
    found: Mapping[str, _Findings], helped: Tests, on_trial: Sequence[str], rivals: Sequence[str]
) -> list[str]:
    if not rivals:
        return []
    return [
        f"{method}, {name}, {words}: {_sorted_out({r: helped[name, method, r, what] for r in rivals})}."
        for method in on_trial
        for name, f in found.items()
        for what, words in (("Δm", "Δm"), ("hardest", f"hardest task ({f.tasks[f.hardest]})"))
    ]


def _enlarged_share(found: _Findings, outcome: _Outcome, factor: float) -> float:
    """The share of the enlarged task's loss in the weighted sum's coefficients, in percent."""
    weights = outcome.weights.copy()
    weights[:, :, found.enlarged] *= factor
    return float(100 * np.mean(weights[:, :, found.enlarged] / weights.sum(axis=2)))


def _other_unit(
    found: Mapping[str, _Findings], moved: Tests, on_trial: Sequence[str], rivals: Sequence[str]
) -> list[str]:
    sentences = []
    for name, f in found.items():
        parts = []
        for method in (*on_trial, *rivals):
            plain, enlarged = f.outcomes[method]
            shares = _enlarged_share(f, plain, 1), _enlarged_share(f, enlarged, _TENFOLD)
            test = moved[name, method]
            luck = "" if _statistics.significant(test) else ", not distinguishable"
            change = test.difference.text(1, sign=True)
            parts.append(f"{method} {shares[0]:.0f} → {shares[1]:.0f} %, {change}{luck}")
        sentences.append(
            f"Control, {name}: the loss of {f.tasks[f.enlarged]} times {_TENFOLD}. Its share in what is descended on, "
            f"and the change of Δm: {'; '.join(parts)}."
        )
        for method in on_trial:
            if more := moved.get((name, method, "equal")):
                said = f"costs {method} and equal weights amounts that are not distinguishable"
                if _statistics.significant(more):
                    said = f"costs {method} {'less' if more.difference.mean > 0 else 'more'} than equal weights"
                sentences.append(f"Control, {name}: the other unit {said}, change against change {more.text()}.")
    return sentences


def _verdict(
    found: Mapping[str, _Findings], followed: Tests, helped: Tests, moved: Tests, on_trial: Sequence[str]
) -> str:
    parts = []
    for name in found:
        said = [
            f"{_follows(followed.get((name, m, 'error')))} with the error and "
            f"{_follows(followed.get((name, m, 'classes')))} with the number of classes"
            for m in on_trial[:1]
        ]
        parts += [f"on {name} {each}" for each in said]
    counts = [
        f"{words} {_won(helped, what, 1)} of {_number(helped, what)} comparisons ahead, {_won(helped, what, -1)} behind"
        for what, words in (("Δm", "on Δm"), ("hardest", "on the hardest task"))
    ]
    own = {key: test for key, test in moved.items() if len(key) == 2 and key[1] in on_trial}
    lost = sum(_statistics.significant(c) and c.difference.mean < 0 for c in own.values())
    equals = [test for key, test in moved.items() if len(key) == 3]
    more = sum(_statistics.significant(c) and c.difference.mean < 0 for c in equals)
    made_worse = f"{lost} of {len(own)} cases" + (f", more than with equal weights in {more}" if equals else "")
    return (
        f"Rank correlation of weights ({on_trial[0]}) and difficulty: {', '.join(parts)}. Against the rivals: "
        f"{'; '.join(counts)}; the others not distinguishable. One loss times {_TENFOLD} made Δm worse in {made_worse}."
    )


def _number(helped: Tests, what: str) -> int:
    return sum(key[-1] == what for key in helped)


def _won(helped: Tests, what: str, sign: int) -> int:
    """How many comparisons are significant, with that sign."""
    tests = [c for key, c in helped.items() if key[-1] == what]
    return sum(_statistics.significant(c) and sign * c.difference.mean > 0 for c in tests)


def _table(found: _Findings) -> _report.Table:
    columns = range(len(found.tasks))
    alone = [_statistics.estimate(found.alone[:, t]).text() for t in columns]
    rows = [["alone", *alone, "", "", ""]]
    for method, (plain, enlarged) in found.outcomes.items():
        scores = [_statistics.estimate(plain.scores[:, t]).text() for t in columns]
        gains = [_statistics.estimate(o.gains).text(1, sign=True) for o in (plain, enlarged)]
        rows.append([method, *scores, f"{plain.rate:g}", *gains])
    task = found.tasks[found.enlarged]
    return _report.Table(["method", *found.tasks, "learning rate", "Δm", f"Δm, {task} x {_TENFOLD}"], rows)


def _correlation_table(correlations: Mapping[tuple[str, str], Mapping[str, np.ndarray]], tests: Tests) -> _report.Table:
    rows = [
        [f"{name}: {method}", *(tests[name, method, w].text(2) if (name, method, w) in tests else "–" for w in each)]
        for (name, method), each in correlations.items()
    ]
    return _report.Table(["weights of", "with errors", "with training losses", "with classes"], rows)


def _comparison_table(
    found: Mapping[str, _Findings], helped: Tests, on_trial: Sequence[str], rivals: Sequence[str]
) -> _report.Table:
    keys = [(name, method) for name in found for method in on_trial]
    rows = [
        [f"{name}: {method} against {rival}", *(helped[name, method, rival, what].text() for what in ("Δm", "hardest"))]
        for name, method in keys
        for rival in rivals
    ]
    return _report.Table(["", "Δm", "hardest task"], rows)


def _rows(config: Config, found: Mapping[str, _Findings]) -> list[dict[str, str | float]]:
    rows: list[dict[str, str | float]] = []

    def add(data: str, scaled: str, method: str, rate: float, scores: np.ndarray, weights: np.ndarray | None) -> None:
        for seed in range(config.seeds):
            for t, task in enumerate(found[data].tasks):
                weight: str | float = "" if weights is None else float(weights[seed, t])
                row = {"data": data, "times 10": scaled, "method": method, "rate": f"{rate:g}", "seed": str(seed)}
                rows.append({**row, "task": task, "accuracy": float(scores[seed, t]), "mean weight": weight})

    for name, f in found.items():
        add(name, "", "alone", float("nan"), f.alone, None)
        for method, outcomes in f.outcomes.items():
            for scaled, o in zip(("", f.tasks[f.enlarged]), outcomes, strict=True):
                add(name, scaled, method, o.rate, o.scores, o.weights.mean(axis=1))
    return rows


def _draw_weights(config: Config, found: Mapping[str, _Findings]) -> figure.Figure:
    """A row a data set, a column a method, a line a task."""
    methods = [m for m in config.methods if m in _CHANGING]
    fig = figure.Figure(figsize=(2.35 * len(methods) + 2.4, 4.6), layout="constrained")
    grid = fig.subplots(len(found), len(methods), sharex=True, sharey="row", squeeze=False)
    steps = (np.arange(config.records) + 0.5) * config.steps_per_record
    for line, (name, f) in zip(grid, found.items(), strict=True):
        for ax, method in zip(line, methods, strict=True):
            ax.axhline(1 / len(f.tasks), color="black", linewidth=0.8, linestyle=":")
            for k, t in enumerate(_by_error(f)):
                label = f"{f.tasks[t]} ({100 - f.alone[:, t].mean():.0f} % wrong)"
                weights = f.outcomes[method][0].weights[:, :, t]
                _plots.curve(ax, steps, weights, color=_plots.LINE_COLORS[k + 1], label=label)
            ax.set_title(f"{name}: {method}", fontsize=9.5)
            _plots.plain(ax)
        line[0].set_ylim(0, None)  # the row's
        line[0].set_ylabel("share of the weights")
        line[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    return fig


def _draw_scores(found: Mapping[str, _Findings]) -> figure.Figure:
    """A row a data set: Δm, and the hardest task."""
    fig = figure.Figure(figsize=(9, 5.6), layout="constrained")
    grid = fig.subplots(len(found), 2, sharey="row", squeeze=False)
    for line, (name, f) in zip(grid, found.items(), strict=True):
        alone = (0.0, f.alone[:, f.hardest].mean())
        titles = (f"{name}: Δm (%)", f"{name}: accuracy of {f.tasks[f.hardest]}, the hardest task (%)")
        for ax, what, title, reference in zip(line, ("Δm", "hardest"), titles, alone, strict=True):
            ax.axvline(reference, color="black", linewidth=0.9, linestyle=":")
            for y, (method, outcomes) in enumerate(f.outcomes.items()):
                color = _plots.LINE_COLORS[2 if method in ON_TRIAL else 1]
                for outcome, shift, face in zip(outcomes, (0.14, -0.14), (color, "white"), strict=True):
                    e = _statistics.estimate(_measure(f, outcome, what))
                    error = None if math.isnan(e.error) else 2 * e.error
                    ax.errorbar(e.mean, y + shift, xerr=error, color=color, marker="o", mfc=face, capsize=2)
            ax.set_title(title, fontsize=10, loc="left")
            ax.set_yticks(range(len(f.outcomes)), list(f.outcomes))
            _plots.plain(ax)
    return fig
