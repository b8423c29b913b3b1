"""Logic gates: the experiment that the authors of CDTT published with their code.

XOR, with targets ten times as large, and AND are learned from a shared layer of two sigmoid units, with one linear
output each: a trunk so small that the tasks must agree on it. Nakamura, Grassi, Wolf, "Leveraging convergence behavior
to balance conflicting tasks in multi-task learning", Neurocomputing 511, 2022, arXiv 2204.06698.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
import math
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax

from optax_mtl.experiments import _plots, _registry, _report, _statistics, _training

INPUTS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
TARGETS = {"xor": (0, 10, 10, 0), "and": (0, 0, 0, 1), "or": (0, 1, 1, 1)}


class Outcome(NamedTuple):
    """How many seeds learnt all gates, and the median epochs of those."""

    learnt: int
    seeds: int
    epochs: float

    @property
    def share(self) -> _statistics.Estimate:
        """Of the seeds that learnt, in percent; none and all have a standard error too (Agresti and Coull's)."""
        p = (self.learnt + 1) / (self.seeds + 2)
        return _statistics.Estimate(100 * self.learnt / self.seeds, 100 * math.sqrt(p * (1 - p) / self.seeds))

    def cells(self) -> list[str]:
        """For the table."""
        epochs = f"{self.epochs:.0f}" if self.learnt else "–"
        return [f"{self.learnt}/{self.seeds}", self.share.text(0), epochs]


# XOR and AND with the authors' code, over 20 seeds.
AUTHORS = {
    "cdtt": Outcome(13, 20, 186),
    "edm": Outcome(13, 20, 355),
    "linear_scalarization": Outcome(3, 20, 157),
}
DEFAULT_METHODS = tuple(AUTHORS)
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Config:
    """The authors' values, but for the seeds.

    Attributes:
      seeds: number of seeds.
      steps: epochs at most, each of two batches of two.
      learning_rate: of SGD with momentum 0.9.
      gates: which gates are the tasks.
    """

    seeds: int = 400
    steps: int = 2_500
    learning_rate: float = 0.05
    gates: tuple[str, ...] = ("xor", "and")


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    gates = " and ".join(
        gate.upper() + (f" (targets 0 and {max(TARGETS[gate])})" if max(TARGETS[gate]) > 1 else "")
        for gate in config.gates
    )
    return [
        f"{gates} from a shared layer of two sigmoid units and one linear output each; squared error.",
        "An epoch is the four points in a new order, in two batches of two. SGD, learning rate "
        f"{config.learning_rate:g}, momentum 0.9; every method's own defaults (tension 0.3 for cdtt).",
        "Methods act on the shared layer, each output gets its own gradient, as in the authors' code; the initial "
        "weights are uniform in ±1/√2, PyTorch's default.",
        f"A gate is learnt in the first epoch with a mean error under {_TOLERANCE:g}, within {config.steps:,} epochs. "
        "The mean error is the authors': the losses of the two batches, summed and divided by the number of "
        f"examples times the number of tasks ({len(INPUTS) * len(config.gates)}).",
        f"Seeds: {config.seeds}. A seed fixes initial weights and order of the data, the same for every method.",
    ]


def ticks(config: Config, methods: Sequence[str]) -> int:
    """The sum of the ticks that `run` announces by `advance`."""
    return len(methods) * _chunks(config)


def _chunks(config: Config) -> int:
    return math.gcd(config.steps, 10)


def make_problem(config: Config) -> _training.Problem:
    """Weights, data and batches of all seeds."""
    inputs = jnp.asarray(INPUTS)
    targets = jnp.asarray([TARGETS[gate] for gate in config.gates], jnp.float32)  # (T, 4)

    def squared_errors(params: dict[str, dict[str, jax.Array]], points: jax.Array) -> jax.Array:
        trunk, heads = params["trunk"], params["heads"]  # kernels (2, 2) and (T, 2)
        hidden = jax.nn.sigmoid(inputs[points] @ trunk["kernel"] + trunk["bias"][None])
        outputs = heads["kernel"] @ hidden.T + heads["bias"][:, None]  # (T, B)
        return jnp.mean(jnp.square(outputs - targets[:, points]), axis=1)

    return _training.Problem(
        losses=lambda params, _, points: squared_errors(params, points),
        evaluate=lambda params, _: squared_errors(params, jnp.arange(len(INPUTS))),
        params=_stack([_first_params(seed, len(config.gates)) for seed in range(config.seeds)]),
        data=np.zeros((config.seeds, 0), np.float32),
        batches=np.stack([_orders(seed, config.steps) for seed in range(config.seeds)]),
    )


def _first_params(seed: int, num_tasks: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    bound = 1 / math.sqrt(2)

    def uniform(*shape: int) -> np.ndarray:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    return {
        "trunk": {"kernel": uniform(2, 2), "bias": uniform(2)},
        "heads": {"kernel": uniform(num_tasks, 2), "bias": uniform(num_tasks)},
    }


def _orders(seed: int, epochs: int) -> np.ndarray:
    """`(epochs, 2, 2)`: a new order of the four points in every epoch."""
    rng = np.random.default_rng([seed, 1])
    return rng.permuted(np.tile(np.arange(4, dtype=np.int32), (epochs, 1)), axis=1).reshape(-1, 2, 2)


def _stack(trees: Sequence[dict[str, dict[str, np.ndarray]]]) -> dict[str, dict[str, np.ndarray]]:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def epochs_to_learn(losses: np.ndarray) -> np.ndarray:
    """Epochs until every gate has once had a mean error under the tolerance.

    Args:
      losses: `(S, epochs, T)`, mean loss of the two batches of each epoch.

    Returns:
      `(S,)`, infinite for seeds that never did.
    """
    num_tasks = losses.shape[2]
    learnt = 2 * losses / (len(INPUTS) * num_tasks) < _TOLERANCE
    first = np.where(learnt.any(axis=1), learnt.argmax(axis=1) + 1.0, np.inf)  # (S, T)
    return first.max(axis=1)


def run(config: Config, methods: Sequence[str], advance: Callable[[str, int], object]) -> dict[str, _training.Run]:
    """Trains every method; `advance(method, ticks)` is called as it goes."""
    problem = make_problem(config)

    def train(method: str) -> _training.Run:
        def build(key: jax.Array) -> optax.GradientTransformation:
            setting = _registry.Setting(
                num_tasks=len(config.gates),
                learning_rate=config.learning_rate,
                optimizer=optax.sgd(config.learning_rate, momentum=0.9),
                key=key,
                steps_per_epoch=2,
                form="regression",
            )
            return _registry.METHODS[method].build(setting)

        return _training.train(build, problem, chunks=_chunks(config), advance=lambda ticks: advance(method, ticks))

    return {method: train(method) for method in methods}


def section(config: Config, runs: dict[str, _training.Run]) -> _report.Section:
    """Table, findings and picture."""
    epochs = {method: epochs_to_learn(run.record.losses) for method, run in runs.items()}
    authors = {m: o for m, o in AUTHORS.items() if m in runs and set(config.gates) == {"xor", "and"}}
    outcomes = {method: _outcome(values) for method, values in epochs.items()}
    unknown = ["–"] * 3
    rows = [
        [
            method,
            *outcomes[method].cells(),
            *(authors[method].cells() if method in authors else unknown),
            f"{run.seconds:.1f}",
            f"{run.compile_seconds:.1f}",
        ]
        for method, run in runs.items()
    ]
    headers = ["method", "learnt", "%", "epochs", "authors: learnt", "%", "epochs", "train, s", "compile, s"]
    gates = " and ".join(gate.upper() for gate in config.gates)
    figure = _plots.shares_over_time(
        epochs,
        config.steps,
        {method: (outcome.epochs, outcome.share.mean / 2) for method, outcome in authors.items()},
        title=f"Seeds that have learnt {gates}",
        mark_name="authors' code: median epoch, half of the seeds that learn",
    )
    return _report.Section(
        title="Logic gates",
        introduction=f"{gates} from one shared layer of two sigmoid units: the experiment that the authors of CDTT "
        "published with their code ([arXiv 2204.06698](https://arxiv.org/abs/2204.06698)).",
        protocol=protocol(config),
        table=_report.Table(headers, rows),
        legend=f"Seeds that learn {gates}, their share ± standard error, and the median of their epochs; beside it "
        "what the authors' own code gave. Seconds are for all seeds together.",
        findings=_against_authors(outcomes, authors) + _against_the_best(epochs),
        pictures=[
            _report.Picture("logic-gates.png", figure, f"Share of the seeds that have learnt {gates}, by epoch.")
        ],
        data={
            "epochs_to_learn": {
                method: [int(e) if np.isfinite(e) else None for e in values] for method, values in epochs.items()
            },
            "authors": {method: outcome._asdict() for method, outcome in authors.items()},
            "seconds": {method: round(run.seconds, 2) for method, run in runs.items()},
            "compile_seconds": {method: round(run.compile_seconds, 2) for method, run in runs.items()},
        },
    )


def _outcome(epochs: np.ndarray) -> Outcome:
    learnt = epochs[np.isfinite(epochs)]
    return Outcome(len(learnt), len(epochs), float(np.median(learnt)) if learnt.size else math.inf)


def _against_authors(outcomes: dict[str, Outcome], authors: dict[str, Outcome]) -> list[str]:
    findings = []
    for method, theirs in authors.items():
        ours, published = outcomes[method].share, theirs.share
        difference = _statistics.Estimate(ours.mean - published.mean, math.hypot(ours.error, published.error))
        verdict = "distinguishable" if _statistics.distinguishable(difference) else "not distinguishable"
        findings.append(
            f"{method} learns in {ours.text(0)} % of the seeds, the authors' code in {published.text(0)} %: {verdict}."
        )
    return findings


def _against_the_best(epochs: dict[str, np.ndarray]) -> list[str]:
    learnt = {method: np.isfinite(values) for method, values in epochs.items()}
    best, *others = sorted(learnt, key=lambda method: -learnt[method].mean())
    findings = [f"{best} learns most often."] if others else []
    for method in others:
        difference = _statistics.estimate(100 * (learnt[method].astype(float) - learnt[best]))
        verdict = "" if _statistics.distinguishable(difference) else " (not distinguishable)"
        finding = f"{method} against {best}, seed by seed: {difference.text(0, sign=True)} points{verdict}"
        both = learnt[method] & learnt[best]
        if both.any():
            ratio = np.median(epochs[method][both] / epochs[best][both])
            finding += f"; where both learn ({both.sum()} seeds), {ratio:.2g} times the epochs (median)"
        findings.append(finding + ".")
    return findings
