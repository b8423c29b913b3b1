"""What a balancing method costs by itself: on large gradients, on a matrix, on a Gramian, and to compile."""

from collections.abc import Callable, Sequence
import functools
import pathlib
import tempfile
import time
from typing import Any, Protocol

import jax
from jax import lax, numpy as jnp
import numpy as np
import optax

import optax_mtl as mtl
from optax_mtl import _weighting
from optax_mtl.experiments import _speed_peers, _timing

_Row = dict[str, Any]
_Make = Callable[[int], Any]  # a method, from the number of tasks
_Progress = Callable[[str], Any]  # is told what comes next

# Every method, as the papers have it; those that come in forms of different cost, in these.
METHODS: dict[str, _Make] = {
    "sum_tasks": mtl.sum_tasks,
    "mean_tasks": mtl.mean_tasks,
    "linear_scalarization": mtl.linear_scalarization,
    "rlw": lambda n: mtl.rlw(n, 0),
    "uncertainty": mtl.uncertainty,
    "gls": mtl.gls,
    "scale_invariant": mtl.scale_invariant,
    "uw_o": mtl.uw_o,
    "uw_so": mtl.uw_so,
    "dwa": lambda n: mtl.dwa(n, steps_per_epoch=2),
    "adaptive_weight_assignment": mtl.adaptive_weight_assignment,
    "gradnorm": mtl.gradnorm,
    "imtl_l": mtl.imtl_l,
    "dtp": mtl.dtp,
    "cov_weighting": mtl.cov_weighting,
    "slaw": mtl.slaw,
    "igb": lambda n: mtl.igb(n, steps_per_epoch=2),
    "famo": mtl.famo,
    "go4align": mtl.go4align,
    "stch": lambda n: mtl.stch(n, mu=0.5),
    "group_dro": mtl.group_dro,
    "cosmos": mtl.cosmos,
    "pbi": mtl.pbi,
    "ldc_mtl": mtl.ldc_mtl,
    "mgda": mtl.mgda,
    "pcgrad": lambda n: mtl.pcgrad(n, 0),
    "cagrad": mtl.cagrad,
    "edm": mtl.edm,
    "dual_proj": mtl.dual_proj,
    "upgrad": mtl.upgrad,
    "nash_mtl": mtl.nash_mtl,
    "fairgrad": mtl.fairgrad,
    "db_mtl": mtl.db_mtl,
    "db_mtl, beta=0": lambda n: mtl.db_mtl(n, beta=0.0),
    "excess_mtl": mtl.excess_mtl,
    "pike": lambda n: mtl.pike(n, zeta1=0.1, zeta2=0.1),
    "cdtt": mtl.cdtt,
    "gradvac": lambda n: mtl.gradvac(n, 0, beta=0.5),
    "gradvac, by leaf": lambda n: mtl.gradvac(n, 0, granularity="leaf"),
    "imtl_g": mtl.imtl_g,
    "imtl": mtl.imtl,
    "aligned_mtl": mtl.aligned_mtl,
    "con_fig": mtl.con_fig,
    "con_fig_momentum": mtl.con_fig_momentum,
    "krum": lambda n: mtl.krum(n, n_selected=min(2, n)),
    "sdmgrad": mtl.sdmgrad,
    "modo": mtl.modo,
    "moco": mtl.moco,
    "grad_cosine": mtl.grad_cosine,
    "ol_aux": mtl.ol_aux,
    "bloop": mtl.bloop,
    "pcd": mtl.pcd,
    "auto_lambda": lambda n: mtl.auto_lambda(n, learning_rate=1e-2),
    "auxi_nash": mtl.auxi_nash,
    "hydalearn": lambda n: mtl.hydalearn(n, learning_rate=1e-2),
    "hydalearn, first order": lambda n: mtl.hydalearn(n, learning_rate=1e-2, lookahead="first_order"),
    "ial": mtl.ial,
    "cr_mogm": lambda n: mtl.cr_mogm(n, mtl.mgda(n)),
    "update_every": lambda n: mtl.update_every(n, mtl.mgda(n), every=2),
    "madam": lambda n: mtl.madam(n, mtl.mgda(n)),
    "madam, own squares": lambda n: mtl.madam(n, mtl.mgda(n), cross=False),
    "apt": lambda n: mtl.apt(n, mtl.upgrad(n)),
    "graddrop": lambda n: mtl.graddrop(n, 0),
    "trimmed_mean": lambda n: mtl.trimmed_mean(n, k=(n - 1) // 2),
    "scale_by_mao": mtl.scale_by_mao,
    "scale_by_mao, by leaf": lambda n: mtl.scale_by_mao(n, grain="leaf"),
    "scale_by_mao, optax": lambda n: mtl.scale_by_mao(n, base=optax.scale_by_adam()),
    "scale_by_mtadam": mtl.scale_by_mtadam,
}
_FEW = ("sum_tasks", "gradnorm", "mgda", "upgrad", "graddrop", "trimmed_mean", "scale_by_mao")

# Those that TorchJD has as well, with what makes ours do the same.
ALONE: dict[str, _Make] = {
    "sum_tasks": mtl.sum_tasks,
    "mean_tasks": mtl.mean_tasks,
    "linear_scalarization": lambda n: mtl.linear_scalarization(n, weights=jnp.arange(1.0, n + 1)),
    "rlw": lambda n: mtl.rlw(n, 0),
    "upgrad": mtl.upgrad,
    "dual_proj": mtl.dual_proj,
    "mgda": mtl.mgda,
    "cagrad": lambda n: mtl.cagrad(n, c=0.5, rescale=0),
    "pcgrad": lambda n: mtl.pcgrad(n, 0),
    "gradvac": lambda n: mtl.gradvac(n, 0, beta=0.5),
    "imtl_g": mtl.imtl_g,
    "aligned_mtl": mtl.aligned_mtl,
    "fairgrad": lambda n: mtl.fairgrad(n, alpha=2.0),
    "nash_mtl": mtl.nash_mtl,
    "con_fig": mtl.con_fig,
    "pcd": mtl.pcd,
    "krum": lambda n: mtl.krum(n, n_byzantine=1),
    "excess_mtl": mtl.excess_mtl,
    "graddrop": lambda n: mtl.graddrop(n, 0),
    "trimmed_mean": lambda n: mtl.trimmed_mean(n, k=1),
    "cr_mogm": lambda n: mtl.cr_mogm(n, mtl.mgda(n)),
    "modo": mtl.modo,
    "sdmgrad": mtl.sdmgrad,
}
_INDEPENDENT = ("modo", "sdmgrad")  # these are given two more batches' gradients


class Asks(Protocol):
    """The process with TorchJD."""

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """Its answer to a command."""


def extra_args(num_tasks: int) -> dict[str, Any]:
    """What methods are given beside gradients: all of it to all of them."""
    ones = jnp.linspace(0.5, 1.5, num_tasks)

    # The user's own function, which is not what is timed: one number a task, from a parameter each.
    def value_fn(params: Any) -> jax.Array:
        smallest = min(jax.tree.leaves(params), key=lambda leaf: leaf.size)
        return ones * (1 + jnp.sum(smallest) ** 2)

    return {"losses": ones, "kpis": jnp.exp(-ones), "gradient_variance": ones, "value_fn": value_fn}


# -- On large gradients ----------------------------------------------------------------------------------------------


def measure_balancing(
    full: bool = False, progress: _Progress = lambda _: None, *, methods: Sequence[str] = (), tasks: Sequence[int] = ()
) -> list[_Row]:
    """The transformation alone, on the gradients of 10 million parameters, against what no method can do without.

    The floor is the larger of the time to read the gradients once, and the time of `T * T` multiply-adds a parameter
    at the rate of a large matrix product; both are measured in turn with the method. What the method must move besides
    (a second pass, its state in and out, its update) is told in multiples of the gradients. The state is donated.
    """
    rows = []
    for num_tasks in tasks or ((2, 4, 8, 16) if full else (2, 8)):
        params, task_grads = _large_gradients(num_tasks)
        read, multiply = _floors(task_grads, num_tasks)
        for name in methods or (METHODS if full else _FEW):
            progress(f"{name}, T = {num_tasks}, 10 million parameters")
            rows.append(_balancing_row(name, num_tasks, params, task_grads, read, multiply))
    return rows


_LARGE = [(2500, 2500), (1000, 1000), (1000, 1000), (1000, 1000), (700, 1000), *[(1000,)] * 50]


def _large_gradients(num_tasks: int) -> tuple[Any, Any]:
    # No leaf of 32 MB or more: the C library gives such back to the system at once, and every update would be paid for
    # by fetching its pages anew.
    rng = np.random.default_rng(0)
    params = {f"{i:02}": jnp.ones(shape) for i, shape in enumerate(_LARGE)}
    task_grads = {
        name: jnp.asarray(rng.standard_normal((num_tasks, *leaf.shape), np.float32)) for name, leaf in params.items()
    }
    return params, task_grads


def _floors(task_grads: Any, num_tasks: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    size = 2048
    read = jax.jit(lambda tree: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(tree)))
    multiply = jax.jit(lambda a: jnp.dot(a, a, precision="highest"))
    square = jnp.ones((size, size))
    number = sum(leaf.size for leaf in jax.tree.leaves(task_grads)) * num_tasks

    def timed() -> _timing.Seconds:
        start = time.perf_counter()
        jax.block_until_ready(multiply(square))
        return _timing.Seconds((time.perf_counter() - start) * number / size**3)

    return functools.partial(read, task_grads), timed


def _balancing_row(
    name: str, num_tasks: int, params: Any, task_grads: Any, read: Callable[[], Any], multiply: Callable[[], Any]
) -> _Row:
    tx = METHODS[name](num_tasks)
    given = extra_args(num_tasks)
    state = tx.init(params)
    update = jax.jit(lambda grads, state: tx.update(grads, state, params, **given), donate_argnums=1)
    memory = update.lower(task_grads, state).compile().memory_analysis()

    def step() -> Any:
        nonlocal state
        updates, state = update(task_grads, state)
        return updates

    rounds = 9
    taken = _timing.interleaved({"read": read, "multiply": multiply, "step": step}, rounds)
    medians = {way: float(np.median(seconds)) for way, seconds in taken.items()}
    floor = max(medians["read"], medians["multiply"])
    size = _bytes(task_grads)
    return {
        "method": name,
        "tasks": num_tasks,
        "milliseconds": 1e3 * medians["step"],
        "read_milliseconds": 1e3 * medians["read"],
        "multiply_milliseconds": 1e3 * medians["multiply"],
        "over_floor": medians["step"] / floor,
        "state_over_gradients": _bytes(state) / size,
        "temporary_over_gradients": None if memory is None else memory.temp_size_in_bytes / size,
        "rounds": rounds,
    }


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# -- On a matrix, against TorchJD ------------------------------------------------------------------------------------


def measure_aggregation(
    full: bool = False,
    progress: _Progress = lambda _: None,
    *,
    peers: Asks | None = None,
    notes: list[str] | None = None,
    methods: Sequence[str] = (),
) -> list[_Row]:
    """Eight gradients of a million parameters to one, here and in TorchJD, which takes turns in its own process."""
    num_tasks, size = 8, 1_000_000
    rng = np.random.default_rng(0)
    grads, first, second = rng.standard_normal((3, num_tasks, size), np.float32)
    given = extra_args(num_tasks)
    on_device = jax.device_put((grads, first, second))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if peers is not None:
            arrays = str(pathlib.Path(folder, "matrix.npz"))
            np.savez(arrays, grads=grads, first=first, second=second)
            peers.ask("load_matrix", arrays=arrays, device="cuda" if jax.default_backend() == "gpu" else "cpu")
        for name in methods or ALONE:
            progress(f"{name}, a matrix ({num_tasks}, {size:,})")
            ways = {"here": _aggregation(name, num_tasks, on_device, given)}
            if peers is not None:
                ask = functools.partial(peers.ask, "aggregate", method=name)
                try:
                    ask()
                except _speed_peers.PeersError as error:  # it says which of its solvers is missing, say
                    if notes is None:
                        raise
                    notes.append(f"TorchJD, {name}: {error}")
                else:
                    ways["TorchJD"] = lambda ask=ask: _timing.Seconds(ask()["seconds"])  # type: ignore[misc]
            taken = _timing.interleaved(ways, 25 if full else 11)
            medians = {way: 1e3 * float(np.median(seconds)) for way, seconds in taken.items()}
            theirs = medians.get("TorchJD")
            rows.append(
                {
                    "method": name,
                    "milliseconds": medians["here"],
                    "torchjd_milliseconds": theirs,
                    "times_faster": None if theirs is None else theirs / medians["here"],
                }
            )
    return rows


def _aggregation(name: str, num_tasks: int, arrays: Any, given: dict[str, Any]) -> Callable[[], Any]:
    grads, *samples = arrays
    tx = ALONE[name](num_tasks)
    state = tx.init(grads[0])

    def update(grads: jax.Array, state: Any, samples: Any) -> Any:
        extra = {"independent_grads": samples} if name in _INDEPENDENT else {}
        return tx.update(grads, state, None, **given, **extra)

    jitted = jax.jit(update, donate_argnums=1)

    def run() -> Any:
        nonlocal state
        updates, state = jitted(grads, state, samples)
        return updates

    return run


# -- On a Gramian ----------------------------------------------------------------------------------------------------


def measure_solvers(
    full: bool = False, progress: _Progress = lambda _: None, *, methods: Sequence[str] = ()
) -> list[_Row]:
    """The `T x T` part of a step: of a thousand in one program, each on another Gramian of one kind.

    Methods that do not take a Gramian are left out: what they do besides goes over all gradients, and is timed there.
    """
    num_tasks, steps = 16, 1024 if full else 256
    rows = []
    for name in methods or METHODS:
        tx = METHODS[name](num_tasks)
        if not isinstance(tx, _weighting.Weighting) or tx.needs_gradients:
            continue
        progress(f"{name}, Gramians of {num_tasks} tasks")
        run = _steps_on_gramians(tx, num_tasks)
        state = tx.init(jnp.zeros(3))
        for kind in KINDS:
            gramians = _gramians(kind, num_tasks, steps)
            try:
                taken = _timing.interleaved({name: functools.partial(run, gramians, state)}, 3)[name]
            except ValueError:  # it looks at gradients in a step, whatever it is given
                break
            rows.append(
                {
                    "method": name,
                    "kind": kind,
                    "tasks": num_tasks,
                    "microseconds": 1e6 * float(np.median(taken)) / steps,
                }
            )
    return rows


KINDS = ("random", "conflicting", "rank deficient", "badly scaled", "nearly parallel")


def _gramians(kind: str, num_tasks: int, number: int) -> jax.Array:
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((number, num_tasks, 200))
    if kind == "conflicting":
        grads += 0.01 * rng.standard_normal((number, 1, 200)) - grads.mean(1, keepdims=True)
    elif kind == "rank deficient":
        rank = num_tasks // 2
        factors = rng.standard_normal((number, num_tasks, rank)), rng.standard_normal((number, rank, 200))
        grads = np.matmul(*factors)
    elif kind == "badly scaled":
        grads *= rng.permuted(np.tile(np.logspace(-4, 4, num_tasks), (number, 1)), axis=1)[..., None]
    elif kind == "nearly parallel":
        grads = rng.standard_normal((number, 1, 200)) + 1e-2 * grads
    return jnp.asarray(grads @ grads.transpose(0, 2, 1), jnp.float32)


def _steps_on_gramians(tx: Any, num_tasks: int) -> Callable[..., Any]:
    given = extra_args(num_tasks)
    params = jnp.zeros(3)

    def step(state: Any, gramian: jax.Array) -> Any:
        weights, state = tx.update(mtl.Gramian(gramian), state, params, **given)
        return state, weights

    return jax.jit(lambda gramians, state: lax.scan(step, state, gramians)[1])


# -- Many tasks ------------------------------------------------------------------------------------------------------

MANY = ("mean_tasks", "mgda", "upgrad", "nash_mtl", "cagrad", "pcgrad")  # one of each mechanism


def measure_tasks(
    full: bool = False, progress: _Progress = lambda _: None, *, methods: Sequence[str] = (), tasks: Sequence[int] = ()
) -> list[_Row]:
    """Against the number of tasks: the `T x T` part by itself, and the whole on gradients of a million parameters."""
    rows = []
    for num_tasks in tasks or ((2, 4, 8, 16, 32, 64, 128) if full else (2, 8, 32, 128)):
        rng = np.random.default_rng(0)
        params = {f"{i}": jnp.ones(250_000) for i in range(4)}
        grads = {
            name: jnp.asarray(rng.standard_normal((num_tasks, leaf.size), np.float32)) for name, leaf in params.items()
        }
        steps = max(256 // num_tasks, 4)
        gramians = _gramians("random", num_tasks, steps)
        for name in methods or MANY:
            progress(f"{name}, T = {num_tasks}")
            tx = METHODS[name](num_tasks)
            update = jax.jit(functools.partial(tx.update, params=params, **extra_args(num_tasks)))
            ways: dict[str, Callable[[], Any]] = {
                "solve": functools.partial(_steps_on_gramians(tx, num_tasks), gramians, tx.init(jnp.zeros(3))),
                "whole": functools.partial(update, grads, tx.init(params)),
            }
            taken = {way: float(np.median(seconds)) for way, seconds in _timing.interleaved(ways, 5).items()}
            rows.append(
                {
                    "method": name,
                    "tasks": num_tasks,
                    "microseconds": 1e6 * taken["solve"] / steps,
                    "milliseconds": 1e3 * taken["whole"],
                }
            )
    return rows


# -- To compile ------------------------------------------------------------------------------------------------------


def measure_compilation(
    full: bool = False, progress: _Progress = lambda _: None, *, methods: Sequence[str] = ()
) -> list[_Row]:
    """Tracing, lowering and compiling the first update for 8 tasks and 12 leaves; by leaf too, where a method can."""
    num_tasks = 8
    params = {
        f"layer {i}": {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[-1])}
        for i, shape in enumerate([(32, 64), *[(64, 64)] * 4, (64, 10)])
    }
    task_grads = jax.tree.map(lambda p: jnp.zeros((num_tasks, *p.shape)), params)
    given = extra_args(num_tasks)
    rows = []
    for name in methods or (METHODS if full else _FEW):
        progress(f"{name}, compiled for {num_tasks} tasks")
        tx = METHODS[name](num_tasks)
        forms = {"whole": tx}
        if isinstance(tx, _weighting.Weighting) and not tx.needs_gradients:
            forms["blockwise"] = mtl.blockwise(tx)
        row: _Row = {"method": name, "tasks": num_tasks, "blockwise_seconds": None}
        for form, transformation in forms.items():
            jax.clear_caches()
            state = transformation.init(params)
            start = time.perf_counter()
            update = jax.jit(lambda grads, state, tx=transformation: tx.update(grads, state, params, **given))
            update.lower(task_grads, state).compile()
            row["seconds" if form == "whole" else f"{form}_seconds"] = time.perf_counter() - start
        rows.append(row)
    return rows
