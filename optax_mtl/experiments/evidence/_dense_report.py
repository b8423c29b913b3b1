"""What the runs on dense tasks show: gains over single-task networks, tests, sentences, pictures."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib import axes, colors, figure
import numpy as np

from optax_mtl.experiments import _plots, _registry, _report, _statistics
from optax_mtl.experiments.evidence import _encoder_decoder, _scenes

SINGLE = "single-task networks"
TUNED = "best fixed weights"
EQUAL = _registry.BASELINE
TASKS = _encoder_decoder.TASKS
_METRICS = _encoder_decoder.METRICS
_OF_TASK = np.array([task for task, _ in _METRICS.values()])
_MORE_IS_BETTER = np.array([more for _, more in _METRICS.values()])


class Outcome(NamedTuple):
    """What came of one source of images.

    Attributes:
      metrics: `(S, 8)` of each run, and of the single-task networks.
      gains: Δm `(S,)` of each run.
      by_task: `(S, 3)`, the same over each task's metrics.
    """

    metrics: dict[str, np.ndarray]
    gains: dict[str, np.ndarray]
    by_task: dict[str, np.ndarray]


def outcome(finals: Mapping[str, np.ndarray], fixed: Sequence[str]) -> Outcome:
    """Gains over the single-task networks.

    Args:
      finals: the final metrics `(S, 8)` of all runs, those of `only TASK` among them.
      fixed: names of the runs with fixed weights; if there are any, their best is one more run, `TUNED`.

    Returns:
      An `Outcome`.
    """
    alone = np.stack([finals[f"only {task}"] for task in TASKS])
    single = alone[_OF_TASK, :, np.arange(len(_OF_TASK))].T
    runs = {name: values for name, values in finals.items() if not name.startswith("only ")}
    if fixed:
        choices = np.stack([runs[name] for name in (EQUAL, *fixed)])
        gains = np.stack([_statistics.delta_m(values, single, _MORE_IS_BETTER) for values in choices])
        runs[TUNED] = choices[best_on_other_seeds(gains), np.arange(len(single))]

    def gain(values: np.ndarray, of: np.ndarray) -> np.ndarray:
        return _statistics.delta_m(values[:, of], single[:, of], _MORE_IS_BETTER[of])

    every, of_each = np.full(len(_OF_TASK), True), [np.equal(_OF_TASK, task) for task in range(len(TASKS))]
    return Outcome(
        metrics={SINGLE: single, **runs},
        gains={name: gain(values, every) for name, values in runs.items()},
        by_task={name: np.stack([gain(values, of) for of in of_each], axis=1) for name, values in runs.items()},
    )


def best_on_other_seeds(gains: np.ndarray) -> np.ndarray:
    """For each seed, the row of `(rows, S)` with the highest mean over all other seeds."""
    return np.argmax(gains.sum(axis=1, keepdims=True) - gains, axis=0)


def best(of: Outcome, names: Sequence[str]) -> str:
    """The one with the highest mean Δm."""
    return max(names, key=lambda name: of.gains[name].mean())


# -- Sentences -----------------------------------------------------------------


def findings(scenes: Outcome, methods: Sequence[str]) -> list[str]:
    """What the gains say, in sentences.

    Args:
      scenes: what came of the scenes.
      methods: names of all but equal weighting.

    Returns:
      The sentences.
    """
    with_equal = [EQUAL, *methods]
    rivals = {
        "the single-task networks, of which there are three": (0 * scenes.gains[EQUAL], with_equal),
        f"equal weighting ({_percent(scenes.gains[EQUAL])})": (scenes.gains[EQUAL], methods),
    }
    if TUNED in scenes.gains:
        rivals[f"the {TUNED} ({_percent(scenes.gains[TUNED])})"] = scenes.gains[TUNED], with_equal
    return [
        *(f"Δm against {name}: {_told(_against(scenes, *rival))}." for name, rival in rivals.items()),
        *(_on_task(scenes, task, with_equal) for task in range(len(TASKS))),
    ]


def conflicts(cosines: np.ndarray) -> str:
    """A sentence on the cosines `(S, records, 3, 3)` under equal weighting."""
    means, lowest = cosines.mean(axis=(0, 1)), cosines.mean(axis=0).min(axis=0)
    told = [
        f"{TASKS[i]} and {TASKS[j]} {means[i, j]:+.2f} (lowest {lowest[i, j]:+.2f})"
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    return (
        "Cosine of the tasks' gradients on the trunk under equal weighting, mean over all steps (and the lowest mean "
        f"over a {cosines.shape[1]}th of them): {', '.join(told)}."
    )


def on_the_photograph(photograph: Outcome) -> str:
    """A sentence on the second source."""
    others = [name for name in photograph.gains if name != EQUAL]
    return (
        f"On crops of the real photograph, equal weighting has a Δm of {_percent(photograph.gains[EQUAL])}; against "
        f"it, {_told(_against(photograph, photograph.gains[EQUAL], others))}."
    )


def verdict(scenes: Outcome, methods: Sequence[str]) -> str:
    """What became of it, in a sentence or two."""
    text = f"Against equal weighting, {_counted(_against(scenes, scenes.gains[EQUAL], methods))}"
    if TUNED in scenes.gains:
        text += f"; against the {TUNED}, {_counted(_against(scenes, scenes.gains[TUNED], methods))}"
    first = best(scenes, [EQUAL, *methods])
    return f"{text}. Best Δm: {first}, {_percent(scenes.gains[first])}."


def _percent(gains: np.ndarray) -> str:
    return f"{_statistics.estimate(gains).text(1, sign=True)} %"


def _against(of: Outcome, rival: np.ndarray, names: Sequence[str]) -> dict[str, _statistics.Comparison]:
    """Each run's Δm against a rival's, the best first."""
    compared = _statistics.holm([_statistics.paired(of.gains[name], rival) for name in names])
    return dict(sorted(zip(names, compared, strict=True), key=lambda item: -item[1].difference.mean))


def _grouped(compared: Mapping[str, _statistics.Comparison]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"ahead": [], "behind": [], "not distinguishable": []}
    for name, comparison in compared.items():
        side = "ahead" if comparison.difference.mean > 0 else "behind"
        groups[side if _statistics.significant(comparison) else "not distinguishable"].append(name)
    return {group: names for group, names in groups.items() if names}


def _told(compared: Mapping[str, _statistics.Comparison]) -> str:
    """Such as `ahead: mgda +1.2 ± 0.3 (p = 0.004); not distinguishable: dwa`."""

    def one(group: str, name: str) -> str:
        return name if group == "not distinguishable" else f"{name} {compared[name].text()}"

    groups = _grouped(compared).items()
    return "; ".join(f"{group}: {', '.join(one(group, name) for name in names)}" for group, names in groups)


def _counted(compared: Mapping[str, _statistics.Comparison]) -> str:
    """Such as `2 of 12 methods are ahead (mgda, edm), 10 not distinguishable`."""
    groups = _grouped(compared)
    parts = [
        f"{len(names)} {group}" + (f" ({', '.join(names)})" if group != "not distinguishable" else "")
        for group, names in groups.items()
    ]
    first, *rest = parts
    number, rank = first.split(" ", 1)
    return ", ".join([f"{number} of {len(compared)} methods {'is' if number == '1' else 'are'} {rank}", *rest])


def _on_task(scenes: Outcome, task: int, names: Sequence[str]) -> str:
    gains = {name: scenes.by_task[name][:, task] for name in names}
    ordered = sorted(names, key=lambda name: -gains[name].mean())
    return (
        f"On {TASKS[task]}, gain over its single-task network: equal weighting {_percent(gains[EQUAL])}, most "
        f"{ordered[0]}, {_percent(gains[ordered[0]])}, least {ordered[-1]}, {_percent(gains[ordered[-1]])}."
    )


# -- Tables --------------------------------------------------------------------


def table(of: Outcome) -> _report.Table:
    """All metrics, the best Δm first."""
    rows = []
    for name in [SINGLE, *sorted(of.gains, key=lambda name: -of.gains[name].mean())]:
        means = zip(_METRICS, of.metrics[name].mean(axis=0), strict=True)
        gain = _statistics.estimate(of.gains[name]).text(1, sign=True) if name in of.gains else "0"
        rows.append([name, *(f"{mean:.{2 if metric.endswith(' m') else 1}f}" for metric, mean in means), gain])
    arrows = [f"{metric} {'↑' if more else '↓'}" for metric, (_, more) in _METRICS.items()]
    return _report.Table(["", *arrows, "Δm, % ↑"], rows)


def shares(weights: Mapping[str, np.ndarray]) -> _report.Table:
    """How methods share out their weights `(S, records, 3)`, in percent of their sum."""
    rows = []
    for method, values in weights.items():
        percent = (100 * values / values.sum(axis=-1, keepdims=True)).mean(axis=1)
        rows.append([method, *(_statistics.estimate(task).text(0) for task in percent.T)])
    return _report.Table(["share of the weights, %", *TASKS], rows)


def rows(outcomes: Mapping[str, Outcome]) -> list[dict[str, str | float]]:
    """One for each source, run and seed."""
    found = []
    for source, of in outcomes.items():
        for name, values in of.metrics.items():
            nothing = np.zeros(len(values)), np.zeros((len(values), len(TASKS)))
            gains, by_task = (of.gains[name], of.by_task[name]) if name in of.gains else nothing
            for seed, metrics in enumerate(values):
                row: dict[str, str | float] = {"images": source, "run": name, "seed": float(seed)}
                row |= {metric: float(value) for metric, value in zip(_METRICS, metrics, strict=True)}
                row |= {f"gain on {task}, %": float(g) for task, g in zip(TASKS, by_task[seed], strict=True)}
                found.append(row | {"Δm, %": float(gains[seed])})
    return found


# -- Pictures ------------------------------------------------------------------


class Shown(NamedTuple):
    """One test image: the title, its truth, what runs see in it (classes, depth and normals each), how many classes."""

    title: str
    truth: _scenes.Scenes
    seen: dict[str, Sequence[np.ndarray]]
    classes: int


def images(blocks: Sequence[Shown]) -> figure.Figure:
    """A block of four columns a test image: itself, segmentation, depth, normals; a row a run, below the truth."""
    fig = figure.Figure(figsize=(5.6 * len(blocks) + 0.4, 5.7), layout="constrained")
    side_by_side = fig.add_gridspec(1, len(blocks))
    for i, shown in enumerate(blocks):
        part = fig.add_subfigure(side_by_side[i])
        part.suptitle(shown.title, weight="bold")
        grid = part.subplots(len(shown.seen) + 1, 4)
        for ax in grid.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax, title in zip(grid[0], ("image", *TASKS), strict=True):
            ax.set_title(title, fontsize=9)
        unknown = shown.truth.classes == _scenes.UNKNOWN
        fields = [np.ma.array(shown.truth.classes, mask=unknown), np.ma.array(shown.truth.depth, mask=unknown)]
        grid[0, 0].imshow(shown.truth.images)
        limits = np.quantile(shown.truth.depth[~unknown], [0.01, 0.99])
        _draw(grid[0], "truth", [*fields, np.where(unknown[..., None], 0, shown.truth.normals)], shown.classes, limits)
        for line, (name, seen) in zip(grid[1:], shown.seen.items(), strict=True):
            _draw(line, name, seen, shown.classes, limits)
    return fig


def _draw(
    line: Sequence[axes.Axes], name: str, fields: Sequence[np.ndarray], classes: int, limits: Sequence[float]
) -> None:
    """A row, in the same colours as all others."""
    palette = colors.ListedColormap([_plots.LINE_COLORS[i] for i in (1, 6, 2, 5)[:classes]])
    segmentation, depth, normals = fields
    line[0].set_ylabel(name, fontsize=9)
    line[1].imshow(segmentation, cmap=palette, vmin=-0.5, vmax=classes - 0.5)
    line[2].imshow(depth, cmap="viridis_r", vmin=limits[0], vmax=limits[1])
    line[3].imshow((1 - np.asarray(normals)) / 2)
