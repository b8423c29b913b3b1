"""Impartial auxiliary learning: what auxiliary tasks do for a primary one, the more of their labels are wrong.

Li, Feng, Wang, Yang, Zuo, "Unprejudiced training auxiliary tasks makes primary better", arXiv 2412.19547. The function
of the uncertainties in the encoder stage, which is not established, is tried in three forms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from flax import nnx
import jax
from jax import numpy as jnp
from matplotlib import figure
import numpy as np
import optax
from sklearn import datasets

import optax_mtl as mtl
from optax_mtl.experiments import _data, _models, _plots, _registry, _report, _statistics, _training
from optax_mtl.experiments.evidence import _study

SINGLE, EQUAL, TUNED, IAL = "single-task", "equal", "tuned weight", "ial"
TASKS = {"primary": 10, "left": 10, "right": 10}  # task: number of classes
_COLUMNS = [0, 0, 1]  # of MultiDigits' labels: the left digit, the left digit, the right digit
_RECORDS = 10

Pair: TypeAlias = tuple[str, str]  # of methods: this one, against that one


def _ial(uncertainty_fn: str) -> Callable[[_registry.Setting], optax.GradientTransformation]:
    return lambda s: optax.chain(
        mtl.ial(s.num_tasks, primary=s.primary, shared=_registry.is_shared, uncertainty_fn=uncertainty_fn), s.optimizer
    )


METHODS = {  # those under one budget, by the names they have in tables
    SINGLE: _registry.METHODS["linear_scalarization"].build,
    EQUAL: _registry.METHODS["linear_scalarization"].build,
    "uncertainty": _registry.METHODS["uncertainty"].build,
    "grad_cosine": _registry.METHODS["grad_cosine"].build,
    "pcd": _registry.METHODS["pcd"].build,
    IAL: _registry.METHODS["ial"].build,
    "ial, ratio": _ial("ratio"),
    "ial, none": _ial("none"),
}
_LINES = {  # colour and style of each method's curve
    EQUAL: (_plots.LINE_COLORS[0], "-"),
    TUNED: (_plots.LINE_COLORS[2], "-."),
    "uncertainty": (_plots.LINE_COLORS[3], "-"),
    "grad_cosine": (_plots.LINE_COLORS[4], "-"),
    "pcd": (_plots.LINE_COLORS[5], "-"),
    IAL: (_plots.LINE_COLORS[1], "-"),
    "ial, ratio": (_plots.LINE_COLORS[1], "--"),
    "ial, none": (_plots.LINE_COLORS[1], ":"),
}


@dataclass(frozen=True)
class Config:
    """The same for every method.

    Attributes:
      seeds: number of seeds.
      steps: optimiser steps, rounded up to a multiple of 10.
      batch_size: canvases in a batch of the primary task, and as many in one of the auxiliary tasks.
      learning_rate: of Adam.
      width: units in each of the trunk's two hidden layers.
      labelled: number of training canvases with a label of the primary task.
      train_size: number of training canvases, all with labels of the auxiliary tasks.
      validation_size: number of canvases by which the weight that all auxiliary tasks share is tuned.
      test_size: number of test canvases.
      wrong: per cent of the auxiliary labels that are wrong, each a setting.
      weights: of the auxiliary tasks, tried beside 0 and 1 for the tuned weight.
      methods: which to train; single-task, equal and ial are among them.
    """

    seeds: int = 10
    steps: int = 800
    batch_size: int = 32
    learning_rate: float = 4e-3
    width: int = 64
    labelled: int = 100
    train_size: int = 2_000
    validation_size: int = 1_000
    test_size: int = 2_000
    wrong: tuple[int, ...] = (0, 20, 40, 60, 80, 100)
    weights: tuple[float, ...] = (0.1, 0.3)
    methods: tuple[str, ...] = tuple(METHODS)

    def __post_init__(self) -> None:
        """Rounds up."""
        object.__setattr__(self, "steps", -(-self.steps // _RECORDS) * _RECORDS)


QUICK = Config(
    seeds=2,
    steps=20,
    labelled=32,
    train_size=64,
    validation_size=50,
    test_size=50,
    wrong=(0, 100),
    weights=(0.3,),
    methods=(SINGLE, EQUAL, IAL),
)


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    shares = ", ".join(map(str, config.wrong))
    candidates = ", ".join(f"{w:g}" for w in sorted({0.0, 1.0, *config.weights}))
    return [
        f"Two 8 x 8 digits on a {_data.SIDE} x {_data.SIDE} canvas, one over the other (MultiDigits). The primary task "
        f"is the left digit, with few good labels: on {config.labelled} canvases. The auxiliary tasks are the left and "
        f"the right digit with plenty of cheap labels: on {config.train_size:,} canvases, those {config.labelled} "
        "among them.",
        "Scikit-learn's 1,797 images are split into three fifths, one fifth and one fifth before any canvas is made: "
        f"training, {config.validation_size:,} validation and {config.test_size:,} test canvases, with no image in two "
        "of them.",
        f"Of the training labels of each auxiliary task, {shares} % are replaced, exactly that share, each by one of "
        "the nine other digits, all as likely; they stay wrong throughout. What is wrong at one share is wrong at "
        "every larger one. The labels of the primary task and of the test canvases are right.",
        f"One trunk of two hidden layers of {config.width} units (ReLU), one linear head a task, mean cross-entropies; "
        f"{config.steps:,} steps of Adam with learning rate {config.learning_rate:g} for every method, each step with "
        f"{config.batch_size} canvases for the primary task and {config.batch_size} for the auxiliary ones; default "
        "arguments (but uncertainty is told that the tasks are classifications).",
        "Settled in a pilot of single-task networks and equal weights only, with right labels, on the validation "
        "canvases of other seeds: the primary task (with the same labels for all tasks, equal weights were behind "
        "single-task for the left digit, the right digit, the parity of the sum and that of the left digit; among the "
        "tasks with few labels that were tried, this one left auxiliary tasks room to help), the number of steps, and "
        "the learning rate, of 0.0005, 0.001, 0.002 and 0.004 the one with the highest sum of both accuracies (which "
        "differed little from 0.001 on; it is the highest that was tried).",
        f"{TUNED}: the best of {candidates} as the weight of both auxiliary tasks beside 1 for the primary, chosen for "
        "each share by the mean validation accuracy of the primary task. It is the only one that was tuned, and it "
        "costs as many trainings; 0 is single-task.",
        f"{IAL} multiplies an auxiliary gradient, brought to the primary's norm, by exp(-σ²), this library's reading "
        "of the paper; 'ial, ratio' by min(1, σ² of the primary / σ²) and 'ial, none' by one, the part that is "
        "established. σ² is learned as in uncertainty weighting.",
        "ial, grad_cosine and pcd balance the trunk only; each head gets its own gradient (in ial, over 2σ²). Equal, "
        "tuned and uncertainty weight trunk and heads.",
        f"Seeds: {config.seeds}. A seed fixes split, canvases, wrong labels, initial weights and order of the batches, "
        "the same for every method and share: all comparisons are by pairs.",
        "Scores are the primary task's test accuracies after the last step, with no early stopping.",
        "None of the paper's data sets and networks is used (NYUv2, Cityscapes, Pascal-Context, CIFAR-100): wrong "
        "labels by the dial are a test of what the method is for, not a reproduction.",
    ]


def cells(config: Config) -> list[_study.Cell]:
    """One program for each method; the shares of wrong labels are trained in it side by side."""
    builds = {name: METHODS[name] for name in config.methods}
    builds |= {_weight_name(weight): _weighted(weight) for weight in config.weights}
    return [_cell(config, name, build) for name, build in builds.items()]


def _weight_name(weight: float) -> str:
    return f"weight {weight:g}"


def _weighted(weight: float) -> Callable[[_registry.Setting], optax.GradientTransformation]:
    weights = (1.0, weight, weight)
    return lambda s: optax.chain(mtl.linear_scalarization(s.num_tasks, weights=jnp.array(weights)), s.optimizer)


def _cell(
    config: Config, name: str, build_method: Callable[[_registry.Setting], optax.GradientTransformation]
) -> _study.Cell:
    alone = name == SINGLE
    wrong = (0,) if alone else config.wrong  # no auxiliary labels, no wrong ones

    def build(key: jax.Array) -> optax.GradientTransformation:
        setting = _registry.Setting(
            num_tasks=1 if alone else len(TASKS),
            learning_rate=config.learning_rate,
            optimizer=optax.adam(config.learning_rate),
            key=key,
            steps_per_epoch=config.train_size // config.batch_size,
            form="classification",
        )
        return build_method(setting)

    def run(advance: _training.Advance) -> _study.Arrays:
        problem = make_problem(config, wrong, alone=alone)
        record = _training.train(build, problem, chunks=_RECORDS, advance=advance).record
        scores, weights = (x.reshape(config.seeds, len(wrong), *x.shape[1:]) for x in (record.scores, record.weights))
        return {"test": scores[:, :, -1, 0], "validation": scores[:, :, -1, 1], "weights": weights}

    return _study.Cell(name, run, _RECORDS)


def make_problem(config: Config, wrong: Sequence[int], *, alone: bool = False) -> _training.Problem:
    """Data, batches and initial weights, of each seed with each share of wrong labels, in this order.

    What is evaluated is the primary task's accuracy on test and validation canvases, in place of one number a task.
    """
    seeds = range(config.seeds)
    data = [make_data(config, seed) for seed in seeds]

    def network(key: jax.Array) -> tuple[Any, Any]:
        return nnx.split(_models.TrunkAndHeads(_data.SIDE**2, config.width, TASKS, rngs=nnx.Rngs(key)))

    graph, _ = network(jax.random.key(0))
    first_params = jax.jit(lambda key: nnx.to_pure_dict(network(key)[1]))

    def losses(params: Any, data: Any, batch: jax.Array) -> jax.Array:
        def of(rows: jax.Array, tasks: slice) -> jax.Array:
            logits = nnx.merge(graph, params)(data["images"][rows])[tasks]
            return _models.cross_entropies(logits, data["labels"][rows, tasks])

        primary = of(batch[0], slice(0, 1))
        return primary if alone else jnp.concatenate([primary, of(batch[1], slice(1, None))])

    def evaluate(params: Any, data: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(data["held_out"])[0]
        hits = jnp.argmax(logits, axis=-1) == data["answers"]
        return jnp.stack([jnp.mean(hits[: config.test_size]), jnp.mean(hits[config.test_size :])])

    def each_share(per_seed: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: np.repeat(np.stack(leaves), len(wrong), axis=0), *per_seed)

    return _training.Problem(
        losses=losses,
        evaluate=evaluate,
        params=each_share([first_params(jax.random.key(seed)) for seed in seeds]),
        data={
            "images": each_share([d.train.images for d in data]),
            "labels": np.stack([with_wrong(d.train.labels, w, seed) for seed, d in enumerate(data) for w in wrong]),
            "held_out": each_share([np.concatenate([d.test.images, d.validation.images]) for d in data]),
            "answers": each_share([np.concatenate([d.test.labels, d.validation.labels])[:, 0] for d in data]),
        },
        batches=each_share([_batches(config, seed) for seed in seeds]),
    )


def _batches(config: Config, seed: int) -> np.ndarray:
    """`(records, steps, 2, batch_size)`: rows for the primary task, and rows for the auxiliary ones."""
    sizes = (config.labelled, config.train_size)
    rows = [_data.epochs(seed, size, config.batch_size, config.steps) for size in sizes]
    return np.stack(rows, axis=1).reshape(_RECORDS, config.steps // _RECORDS, 2, config.batch_size)


class Data(NamedTuple):
    """Canvases, with labels for `TASKS`; no source image is in two of them."""

    train: _data.Split
    validation: _data.Split
    test: _data.Split


def make_data(config: Config, seed: int) -> Data:
    """Training, validation and test canvases of a seed, all labels right."""
    digits = datasets.load_digits()
    images = (digits.images / 16).astype(np.float32)
    rng = np.random.default_rng(seed)
    fifth = len(images) // 5
    parts = np.split(rng.permutation(len(images)), [len(images) - 2 * fifth, len(images) - fifth])
    sizes = (config.train_size, config.validation_size, config.test_size)
    splits = [
        _data.compose(images, digits.target, rng.choice(part, (size, 2)))
        for part, size in zip(parts, sizes, strict=True)
    ]
    return Data(*(split._replace(labels=split.labels[:, _COLUMNS]) for split in splits))


def with_wrong(labels: np.ndarray, wrong: int, seed: int) -> np.ndarray:
    """The labels `(N, T)` with `wrong` per cent of each auxiliary task's replaced by another class."""
    rng = np.random.default_rng([seed, 2])  # apart from the streams of canvases and batches
    labels = labels.copy()
    for task, classes in enumerate(TASKS.values()):
        order, shift = rng.permutation(len(labels)), rng.integers(1, classes, len(labels))  # the same for every share
        rows = order[: round(len(labels) * wrong / 100)]
        if task > 0:
            labels[rows, task] = (labels[rows, task] + shift[rows]) % classes
    return labels


def report(config: Config, results: _study.Results) -> _study.Report:
    """Accuracy and weights against the share of wrong labels."""
    tuned = tune(config, results)
    runs = {name: results[name] for name in config.methods} | {TUNED: _chosen(results, tuned)}
    shape = (config.seeds, len(config.wrong))
    accuracy = {name: np.broadcast_to(100 * run["test"], shape) for name, run in runs.items()}  # (S, shares)
    weights = {name: relative_weights(run["weights"]) for name, run in runs.items() if name != SINGLE}  # (S, shares)
    comparisons = compare(accuracy)
    return _study.Report(
        section=_report.Section(
            title="Auxiliary tasks with wrong labels",
            introduction="The more of the auxiliary tasks' labels are wrong, the less they can help the primary task, "
            "and the more they can harm it. Impartial auxiliary learning "
            "([arXiv 2412.19547](https://arxiv.org/abs/2412.19547)) weights them by gradient norms and uncertainties.",
            protocol=protocol(config),
            table=_report.Table(
                ["wrong labels, %", *map(str, config.wrong)],
                [[name, *(_statistics.estimate(share).text() for share in of.T)] for name, of in accuracy.items()],
            ),
            legend=f"Test accuracy of the primary task in %, mean ± standard error over {config.seeds} seeds.",
            findings=[
                *(_sentence(config, pair, found) for pair, found in comparisons.items()),
                _best(config, accuracy),
                _weights_sentence(config, weights, tuned),
            ],
            pictures=[
                _report.Picture(
                    "ial.png",
                    _picture(config, accuracy, weights),
                    "Left: the primary task's accuracy against the share of wrong auxiliary labels. Right: the "
                    "auxiliary tasks' mean weight relative to the primary's, over the whole training. Bands are one "
                    "standard error; a weight of zero is not drawn.",
                )
            ],
            data={},
            details=[
                (
                    _report.Table(
                        ["difference in points, with wrong labels, %", *map(str, config.wrong)],
                        [[" - ".join(pair), *(c.text() for c in found)] for pair, found in comparisons.items()],
                    ),
                    "Difference in accuracy, seed by seed, ± standard error; p from Student's t-test for pairs, after "
                    f"Holm's correction for all {sum(map(len, comparisons.values()))}.",
                )
            ],
        ),
        rows=[
            {
                "wrong": share,
                "method": name,
                "seed": seed,
                "test accuracy": float(accuracy[name][seed, i]),
                "validation accuracy": float(100 * np.broadcast_to(run["validation"], shape)[seed, i]),
                "auxiliary weight": 0.0 if name == SINGLE else float(weights[name][seed, i]),
            }
            for name, run in runs.items()
            for i, share in enumerate(config.wrong)
            for seed in range(config.seeds)
        ],
        verdict=verdict(config, comparisons),
    )


def tune(config: Config, results: _study.Results) -> list[str]:
    """For each share of wrong labels, the cell of the fixed weight with the best mean validation accuracy."""
    candidates = [SINGLE, EQUAL, *map(_weight_name, config.weights)]
    found = [np.broadcast_to(results[c]["validation"].mean(axis=0), len(config.wrong)) for c in candidates]
    return [candidates[best] for best in np.argmax(found, axis=0)]


def _chosen(results: _study.Results, names: Sequence[str]) -> _study.Arrays:
    """What was found by the cell that each share has chosen."""

    def of(name: str, key: str, i: int) -> np.ndarray:
        if name == SINGLE:  # is one share for all, and one task
            return results[name][key][:, 0] * (np.array([1, 0, 0]) if key == "weights" else 1)
        return results[name][key][:, i]

    keys = ("test", "validation", "weights")
    return {key: np.stack([of(name, key, i) for i, name in enumerate(names)], axis=1) for key in keys}


def relative_weights(weights: np.ndarray) -> np.ndarray:
    """An auxiliary task's mean weight over the primary's `(S, shares)`, from weights `(S, shares, records, T)`."""
    mean = weights.mean(axis=2)
    return mean[..., 1:].mean(axis=-1) / mean[..., 0]


def compare(accuracy: Mapping[str, np.ndarray]) -> dict[Pair, list[_statistics.Comparison]]:
    """Ial against each other method, and equal weights against single-task, at each share; p for all together."""
    pairs = [(IAL, SINGLE), (EQUAL, SINGLE), *((IAL, other) for other in accuracy if other not in (IAL, SINGLE))]
    found = [_statistics.paired(*both) for a, b in pairs for both in zip(accuracy[a].T, accuracy[b].T, strict=True)]
    shares = len(found) // len(pairs)
    raised = _statistics.holm(found)
    return {pair: raised[i * shares : (i + 1) * shares] for i, pair in enumerate(pairs)}


def _ahead(comparison: _statistics.Comparison) -> int:
    """1, -1, or 0 for what luck may have done."""
    return int(_statistics.significant(comparison)) * (1 if comparison.difference.mean > 0 else -1)


def _where(config: Config, found: Sequence[_statistics.Comparison], sign: int) -> list[int]:
    """The shares of wrong labels at which a comparison has that sign."""
    return [share for share, comparison in zip(config.wrong, found, strict=True) if _ahead(comparison) == sign]


def _shares(shares: Sequence[int]) -> str:
    """Such as `0, 20 and 40 %`."""
    *others, last = map(str, shares)
    return f"{', '.join(others)} and {last} %" if others else f"{last} %"


def _sentence(config: Config, pair: Pair, found: Sequence[_statistics.Comparison]) -> str:
    differences = dict(zip(config.wrong, found, strict=True))
    parts = []
    for sign, text in ((1, "ahead at"), (-1, "behind at"), (0, "not distinguishable at")):
        if at := _where(config, found, sign):
            numbers = ", ".join(differences[share].difference.text(sign=True) for share in at)
            parts.append(f"{text} {_shares(at)} wrong labels ({numbers} points)")
    return f"{pair[0]} against {pair[1]}: {'; '.join(parts)}."


def _best(config: Config, accuracy: Mapping[str, np.ndarray]) -> str:
    means = {name: of.mean(axis=0) for name, of in accuracy.items()}
    best = [max(means, key=lambda name: means[name][i]) for i in range(len(config.wrong))]
    each = ", ".join(
        f"{name} at {share} % ({means[name][i]:.1f})"
        for i, (share, name) in enumerate(zip(config.wrong, best, strict=True))
    )
    return f"Highest mean accuracy (which luck decides where methods are close): {each}."


def _weights_sentence(config: Config, weights: Mapping[str, np.ndarray], tuned: Sequence[str]) -> str:
    first, last = config.wrong[0], config.wrong[-1]
    each = ", ".join(f"{name} {of[:, 0].mean():.2g} and {of[:, -1].mean():.2g}" for name, of in weights.items())
    chosen = ", ".join(f"{name} at {share} %" for share, name in zip(config.wrong, tuned, strict=True))
    return (
        f"Mean weight of an auxiliary task relative to the primary's with {first} and {last} % wrong labels: {each}. "
        f"Chosen as {TUNED}: {chosen}."
    )


def verdict(config: Config, comparisons: Mapping[Pair, Sequence[_statistics.Comparison]]) -> str:
    """What became of the claim."""
    found = comparisons[IAL, SINGLE]
    ahead, behind = _where(config, found, 1), _where(config, found, -1)
    worst = min((c.difference for c in found), key=lambda difference: difference.mean).text(sign=True)
    if behind:
        text = f"Not safe: ial is behind single-task at {_shares(behind)} wrong labels ({worst} points at worst), "
        text += f"ahead {f'at {_shares(ahead)}' if ahead else 'nowhere'}"
    elif ahead:
        text = f"Safe as far as can be told: ial is ahead of single-task at {_shares(ahead)} wrong labels, "
        text += f"behind nowhere ({worst} points at worst)"
    else:
        text = "Undecided: ial is not distinguishable from single-task at any share of wrong labels "
        text += f"({worst} points at worst)"
    shares = len(config.wrong)
    rivals = [
        f"{other} {len(_where(config, c, 1))}/{len(_where(config, c, -1))}"
        for (method, other), c in comparisons.items()
        if method == IAL and other != SINGLE
    ]
    return f"{text}. Of {shares} shares, ial is ahead/behind at: against {', '.join(rivals)}."


def _picture(config: Config, accuracy: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> figure.Figure:
    fig = figure.Figure(figsize=(11, 4.6), layout="constrained")
    left, right = fig.subplots(1, 2)
    shares = np.array(config.wrong)
    _plots.curve(left, shares, accuracy[SINGLE], color="black", label=SINGLE, linestyle=":")
    for name, of in accuracy.items():
        if name != SINGLE:
            color, style = _LINES[name]
            _plots.curve(left, shares, of, color=color, label=name, linestyle=style)
            shown = np.where(weights[name] > 0, weights[name], np.nan)  # a tuned weight may be zero
            _plots.curve(right, shares, shown, color=color, label=name, linestyle=style)
    left.set_title("Primary task: test accuracy, %", fontsize=10, loc="left")
    right.set_title("An auxiliary task's weight, the primary's is one", fontsize=10, loc="left")
    right.set_yscale("log")
    for ax in (left, right):
        ax.set_xlabel("wrong auxiliary labels, %")
        ax.set_xlim(shares[0], shares[-1])
        _plots.plain(ax)
    fig.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return fig
