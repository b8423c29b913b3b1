"""What an experiment is made of: cells that are run one by one, and a report on what they found."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from optax_mtl.experiments import _report, _training

Arrays: TypeAlias = Mapping[str, np.ndarray]
Results: TypeAlias = Mapping[str, Arrays]  # of each cell, by its name


@dataclass(frozen=True)
class Cell:
    """One program: one method in one setting, all seeds at once. What is interrupted goes on with the next cell.

    Attributes:
      name: such as `"cifar, 40 % wrong: pcd"`; no other cell of the experiment has it.
      run: does the work, and returns what the report needs, as arrays. Calls its argument with 1 `ticks` times.
      ticks: for the progress bar.
    """

    name: str
    run: Callable[[_training.Advance], Arrays]
    ticks: int = 1


@dataclass(frozen=True)
class Report:
    """What an experiment shows.

    Attributes:
      section: the page: claim, findings, table, pictures, protocol.
      rows: the CSV file, one row for each setting, method and seed: column to value.
      verdict: for the table of all experiments: what became of the claim, in a sentence or two without line breaks.
    """

    section: _report.Section
    rows: Sequence[Mapping[str, str | float]]
    verdict: str
