"""The table of what is compared with whom. The tests and the report read the same rows."""

from collections.abc import Callable
import dataclasses
import functools

import jax
from jax import lax
import numpy as np

from parity import records
from parity.records import norm

MOST = 10  # tasks


# -- Recorded cases --------------------------------------------------------------------------------------------------


class Cases:
    """Cases of 1 to 10 tasks as if all had ten, of which the last are absent: one program runs them all.

    `cases(field)` is an array of all of them, with NaN for those for which nothing was recorded.
    """

    def __init__(self, groups, size=MOST):
        """Joins the groups.

        Args:
          groups: `{group: {field: array}}`, the cases of a group along axis 0.
          size: number of parameters; fewer are padded to so many.
        """
        self._groups = list(groups.values())
        self._shapes = [fields["grads"].shape for fields in self._groups]
        tasks = np.concatenate([np.full(shape[0], shape[-2]) for shape in self._shapes])
        self.present = np.arange(MOST) < tasks[:, None]
        self.grads = self("grads", (MOST, size))
        self.kind = np.concatenate([fields["kind"] for fields in self._groups])
        self.fields = {field for fields in self._groups for field in fields}

    def __len__(self):
        return len(self.present)

    def __call__(self, field, lengths=(MOST,)):
        """`(cases, ..., *lengths)`, padded with zeros."""
        parts = [fields.get(field) for fields in self._groups]
        # Axes in between are draws, of which small groups have one only, or steps.
        inner = np.broadcast_shapes(*(part.shape[1 : part.ndim - len(lengths)] for part in parts if part is not None))
        whole = []
        for part, (cases, *_) in zip(parts, self._shapes, strict=True):
            if part is None:
                whole.append(np.full((cases, *inner, *lengths), np.nan))
                continue
            lead = part.ndim - len(lengths)
            missing = [(0, length - found) for length, found in zip(lengths, part.shape[lead:], strict=True)]
            part = np.pad(part, [(0, 0)] * lead + missing)
            whole.append(np.broadcast_to(part, (cases, *inner, *lengths)))
        return np.concatenate(whole)

    def orders(self, field):
        """Like `cases(field)`, for permutations of the tasks; those that are absent come last."""
        orders = self(field, (MOST, MOST))
        recorded = self.present.reshape(len(orders), *[1] * (orders.ndim - 2), MOST)
        return np.where(recorded, orders, np.arange(MOST)).astype(int)


def _read():
    """Everything that is recorded, by what it was recorded of: single matrices, and runs of five steps."""
    files = {name: records.load(name) for name in ("stateless", "gramian", "losses", "runs", "stateful")}
    matrices, steps, runs, short = {}, {}, {}, {}
    for group, fields in files["stateless"].items():
        everything = fields | files["gramian"][group]
        own = {field: everything[field] for field in everything if field not in ("grads", "kind")}
        theirs = {field for field in own if field.startswith("libmtl.")}
        count = len(own["exact.minnorm"])
        matrices[group] = {field: own[field] for field in own.keys() - theirs} | files["losses"][group]
        matrices[group] |= {"grads": fields["grads"][:count], "kind": fields["kind"][:count]}
        steps[group] = {field: own[field] for field in theirs}
        steps[group] |= {"grads": fields["grads"][count:], "kind": fields["kind"][count:]}

        recorded = files["runs"][group]
        shape = recorded["losses"].shape[:2]
        runs[group] = {field: recorded[field] for field in recorded if not field.startswith("d3.")}
        runs[group] |= {
            field: steps[group][field].reshape(*shape, *steps[group][field].shape[1:])
            for field in ("grads", "kind", "libmtl.orders")
        }
        runs[group]["kind"] = runs[group]["kind"][:, 0]
        few = len(files["stateful"][group]["losses"])
        short[group] = {field.removeprefix("d3."): recorded[field] for field in recorded if field.startswith("d3.")}
        short[group] |= files["stateful"][group]
        short[group] |= {field: runs[group][field][:few] for field in ("grads", "kind")}
    long = records.load("cdtt")
    for fields in long.values():
        fields["kind"] = np.full(len(fields["grads"]), "run")
    coordinates = records.load("coordinates")
    for group, fields in coordinates.items():
        tasks, size = group.split("_d")
        count = len(fields["pref"])
        if size == "3":
            fields |= {"grads": matrices[tasks]["grads"][:count, :, :3]}
        start = 0 if size == "3" else count  # where its cases are in the file of all
        fields["kind"] = matrices[tasks]["kind"][start : start + count]
    return Cases(matrices), Cases(steps), Cases(runs), Cases(short), Cases(coordinates, size=20), Cases(long, size=20)


# Single gradient matrices, which TorchJD, conflictfree and an exact solver were given; those of LibMTL, which are the
# steps of RUNS; runs in three dimensions, and matrices in three and twenty, for what sees more than the Gramian; the
# runs of CDTT.
ALL = MATRICES, STEPS, RUNS, SHORT_RUNS, COORDINATES, LONG_RUNS = _read()


# -- Our answers -----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def run(method, grads, present, per_run=(), **per_step):
    """Updates and states over all steps of all runs of `method(*per_run)`. A map: it compiles faster than a vmap.

    Args:
      method: returns a transformation for ten tasks.
      grads: `(runs, steps, T, d)`.
      present: `(runs, T)`.
      per_run: arrays `(runs, ...)`.
      **per_step: arrays `(runs, steps, ...)`, arguments of `update`.

    Returns:
      `(updates, state)`, `(runs, steps, ...)`.
    """

    def one_run(inputs):
        grads, present, per_run, per_step = inputs
        tx = method(*per_run)

        def step(state, now):
            grads, per_step = now
            updates, state = tx.update(grads, state, grads[0], **({"task_mask": present} | per_step))
            return state, (updates, state)

        return lax.scan(step, tx.init(grads[0, 0]), (grads, per_step))[1]

    return lax.map(one_run, (grads, present, per_run, per_step))


def first_step(method, cases, *per_case, **per_step):
    """Updates `(cases, d)` and weights `(cases, T)` of a first step."""
    count = len(cases)
    assert count <= len(STEPS)

    def fill(array):  # as many cases whatever the cases: a method is compiled once
        return np.resize(array, (len(STEPS), *array.shape[1:]))

    per_step = {name: fill(array)[:, None] for name, array in per_step.items()}
    per_case = [fill(array) for array in per_case]
    updates, state = run(method, fill(cases.grads)[:, None], fill(cases.present), per_case, **per_step)
    return np.asarray(updates)[:count, 0], np.asarray(state.task_weights)[:count, 0]


@functools.partial(jax.jit, static_argnums=0)
def apply(function, *arrays):
    """`function` of every case in turn; the arrays have the cases along axis 0."""
    return lax.map(lambda case: function(*case), arrays)


# -- The table -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answers:
    """Two programs' answers to the same cases.

    Attributes:
      cases: what they were asked.
      ours: `(cases, ..., n)`.
      theirs: as `ours`; NaN where nothing is recorded or the peer failed.
      scale: what a difference is relative to, `(cases, ...)`; the norm of their answer if None.
      trusted: `(cases, ...)` of bool, False where the peer did not solve its problem; all True if None.
      errors: how far our answers and theirs are from the exact solution, relative to something, `(cases, ...)` each;
        None where there is no such thing.
    """

    cases: Cases
    ours: np.ndarray
    theirs: np.ndarray
    scale: np.ndarray | None = None
    trusted: np.ndarray | None = None
    errors: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def kind(self):
        """Of the cases, `(cases, 1, ...)`."""
        return self.cases.kind.reshape(-1, *[1] * (self.recorded.ndim - 1))

    def name(self, chosen):
        """The number of tasks and kind of every answer that is chosen."""
        tasks, kinds = self.cases.present.sum(-1), self.cases.kind
        return [f"T{tasks[index[0]]} {kinds[index[0]]} {tuple(index)}" for index in np.argwhere(chosen).tolist()]

    @property
    def recorded(self):
        return np.isfinite(self.theirs).all(-1)

    @property
    def compared(self):
        return self.recorded if self.trusted is None else self.recorded & self.trusted

    @property
    def difference(self):
        """Relative; NaN where nothing is compared, zero where both answers are."""
        scale = norm(self.theirs) if self.scale is None else self.scale
        distance = norm(np.asarray(self.ours) - self.theirs)
        return np.where(self.compared, relative(distance, scale), np.nan)


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
      method: our name.
      peer: whose code.
      config: how the recorded answer is called, behind the peer's name.
      answers: returns the `Answers`.
      tolerance: of the relative difference.
      note: what was converted, or why so little agreement is asked for.
      exact: of our relative error, where the exact solution is known.
    """

    method: str
    peer: str
    config: str
    answers: Callable[[], Answers]
    tolerance: float
    note: str
    exact: float

    def __str__(self):
        return f"{self.method}-{self.peer}-{self.config}"


def table():
    """An empty table, and what enters rows in it.

    `row(method, peer, config, ...)(function, *arguments)` enters what `function(field, *arguments)` returns, where
    `field` is the name of the recorded answer; it is also a decorator.
    """
    rows: list[Row] = []

    def row(method, peer, config, tolerance, note="", *, exact=1e-10):
        field = f"{peer.lower()}.{config}"

        def enter(function, *args, **kwargs):
            answers = functools.cache(lambda: function(field, *args, **kwargs))
            rows.append(Row(method, peer, config, answers, tolerance, note, exact))
            return function

        return enter

    return rows, row


def relative(distance, scale):
    """`distance / scale`; zero where both are."""
    return np.where(distance == 0, 0, distance / np.where(scale > 0, scale, 1e-300))
