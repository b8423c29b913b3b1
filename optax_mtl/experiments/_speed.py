"""What a training step costs: against an ordinary one, against the floor of `T` gradients, and against TorchJD."""

from collections.abc import Callable, Iterator, Sequence
import itertools
import json
import os
import pathlib
import subprocess
import tempfile
import time
from typing import Any, NamedTuple
import warnings

import jax
from jax import numpy as jnp
import numpy as np
import tqdm

import optax_mtl as mtl
from optax_mtl.experiments import _report, _speed_alone, _speed_peers, _timing, _workloads

PLAIN = "plain step"
FLOORS = ("T gradients alone, one by one", "T gradients alone, batched")
EXACT, LIGHT, KEPT = EXACT_WAYS = ("exact", "light", "light, not recomputed")
UNSPLIT, FEATURES = "exact, not split", "feature-level"
METHODS: dict[str, dict[str, Any]] = {  # TorchJD's, with what makes ours do the same
    "upgrad": {},
    "dual_proj": {},
    "mgda": {},
    "cagrad": {"rescale": 0},
    "pcgrad": {"key": 0},
    "gradvac": {"key": 0, "beta": 0.5},
    "imtl_g": {},
    "aligned_mtl": {},
    "fairgrad": {},
    "nash_mtl": {},
    "con_fig": {},
    "krum": {"n_byzantine": 1},
    "graddrop": {"key": 0},
    "trimmed_mean": {"k": 1},
    "mean_tasks": {},
    "sum_tasks": {},
}

STEPS = "steps"
_FEW_METHODS = ("upgrad", "mgda", "pcgrad")
_MIXERS = ("graddrop", "trimmed_mean")  # they want the gradients themselves
_CHECKED = "upgrad"  # other methods of TorchJD stop early, draw lots or are of another scale
_TASKS = (2, 4, 8, 16, 32)
_QUICK_SECONDS, _FULL_SECONDS = 5, 12  # a case, but for compiling
_FEWEST_ROUNDS, _MOST_ROUNDS = 5, 50
_FASTEST = {"floor": FLOORS, "ours": EXACT_WAYS, "TorchJD": _speed_peers.WAYS, "torch's plain": (_speed_peers.PLAIN,)}
_RATIOS = (
    ("floor", PLAIN),
    ("ours", PLAIN),
    (FEATURES, PLAIN),
    (EXACT, "floor"),
    (LIGHT, "floor"),
    (KEPT, "floor"),
    ("TorchJD", "torch's plain"),
    ("TorchJD", "ours"),
)

_Row = dict[str, Any]
_Way = tuple[str, str | None]  # its name, and the method
_Step = Callable[..., Any]


class Case(NamedTuple):
    """A network, and the methods to time on it."""

    workload: str
    heads: str
    num_tasks: int
    methods: Sequence[str]

    def __str__(self) -> str:
        return f"{self.workload}, {self.heads} heads, T = {self.num_tasks}"


def plan(
    full: bool,
    workloads: Sequence[str] = tuple(_workloads.WORKLOADS),
    numbers: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
) -> list[Case]:
    """What to measure.

    Args:
      full: every number of tasks, and every method on one network.
      workloads: which networks.
      numbers: of tasks; None for the choice that `full` makes.
      methods: None for that choice.

    Returns:
      The cases.
    """
    cases = []
    for workload, heads in itertools.product(workloads, ("light", "heavy") if full else ("light",)):
        many = workload == "mlp" and heads == "light"
        for n in numbers or (_TASKS if full and heads == "light" else (2, 8) if many else (8,)):
            chosen: Sequence[str] = [_CHECKED]
            if many and (full or n == 8):
                chosen = list(METHODS) if full and n == 8 else _FEW_METHODS
            cases.append(Case(workload, heads, n, methods or chosen))
    return cases


# -- Our steps -----------------------------------------------------------------


def steps(workload: _workloads.Workload, methods: Sequence[str]) -> dict[_Way, tuple[_Step, Any]]:
    """All ways to make a step's gradients in JAX.

    Args:
      workload: the network.
      methods: names of methods; the first of them in some more ways.

    Returns:
      For each way a function from parameters, state and batch to losses, gradients of trunk and heads, and state; and
      the state to begin with. The floor's gradients are those of every task, as they come.
    """
    loss_fn = mtl.split(workload.trunk, workload.heads)

    def losses_of(params: Any, batch: Any) -> tuple[jax.Array, ...]:
        features = workload.trunk(params["trunk"], batch)
        pairs = zip(workload.heads, params["heads"], strict=True)
        return tuple(head(own, features, batch) for head, own in pairs)

    def plain(params: Any, state: Any, batch: Any) -> Any:
        def total(params: Any) -> Any:
            losses = jnp.stack(losses_of(params, batch))
            return jnp.sum(losses), losses

        (_, losses), grads = jax.value_and_grad(total, has_aux=True)(params)
        return losses, grads, state

    def gradients_alone(batched: bool) -> _Step:
        def floor(params: Any, state: Any, batch: Any) -> Any:
            features, pull_back = jax.vjp(lambda trunk: workload.trunk(trunk, batch), params["trunk"])
            results = [
                jax.value_and_grad(head, argnums=(0, 1))(own, features, batch)
                for head, own in zip(workload.heads, params["heads"], strict=True)
            ]
            losses, grads = zip(*results, strict=True)
            heads, cotangents = zip(*grads, strict=True)
            if batched:
                (trunk,) = jax.vmap(pull_back)(jnp.stack(cotangents))
            else:
                trunk = [pull_back(cotangent)[0] for cotangent in cotangents]
            return losses, {"trunk": trunk, "heads": heads}, state

        return floor

    def balanced(oracle: _Step, tx: Any) -> _Step:
        def step(params: Any, state: Any, batch: Any) -> Any:
            losses, task_grads = oracle(params, batch)
            grads, state = tx.update(task_grads, state, params, losses=losses)
            return losses, grads, state

        return step

    found: dict[_Way, tuple[_Step, Any]] = {(PLAIN, None): (plain, ())}
    found |= {(name, None): (gradients_alone(batched), ()) for name, batched in zip(FLOORS, (False, True), strict=True)}
    for method in methods:
        num_tasks = len(workload.heads)
        tx = mtl.shared_and_heads(getattr(mtl, method)(num_tasks, **METHODS[method]), loss_fn.shared)
        oracles = {EXACT: mtl.value_and_task_grads(loss_fn)}
        if method not in _MIXERS:
            oracles[KEPT] = mtl.value_and_light_grads(loss_fn, recompute=False)
        if method == methods[0]:
            oracles[UNSPLIT] = mtl.value_and_task_grads(losses_of)
            if method not in _MIXERS:
                oracles[LIGHT] = mtl.value_and_light_grads(loss_fn)
                oracles[FEATURES] = mtl.value_and_feature_grads(loss_fn)
        for name, oracle in oracles.items():
            found[name, method] = balanced(oracle, tx), tx.init(workload.params)
    return found


def _runner(program: _timing.Program, workload: _workloads.Workload, state: Any) -> Callable[[], Any]:
    def run() -> Any:
        nonlocal state
        losses, grads, state = program(workload.params, state, workload.batch)
        return losses, grads, state

    return run


# -- Their steps ---------------------------------------------------------------


class Peers:
    """TorchJD in a process of its own, which takes turns with this one."""

    def __init__(self, python: str) -> None:
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process is)
        self._process = subprocess.Popen(
            [python, _speed_peers.__file__, str(_timing.cores())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        try:
            self.versions = self._answer()
        except _speed_peers.PeersError:
            self.close()
            raise

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """What it answers to a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._stderr.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._stderr.seek(0)
            last = self._stderr.read().strip().rpartition("\n")[2]
            raise _speed_peers.PeersError(f"its process ended with exit status {status}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _speed_peers.PeersError(answer["error"])
        return answer


def _peer_runners(
    peers: Peers, case: Case, workload: _workloads.Workload, ours: dict[_Way, Callable[[], Any]], notes: list[str]
) -> dict[_Way, Callable[[], Any]]:
    """TorchJD's ways to make the same gradients; what fails is noted."""

    def runner(way: str, method: str | None) -> Callable[[], Any]:
        return lambda: _timing.Seconds(peers.ask("step", way=way, method=method)["seconds"])

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    ways: list[_Way] = [(_speed_peers.PLAIN, None)]
    ways += [(way, method) for method in case.methods for way in _speed_peers.ways(method, case.num_tasks)]
    found: dict[_Way, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        arrays, grads = (str(pathlib.Path(folder, name)) for name in ("network.npz", "grads.npz"))
        content = _by_path({**workload.params, **workload.batch})
        np.savez(arrays, attention_heads=_workloads.ATTENTION_HEADS, **content)
        peers.ask("load", kind=case.workload, arrays=arrays, device=device)
        for way, method in ways:
            run = runner(way, method)
            try:
                run()
            except _speed_peers.PeersError as error:
                notes.append(f"{case}: {way}, {method}: {error}")
                continue
            found[way, method] = run
            if method in (None, _CHECKED):
                peers.ask("save", arrays=grads)
                with np.load(grads) as loaded:
                    difference = _difference(dict(loaded), _results(ours[EXACT if method else PLAIN, method]))
                if difference:
                    notes.append(f"{case}: {way}, {method}: {difference}")
                    del found[way, method]
    return found


def _results(run: Callable[[], Any]) -> dict[str, Any]:
    """What a way of ours returns: losses, and the gradients of the trunk by path."""
    losses, grads, _ = run()
    return {"losses": np.asarray(losses), **_by_path({"trunk": grads["trunk"]})}


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """What is wrong with results, if anything: unless two ways do the same, their times say nothing."""
    # One ReLU that goes the other way is 0.4 % of a gradient; and GPUs multiply matrices with fewer digits.
    losses, gradients = (1e-4, 2e-2) if jax.default_backend() == "cpu" else (1e-2, 1e-1)
    trunk = [path for path in wanted if path != "losses"]
    for what, paths, tolerance in (("losses", ["losses"], losses), ("gradients", trunk, gradients)):
        a, b = (np.concatenate([np.ravel(of[path]) for path in paths]) for of in (found, wanted))
        distance = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not distance <= tolerance:
            return f"left out, as its {what} differ by {distance:.1g} from ours, relatively"
    return None


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


# -- Measuring -----------------------------------------------------------------


def measure(case: Case, peers: Peers | None, seconds: float, notes: list[str]) -> list[_Row]:
    """Times all ways of a case in turn.

    Args:
      case: the network and the methods.
      peers: TorchJD, if it is there.
      seconds: how long, about.
      notes: takes what could not be timed.

    Returns:
      A row for each way.
    """
    workload = _workloads.WORKLOADS[case.workload](case.num_tasks, case.heads == "heavy")
    methods = [name for name in case.methods if case.num_tasks >= _speed_peers.PEERS[name].least_tasks]
    case = case._replace(methods=methods)
    programs, ways = {}, {}
    for way, (step, state) in steps(workload, methods).items():
        programs[way] = _timing.Program(step, workload.params, state, workload.batch)
        ways[way] = _runner(programs[way], workload, state)
    for name in (LIGHT, KEPT, UNSPLIT):
        if (name, _CHECKED) in ways:
            difference = _difference(_results(ways[name, _CHECKED]), _results(ways[EXACT, _CHECKED]))
            if difference:
                notes.append(f"{case}: {name}, {_CHECKED}: {difference}")
                del ways[name, _CHECKED]
    if peers is not None:
        ways |= _peer_runners(peers, case, workload, ways, notes)

    start = time.perf_counter()
    _timing.interleaved(ways, 1)
    a_round = (time.perf_counter() - start) / (1 + _timing.WARM_UP)
    rounds = min(max(round(seconds / a_round), _FEWEST_ROUNDS), _MOST_ROUNDS)
    taken = _timing.interleaved(ways, rounds)

    def row(way: _Way) -> _Row:
        name, method = way
        program = programs.get(way)
        return {
            "workload": case.workload,
            "heads": case.heads,
            "tasks": case.num_tasks,
            "shared_parameters": sum(leaf.size for leaf in jax.tree.leaves(workload.params["trunk"])),
            "way": name,
            "method": method,
            "milliseconds": 1e3 * float(np.median(taken[way])),
            "rounds": rounds,
            **({} if program is None else program.costs()),
        }

    return [row(way) for way in ways]


# -- Tables --------------------------------------------------------------------


class Titled(NamedTuple):
    """A table, with its title and how to read it."""

    title: str
    table: _report.Table
    legend: str


def tables(rows: Sequence[_Row]) -> list[Titled]:
    """The tables of whole steps."""
    found = []
    for (workload, heads), group in _grouped(rows, "workload", "heads"):
        size = f"{workload}, {heads} heads, {group[0]['shared_parameters'] / 1e6:.2g} million shared parameters"
        first = next((row["method"] for row in group if row["method"]), None)
        chosen = [row for row in group if row["method"] in (None, first)]
        found.append(
            Titled(
                f"{size}: milliseconds a step",
                _by_tasks(chosen, lambda row: f"{row['milliseconds']:.1f}"),
                "Medians of steps in turn, from parameters and batch to the gradients of trunk and heads.",
            )
        )
        chosen = [row for row in chosen if "traces" in row]
        found.append(
            Titled(
                f"{size}: temporary memory, MB",
                _by_tasks(chosen, lambda row: _scaled(row["temporary_bytes"], 1e-6)),
                "What XLA allocates beside parameters, batch and results. (T gradients alone are results.)",
            )
        )
    found.append(
        Titled(
            "Ratios",
            _ratios(rows),
            f"Plain: one ordinary step on the summed loss. The floor: {' or '.join(FLOORS)}, the faster. Ours: the "
            f"fastest of {', '.join(EXACT_WAYS)}, which return the same. TorchJD: its fastest way.",
        )
    )
    found.append(
        Titled(
            "Programs",
            _programs(rows),
            "FLOPs as XLA counts them, the body of a loop once; traces after all the steps.",
        )
    )
    return found


def findings(rows: Sequence[_Row]) -> list[str]:
    """The ratios in a sentence each."""
    found = []
    for name, values in _columns(rows).items():
        known = [value for value in values if value is not None]
        found.append(f"{name}: {np.median(known):.2f} in the median, {min(known):.2f} to {max(known):.2f}.")
    return found


def _grouped(rows: Sequence[_Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[_Row]]]:
    def key(row: _Row) -> tuple[Any, ...]:
        return tuple(row[k] for k in keys)

    for values in dict.fromkeys(map(key, rows)):
        yield values, [row for row in rows if key(row) == values]


def _name(row: _Row) -> str:
    return row["way"] if row["method"] is None else f"{row['method']}, {row['way']}"


def _scaled(number: float | None, factor: float) -> str:
    return "–" if number is None else f"{number * factor:.1f}"


def _by_tasks(rows: Sequence[_Row], text: Callable[[_Row], str]) -> _report.Table:
    """Ways by numbers of tasks, those that all numbers have."""
    numbers = dict.fromkeys(row["tasks"] for row in rows)
    lines = [
        [_name(same[0]), *map(text, same)] for _, same in _grouped(rows, "way", "method") if len(same) == len(numbers)
    ]
    return _report.Table(["", *(f"T = {n}" for n in numbers)], lines)


def _balanced(rows: Sequence[_Row]) -> Iterator[tuple[str, dict[str, _Row]]]:
    """Each case with each method, and its rows by way."""
    for (workload, heads, tasks), case in _grouped(rows, "workload", "heads", "tasks"):
        ordinary = {row["way"]: row for row in case if row["method"] is None}
        for (method,), ways in _grouped([row for row in case if row["method"]], "method"):
            yield f"{workload}, {heads} heads, T = {tasks}: {method}", ordinary | {row["way"]: row for row in ways}


def _columns(rows: Sequence[_Row]) -> dict[str, list[float | None]]:
    """Ratios, one of each kind for each case with each method; None where there is nothing to compare."""
    columns: dict[str, list[float | None]] = {}
    for _, ways in _balanced(rows):
        times = {way: row["milliseconds"] for way, row in ways.items()}
        for name, several in _FASTEST.items():
            if known := [times[way] for way in several if way in times]:
                times[name] = min(known)
        for a, b in _RATIOS:
            columns.setdefault(f"{a} / {b}", []).append(times[a] / times[b] if a in times and b in times else None)
    return {name: values for name, values in columns.items() if any(values)}


def _ratios(rows: Sequence[_Row]) -> _report.Table:
    columns = _columns(rows)
    lines = [
        [name, *("–" if value is None else f"{value:.2f}" for value in values)]
        for (name, _), *values in zip(_balanced(rows), *columns.values(), strict=True)
    ]
    return _report.Table(["", *columns], lines)


def _programs(rows: Sequence[_Row]) -> _report.Table:
    """What does not vary, for the case with most methods."""
    _, most = max(_grouped(rows, "workload", "heads", "tasks"), key=lambda case: (len(case[1]), case[0][2]))
    lines = [
        [
            _name(row),
            f"{row['compile_seconds']:.1f}",
            str(row["traces"]),
            _scaled(row["flops"], 1e-9),
            _scaled(row["temporary_bytes"], 1e-6),
        ]
        for row in most
        if "traces" in row
    ]
    case = f"{most[0]['workload']}, {most[0]['heads']} heads, T = {most[0]['tasks']}"
    return _report.Table([case, "compile time, s", "traces", "GFLOP", "temporary memory, MB"], lines)


# -- What methods cost by themselves ---------------------------------------------


class Section(NamedTuple):
    """Measurements that are a table: from the command's choice to rows, and which of their fields to show."""

    title: str
    measure: Callable[..., list[_Row]]
    columns: dict[str, str]


SECTIONS = {
    "balancing": Section(
        "The transformation alone, on the gradients of 10 million parameters",
        lambda full, progress, peers, notes: _speed_alone.measure_balancing(full, progress),
        {
            "method": "",
            "tasks": "T",
            "milliseconds": "ms",
            "read_milliseconds": "to read them once, ms",
            "multiply_milliseconds": "to multiply them, ms",
            "over_floor": "over the larger",
            "state_over_gradients": "state / gradients",
        },
    ),
    "aggregation": Section(
        "On a matrix (8, 1,000,000), against TorchJD's aggregators",
        lambda full, progress, peers, notes: _speed_alone.measure_aggregation(full, progress, peers=peers, notes=notes),
        {"method": "", "milliseconds": "ms", "torchjd_milliseconds": "TorchJD, ms", "times_faster": "TorchJD / ours"},
    ),
    "solvers": Section(
        "The T x T part alone",
        lambda full, progress, peers, notes: _speed_alone.measure_solvers(full, progress),
        {"method": "", "kind": "Gramians", "tasks": "T", "microseconds": "µs"},
    ),
    "tasks": Section(
        "Against the number of tasks: random Gramians, and the gradients of a million parameters",
        lambda full, progress, peers, notes: _speed_alone.measure_tasks(full, progress),
        {"method": "", "tasks": "T", "microseconds": "the T x T part, µs", "milliseconds": "all of it, ms"},
    ),
    "compilation": Section(
        "To compile the first update",
        lambda full, progress, peers, notes: _speed_alone.measure_compilation(full, progress),
        {"method": "", "tasks": "T", "seconds": "s", "blockwise_seconds": "blockwise, s"},
    ),
}


def _listed(rows: Sequence[_Row], columns: dict[str, str]) -> _report.Table:
    def text(value: Any) -> str:
        return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    return _report.Table(list(columns.values()), [[text(row[key]) for key in columns] for row in rows])


# -- The command ---------------------------------------------------------------


def run(
    *,
    full: bool,
    sections: Sequence[str] | None,
    peers_python: str,
    out: pathlib.Path | None,
    resume: bool,
    command: str,
    **choice: Any,
) -> None:
    """Measures, prints, and writes a report.

    Args:
      full: whether to measure all there is.
      sections: "steps" and names of `SECTIONS`; None for all if `full`, else for the steps.
      peers_python: an interpreter that may have TorchJD.
      out: directory for `speed.md` and `speed.json`, which are written after each case and section; None for neither.
      resume: whether to keep what is in `speed.json`, and measure the rest.
      command: what was typed, for the report.
      **choice: as for `plan`.

    Raises:
      SystemExit: if what is in `out` was measured elsewhere, or with other versions.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch is to have its part of the GPU
    # The networks have none of what jaxlib 0.10.2 gets wrong, and what the ways return is compared.
    warnings.filterwarnings("ignore", message=".*gets batches of normalisation")
    start = time.perf_counter()
    sections = sections or ([STEPS, *SECTIONS] if full else [STEPS])
    cases = plan(full, **choice) if STEPS in sections else []
    report = _Report(out, command, _timing.machine())
    if report.machine["load"] > 0.5:
        report.notes.append(
            f"Other processes were at work (load average {report.machine['load']}). That lengthens all times, torch's "
            "most, whose threads wait for each other. Begin anew when they are done, or set OMP_WAIT_POLICY=PASSIVE, "
            "which costs torch a little always and spares it the worst."
        )
    peers = None
    try:
        peers = Peers(peers_python)
        report.machine |= peers.versions
    except _speed_peers.PeersError as error:
        report.notes.append(f"Without TorchJD ({error}). Write: pip install 'optax-mtl[peers]'")
    try:
        if resume:
            report.resume()
        _measure_sections(sections, cases, full, peers, report)
    finally:
        if peers is not None:
            peers.close()

    for titled in report.titled():
        print(f"{titled.title}\n\n{titled.table.text()}\n\n{_report.wrapped(titled.legend)}\n")
    print(f"{_report.wrapped(report.introduction())}\n\n{_report.bullets(report.bullets(), 100)}\n")
    if out is not None:
        print(f"{time.perf_counter() - start:.0f} s. Tables and all numbers: {out / 'speed.md'}")


class _Report:
    """What has been measured so far, kept in files if there is a directory for them."""

    def __init__(self, out: pathlib.Path | None, command: str, machine: dict[str, Any]) -> None:
        self._out, self._command, self.machine = out, command, machine
        self.notes: list[str] = []
        self.results: dict[str, list[_Row]] = {}

    def resume(self) -> None:
        """Takes over what an earlier run has left."""
        path = None if self._out is None else self._out / "speed.json"
        if path is None or not path.exists():
            return
        earlier = json.loads(path.read_text(encoding="utf-8"))
        for name in self.machine.keys() | earlier["machine"].keys():
            then, now = earlier["machine"].get(name), self.machine.get(name)
            if then != now and name != "load":
                raise SystemExit(
                    f"{path} was measured with {name} {then}, and now it is {now}: times of both do not go into one "
                    "table. Write another --out, or leave --resume out to begin anew."
                )
        self.notes = list(dict.fromkeys([*earlier["notes"], *self.notes]))
        self.results = {name: earlier[name] for name in (STEPS, *SECTIONS) if name in earlier}

    def titled(self) -> list[Titled]:
        """The tables."""
        found = tables(self.results[STEPS]) if STEPS in self.results else []
        for name, (title, _, columns) in SECTIONS.items():
            if name in self.results:
                found.append(Titled(title, _listed(self.results[name], columns), "Medians of runs in turn."))
        return found

    def introduction(self) -> str:
        """What the numbers depend on."""
        return f"Measured on {', '.join(f'{name} {value}' for name, value in self.machine.items())}."

    def bullets(self) -> list[str]:
        """Ratios, and what went wrong."""
        return [*findings(self.results.get(STEPS, [])), *self.notes]

    def save(self) -> None:
        """Writes the files anew."""
        if self._out is None:
            return
        self._out.mkdir(parents=True, exist_ok=True)
        parts = ["# Speed", self.introduction(), f"    {self._command}", _report.bullets(self.bullets())]
        parts += [f"## {titled.title}\n\n{titled.table.markdown()}\n\n{titled.legend}" for titled in self.titled()]
        content = {"command": self._command, "machine": self.machine, "notes": self.notes, **self.results}
        for name, text in (("speed.md", "\n\n".join(parts)), ("speed.json", json.dumps(content, indent=1))):
            (self._out / f"{name}.new").write_text(text + "\n", encoding="utf-8")
            (self._out / f"{name}.new").replace(self._out / name)  # whoever stops the run finds the last one whole


def _measure_sections(
    sections: Sequence[str], cases: Sequence[Case], full: bool, peers: Peers | None, report: _Report
) -> None:
    """Adds to the report what is not in it yet."""
    with tqdm.tqdm(bar_format="{desc} {elapsed}", disable=None, leave=False) as bar:
        if STEPS in sections:
            rows = report.results.setdefault(STEPS, [])
            done = {(row["workload"], row["heads"], row["tasks"]) for row in rows}
            for i, case in enumerate(cases):
                if (case.workload, case.heads, case.num_tasks) not in done:
                    bar.set_description_str(f"{case} ({i + 1} of {len(cases)})")
                    rows += measure(case, peers, _FULL_SECONDS if full else _QUICK_SECONDS, report.notes)
                    report.save()
        for name in sections:
            if name != STEPS and name not in report.results:
                report.results[name] = SECTIONS[name].measure(full, bar.set_description_str, peers, report.notes)
                report.save()
