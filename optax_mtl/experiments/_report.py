"""What an experiment leaves: a section of text, tables and pictures; on the terminal, and as a Markdown report."""

from collections.abc import Sequence
from dataclasses import dataclass
import importlib.metadata
import json
import pathlib
import platform
import re
import textwrap
import time
from typing import Any

import jax
from matplotlib import figure

import optax_mtl


@dataclass(frozen=True)
class Table:
    """A table of strings; the first column is aligned left, the others right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """For the terminal."""
        widths = [max(map(len, column)) for column in zip(self.headers, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            first, *others = cells
            aligned = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
            return "  ".join([first.ljust(widths[0]), *aligned]).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([line(self.headers), rule, *map(line, self.rows)])

    def markdown(self) -> str:
        """For the report."""
        rule = [":--", *["--:"] * (len(self.headers) - 1)]
        text = "\n".join(f"| {' | '.join(row)} |" for row in [self.headers, rule, *self.rows])
        return re.sub(" ± |(?<=p) [=<] ", lambda m: m[0].replace(" ", "\N{NO-BREAK SPACE}"), text)  # not torn apart


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, what it shows, and how finely it is drawn."""

    name: str
    figure: figure.Figure
    caption: str
    dots_per_inch: int = 144


@dataclass(frozen=True)
class Section:
    """One benchmark's part of the report.

    Attributes:
      title: its heading.
      introduction: what the benchmark is.
      protocol: what was done, a sentence or two an item.
      table: the result.
      legend: how to read the table.
      findings: what was found, in sentences made from the numbers.
      pictures: the pictures.
      data: everything else, for `results.json`.
      details: further tables, each with its legend.
    """

    title: str
    introduction: str
    protocol: Sequence[str]
    table: Table
    legend: str
    findings: Sequence[str]
    pictures: Sequence[Picture]
    data: dict[str, Any]
    details: Sequence[tuple[Table, str]] = ()

    def markdown(self, level: int = 2) -> str:
        """For the report, its title a heading of that level."""
        parts = [f"{'#' * level} {self.title}", self.introduction]
        parts += [f"{'#' * level}# What was found", bullets(self.findings), self.table.markdown(), self.legend]
        parts += [f"{table.markdown()}\n\n{legend}" for table, legend in self.details]
        parts += [f"![{p.caption}]({p.name})\n\n*{p.caption}*" for p in self.pictures]
        parts += [f"{'#' * level}# Protocol", bullets(self.protocol)]
        return "\n\n".join(parts)

    def text(self) -> str:
        """For the terminal."""
        tables = [(self.table, self.legend), *self.details]
        return "\n\n".join(
            [f"{table.text()}\n\n{wrapped(legend)}" for table, legend in tables] + [bullets(self.findings, 100)]
        )


def bullets(items: Sequence[str], width: int | None = None) -> str:
    """A list of sentences, broken into lines of `width` if that is given."""
    if width is None:
        return "\n".join(f"- {item}" for item in items)
    return "\n".join(textwrap.fill(item, width, initial_indent="- ", subsequent_indent="  ") for item in items)


def wrapped(text: str) -> str:
    """Text broken into lines for the terminal."""
    return textwrap.fill(text, 100)


def versions() -> dict[str, str]:
    """What the results depend on besides the code of the experiment."""
    packages = ["jax", "optax", "flax", "scikit-learn"]
    return {
        "python": platform.python_version(),
        "optax-mtl": optax_mtl.__version__,
        **{package: importlib.metadata.version(package) for package in packages},
        "device": jax.devices()[0].device_kind,
    }


def write(out: pathlib.Path, sections: Sequence[Section], *, command: str, start: float) -> pathlib.Path:
    """Writes `report.md`, `results.json` and the pictures into `out`.

    Returns:
      The path of the report.
    """
    seconds = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for picture in section.pictures:
            picture.figure.savefig(out / picture.name, dpi=picture.dots_per_inch)
    used = versions()
    report = out / "report.md"
    parts = [
        "# Multi-task methods compared",
        f"```\n{command}\n```",
        f"{seconds:.0f} seconds. " + ", ".join(f"{k} {v}" for k, v in used.items()) + ".",
        *(section.markdown() for section in sections),
    ]
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    results = {
        "command": command,
        "seconds": round(seconds, 1),
        "versions": used,
        **{s.title: {"protocol": list(s.protocol), "findings": list(s.findings), **s.data} for s in sections},
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report
