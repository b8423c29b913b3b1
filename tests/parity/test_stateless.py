"""Methods that see one step's gradients only, against TorchJD, LibMTL, conflictfree and the exact optimum."""

import functools

import jax
from jax import lax
import numpy as np
import pytest

import optax_mtl as mtl
from parity import records
from parity.records import at_most, close, gramian, inner, min_norm_gap, mix, norm

CASES = records.load("stateless")
groups = pytest.mark.parametrize("group", CASES)


def torchjd(case, array):
    """The cases that TorchJD, conflictfree and the exact solver were given: the first."""
    return np.asarray(array)[: len(case["exact.minnorm"])]


def libmtl(case, array):
    """The cases that LibMTL was given: the last."""
    return np.asarray(array)[-len(case["libmtl.PCGrad"]) :]


@functools.partial(jax.jit, static_argnums=0)
def first_steps(method, grads, losses=None, argument=None):
    """Updates and weights of `method(num_tasks, argument)` on every case. A map, as it compiles faster than a vmap."""

    def first_step(case):
        grads, losses, argument = case
        tx = method(grads.shape[0], *([] if argument is None else [argument]))
        updates, state = tx.update(grads, tx.init(grads[0]), losses=losses)
        return updates, state.task_weights

    return lax.map(first_step, (grads, losses, argument))


# -- Linear scalarization and RLW ------------------------------------------------------------------------------------


def mean(num_tasks):
    return mtl.linear_scalarization(num_tasks, reduction="mean")


def constant(num_tasks, weights):
    return mtl.linear_scalarization(num_tasks, weights=weights)


@groups
def test_linear_scalarization(group):
    case = CASES[group]
    grads, largest = torchjd(case, case["grads"]), norm(case["grads"]).max(-1)
    updates, _ = first_steps(mtl.linear_scalarization, case["grads"])
    close(torchjd(case, updates), case["torchjd.Sum"], torchjd(case, largest), 1e-13)
    if "libmtl.EW" in case:
        close(libmtl(case, updates), case["libmtl.EW"], libmtl(case, largest), 1e-13)
    close(first_steps(mean, grads)[0], case["torchjd.Mean"], torchjd(case, largest), 1e-13)
    updates, _ = first_steps(constant, grads, argument=case["torchjd.pref"])
    close(updates, case["torchjd.Constant.pref"], torchjd(case, largest), 1e-13)


@groups
def test_rlw(group):
    case = CASES[group]
    close(jax.jit(jax.vmap(mtl.rlw_weights))(case["torchjd.z"]), case["torchjd.Random"], 1, 1e-14)


# -- MGDA ------------------------------------------------------------------------------------------------------------
# Both peers stop their Frank-Wolfe early, up to 24 % (TorchJD) and 44 % (LibMTL) of the mean gradient from the optimum.
# So vectors are held to the exact optimum, and the peers' distance from optimality is a bound for ours.


@groups
def test_mgda(group):
    case = CASES[group]
    updates, weights = first_steps(mtl.mgda, case["grads"])
    close(torchjd(case, updates), case["exact.minnorm"], torchjd(case, norm(case["grads"].mean(1))), 1e-13)

    gap, size = min_norm_gap(case["grads"], weights)
    rounding = 1e-14 * size
    for precision in ("default", "tight"):
        peer = case[f"torchjd.MGDA.{precision}.fw_gap"]
        at_most(torchjd(case, gap), np.maximum(peer, torchjd(case, rounding)))
    if group != "T1":  # LibMTL fails there
        peer, _ = min_norm_gap(libmtl(case, case["grads"]), case["libmtl.MGDA.none"])
        at_most(libmtl(case, gap), np.maximum(peer, libmtl(case, rounding)))


@pytest.mark.parametrize(
    ("group", "normalization"), [("T2", "l2"), ("T2", "loss"), ("T2", "loss+"), ("T5", "l2"), ("T5", "loss+")]
)
def test_mgda_normalization(group, normalization):
    case = CASES[group]
    grads, losses, peer = libmtl(case, case["grads"]), case["libmtl.losses"], case[f"libmtl.MGDA.{normalization}"]
    _, weights = first_steps(functools.partial(mtl.mgda, normalization=normalization), grads, losses)

    norms = norm(grads)[..., None]
    scale = {"l2": norms, "loss": losses[..., None], "loss+": losses[..., None] * norms}[normalization]
    known = np.isfinite(peer).all(-1)
    assert set(libmtl(case, case["kind"])[~known]) <= {"zero_row"}  # LibMTL divides by the zero norm
    # LibMTL applies the weights to the normalized gradients, we to the gradients: what is compared is the weights.
    normalized = (grads / np.where(scale > 0, scale, 1))[known]
    weights, peer = np.asarray(weights)[known], peer[known]
    gap, size = min_norm_gap(normalized, weights)
    at_most(gap, np.maximum(min_norm_gap(normalized, peer)[0], 1e-14 * size))
    if group == "T2":  # in closed form, where LibMTL goes only to 0.001 and 0.999 for 0 and 1
        clipped = np.where(weights == 0, 0.001, np.where(weights == 1, 0.999, weights))
        close(mix(clipped, normalized), mix(peer, normalized), norm(normalized).max(-1), 1e-11)


# -- CAGrad ----------------------------------------------------------------------------------------------------------


def cagrad(num_tasks, c):
    return mtl.cagrad(num_tasks, c=c, rescale=0)


def solve_cagrad(group, c):
    grads = CASES[group]["grads"]
    return [np.asarray(a) for a in first_steps(cagrad, grads, argument=np.full(len(grads), c))]


def worst_case(grads, direction):
    """What CAGrad maximises: the least `<g_i, d>`, over the gradients that are not zero."""
    least = np.where(norm(grads) > 0, inner(grads, direction), np.inf).min(-1)
    return np.where(np.isfinite(least), least, 0)


def steps_away(grads, weights):
    """The tasks' shares in the step from the mean gradient, on the simplex."""
    step = np.where(norm(grads) > 0, np.maximum(weights - 1 / grads.shape[-2], 0), 0)
    return step / np.maximum(step.sum(-1, keepdims=True), 1e-300)


both_c = pytest.mark.parametrize("c", [0.5, 0.9])


@groups
@both_c
def test_cagrad_is_optimal(group, c):
    grads = CASES[group]["grads"]
    updates, weights = solve_cagrad(group, c)
    centre = grads.mean(1)
    at_most(norm(updates - centre), c * norm(centre) * (1 + 1e-10))

    # For every direction in the ball and every x on the simplex, min_i <g_i, d> <= <g_x, mean> + c |mean| |g_x|; at the
    # optimum both are equal, for the x of the step. (Reading x off the weights costs digits where norms are far apart.)
    x = steps_away(grads, weights)
    bound = (mix(x, grads) * centre).sum(-1) + c * norm(centre) * norm(mix(x, grads))
    at_most(bound - worst_case(grads, updates), 1e-9 * norm(centre) * (x * norm(grads)).sum(-1))


@groups
@both_c
def test_cagrad_torchjd(group, c):
    case = CASES[group]
    grads, kind, peer = torchjd(case, case["grads"]), torchjd(case, case["kind"]), case[f"torchjd.CAGrad.c{c}"]
    updates, weights = (torchjd(case, a) for a in solve_cagrad(group, c))
    size, theirs = norm(grads.mean(1)), mix(peer, grads)

    # Its solver stops at 1e-8 of the objective, hence at 1e-4 of the direction.
    solved = peer.any(-1)
    close(updates[solved], theirs[solved], size[solved], 5e-4)
    better = worst_case(grads, updates) - worst_case(grads, theirs)
    at_most(-better[solved], 1e-14 * (size * norm(grads).max(-1))[solved])

    # Elsewhere TorchJD returns zero, which is not in the ball. Its thresholds of 1e-4 fire: a combination of gradients
    # is that small beside them all (one is zero, or small beside the others), or so are all of them, squared.
    assert set(kind[~solved]) <= {"zero_row", "badly_scaled"}
    trace = (grads**2).sum((1, 2))
    combination = norm(mix(steps_away(grads, weights), grads))
    assert np.all((combination < 1e-4 * np.sqrt(trace)) | (trace < 1e-4) | (kind == "zero_row") | solved)
    assert np.all((better > 0) | (kind != "zero_row") | (size == 0))


@pytest.mark.parametrize(("group", "rescale"), [*((group, 0) for group in CASES), ("T3", 1), ("T3", 2)])
def test_cagrad_libmtl(group, rescale):
    case = CASES[group]
    grads, kind, theirs = libmtl(case, case["grads"]), libmtl(case, case["kind"]), case[f"libmtl.CAGrad.r{rescale}"]
    if rescale == 0:
        updates = libmtl(case, solve_cagrad(group, 0.5)[0])
    else:
        updates = np.asarray(first_steps(functools.partial(mtl.cagrad, c=0.5, rescale=rescale), grads)[0])
    # SciPy's solver stops at 1e-6 of the objective, hence at 1e-3 of the direction, and further off where norms are far
    # apart; a zero gradient is a task for LibMTL, which holds the worst case at zero.
    size = norm(grads.mean(1))
    regular = ~np.isin(kind, ["zero_row", "badly_scaled"])
    close(updates[regular], theirs[regular], size[regular], 5e-3)
    at_most(worst_case(grads, theirs) - worst_case(grads, updates), 1e-6 * size * norm(grads).max(-1))


# -- PCGrad ----------------------------------------------------------------------------------------------------------


@jax.jit
def project(gramians, orders):
    """Weights `(cases, draws, T)` for `(cases, T, T)` Gramians and `(cases, draws, T, T)` orders."""
    return lax.map(lambda case: lax.map(functools.partial(mtl.pcgrad_weights, case[0]), case[1]), (gramians, orders))


@groups
def test_pcgrad_torchjd(group):
    case = CASES[group]
    grads, orders = torchjd(case, case["grads"]), case["torchjd.orders"].astype(int)
    weights, peer = project(gramian(grads), orders), case["torchjd.PCGrad"]
    close(weights, peer, norm(peer), 1e-12)


@groups
def test_pcgrad_conflictfree(group):
    case = CASES[group]
    recorded = np.isfinite(case["conflictfree.PCGradOperator"]).all(-1)  # not for d = 1000
    updates, _ = first_steps(functools.partial(mtl.pcgrad, order="fixed"), torchjd(case, case["grads"])[recorded])
    largest = norm(torchjd(case, case["grads"])[recorded]).max(-1)
    close(updates, case["conflictfree.PCGradOperator"][recorded], largest, 1e-12)


@groups
def test_pcgrad_libmtl(group):
    case = CASES[group]
    grads, orders = libmtl(case, case["grads"]), case["libmtl.orders"].astype(int)
    # LibMTL adds 1e-8 to squared norms, and a task may be projected against itself: here, against its copy.
    tasks = orders.shape[1]
    doubled = np.tile(gramian(grads), (1, 2, 2))
    doubled[:, range(tasks, 2 * tasks), range(tasks, 2 * tasks)] += 1e-8
    own = np.broadcast_to(np.arange(2 * tasks)[:, None], (len(grads), 2 * tasks, tasks))
    visits = np.concatenate([np.concatenate([orders + tasks, own[:, tasks:]], axis=1), own], axis=2)
    weights = np.asarray(project(doubled, visits[:, None]))[:, 0]
    weights = weights[:, :tasks] + weights[:, tasks:] - 1
    close(weights, case["libmtl.PCGrad"], norm(case["libmtl.PCGrad"]), 1e-12)
