"""Segmentation, depth and surface normals from one small encoder-decoder, with the metrics of that literature.

The benchmark that most methods' papers end with (NYUv2 and Cityscapes: Liu, Johns, Davison, "End-to-end multi-task
learning with attention", CVPR 2019), in a size that trains on two cores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

from optax_mtl.experiments import _data, _plots, _registry, _report, _training
from optax_mtl.experiments.evidence import _dense_report, _encoder_decoder, _scenes, _study
from optax_mtl.experiments.evidence._dense_report import EQUAL, SINGLE, TASKS, TUNED

SOURCES = {"scenes": _scenes.scenes, "photograph": _scenes.motorcycle}
_CLASSES = {"scenes": _scenes.CLASSES, "photograph": _scenes.LAYERS}
_FIXED = "fixed weights"  # the cell of all runs with such
_SHOWN = {"scenes": 15, "photograph": 36}  # the test image in the picture, of the first seed


@dataclass(frozen=True)
class Config:
    """The same for every method.

    Attributes:
      seeds: number of seeds.
      steps: optimiser steps, rounded up to a multiple of `records`.
      records: how often is evaluated.
      batch_size: images in a batch.
      learning_rate: of Adam.
      width: channels at the finest grid.
      train_size: number of training images.
      test_size: number of test images.
      methods: names, on the scenes.
      fixed: fixed weights of the tasks, beside equal ones, on the scenes.
      photograph_methods: names, on the real photograph.
    """

    seeds: int = 10
    steps: int = 300
    records: int = 5
    batch_size: int = 8
    learning_rate: float = 5e-3
    width: int = 8
    train_size: int = 512
    test_size: int = 64
    methods: tuple[str, ...] = (
        EQUAL,
        "uncertainty",
        "adaptive_weight_assignment",
        "famo",
        "mgda",
        "pcgrad",
        "nash_mtl",
        "upgrad",
        "edm",
        "cdtt",
        "mao",
    )
    fixed: tuple[tuple[float, ...], ...] = ((3, 1, 1), (1, 3, 1), (1, 1, 3))
    photograph_methods: tuple[str, ...] = (EQUAL, "upgrad")

    def __post_init__(self) -> None:
        """Rounds up."""
        object.__setattr__(self, "steps", -(-self.steps // self.records) * self.records)


QUICK = Config(
    seeds=2,
    steps=10,
    records=1,
    batch_size=4,
    width=4,
    train_size=8,
    test_size=6,
    methods=(EQUAL, "mgda"),
    fixed=(),
    photograph_methods=(),
)


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    weights_losses = [m for m in config.methods if _registry.METHODS[m].weights_losses]
    sentences = [
        f"Scenes: {_scenes.SIDE} x {_scenes.SIDE} pixels, a floor, a wall, up to two balls and two boxes, rendered "
        "with numpy, so that class, depth and normal of each pixel are exact. Each surface wears a crop of a real "
        f"photograph ({', '.join(_scenes.PHOTOGRAPHS)}: files of scikit-image and scikit-learn), shaded from one side.",
        "Two thirds of the photographs clothe the training scenes, the others the test scenes, split anew for each "
        f"seed: {config.train_size} training and {config.test_size} test scenes.",
        "Tasks and losses as usual on NYUv2: segmentation (floor, wall, ball, box; cross-entropy), depth (mean "
        "absolute error, in metres), normals (one minus the cosine).",
        f"Network: an encoder and decoder with three resolutions, {config.width}, {2 * config.width} and "
        f"{4 * config.width} channels, shared by all tasks, and one 1 x 1 convolution a task.",
        f"{config.steps} steps of Adam, learning rate {config.learning_rate:g}, batches of {config.batch_size}, for "
        "every run, and every method's default arguments (but uncertainty is told which task is a classification).",
        "The learning rate was chosen for equal weighting and the single-task networks, from 0.005 and 0.01, in "
        "a pilot run on other scenes.",
        "mao is itself one Adam a task with that learning rate, their steps summed, so that its trunk moves up to "
        "three times as far in a step.",
        f"Seeds: {config.seeds}. A seed fixes photographs, scenes, first weights and order of the batches, the same "
        "for every run: runs are compared seed by seed.",
        f"Methods that weight losses ({', '.join(weights_losses)}) weight trunk and heads; the others act on the trunk "
        "only, and each head gets its own gradient.",
        f"{SINGLE.capitalize()}: the same network trained for one task, as many steps; three networks instead of one.",
        "Scores are of the test images after the last step. Δm is the gain over the single-task networks of the same "
        "seed in percent, counted so that positive is better, and averaged over all eight metrics.",
        "Differences are tested seed by seed, by the t-test for pairs, with Holm's correction for the number of runs.",
    ]
    if config.fixed:
        ratios = ", ".join(map(_ratio, config.fixed))
        sentences.append(
            f"{TUNED.capitalize()}: equal ones or {ratios} (segmentation : depth : normals), for each seed those with "
            "the highest mean Δm over the other seeds, so that no seed's own test images choose for it."
        )
    if config.photograph_methods:
        sentences.append(
            "Photograph: the left picture of Middlebury's stereo pair Motorcycle with its measured disparity, as "
            "scikit-image has it, at a quarter of its size. Crops of its left part are trained on, others of its right "
            "part are the test. Depth is from the disparity and the camera's constants, normals are from the "
            "disparity's slope; the classes are three layers of depth. One picture: an illustration."
        )
    sentences.append(
        "The papers have photographs of hundreds of rooms or streets in 288 x 384 pixels or more, deep pre-trained "
        "networks and days of a GPU; what is the same here is the shape of the problem."
    )
    return sentences


def cells(config: Config) -> list[_study.Cell]:
    """For each source of images: one for all runs with fixed weights, and one a method."""
    return [
        _study.Cell(f"{source}: {name}", functools.partial(run, config, source), config.records)
        for source in SOURCES
        for name, run in _runs(config, source).items()
    ]


def _runs(config: Config, source: str) -> dict[str, Callable[[Config, str, _training.Advance], _study.Arrays]]:
    methods = _methods(config, source)
    if not methods:
        return {}
    return {_FIXED: _run_fixed, **{method: functools.partial(_run_method, method) for method in methods}}


def _methods(config: Config, source: str) -> tuple[str, ...]:
    return config.methods if source == "scenes" else config.photograph_methods


def _fixed(config: Config, source: str) -> dict[str, tuple[float, ...]]:
    """The runs with fixed weights. A single-task network is one in which one task has all the weight."""
    alone = {f"only {task}": tuple(float(task == other) for other in TASKS) for task in TASKS}
    return alone | {_ratio(weights): weights for weights in config.fixed if source == "scenes"}


def _ratio(weights: Sequence[float]) -> str:
    return ":".join(f"{weight:g}" for weight in weights)


def _run_method(method: str, config: Config, source: str, advance: _training.Advance) -> _study.Arrays:
    return _run(method, len(TASKS), _problem(config, source), config, advance)


def _run_fixed(config: Config, source: str, advance: _training.Advance) -> _study.Arrays:
    """All in one program. What is found has an axis for the networks, before those of a single one."""
    weights = list(_fixed(config, source).values())
    return _run(EQUAL, 1, _side_by_side(_problem(config, source), weights), config, advance)


def _side_by_side(problem: _training.Problem, weights: Sequence[Sequence[float]]) -> _training.Problem:
    """A network for each row of weights, under the sum of all their losses.

    Adam goes number by number, and no number is in two networks: each is trained as if it were alone.
    """
    shares = jnp.asarray(weights, jnp.float32)

    def losses(params: Any, data: Any, batch: jax.Array) -> jax.Array:
        return jnp.vdot(shares, jax.vmap(lambda network: problem.losses(network, data, batch))(params))[None]

    return replace(
        problem,
        losses=losses,
        evaluate=lambda params, data: jax.vmap(lambda network: problem.evaluate(network, data))(params),
        params=jax.tree.map(lambda leaf: jnp.stack([leaf] * len(weights), axis=1), problem.params),
    )


def _run(
    method: str, num_tasks: int, problem: _training.Problem, config: Config, advance: _training.Advance
) -> _study.Arrays:
    def build(key: jax.Array) -> optax.GradientTransformation:
        setting = _registry.Setting(
            num_tasks=num_tasks,
            learning_rate=config.learning_rate,
            optimizer=optax.adam(config.learning_rate),
            key=key,
            steps_per_epoch=config.train_size // config.batch_size,
            form=("classification", "regression", "regression"),
        )
        return _registry.METHODS[method].build(setting)

    record = _training.train(build, problem, chunks=config.records, advance=advance).record
    shown = {task: record.scores[task][0, -1] for task in TASKS}
    return {"metrics": record.scores["metrics"], "weights": record.weights, "cosines": record.cosines, **shown}


@functools.lru_cache(maxsize=1)
def _problem(config: Config, source: str) -> _training.Problem:
    """Images, batches and first parameters of all seeds."""
    seeds = range(config.seeds)
    splits = [SOURCES[source](seed, config.train_size, config.test_size) for seed in seeds]
    orders = [_data.epochs(seed, config.train_size, config.batch_size, config.steps) for seed in seeds]

    def losses(params: Any, data: _scenes.Split, batch: jax.Array) -> jax.Array:
        return _encoder_decoder.losses(params, jax.tree.map(lambda field: field[batch], data.train))

    def evaluate(params: Any, data: _scenes.Split) -> dict[str, jax.Array]:
        image = jnp.asarray(data.test.images[_shown(source, data.test)])
        logits, depth, normals = _encoder_decoder.predict(params, image[None])
        shown = (jnp.argmax(logits[0], axis=-1), depth[0], normals[0])
        return {"metrics": _encoder_decoder.metrics(params, data.test), **dict(zip(TASKS, shown, strict=True))}

    keys = jax.vmap(jax.random.key)(np.arange(config.seeds, dtype=np.uint32))
    first = functools.partial(_encoder_decoder.init, width=config.width, classes=len(_CLASSES[source]))
    return _training.Problem(
        losses=losses,
        evaluate=evaluate,
        params=jax.jit(jax.vmap(first))(keys),
        data=jax.tree.map(lambda *fields: np.stack(fields), *splits),
        batches=np.stack(orders).reshape(config.seeds, config.records, -1, config.batch_size),
    )


def _shown(source: str, test: _scenes.Scenes) -> int:
    return min(_SHOWN[source], len(test.images) - 1)


def report(config: Config, results: _study.Results) -> _study.Report:
    """Table, findings and pictures."""
    outcomes = {}
    for source in SOURCES:
        if methods := _methods(config, source):
            runs = [*_fixed(config, source), *methods]
            finals = {name: _found(config, results, source, name, "metrics")[:, -1] for name in runs}
            fixed = [_ratio(weights) for weights in config.fixed if source == "scenes"]
            outcomes[source] = _dense_report.outcome(finals, fixed)
    scenes, others = outcomes["scenes"], [method for method in config.methods if method != EQUAL]
    findings = _dense_report.findings(scenes, others)
    findings.append(_dense_report.conflicts(results[f"scenes: {EQUAL}"]["cosines"]))
    legend = (
        f"Means over {config.seeds} seeds, the best Δm first, with its standard error. Arrows: which way is better."
    )
    weights = {method: results[f"scenes: {method}"]["weights"] for method in config.methods}
    details = [(_dense_report.shares(weights), "Mean over all steps ± standard error over seeds.")]
    if "photograph" in outcomes:
        findings.append(_dense_report.on_the_photograph(outcomes["photograph"]))
        details.append((_dense_report.table(outcomes["photograph"]), f"On the real photograph. {legend}"))
    section = _report.Section(
        title="Dense prediction",
        introduction="Segmentation, depth and surface normals of small scenes in the colours of real photographs, from "
        "one encoder-decoder that all three tasks share.",
        protocol=protocol(config),
        table=_dense_report.table(scenes),
        legend=legend,
        findings=findings,
        pictures=[
            _report.Picture(
                "dense.png",
                _plots.bars(scenes.gains, EQUAL, title="Gain over single-task networks", label="Δm, %"),
                "Δm on the scenes: mean, two standard errors, and every seed; dashed: equal weighting.",
            ),
            _report.Picture(
                "dense-images.png",
                _dense_report.images([_beside_truth(config, results, source, of) for source, of in outcomes.items()]),
                "A test image of the first seed, its truth, and what three trainings see in it."
                + (
                    " Where the real photograph's truth is white or grey, it is not known."
                    if "photograph" in outcomes
                    else ""
                ),
                dots_per_inch=110,
            ),
        ],
        data={},
        details=details,
    )
    return _study.Report(section, _dense_report.rows(outcomes), _dense_report.verdict(scenes, others))


def _found(config: Config, results: _study.Results, source: str, name: str, what: str) -> np.ndarray:
    """What a run has found, whether it had a cell of its own or not."""
    fixed = list(_fixed(config, source))
    if name not in fixed:
        return results[f"{source}: {name}"][what]
    together = results[f"{source}: {_FIXED}"][what]  # (S, records, networks, metrics), or (networks, H, W, ...)
    return np.take(together, fixed.index(name), axis=2 if what == "metrics" else 0)


def _beside_truth(
    config: Config, results: _study.Results, source: str, of: _dense_report.Outcome
) -> _dense_report.Shown:
    """A test image beside its truth: single-task networks, equal weighting, and the best method."""
    best = _dense_report.best(of, [name for name in _methods(config, source) if name != EQUAL] or [EQUAL])
    runs = {"single-task": [f"only {task}" for task in TASKS], "equal": [EQUAL] * 3, best: [best] * 3}
    test = SOURCES[source](0, config.train_size, config.test_size).test
    return _dense_report.Shown(
        title={"scenes": "A test scene", "photograph": "A real photograph"}[source],
        truth=_scenes.Scenes(*(field[_shown(source, test)] for field in test)),
        seen={
            name: [_found(config, results, source, run, task) for run, task in zip(three, TASKS, strict=True)]
            for name, three in runs.items()
        },
        classes=len(_CLASSES[source]),
    )
