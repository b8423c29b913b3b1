"""The pictures. Colours mean the same in all of them."""

from collections.abc import Mapping, Sequence
import math

import matplotlib
from matplotlib import axes, figure, ticker
import numpy as np

# Okabe and Ito's colours, told apart by colour-blind readers too.
TASK_COLORS = ("#0072B2", "#E69F00", "#009E73")
PAIR_COLORS = ("#444444", "#56B4E9", "#D55E00")
LINE_COLORS = ("#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#999999")
_GREY = "#888888"


def panels(
    curves: Mapping[str, np.ndarray],
    steps: np.ndarray,
    names: Sequence[str],
    colors: Sequence[str],
    *,
    title: str,
    label: str,
    limits: tuple[float, float],
    reference: np.ndarray | None = None,
    reference_name: str = "",
    level: float | None = None,
) -> figure.Figure:
    """One small panel a method, with one line a name: the mean over seeds, and its standard error as a band.

    Args:
      curves: `(S, records, K)` of each method.
      steps: `(records,)`.
      names: of the `K` lines.
      colors: of the `K` lines.
      title: of the picture.
      label: of the vertical axes.
      limits: of the vertical axes.
      reference: `(records, K)`, drawn dashed in every panel.
      reference_name: what the dashed lines are.
      level: where to draw a thin horizontal line.

    Returns:
      The figure.
    """
    columns = min(5, len(curves) + 1)
    rows = math.ceil((len(curves) + 1) / columns)  # one cell for the legend
    fig = figure.Figure(figsize=(2.4 * columns + 0.6, 1.9 * rows + 0.7), layout="constrained")
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    grid = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    cells = list(grid.flat)
    for ax, (method, values) in zip(cells, curves.items(), strict=False):
        mean = values.mean(axis=0)
        error = values.std(axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0 * mean
        if level is not None:
            ax.axhline(level, color=_GREY, linewidth=0.7)
        for k, (name, color) in enumerate(zip(names, colors, strict=True)):
            ax.plot(steps, mean[:, k], color=color, linewidth=1.6, label=name)
            ax.fill_between(
                steps, mean[:, k] - error[:, k], mean[:, k] + error[:, k], color=color, alpha=0.25, linewidth=0
            )
            if reference is not None:
                ax.plot(steps, reference[:, k], color=color, linewidth=0.9, linestyle=(0, (4, 2)))
        ax.set_title(method, fontsize=10)
        ax.set_ylim(*limits)
        plain(ax)
    cells[0].set_xlim(0, steps[-1])
    handles, labels = cells[0].get_legend_handles_labels()
    if reference is not None:
        handles.append(cells[0].plot([], [], color="black", linewidth=0.9, linestyle=(0, (4, 2)))[0])
        labels.append(reference_name)
    for ax in cells[len(curves) :]:
        ax.set_axis_off()
    cells[-1].legend(handles, labels, loc="center", frameon=False, fontsize=11)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    for ax in grid[:, 0]:
        ax.set_ylabel(label)
    return fig


def bars(values: Mapping[str, np.ndarray], baseline: str, *, title: str, label: str) -> figure.Figure:
    """One horizontal bar a method, the best on top: mean, two standard errors, and every seed as a dot.

    Args:
      values: `(S,)` of each method.
      baseline: the method whose mean is drawn through all bars, if it is there.
      title: of the picture.
      label: of the horizontal axis.

    Returns:
      The figure.
    """
    ordered = sorted(values.items(), key=lambda item: item[1].mean())
    fig = figure.Figure(figsize=(8, 0.36 * len(ordered) + 1.5), layout="constrained")
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    ax = fig.subplots()
    for y, (_, gains) in enumerate(ordered):
        mean = gains.mean()
        ax.barh(y, mean, color=TASK_COLORS[0] if mean > 0 else "#D55E00", alpha=0.35, height=0.7)
        ax.plot(gains, np.full(len(gains), y - 0.22), ".", color=_GREY, markersize=4)
        if len(gains) > 1:
            error = 2 * gains.std(ddof=1) / math.sqrt(len(gains))
            ax.errorbar(mean, y + 0.08, xerr=error, color="black", capsize=3, linewidth=1.4)
    ax.axvline(0, color="black", linewidth=1)
    if baseline in values:
        ax.axvline(values[baseline].mean(), color="black", linewidth=0.9, linestyle=(0, (4, 2)))
    ax.set_yticks(range(len(ordered)), [method for method, _ in ordered])
    ax.set_xlabel(label)
    plain(ax)
    ax.grid(visible=False, axis="y")
    return fig


def heat_maps(
    values: Mapping[str, np.ndarray],
    steps: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    label: str,
    limits: tuple[float, float],
) -> figure.Figure:
    """One panel a method and column, rows by steps: red below zero, grey where there is nothing to see.

    Args:
      values: `(records, B, K)` of each method; not a number where there is nothing to see.
      steps: `(records,)`.
      rows: names of the `B` rows of a panel, from the top.
      columns: names of the `K` panels of a method.
      title: of the picture.
      label: of the colours.
      limits: where the colours end: with zero in the middle, or at the lower end.

    Returns:
      The figure.
    """
    size = (1.9 * len(columns) + 2.2, (0.15 * len(rows) + 0.4) * len(values) + 0.8)
    fig = figure.Figure(figsize=size, layout="constrained")
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    grid = fig.subplots(len(values), len(columns), sharex=True, sharey=True, squeeze=False)
    colors = matplotlib.colormaps["RdBu" if limits[0] < 0 else "viridis"]
    colors = colors.with_extremes(bad="#CCCCCC", under="#B2182B")
    edges = np.concatenate([[0], steps]), np.arange(len(rows) + 1)
    for (method, table), line in zip(values.items(), grid, strict=True):
        for k, (name, ax) in enumerate(zip(columns, line, strict=True)):
            mesh = ax.pcolormesh(
                *edges, np.ma.masked_invalid(table[:, :, k].T), cmap=colors, vmin=limits[0], vmax=limits[1]
            )
            ax.set_title(f"{method}: {name}" if k == 0 else name, fontsize=9, loc="left")
            ax.tick_params(labelsize=7)
    grid[0, 0].set_yticks(np.arange(len(rows)) + 0.5, rows)
    grid[0, 0].invert_yaxis()
    for ax in grid[-1]:
        ax.set_xlabel("step", fontsize=9)
    bar = fig.colorbar(mesh, ax=grid, label=label, extend="both", aspect=40, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    return fig


def canvases(images: np.ndarray, titles: Sequence[str], *, title: str) -> figure.Figure:
    """A row of images `(N, side, side)`, each with its title."""
    fig = figure.Figure(figsize=(1.3 * len(images), 1.8), layout="constrained")
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    for ax, image, text in zip(fig.subplots(1, len(images)), images, titles, strict=True):
        ax.imshow(image, cmap="gray_r", interpolation="nearest")
        ax.set_title(text, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    return fig


def shares_over_time(
    epochs: Mapping[str, np.ndarray],
    last: int,
    marks: Mapping[str, tuple[float, float]],
    *,
    title: str,
    mark_name: str,
) -> figure.Figure:
    """How many seeds are done by when.

    Args:
      epochs: `(S,)` of each method: when each seed was done, infinite for never.
      last: the last epoch.
      marks: an epoch and a percentage to mark with a cross, for some methods.
      title: of the picture.
      mark_name: what the crosses are.

    Returns:
      The figure.
    """
    fig = figure.Figure(figsize=(8, 4), layout="constrained")
    fig.suptitle(title, x=0.01, ha="left", weight="bold")
    ax = fig.subplots()
    when = np.arange(last + 1)
    for i, (method, done) in enumerate(epochs.items()):
        color = f"C{i}" if len(epochs) > 3 else (*TASK_COLORS,)[i]
        part = 100 * np.mean(done[:, None] <= when, axis=0)
        ax.step(when, part, where="post", color=color, linewidth=2)
        ax.annotate(f" {method}", (last, part[-1]), color=color, va="center", annotation_clip=False, weight="bold")
        if method in marks:
            ax.plot(*marks[method], "x", color=color, markersize=9, markeredgewidth=2)
    if marks:
        ax.plot([], [], "x", color="black", markersize=9, markeredgewidth=2, label=mark_name)
        ax.legend(loc="upper left", frameon=False)
    ax.set_xlim(0, last)
    ax.set_ylim(0, 100)
    ax.set_xlabel("epoch")
    ax.yaxis.set_major_formatter(ticker.PercentFormatter(decimals=0))
    plain(ax)
    return fig


def curve(ax: axes.Axes, x: np.ndarray, values: np.ndarray, *, color: str, label: str, linestyle: str = "-") -> None:
    """The mean over seeds of `(S, len(x))`, and a band of one standard error."""
    mean = values.mean(axis=0)
    ax.plot(x, mean, color=color, linewidth=1.6, linestyle=linestyle, label=label)
    if len(values) > 1:
        error = values.std(axis=0, ddof=1) / math.sqrt(len(values))
        ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def plain(ax: axes.Axes) -> None:
    """Takes away what is not needed to read a picture."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8.5)
