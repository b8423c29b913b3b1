"""The toy of CAGrad and Nash-MTL: two objectives in the plane, and where every method of the catalogue ends.

Two valleys lead down to a bowl with the Pareto front. In the valleys the gradients are steep, unequal and opposed; who
follows their sum gets stuck there. Liu, Liu, Jin, Stone, Liu, "Conflict-averse gradient descent for multi-task
learning", NeurIPS 2021; Navon et al., "Multi-task learning as a bargaining game", ICML 2022.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
import inspect
import math

import jax
from jax import numpy as jnp
from matplotlib import figure, layout_engine, lines
import numpy as np
import optax

import optax_mtl as mtl
from optax_mtl.experiments import _plots, _registry, _report, _training
from optax_mtl.experiments.evidence import _study

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))  # Nash-MTL's
SCALES = (1.0, 0.1)  # of the first loss: CAGrad's and Nash-MTL's
KEYS = 10  # for methods that draw random numbers
NEAR = 0.1  # to the front, of which each half is seven long
BALANCED = 0.1  # of the way from the middle of the front to an end
LEFT_OUT = {  # what the library has beside the catalogue, and why it is not here
    "dtp": "looks at accuracies, and there are none",
    "krum": "needs more than two tasks",
    "trimmed_mean": "needs more than two tasks",
    "pike": "looks at the noise of single samples, and there is none; its two factors have no defaults",
    "cr_mogm": "wraps another method",
    "update_every": "wraps another method",
}
_END = 7.0  # the first task's best is at x = 7, the second's at -7
_SHIFT = 20.0  # lifts both losses above zero
_RECORDS = 200
_EARLY = 70  # the record at 35,000 of 100,000 steps: Nash-MTL's budget


@dataclass(frozen=True)
class Config:
    """The authors' values.

    Attributes:
      steps: of Adam; a multiple of 200, or it is rounded up to one.
      learning_rate: of Adam.
      methods: which, of the catalogue.
    """

    steps: int = 100_000
    learning_rate: float = 1e-3
    methods: tuple[str, ...] = tuple(_registry.CATALOGUE)

    @property
    def steps_per_record(self) -> int:
        """Steps from one point of a trajectory to the next."""
        return math.ceil(self.steps / _RECORDS)


QUICK = Config(steps=200, methods=("linear_scalarization", "nash_mtl", "pcgrad"))


def protocol(config: Config) -> list[str]:
    """What is done, in sentences."""
    random = [m for m in config.methods if is_random(m)]
    return [
        "The two objectives of [CAGrad's toy](https://github.com/Cranial-XIX/CAGrad), as both papers have them; the "
        "five starting points of [Nash-MTL's](https://github.com/AvivNavon/nash-mtl); Adam with learning rate "
        f"{config.learning_rate:g} for {config.steps_per_record * _RECORDS:,} steps, CAGrad's budget, with a look at "
        f"where the runs are after {config.steps_per_record * _EARLY:,}, Nash-MTL's.",
        "Every method of the catalogue with its default arguments and the same optimiser; nothing is tuned. mao, "
        "mtadam and apt are optimisers themselves, with that learning rate. Where a method counts epochs, one is 100 "
        "steps. Methods that serve a main task serve the first.",
        "Each runs twice: with the losses as they are (CAGrad's), and with the first multiplied by 0.1 (Nash-MTL's).",
        f"{_SHIFT:g} is added to both losses before they are scaled, so that they are positive, and almost zero where "
        "each is lowest, as ten methods demand: they look at logarithms or ratios of losses. No gradient changes.",
        f"There are no seeds: all is deterministic but {', '.join(random) or 'nothing here'}; of those each start has "
        f"{KEYS} runs with different random keys, and the table has the mean over them. Differences are not tested.",
        f"A run has arrived if it ends within {NEAR:g} of the front, which is {2 * _END:g} long. Its balance is how "
        "far from the middle of the front it ends: 0 is the middle, where both losses are equal, 1 one task's own "
        "best.",
        "Left out are methods of the library that are not in the catalogue: "
        + "; ".join(f"{name} {why}" for name, why in LEFT_OUT.items())
        + ".",
    ]


# -- The problem -----------------------------------------------------------------------------------------------------


def objectives(point: jax.Array) -> jax.Array:
    """Both losses `(2,)` at a point `(2,)` of the plane; 20 higher than published."""
    x, y = point[0], point[1]
    bend = jnp.tanh(y)
    # Above the axis, two valleys: each loss has a logarithmic cut along a curve of its own.
    gaps = jnp.abs(jnp.stack([bend - 0.5 * (x + 7), 0.5 * (3 - x) - bend + 2]))
    valleys = jnp.log(jnp.maximum(gaps, 5e-6)) + 6
    # Below it, two bowls.
    bowls = (jnp.square(jnp.stack([_END - x, _END + x])) + 0.1 * jnp.square(y + 8)) / 10 - 20
    side = jnp.tanh(0.5 * y)
    zero = jnp.zeros_like(side)
    above, below = jnp.where(side >= 0, side, zero), jnp.where(side <= 0, -side, zero)  # both slopes count on the axis
    return valleys * above + bowls * below + _SHIFT


def front(count: int = 1_401) -> np.ndarray:
    """Points of the Pareto front `(count, 2)`, from the second task's best to the first's.

    A weighted sum with weights `(1 + x / 7) / 2` of the first loss is lowest at `x`, and there at the root of its slope
    along `y`.
    """
    x = np.linspace(-_END, _END, count)
    spread = (_END**2 - x**2) / 10  # of the weighted bowls, at their bottom
    low, high = np.full_like(x, -12.0), np.full_like(x, -8.0)
    for _ in range(60):  # the slope is negative below the root, positive above
        y = (low + high) / 2
        depth = spread + 0.01 * (y + 8) ** 2 - 20
        slope = -0.5 / np.cosh(y / 2) ** 2 * depth + np.tanh(-y / 2) * 0.02 * (y + 8)
        low, high = np.where(slope < 0, y, low), np.where(slope < 0, high, y)
    return np.stack([x, (low + high) / 2], axis=1)


def distance_to_front(points: np.ndarray) -> np.ndarray:
    """Of each point `(..., 2)`; infinite where it is not a number."""
    gaps = points[..., None, :] - front()
    return np.nan_to_num(np.sqrt(np.min(np.sum(gaps**2, axis=-1), axis=-1)), nan=np.inf)


# -- The runs --------------------------------------------------------------------------------------------------------


def is_random(method: str) -> bool:
    """Whether a method of the catalogue takes a random key."""
    return "key" in inspect.signature(getattr(mtl, method)).parameters


def cells(config: Config) -> list[_study.Cell]:
    """One a method: both scales and all starts at once."""
    return [_study.Cell(method, _runner(config, method)) for method in config.methods]


def _runner(config: Config, method: str) -> Callable[[_training.Advance], _study.Arrays]:
    def build(key: jax.Array) -> optax.GradientTransformation:
        setting = _registry.Setting(
            num_tasks=2,
            learning_rate=config.learning_rate,
            optimizer=optax.adam(config.learning_rate),
            key=key,
            steps_per_epoch=100,
            form="regression",
        )
        return _registry.CATALOGUE[method].build(setting)

    def run(advance: _training.Advance) -> _study.Arrays:
        keys = KEYS if is_random(method) else 1
        shape = (len(SCALES), keys, len(STARTS))
        points = np.broadcast_to(np.asarray(STARTS, np.float32), (*shape, 2)).reshape(-1, 2)
        scales = np.broadcast_to(np.asarray(SCALES, np.float32)[:, None, None], shape).reshape(-1)
        problem = _training.Problem(
            # The whole plane is shared, there are no heads.
            losses=lambda params, scale, _: objectives(params["trunk"]) * jnp.stack([scale, jnp.ones_like(scale)]),
            evaluate=lambda params, _: params["trunk"],
            params={"trunk": points},
            data=scales,
            batches=np.zeros((len(points), _RECORDS, config.steps_per_record), np.int8),
        )
        seen = _training.train(build, problem, chunks=1, advance=advance).record.scores
        path = np.concatenate([points[:, None], seen], axis=1)
        return {"path": path.reshape(*shape, _RECORDS + 1, 2)}

    return run


# -- The report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """Where a method ends.

    Attributes:
      path: `(scales, keys, starts, records, 2)`.
    """

    path: np.ndarray

    @property
    def points(self) -> np.ndarray:
        """`(scales, keys, starts, 2)`."""
        return self.path[..., -1, :]

    @property
    def arrived(self) -> np.ndarray:
        """`(scales, keys, starts)` of bool."""
        return distance_to_front(self.points) < NEAR

    @property
    def early(self) -> np.ndarray:
        """`(scales, keys, starts)` of bool: whether it is there after 35 % of the steps already."""
        return distance_to_front(self.path[..., _EARLY, :]) < NEAR

    @property
    def side(self) -> np.ndarray:
        """`(scales, keys, starts)`: 0 in the middle of the front, 1 at the first task's best, -1 at the second's."""
        return self.points[..., 0] / _END

    def count(self, scale: int, early: bool = False) -> float:
        """Of five starts, how many arrive (early); the mean over the keys."""
        arrived = self.early if early else self.arrived
        return float(arrived[scale].sum(axis=-1).mean())

    def always(self) -> bool:
        """Whether all runs arrive."""
        return bool(self.arrived.all())

    def balanced(self, scale: int) -> bool:
        """Whether all runs with that scale arrive near the middle."""
        return bool((self.arrived[scale] & (np.abs(self.side[scale]) < BALANCED)).all())

    def blind(self) -> bool:
        """Whether all runs arrive, and in the same place for both scales."""
        return self.always() and bool((np.abs(np.diff(self.side, axis=0)) < BALANCED).all())

    def cells(self, scale: int) -> list[str]:
        """For the table: starts that arrive early, and at all; where; how far from the middle."""
        counts = [f"{self.count(scale, early):.2g}" for early in (True, False)]
        side = self.side[scale][self.arrived[scale]]
        if not side.size:
            return [*counts, "–", "–"]
        ends = dict.fromkeys(f"{end:+.2f}".replace("-0.00", "+0.00") for end in (side.min(), side.max()))
        return [*counts, " to ".join(ends), f"{np.abs(side).mean():.2f}"]


def report(config: Config, results: _study.Results) -> _study.Report:
    """Table, findings, and a page of pictures."""
    ends = {method: Ends(results[method]["path"]) for method in config.methods}
    ordered = sorted(ends, key=lambda m: (-ends[m].count(0) - ends[m].count(1), not ends[m].balanced(0)))
    rows = [[m, *ends[m].cells(0), *ends[m].cells(1)] for m in ordered]
    headers = ["method", "early", "arrive", "where", "balance", "0.1: early", "arrive", "where", "balance"]
    section = _report.Section(
        title="Two objectives in the plane",
        introduction="The toy on which [CAGrad](https://arxiv.org/abs/2110.14048) and "
        "[Nash-MTL](https://arxiv.org/abs/2202.01017) show what conflict does: two valleys, in which the gradients are "
        "steep, unequal and opposed, and a bowl below them with the Pareto front. Who stays in a valley has lost; who "
        "arrives at an end of the front has served one task only.",
        protocol=protocol(config),
        table=_report.Table(headers, rows),
        legend="How many of the five starts are at the Pareto front after 35 % of the steps, and at the end; where on "
        "it, from -1 (the second task's best) over 0 (equal losses) to 1 (the first task's best); and how far from its "
        "middle, as a mean over those that arrive. The last four columns are for the first loss multiplied by 0.1.",
        findings=findings(ends),
        pictures=[
            _report.Picture(
                "toy.png",
                _pictures(config, ends),
                "The ways of all methods from the five starts (rings). Solid: the losses as they are; dotted: the "
                "first multiplied by 0.1; dots and triangles are their ends. Thick grey: the Pareto front. Behind the "
                "name, how many of the five arrive, with either.",
                dots_per_inch=90,
            )
        ],
        data={},
    )
    return _study.Report(section, _rows(ends), verdict(ends))


def findings(ends: Mapping[str, Ends]) -> list[str]:
    """Sentences made from the numbers."""
    always = [m for m, e in ends.items() if e.always()]
    never = [m for m, e in ends.items() if not e.arrived.any()]
    balanced = "; ".join(
        f"with the factor {scale:g}: {_names([m for m, e in ends.items() if e.balanced(s)])}"
        for s, scale in enumerate(SCALES)
    )
    blind = [m for m in always if ends[m].blind()]
    runs = sum(e.arrived.size for e in ends.values())
    found = [
        f"{len(always)} of {len(ends)} methods arrive at the front from all five starts, with either scale: "
        f"{_names(always)}.",
        f"Near its middle (within {BALANCED:g} of it) end, from all five starts, {balanced}.",
        f"{len(blind)} end in the same places whatever the first loss is multiplied by (within {BALANCED:g}): "
        f"{_names(blind)}.",
        f"{len(never)} never arrive: {_names(never)}." if never else "Every method arrives in some run.",
    ]
    found += [f"{m} arrives from {_in_words(ends[m])}." for m in _SHOWN if m in ends]
    early = sum(e.early.sum() for e in ends.values())
    late = sum(e.arrived.sum() for e in ends.values())
    moving = sum(
        ((np.linalg.norm(e.points - e.path[..., -_RECORDS // 10 - 1, :], axis=-1) > NEAR) & ~e.arrived).sum()
        for e in ends.values()
    )
    found.append(
        f"After 35 % of the steps {early} of {runs} runs are at the front, at the end {late}. Of the others, "
        f"{moving} have moved by more than {NEAR:g} in the last tenth of the steps: they might arrive yet."
    )
    distances = np.concatenate([distance_to_front(e.points).ravel() for e in ends.values()])
    doubtful = int(((distances > NEAR / 2) & (distances < 5 * NEAR)).sum())
    found.append(
        f"Where the line is drawn matters for few runs: {doubtful} of {runs} end between {NEAR / 2:g} and {5 * NEAR:g} "
        f"from the front, and {int((~np.isfinite(distances)).sum())} at no finite place."
    )
    return found


_SHOWN = ("linear_scalarization", "mgda", "pcgrad", "cagrad", "nash_mtl")  # those of the papers


def _in_words(ends: Ends) -> str:
    """Such as: 3 of 5 (at -0.2 to +0.3) with the factor 1 and 4 of 5 ..."""
    told = []
    for s, scale in enumerate(SCALES):
        _, count, where, _ = ends.cells(s)
        told.append(f"{count} of 5" + (f" (at {where})" if where != "–" else "") + f" with the factor {scale:g}")
    return " and ".join(told)


def _names(methods: Sequence[str]) -> str:
    return ", ".join(methods) or "none"


def verdict(ends: Mapping[str, Ends]) -> str:
    """What became of the papers' claims, in two sentences."""
    always = sum(e.always() for e in ends.values())
    text = f"{always} of {len(ends)} methods arrive at the Pareto front from all five starts with both scales"
    counts = [f"{m} in {ends[m].count(0) + ends[m].count(1):.3g}" for m in _SHOWN if m in ends]
    blind = sum(e.blind() for e in ends.values())
    return f"{text}, {blind} of them in the same places. Of ten runs arrive: {', '.join(counts)}."


def _rows(ends: Mapping[str, Ends]) -> list[dict[str, str | float]]:
    rows: list[dict[str, str | float]] = []
    for method, e in ends.items():
        losses = np.asarray(jax.vmap(objectives)(jnp.asarray(e.points.reshape(-1, 2)))).reshape(e.points.shape) - _SHIFT
        distances, arrived = distance_to_front(e.points), e.arrived
        for s, k, i in np.ndindex(arrived.shape):
            rows.append(
                {
                    "method": method,
                    "scale": SCALES[s],
                    "start": i + 1,
                    "key": k,
                    "x": float(e.points[s, k, i, 0]),
                    "y": float(e.points[s, k, i, 1]),
                    "first loss": float(losses[s, k, i, 0]),
                    "second loss": float(losses[s, k, i, 1]),
                    "distance": float(distances[s, k, i]),
                    "arrived": int(arrived[s, k, i]),
                }
            )
    return rows


# -- The picture -----------------------------------------------------------------------------------------------------

_COLORS = tuple(_plots.LINE_COLORS[i] for i in (1, 2, 3, 4, 5))


def _pictures(config: Config, ends: Mapping[str, Ends]) -> figure.Figure:
    """A small panel a method: the mean loss as contours, the front, and the first key's ways."""
    columns = min(9, len(ends) + 1)
    rows = math.ceil((len(ends) + 1) / columns)  # one more for the legend
    close = layout_engine.ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    fig = figure.Figure(figsize=(1.27 * columns, 1.42 * rows), layout=close)
    panels = list(fig.subplots(rows, columns, squeeze=False).flat)
    axis = np.linspace(-11, 11, 89, dtype=np.float32)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2))
    height = np.asarray(jax.vmap(objectives)(grid)).mean(axis=1).reshape(len(axis), -1)
    curve = front(29)
    for ax in panels:
        ax.set_axis_off()
    for ax, (method, e) in zip(panels, ends.items(), strict=False):
        ax.contour(axis, axis, height, levels=(8, 14, 20, 26), colors="#DDDDDD", linewidths=0.5, antialiased=False)
        ax.plot(*curve.T, color="#AAAAAA", linewidth=4, solid_capstyle="round")
        for i, color in enumerate(_COLORS):
            for s, (style, mark) in enumerate((("-", "o"), (":", "^"))):
                path = e.path[s, 0, i, ::2]
                width, smooth = (1, True) if s == 0 else (0.7, False)  # dots need no smoothing, and the file is smaller
                ax.plot(*path.T, color=color, linewidth=width, linestyle=style, antialiased=smooth)
                ax.plot(*e.points[s, 0, i], mark, color=color, markersize=3.2, markeredgecolor="black", mew=0.4)
            ax.plot(*STARTS[i], "o", color="white", markersize=3, markeredgecolor=color, zorder=1.9)
        ax.set_xlim(-11, 11)
        ax.set_ylim(-11, 11)
        counts = "·".join(f"{e.count(s):.2g}" for s in range(len(SCALES)))
        shown = method.replace("adaptive_weight_assignment", "adaptive_weight_a…")
        ax.set_title(f"{shown}  {counts}", fontsize=6.5, pad=2)
    marks = [
        lines.Line2D([], [], color="black", linewidth=1.1, marker="o", markersize=3.2, label="as they are"),
        lines.Line2D(
            [], [], color="black", linewidth=1, linestyle=":", marker="^", markersize=3.2, label="first × 0.1"
        ),
        lines.Line2D([], [], color="#AAAAAA", linewidth=4, label="Pareto front"),
    ]
    panels[-1].legend(handles=marks, loc="center", frameon=False, fontsize=7)
    return fig
