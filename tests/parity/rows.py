"""The rows of the table: method by method, what we answer to what the peers were asked.

What is compared is the update, or the weights where nothing else is recorded: weights are not unique where gradients
are dependent. Where the peer's convention is another one, the conversion is made here, on its answer or on our input.
"""

import dataclasses
from unittest import mock

import jax
from jax import lax, numpy as jnp
import numpy as np
import optax

import optax_mtl as mtl
from optax_mtl._weighting import weighting
from parity.comparisons import (
    Answers,
    apply,
    COORDINATES,
    first_step,
    LONG_RUNS,
    MATRICES,
    MOST,
    relative,
    run,
    RUNS,
    SHORT_RUNS,
    STEPS,
    table,
)
from parity.records import gramian, inner, mix, norm

ROWS, row = table()

LIBMTL_LOSSES = RUNS("losses").reshape(-1, MOST)  # of STEPS


def mean_norm(cases):
    """The norm of the mean gradient of the tasks that are there."""
    tasks = cases.present.sum(-1).reshape(-1, *[1] * (cases.grads.ndim - 3))
    return norm(cases.grads.sum(-2)) / tasks


def vectors(cases, field):
    """Recorded vectors."""
    return cases(field)


def mixed(cases, field):
    """The vectors that belong to recorded weights."""
    return mix(cases(field), cases.grads)


def largest(cases):
    return norm(cases.grads).max(-1)


def equal_weights(cases):
    return cases.present / cases.present.sum(-1, keepdims=True)


def badly_scaled(cases):
    """Whether norms are far apart, of each answer."""
    bad = (cases.kind == "badly_scaled").reshape(-1, *[1] * (cases.grads.ndim - 3))
    return np.broadcast_to(bad, cases.grads.shape[:-2])


def errors(exact, *answers, scale):
    """How far each answer is from the exact one, relative to `scale`."""
    return tuple(relative(norm(answer - exact), scale) for answer in answers)


# -- Linear scalarization, RLW ---------------------------------------------------------------------------------------


def the_sum():
    return mtl.linear_scalarization(MOST)


@row("linear_scalarization", "TorchJD", "Sum", 1e-13)
def _(field):
    ours, _ = first_step(the_sum, MATRICES)
    return Answers(MATRICES, ours, MATRICES(field), largest(MATRICES))


@row("linear_scalarization", "TorchJD", "Mean", 1e-13, '`reduction="mean"`')
def _(field):
    ours, _ = first_step(lambda: mtl.linear_scalarization(MOST, reduction="mean"), MATRICES)
    return Answers(MATRICES, ours, MATRICES(field), largest(MATRICES))


@row("linear_scalarization", "TorchJD", "Constant.pref", 1e-13)
def _(field):
    pref = MATRICES("torchjd.pref")
    ours, _ = first_step(lambda weights: mtl.linear_scalarization(MOST, weights=weights), MATRICES, pref)
    return Answers(MATRICES, ours, MATRICES(field), largest(MATRICES))


@row("linear_scalarization", "LibMTL", "EW", 1e-13, "LibMTL sums, whatever its documentation says")
def _(field):
    ours, _ = first_step(the_sum, STEPS)
    return Answers(STEPS, ours, STEPS(field), largest(STEPS))


def rlw_weights(draws, present):
    return mtl.rlw_weights(draws, present=present)


@row("rlw", "TorchJD", "Random", 1e-14, "given its draws")
def _(field):
    ours = apply(rlw_weights, MATRICES("torchjd.z"), MATRICES.present)
    return Answers(MATRICES, ours, MATRICES(field))


@row("rlw", "LibMTL", "RLW", 1e-14, "given its draws")
def _(field):
    draws, present = SHORT_RUNS("z"), np.repeat(SHORT_RUNS.present[:, None], 5, axis=1)
    ours = apply(jax.vmap(rlw_weights), draws, present)
    return Answers(SHORT_RUNS, ours, SHORT_RUNS(field))


# -- MGDA ------------------------------------------------------------------------------------------------------------


def mgda():
    return mtl.mgda(MOST)


def mgda_torchjd(field):
    ours, _ = first_step(mgda, MATRICES)
    theirs, exact = mixed(MATRICES, field), MATRICES("exact.minnorm")
    scale = mean_norm(MATRICES)
    return Answers(MATRICES, ours, theirs, scale, errors=errors(exact, ours, theirs, scale=scale))


row("mgda", "TorchJD", "MGDA.default", 0.3, "stops at 1e-3 or after 100 steps of Frank-Wolfe", exact=1e-13)(
    mgda_torchjd
)
row("mgda", "TorchJD", "MGDA.tight", 0.1, "stops at 1e-7 or after 1000 steps", exact=1e-13)(mgda_torchjd)


@row("mgda", "LibMTL", "MGDA.none", 0.1, "weights of its line search end at 0.001 and 0.999; error: duality gap")
def _(field):
    ours, weights = first_step(mgda, STEPS)
    theirs = STEPS(field)
    gap = duality_gaps(STEPS.grads, STEPS.present, weights, theirs)
    return Answers(STEPS, ours, mix(theirs, STEPS.grads), largest(STEPS), errors=gap)


def duality_gaps(grads, present, *weights):
    """`(|d|^2 - min_i <g_i, d>) / max_i |g_i|^2` of each, zero at the min-norm point only."""
    gaps = []
    for each in weights:
        d = mix(each, grads)
        least = np.where(present, inner(grads, d), np.inf).min(-1)
        gaps.append(relative((d * d).sum(-1) - least, norm(grads).max(-1) ** 2))
    return tuple(gaps)


def mgda_normalized(field, normalization):
    updates, weights = first_step(lambda: mtl.mgda(MOST, normalization=normalization), STEPS, losses=LIBMTL_LOSSES)
    norms, losses = norm(STEPS.grads), LIBMTL_LOSSES
    lengths = {"l2": norms, "loss": losses, "loss+": losses * norms}[normalization]
    normalized = STEPS.grads / np.where(lengths > 0, lengths, 1)[..., None]
    theirs = STEPS(field)
    gap = duality_gaps(normalized, STEPS.present, weights, theirs)
    return Answers(STEPS, mix(weights, normalized), mix(theirs, normalized), norm(normalized).max(-1), errors=gap)


_NORMALIZED = "as above; of the normalized gradients, to which LibMTL applies the weights; NaN at a zero row"
row("mgda", "LibMTL", "MGDA.l2", 0.1, _NORMALIZED)(mgda_normalized, "l2")
row("mgda", "LibMTL", "MGDA.loss", 0.01, _NORMALIZED)(mgda_normalized, "loss")
row("mgda", "LibMTL", "MGDA.loss+", 0.1, _NORMALIZED)(mgda_normalized, "loss+")


# -- CAGrad ----------------------------------------------------------------------------------------------------------


def mean_and_step(c):
    return mtl.cagrad(MOST, c=c, rescale=0)


def cagrad(cases, c):
    """Updates, and the tasks' shares in the step from the mean gradient, on the simplex."""
    updates, weights = first_step(mean_and_step, cases, np.full(len(cases), c))
    away = np.where(norm(cases.grads) > 0, np.maximum(weights - equal_weights(cases), 0), 0)
    return updates, relative(away, away.sum(-1, keepdims=True))


def worst_case(cases, direction):
    """What CAGrad maximises: the least `<g_i, d>`, over the gradients that are not zero."""
    least = np.where(norm(cases.grads) > 0, inner(cases.grads, direction), np.inf).min(-1)
    return np.where(np.isfinite(least), least, 0)


def below_bound(cases, c, x, *directions):
    """How far the worst case of each direction is below a bound for all in the ball, relative to the size of its terms.

    For every direction in the ball and every x on the simplex, min_i <g_i, d> <= <g_x, mean> + c |mean| |g_x|; at the
    optimum both are equal, for the x of the step. (Reading x off the weights costs digits where norms are far apart.)
    """
    combination, centre = mix(x, cases.grads), mix(equal_weights(cases), cases.grads)
    bound = (combination * centre).sum(-1) + c * norm(centre) * norm(combination)
    size = norm(centre) * (x * norm(cases.grads)).sum(-1)
    return tuple(relative(np.maximum(bound - worst_case(cases, d), 0), size) for d in directions)


def cagrad_torchjd(field, c):
    weights = MATRICES(field)
    ours, x = cagrad(MATRICES, c)
    theirs = mix(weights, MATRICES.grads)
    error = below_bound(MATRICES, c, x, ours, theirs)
    return Answers(MATRICES, ours, theirs, mean_norm(MATRICES), trusted=weights.any(-1), errors=error)


_TORCHJD_CAGRAD = (
    "`rescale=0`; its solver stops at 1e-8 of the objective; left out: where it returns zero, once one task has "
    "converged; error: of the worst case"
)
row("cagrad", "TorchJD", "CAGrad.c0.5", 5e-4, _TORCHJD_CAGRAD, exact=1e-9)(cagrad_torchjd, 0.5)
row("cagrad", "TorchJD", "CAGrad.c0.9", 5e-4, _TORCHJD_CAGRAD, exact=1e-9)(cagrad_torchjd, 0.9)


def cagrad_libmtl(field, rescale):
    # For LibMTL a zero gradient is a task, which holds the worst case at zero.
    same_problem = STEPS.kind != "zero_row"
    factor = {0: 1, 1: 1 + 0.5**2, 2: 1 + 0.5}[rescale]
    ours, x = cagrad(STEPS, 0.5)
    theirs = STEPS(field)
    error = below_bound(STEPS, 0.5, x, ours, theirs * factor)
    error = tuple(np.where(np.isfinite(theirs).all(-1) & same_problem, each, np.nan) for each in error)
    return Answers(STEPS, ours / factor, theirs, mean_norm(STEPS), same_problem & ~badly_scaled(STEPS), error)


_LIBMTL_CAGRAD = (
    "SciPy stops at 1e-6 of the objective; left out: zero rows, which it takes for tasks, and bad scaling; error: of "
    "the worst case"
)
row("cagrad", "LibMTL", "CAGrad.r0", 5e-3, _LIBMTL_CAGRAD, exact=1e-9)(cagrad_libmtl, 0)
row("cagrad", "LibMTL", "CAGrad.r1", 5e-3, _LIBMTL_CAGRAD, exact=1e-9)(cagrad_libmtl, 1)
row("cagrad", "LibMTL", "CAGrad.r2", 5e-3, _LIBMTL_CAGRAD, exact=1e-9)(cagrad_libmtl, 2)


# -- PCGrad ----------------------------------------------------------------------------------------------------------


@row("pcgrad", "TorchJD", "PCGrad", 1e-12, "given its orders")
def _(field):
    orders = MATRICES.orders("torchjd.orders")
    ours = apply(jax.vmap(mtl.pcgrad_weights, (None, 0)), gramian(MATRICES.grads), orders)
    return Answers(MATRICES, np.where(MATRICES.present[:, None], ours, 0), MATRICES(field))


@row("pcgrad", "conflictfree", "PCGradOperator", 1e-12, '`order="fixed"`')
def _(field):
    ours, _ = first_step(lambda: mtl.pcgrad(MOST, order="fixed"), MATRICES)
    return Answers(MATRICES, ours, MATRICES(field), largest(MATRICES))


@row(
    "pcgrad",
    "LibMTL",
    "PCGrad",
    1e-12,
    "given its orders; each task has a copy to project it against, as LibMTL may project a task against itself, and"
    " 1e-8 is added to the copies' squared norms",
)
def _(field):
    orders = STEPS.orders("libmtl.orders")
    tasks = np.arange(2 * MOST)
    doubled = np.tile(gramian(STEPS.grads), (1, 2, 2))
    doubled[:, tasks[MOST:], tasks[MOST:]] += 1e-8 * STEPS.present
    own = np.broadcast_to(tasks[:, None], (len(orders), 2 * MOST, MOST))
    visits = np.concatenate([np.concatenate([orders + MOST, own[:, MOST:]], axis=1), own], axis=2)
    weights = np.asarray(apply(mtl.pcgrad_weights, doubled, visits))
    ours = weights[:, :MOST] + weights[:, MOST:] - 1
    return Answers(STEPS, np.where(STEPS.present, ours, 0), STEPS(field))


# -- DWA, uncertainty, GradNorm --------------------------------------------------------------------------------------


def learn(method, **per_step):
    return run(method, SHORT_RUNS.grads, SHORT_RUNS.present, losses=SHORT_RUNS("losses"), **per_step)


@row("dwa", "LibMTL", "DWA", 1e-14, "`steps_per_epoch=1`; TorchJD's weights are the same bit for bit")
def _(field):
    ours = learn(lambda: mtl.dwa(MOST, steps_per_epoch=1, temperature=2.0))[1].task_weights
    return Answers(SHORT_RUNS, ours, SHORT_RUNS(field))


def uncertainty(init):
    return learn(lambda: mtl.uncertainty(MOST, optimizer=optax.sgd(0.1), init=init))[1]


@row("uncertainty", "TorchJD", "UW", 1e-12, "SGD(0.1), as it was given")
def _(field):
    state = uncertainty(0.0)
    return Answers(SHORT_RUNS, state.task_weights, SHORT_RUNS(field))


@row("uncertainty", "LibMTL", "UW", 1e-12, "SGD(0.1), as it was given; `init=-0.5`")
def _(field):
    return Answers(SHORT_RUNS, uncertainty(-0.5).task_weights, SHORT_RUNS(field))


@row(
    "gradnorm",
    "LibMTL",
    "GradNorm",
    1e-12,
    "the gradient of the weights; LibMTL learns `p` and weighs by `T softmax(p)`, so ours goes through the Jacobian"
    " of that; left out: its first epoch, in which it does not learn",
)
def _(field):
    losses, weights = SHORT_RUNS("losses"), SHORT_RUNS(field)
    norms, present = norm(SHORT_RUNS.grads), np.repeat(SHORT_RUNS.present[:, None], 5, axis=1)
    ratios = np.where(present, losses / np.where(present, losses[:, :1], 1), 1)
    weigh = jax.vmap(lambda *args: mtl.gradnorm_weight_grads(*args[:3], present=args[3]))
    grads = np.asarray(apply(weigh, norms, weights, ratios, present))
    mean = (weights * grads).sum(-1, keepdims=True) / present.sum(-1, keepdims=True)
    learns = np.broadcast_to(np.arange(5) > 0, losses.shape[:2])
    return Answers(SHORT_RUNS, weights * (grads - mean), SHORT_RUNS("libmtl.GradNorm.grad"), norm(norms), learns)


# -- EDM and CDTT ----------------------------------------------------------------------------------------------------


def central_weights():
    """The authors' central direction as a convex combination, from min-norm weights of the unit gradients."""
    norms = norm(LONG_RUNS.grads)
    weights = LONG_RUNS("fw_weights") / np.where(norms > 0, norms, 1)
    return weights / weights.sum(-1, keepdims=True)


@row(
    "edm",
    "authors of CDTT",
    "fw_weights",
    2e-4,
    "the central direction; exact for two tasks, for three their Frank-Wolfe is up to 7e-5 off; error: duality gap "
    "of the unit gradients",
)
def _(field):
    updates, state = run(lambda: mtl.edm(MOST), LONG_RUNS.grads, LONG_RUNS.present)
    norms = norm(LONG_RUNS.grads)[..., None]
    unit = LONG_RUNS.grads / np.where(norms > 0, norms, 1)
    ours = np.asarray(state.task_weights) * norms[..., 0]
    theirs = LONG_RUNS("fw_weights")
    gap = duality_gaps(unit, LONG_RUNS.present[:, None], ours / ours.sum(-1, keepdims=True), theirs)
    return Answers(LONG_RUNS, updates, mix(central_weights(), LONG_RUNS.grads), errors=gap)


@row(
    "cdtt",
    "authors of CDTT",
    "direction",
    2e-4,
    "every step from the eleventh on, when the window is full; their central direction is up to 7e-5 off for three "
    "tasks (2e-11 for two)",
)
def _(field):
    updates, _ = run(
        lambda alpha: mtl.cdtt(MOST, alpha=alpha, window=10),
        LONG_RUNS.grads,
        LONG_RUNS.present,
        [LONG_RUNS("alpha", ())],
        losses=LONG_RUNS("losses"),
    )
    return Answers(LONG_RUNS, np.asarray(updates)[:, 10:], LONG_RUNS("direction", (20,)))


# -- Projections on the dual cone ------------------------------------------------------------------------------------


def regularised(cases, norm_eps=1e-4, reg_eps=1e-4):
    """The Gramians as TorchJD and LibMTL change them before they solve."""
    matrix = gramian(cases.grads)
    trace = np.trace(matrix, axis1=-2, axis2=-1)[..., None, None]
    identity = np.eye(MOST) * cases.present[:, None, :]
    return np.where(trace < norm_eps, 0, matrix / np.where(trace > 0, trace, 1)) + reg_eps * identity


def upgrad(matrix, preference, present):
    return mtl.upgrad_weights(matrix, preference=preference, present=present)


def dual_proj(matrix, preference, present):
    return mtl.dual_proj_weights(matrix, preference=preference, present=present)


def dual_cone(field, weigh, cases, exact=None, preference=None, **eps):
    """Ours on the regularised Gramian, against the peer; both, ours on the Gramian itself, against the exact one."""
    preference = equal_weights(cases) if preference is None else preference
    ours = mix(apply(weigh, regularised(cases, **eps), preference, cases.present), cases.grads)
    theirs, scale, error = mixed(cases, field), mean_norm(cases), None
    if exact is not None:
        plain = mix(apply(weigh, gramian(cases.grads), preference, cases.present), cases.grads)
        error = errors(cases(exact), plain, theirs, scale=scale)
    return Answers(cases, ours, theirs, scale, errors=error)


_REGULARISED = "given its Gramian: divided by the trace, and reg_eps on the diagonal; the error is that of ours without"
row("upgrad", "TorchJD", "UPGrad.default", 1e-9, _REGULARISED)(dual_cone, upgrad, MATRICES, "exact.upgrad")
row("upgrad", "TorchJD", "UPGrad.reg1e-8", 1e-6, _REGULARISED)(
    dual_cone, upgrad, MATRICES, "exact.upgrad", norm_eps=1e-12, reg_eps=1e-8
)
row("upgrad", "TorchJD", "UPGrad.pref", 1e-9, _REGULARISED)(
    dual_cone, upgrad, MATRICES, preference=MATRICES("torchjd.pref")
)
row("upgrad", "LibMTL", "UPGrad", 1e-9, _REGULARISED)(dual_cone, upgrad, STEPS)
row("dual_proj", "TorchJD", "DualProj.default", 1e-9, _REGULARISED)(dual_cone, dual_proj, MATRICES, "exact.dualproj")
row("dual_proj", "TorchJD", "DualProj.reg1e-8", 1e-6, _REGULARISED)(
    dual_cone, dual_proj, MATRICES, "exact.dualproj", norm_eps=1e-12, reg_eps=1e-8
)
row("dual_proj", "TorchJD", "DualProj.pref", 1e-9, _REGULARISED)(
    dual_cone, dual_proj, MATRICES, preference=MATRICES("torchjd.pref")
)


# -- FairGrad, Nash-MTL ----------------------------------------------------------------------------------------------


def bargaining_residual(cases, weights, alpha=1.0):
    """`max_i |w_i^(1 / alpha) <g_i, d> - 1|` over the tasks that have a gradient: zero at the solution."""
    products = inner(cases.grads, mix(weights, cases.grads))
    residual = np.abs(np.maximum(weights, 0) ** (1 / alpha) * products - 1)
    return np.where(norm(cases.grads) > 0, residual, 0).max(-1)


def solvable():
    """Whether a common descent direction, which a solution takes, is there for MATRICES, and no gradient is zero."""
    norms = np.where(MATRICES.present, norm(MATRICES.grads), np.inf).min(-1)
    return (norms > 0) & (norm(MATRICES("exact.minnorm")) > 1e-6 * norms)


def bargain(cases, ours, theirs, alpha=1.0):
    """Both weights, where the peer solved its equation; of MATRICES, the residuals too, where there is a solution."""
    residuals = tuple(bargaining_residual(cases, weights, alpha) for weights in (ours, theirs))
    errors = tuple(np.where(solvable(), residual, np.nan) for residual in residuals) if cases is MATRICES else None
    trusted = residuals[1] < 1e-5
    return Answers(cases, mix(ours, cases.grads), mix(theirs, cases.grads), trusted=trusted, errors=errors)


def fairgrad(alpha):
    return mtl.fairgrad(MOST, alpha=alpha)


def fair(field, cases, alpha):
    _, ours = first_step(fairgrad, cases, np.full(len(cases), alpha))
    return bargain(cases, ours, cases(field), alpha)


_RESIDUAL = (
    "left out: where the peer stopped early, with a residual of 1e-5 and more; error: the residual, where there is a "
    "solution"
)
row("fairgrad", "TorchJD", "FairGrad.alpha0.5", 1e-4, _RESIDUAL, exact=1e-8)(fair, MATRICES, 0.5)
row("fairgrad", "TorchJD", "FairGrad.alpha1", 1e-4, _RESIDUAL)(fair, MATRICES, 1.0)
row("fairgrad", "TorchJD", "FairGrad.alpha2", 1e-4, _RESIDUAL)(fair, MATRICES, 2.0)
row("fairgrad", "LibMTL", "FairGrad.alpha1", 1e-4, "left out: as above")(fair, STEPS, 1.0)
row("fairgrad", "LibMTL", "FairGrad.alpha2", 1e-4, "left out: as above")(fair, STEPS, 2.0)


def nash_unlimited():
    return mtl.nash_mtl(MOST, max_norm=None)


def nash():
    return mtl.nash_mtl(MOST)


@row("nash_mtl", "TorchJD", "NashMTL.max_norm0", 1e-4, _RESIDUAL)
def _(field):
    _, ours = first_step(nash_unlimited, MATRICES)
    return bargain(MATRICES, ours, MATRICES(field))


@row("nash_mtl", "TorchJD", "NashMTL.max_norm1", 1e-4, "left out: as above")
def _(field):
    ours, _ = first_step(nash, MATRICES)
    solved = bargaining_residual(MATRICES, MATRICES("torchjd.NashMTL.max_norm0")) < 1e-5
    theirs = mixed(MATRICES, field)
    return Answers(MATRICES, ours, theirs, trusted=solved)


def nash_steps(field, method, read):
    """Every step of RUNS; what is remembered of the last one is no more than where to start from."""
    ours, _ = first_step(method, STEPS)
    solved = bargaining_residual(RUNS, RUNS("libmtl.Nash_MTL.max_norm0")) < 1e-4
    return Answers(RUNS, ours.reshape(RUNS.grads[:, :, 0].shape), read(RUNS, field), trusted=solved)


_LIBMTL_NASH = "float32 weights; left out: as above, but 1e-4"
row("nash_mtl", "LibMTL", "Nash_MTL.max_norm0", 1e-4, _LIBMTL_NASH)(nash_steps, nash_unlimited, mixed)
row("nash_mtl", "LibMTL", "Nash_MTL.max_norm1", 1e-4, _LIBMTL_NASH)(nash_steps, nash, vectors)


# -- Aligned-MTL, IMTL, ConFIG ---------------------------------------------------------------------------------------


def aligned(field, scale_mode, preference=None):
    preference = equal_weights(MATRICES) if preference is None else preference
    ours, _ = first_step(lambda p: mtl.aligned_mtl(MOST, scale_mode=scale_mode, preference=p), MATRICES, preference)
    return Answers(MATRICES, ours, mixed(MATRICES, field), trusted=~badly_scaled(MATRICES))


_ALIGNED = "`preference=1/T`; left out: bad scaling, where eigenvalues are at the tolerance for the rank"
row("aligned_mtl", "TorchJD", "AlignedMTL.min", 1e-6, _ALIGNED)(aligned, "min")
row("aligned_mtl", "TorchJD", "AlignedMTL.median", 1e-6, _ALIGNED)(aligned, "median")
row("aligned_mtl", "TorchJD", "AlignedMTL.rmse", 1e-6, _ALIGNED)(aligned, "rmse")
row("aligned_mtl", "TorchJD", "AlignedMTL.min.pref", 1e-6, _ALIGNED)(aligned, "min", MATRICES("torchjd.pref"))


@row("aligned_mtl", "LibMTL", "Aligned_MTL", 1e-6, "left out: bad scaling, as above")
def _(field):
    ours, _ = first_step(lambda: mtl.aligned_mtl(MOST), STEPS)
    return Answers(STEPS, ours, mixed(STEPS, field), trusted=~badly_scaled(STEPS))


def unequal_projections(cases, direction):
    """By how much the projections of a direction on the gradients differ, relative to its length."""
    norms = norm(cases.grads)
    projections = inner(cases.grads, direction) / np.where(norms > 0, norms, 1)
    spread = np.where(norms > 0, projections, -np.inf).max(-1) - np.where(norms > 0, projections, np.inf).min(-1)
    return relative(np.where(norms.any(-1), spread, 0), norm(direction))


def independent(cases):
    """Whether the gradients that are not zero are linearly independent, by far."""
    norms = norm(cases.grads)[..., None]
    values = np.linalg.svd(cases.grads / np.where(norms > 0, norms, 1), compute_uv=False)
    return (values > 1e-4).sum(-1) == (norms > 0).sum((-2, -1))


def imtl_g():
    return mtl.imtl_g(MOST)


def impartial(field, read):
    ours, _ = first_step(imtl_g, MATRICES)
    theirs = read(MATRICES, field)
    errors = unequal_projections(MATRICES, ours), unequal_projections(MATRICES, theirs)
    errors = tuple(np.where(independent(MATRICES), error, np.nan) for error in errors)
    trusted = (errors[1] < 1e-6) & theirs.any(-1)
    return Answers(MATRICES, ours, theirs, trusted=trusted, errors=errors)


_IMPARTIAL = (
    "left out: dependent gradients, where projections cannot be equal, and where the peer's are not, or are zero; "
    "error: by how much they differ"
)
row("imtl_g", "TorchJD", "IMTLG", 1e-5, _IMPARTIAL)(impartial, mixed)
row("imtl_g", "conflictfree", "IMTLGOperator", 1e-5, _IMPARTIAL)(impartial, vectors)


@row(
    "imtl",
    "LibMTL",
    "IMTL",
    1e-5,
    "SGD(0.1), as it was given; left out: dependent gradients, and bad scaling, where its inverse is off",
)
def _(field):
    updates, _ = run(lambda: mtl.imtl(MOST, optimizer=optax.sgd(0.1)), RUNS.grads, RUNS.present, losses=RUNS("losses"))
    return Answers(RUNS, updates, RUNS(field), trusted=independent(RUNS) & ~badly_scaled(RUNS))


def con_fig(preference):
    return mtl.con_fig(MOST, preference=preference)


def conflict_free(field, preference=None):
    preference = MATRICES.present.astype(float) if preference is None else preference
    ours, _ = first_step(con_fig, MATRICES, preference)
    return Answers(MATRICES, ours, MATRICES(field))


row("con_fig", "TorchJD", "ConFIG", 1e-6)(conflict_free)
row("con_fig", "TorchJD", "ConFIG.pref", 1e-6)(conflict_free, MATRICES("torchjd.pref"))
row("con_fig", "conflictfree", "ConFIG.lstsq", 1e-6)(conflict_free)
row("con_fig", "conflictfree", "ConFIG.pinv", 1e-6)(conflict_free)


@row(
    "con_fig", "conflictfree", "ConFIGOperator", 1e-6, "left out: two duplicates, where its closed form divides 0 by 0"
)
def _(field):
    answers = conflict_free(field)
    regular = (MATRICES.kind != "duplicate") | (MATRICES.present.sum(-1) > 2)
    return dataclasses.replace(answers, trusted=regular)


@row("con_fig_momentum", "conflictfree", "PseudoMomentum.all", 1e-5, "left out: two duplicates, as above")
def _(field):
    updates, _ = run(lambda: mtl.con_fig_momentum(MOST), SHORT_RUNS.grads, SHORT_RUNS.present)
    return Answers(SHORT_RUNS, updates, SHORT_RUNS(field), trusted=not_two_duplicates())


def not_two_duplicates():
    regular = (SHORT_RUNS.kind != "duplicate") | (SHORT_RUNS.present.sum(-1) > 2)
    return np.broadcast_to(regular[:, None], SHORT_RUNS.grads.shape[:2])


def starts_late():
    """Its moments of the mixture start when every task has been seen."""
    inner = mtl.con_fig_momentum(MOST)

    def update(grads, state, params, *, task_mask, complete):
        updates, new = inner.update(grads, state, params, task_mask=task_mask)
        late = {
            name: jnp.where(complete, getattr(new.method, name), getattr(state.method, name))
            for name in ("steps", "moment", "second_moment")
        }
        return updates, new._replace(method=new.method._replace(**late))

    return optax.GradientTransformationExtraArgs(inner.init, update)


@row(
    "con_fig_momentum",
    "conflictfree",
    "PseudoMomentum.alternate",
    1e-5,
    "one task a step; its moments of the mixture start, as there, when every task has been seen, before which it "
    "does not move; left out: two duplicates",
)
def _(field):
    tasks, steps = SHORT_RUNS.present.sum(-1)[:, None], np.arange(3 * MOST)
    grads = np.take_along_axis(SHORT_RUNS.grads, np.minimum(steps // tasks, 4)[..., None, None], axis=1)
    turn = np.arange(MOST) == (steps % tasks)[..., None]
    complete = steps >= tasks - 1
    updates, _ = run(starts_late, grads, SHORT_RUNS.present, task_mask=turn, complete=complete)
    theirs = SHORT_RUNS(field, (3 * MOST, MOST))
    theirs[steps >= 3 * tasks] = np.nan  # there are no more
    return Answers(SHORT_RUNS, updates, theirs, trusted=complete & not_two_duplicates()[:, :1])


# -- Krum, GradVac ---------------------------------------------------------------------------------------------------


def krum(matrix, present, byzantine, selected):
    return mtl.krum_weights(matrix, n_byzantine=byzantine, n_selected=selected, present=present)


def distances(cases):
    """Distances between the gradients, `(cases, T, T)`; infinite to those that are not there."""
    found = norm(cases.grads[:, :, None] - cases.grads[:, None])
    return np.where(cases.present[:, :, None] & cases.present[:, None], found, np.inf)


_KRUM = (
    "given a Gramian whose squared distances are its distances, as TorchJD adds up distances, not their squares; left "
    "out: ties"
)


def nearest(field, byzantine, selected):
    options = [np.full(len(MATRICES), option) for option in (byzantine, selected)]
    apart = distances(MATRICES)
    finite = np.where(np.isfinite(apart), apart, 0)
    matrix = (finite[:, :1] + finite[:, :, :1] - finite) / 2
    ours = apply(krum, matrix, MATRICES.present, *options)

    near = np.sort(apart + np.where(np.eye(MOST), np.inf, 0), axis=-1)
    neighbours = MATRICES.present.sum(-1) - byzantine - 2
    counts = np.arange(MOST) < neighbours[:, None, None]
    scores = np.sort(np.where(counts, near, 0).sum(-1) + np.where(MATRICES.present, 0, np.inf), axis=-1)
    tied = scores[:, selected] <= scores[:, selected - 1] * (1 + 1e-9)
    return Answers(MATRICES, ours, MATRICES(field), trusted=~tied)


row("krum", "TorchJD", "Krum.b0.s1", 1e-12, _KRUM)(nearest, 0, 1)
row("krum", "TorchJD", "Krum.b1.s1", 1e-12, _KRUM)(nearest, 1, 1)
row("krum", "TorchJD", "Krum.b1.s2", 1e-12, _KRUM)(nearest, 1, 2)
row("krum", "TorchJD", "Krum.b2.s3", 1e-12, _KRUM)(nearest, 2, 3)


def turn(grams, orders):
    """GradVac over the steps of a run."""

    def step(targets, now):
        weights, targets = mtl.gradvac_weights(now[0], targets, now[1], beta=0.5)
        return targets, weights

    return lax.scan(step, jnp.zeros((MOST, MOST)), (grams, orders))[1]


_GRADVAC = (
    "given its orders, `beta=0.5`; left out: bad scaling, where the 1e-8 that it adds to products of norms counts "
    "(up "
    "to 3e-4)"
)


@row("gradvac", "TorchJD", "GradVac.first", 1e-6, _GRADVAC)
def _(field):
    orders = MATRICES.orders("torchjd.orders")[:, :1]
    ours = np.asarray(apply(turn, gramian(MATRICES.grads)[:, None], orders))[:, 0] * MATRICES.present
    theirs = mixed(MATRICES, field)
    return Answers(MATRICES, mix(ours, MATRICES.grads), theirs, largest(MATRICES), ~badly_scaled(MATRICES))


def gradvac(field, read):
    weights = apply(turn, gramian(RUNS.grads), RUNS.orders("libmtl.orders")) * RUNS.present[:, None]
    return Answers(RUNS, mix(weights, RUNS.grads), read(RUNS, field), largest(RUNS), ~badly_scaled(RUNS))


row("gradvac", "TorchJD", "GradVac", 1e-6, _GRADVAC)(gradvac, mixed)
row("gradvac", "LibMTL", "GradVac", 1e-6, _GRADVAC)(gradvac, vectors)


# -- CR-MOGM, PCD, update_every ---------------------------------------------------------------------------------------


def torchjd_upgrad():
    """UPGrad of the Gramian as TorchJD regularises it."""

    def rule(matrix, state, *, present, **_):
        share = jnp.where(present, 1, 0) / jnp.maximum(jnp.sum(present), 1)
        trace = jnp.trace(matrix)
        matrix = jnp.where(trace < 1e-4, 0, matrix / jnp.where(trace > 0, trace, 1))
        return mtl.upgrad_weights(matrix + 1e-4 * jnp.diag(jnp.where(present, 1.0, 0)), preference=share), state

    return weighting("upgrad", MOST, rule)


@row("cr_mogm", "TorchJD", "CRMOGM.UPGrad", 1e-9, "of an `upgrad` that is given TorchJD's Gramian")
def _(field):
    method = lambda: mtl.cr_mogm(MOST, torchjd_upgrad(), alpha=0.9)
    updates, _ = run(method, RUNS.grads, RUNS.present)
    return Answers(RUNS, updates, mixed(RUNS, field))


@row(
    "cr_mogm",
    "TorchJD",
    "CRMOGM.MGDA.init",
    1e-9,
    "of `mgda`; left out: three tasks and more, where theirs is not exact",
)
def _(field):
    method = lambda init: mtl.cr_mogm(MOST, mtl.mgda(MOST), alpha=0.5, init=init)
    updates, _ = run(method, RUNS.grads, RUNS.present, (equal_weights(RUNS),))
    theirs = mixed(RUNS, field)
    exact = np.repeat(RUNS.present.sum(-1, keepdims=True) <= 2, 5, axis=1)
    return Answers(RUNS, updates, theirs, largest(RUNS), exact)


def first_pcd(field, tau):
    def weigh(matrix, present):
        sizes = jnp.sqrt(jnp.diagonal(matrix) + 1e-8)
        return mtl.pcd_weights(matrix, sizes, jnp.arange(MOST) == 0, tau=tau, present=present)

    ours = mix(apply(weigh, gramian(MATRICES.grads), MATRICES.present), MATRICES.grads)
    return Answers(MATRICES, ours, mixed(MATRICES, field))


_FIRST_PCD = "given the sizes that it divides by, with 1e-8 in them"
row("pcd", "TorchJD", "PCD.tau0.02", 1e-6, _FIRST_PCD)(first_pcd, 0.02)
row("pcd", "TorchJD", "PCD.tau0.3", 1e-6, _FIRST_PCD)(first_pcd, 0.3)


def pcd(field, tau, beta):
    ours, _ = run(lambda: mtl.pcd(MOST, tau=tau, beta=beta), RUNS.grads, RUNS.present)
    return Answers(RUNS, ours, mixed(RUNS, field), trusted=~badly_scaled(RUNS))


_PCD = "left out: bad scaling, where the 1e-8 that it adds to squared norms counts"
row("pcd", "TorchJD", "PCD.default", 1e-6, _PCD)(pcd, 0.02, 0.999)
row("pcd", "TorchJD", "PCD.tau0.3.beta0.5", 1e-6, _PCD)(pcd, 0.3, 0.5)


@row("update_every", "TorchJD", "NashMTL.every2", 1e-4, "of `nash_mtl`; left out: where the peer stopped early")
def _(field):
    updates, _ = run(lambda: mtl.update_every(MOST, nash_unlimited(), every=2), RUNS.grads, RUNS.present)
    theirs = RUNS(field)
    solved = bargaining_residual(RUNS, theirs) < 1e-5
    solved[:, 1::2] = solved[:, :-1:2]  # the steps in between have the weights of those before
    return Answers(RUNS, updates, mix(theirs, RUNS.grads), trusted=solved)


# -- Functions of the losses -----------------------------------------------------------------------------------------


def scalarized(field, weigh):
    """Derivatives of a scalarized loss."""
    ours = apply(weigh, MATRICES("losses"), MATRICES.present, MATRICES("torchjd.pref"))
    return Answers(MATRICES, ours, MATRICES(field))


row("gls", "TorchJD", "GeometricMean", 1e-13)(
    scalarized, lambda losses, present, _: mtl.gls_weights(losses, present=present)
)


@row("gls", "LibMTL", "GLS", 1e-13, "the weights of its update; those that it returns are other ones")
def _(field):
    updates, _ = learn(lambda: mtl.gls(MOST))
    return Answers(SHORT_RUNS, updates, SHORT_RUNS(field))


row("stch", "TorchJD", "STCH.mu1", 1e-13)(
    scalarized, lambda losses, present, _: mtl.stch_weights(losses, mu=1.0, present=present)
)
row("stch", "TorchJD", "STCH.mu0.1", 1e-13)(
    scalarized, lambda losses, present, _: mtl.stch_weights(losses, mu=0.1, present=present)
)


@row("stch", "TorchJD", "STCH.mu0.5.pref", 1e-13)
def _(field):
    def weigh(losses, present, pref):
        reference = jnp.full(MOST, 0.02)
        return mtl.stch_weights(losses, mu=0.5, preference=pref, reference=reference, present=present)

    return scalarized(field, weigh)


def stch_log(field, mu, warmup):
    options = {"form": "log", "steps_per_epoch": 1, "warmup_epochs": warmup}
    updates, _ = learn(lambda: mtl.stch(MOST, mu=mu, **options))
    return Answers(SHORT_RUNS, updates, SHORT_RUNS(field))


row("stch", "LibMTL", "STCH.mu1.w1", 1e-12, '`form="log"`, each step an epoch')(stch_log, 1.0, 1)
row("stch", "LibMTL", "STCH.mu0.1.w0", 1e-12, '`form="log"`, each step an epoch')(stch_log, 0.1, 0)


@row("cosmos", "TorchJD", "COSMOS", 1e-12)
def _(field):
    def weigh(losses, present, pref):
        return mtl.cosmos_weights(losses, preference=pref, present=present)

    return scalarized(field, weigh)


row("pbi", "TorchJD", "PBI", 1e-9, "it adds 1e-12 under the root of the distance from the ray")(
    scalarized, lambda losses, present, pref: mtl.pbi_weights(losses, preference=pref, present=present)
)


# -- FAMO, IMTL-L ----------------------------------------------------------------------------------------------------


def famo():
    after = np.roll(SHORT_RUNS("losses_after"), 1, axis=1)  # the first step's is ignored
    return learn(lambda: mtl.famo(MOST), losses_after=np.where(SHORT_RUNS.present[:, None], after, 1))


_FAMO = "`losses_after` of a step are given in the next; the peer adds 1e-8 to losses"


@row("famo", "TorchJD", "FAMO", 1e-5, _FAMO)
def _(field):
    return Answers(SHORT_RUNS, famo()[1].task_weights, SHORT_RUNS(field))


@row("famo", "LibMTL", "FAMO", 1e-5, _FAMO)
def _(field):
    return Answers(SHORT_RUNS, famo()[0], SHORT_RUNS(field))


@row("imtl_l", "TorchJD", "IMTLL", 1e-12, "SGD(0.1), as it was given")
def _(field):
    state = learn(lambda: mtl.imtl_l(MOST, optimizer=optax.sgd(0.1)))[1]
    return Answers(SHORT_RUNS, state.task_weights, SHORT_RUNS(field))


# -- Methods of several samples, or with a gradient a task in their state --------------------------------------------


def stochastic(method, first, *others):
    """Updates and weights of a method that is given two more samples of the gradients."""
    samples = [SHORT_RUNS.grads if name == "grads" else SHORT_RUNS(name, (MOST, MOST)) for name in (first, *others)]
    updates, state = run(method, samples[0], SHORT_RUNS.present, independent_grads=tuple(samples[1:]))
    return np.asarray(updates), np.asarray(state.task_weights)


def modo(field, gamma):
    _, weights = stochastic(lambda: mtl.modo(MOST, gamma=gamma, rho=0.1), "grads_3", "grads", "grads_2")
    return Answers(SHORT_RUNS, weights, SHORT_RUNS(field))


row("modo", "TorchJD", "MoDo.default", 1e-12)(modo, 0.1)
row("modo", "TorchJD", "MoDo.gamma0.001", 1e-12)(modo, 1e-3)
row("modo", "LibMTL", "MoDo", 1e-12)(modo, 1e-3)


def sdmgrad(rate):
    return stochastic(lambda: mtl.sdmgrad(MOST, inner_learning_rate=rate), "grads", "grads_2", "grads_3")


@row("sdmgrad", "TorchJD", "SDMGrad.lr0.5", 1e-6, "at a rate at which rounding does not grow")
def _(field):
    return Answers(SHORT_RUNS, sdmgrad(0.5)[1], SHORT_RUNS(field))


@row("sdmgrad", "LibMTL", "SDMGrad", 1e-6, "left out: more than three tasks, as rounding grows at its rate of 5")
def _(field):
    few = np.repeat(SHORT_RUNS.present.sum(-1, keepdims=True) <= 3, 5, axis=1)
    return Answers(SHORT_RUNS, sdmgrad(5.0)[0], SHORT_RUNS(field), largest(SHORT_RUNS), few)


# -- Coordinate by coordinate ----------------------------------------------------------------------------------------


def given_draws(method):
    """The transformation `method(leak)`, with `draws` for its uniform random numbers."""

    def make(leak, draws):
        inner = method(leak)

        def update(*args, **kwargs):
            with mock.patch.object(jax.random, "uniform", return_value=draws):
                return inner.update(*args, **kwargs)

        return optax.GradientTransformationExtraArgs(inner.init, update)

    return make


def drop_signs(field, leak):
    method = given_draws(lambda leak: mtl.graddrop(MOST, 0, leak=leak))
    updates, _ = run(method, COORDINATES.grads[:, None], COORDINATES.present, (leak, COORDINATES("uniforms", (20,))))
    return Answers(COORDINATES, np.asarray(updates)[:, 0], COORDINATES(field, (20,)), largest(COORDINATES))


row("graddrop", "TorchJD", "GradDrop", 1e-13, "given its draws")(drop_signs, np.zeros_like(COORDINATES("pref")))
row("graddrop", "TorchJD", "GradDrop.leakpref", 1e-13, "given its draws; `leak` is a preference vector")(
    drop_signs, COORDINATES("pref")
)


def trimmed(field, k):
    updates, _ = run(lambda: mtl.trimmed_mean(MOST, k=k), COORDINATES.grads[:, None], COORDINATES.present)
    theirs = COORDINATES(field, (20,))
    return Answers(COORDINATES, np.asarray(updates)[:, 0], theirs, largest(COORDINATES))


row("trimmed_mean", "TorchJD", "TrimmedMean.1", 1e-13)(trimmed, 1)
row("trimmed_mean", "TorchJD", "TrimmedMean.2", 1e-13)(trimmed, 2)


def tracked(field, method):
    updates, _ = learn(method)
    return Answers(SHORT_RUNS, updates, SHORT_RUNS(field), trusted=~badly_scaled(SHORT_RUNS))


_ADDED = "left out: bad scaling, where the 1e-8 that it adds to norms and losses counts (up to 1e-3)"
row("moco", "LibMTL", "MoCo", 1e-6, f'`mapping="softmax", prenorm=True`; {_ADDED}')(
    tracked, lambda: mtl.moco(MOST, mapping="softmax", prenorm=True)
)
row("db_mtl", "LibMTL", "DB_MTL.b0.9.s0", 1e-5, _ADDED)(tracked, lambda: mtl.db_mtl(MOST, beta=0.9, beta_sigma=0.0))
row("db_mtl", "LibMTL", "DB_MTL.b0.9.s0.5", 1e-5, _ADDED)(tracked, lambda: mtl.db_mtl(MOST, beta=0.9, beta_sigma=0.5))


def excess(step_size, warmup=0):
    """Weights that sum to one."""
    method = lambda: mtl.excess_mtl(MOST, step_size=step_size, warmup_steps=warmup)
    _, state = run(method, SHORT_RUNS.grads, SHORT_RUNS.present)
    return np.asarray(state.task_weights) / SHORT_RUNS.present.sum(-1)[:, None, None]


def without_zero_rows(cases):
    return np.broadcast_to((cases.kind != "zero_row")[:, None], cases.grads.shape[:-2])


_EXCESS = "sum to `T` here and to one there; "
_EXCESS_EPS = "left out: zero rows, and bad scaling, where the 1e-7 that it adds to sums of squares counts"
_EXCESS_FIRST = "times those of its first step, which it takes by the excess risks themselves; "


def excess_torchjd(field, step_size, warmup=0):
    ours, theirs = excess(step_size, warmup), SHORT_RUNS(field)
    if not warmup:
        ours = ours * theirs[:, :1]
        ours /= ours.sum(-1, keepdims=True)
    return Answers(SHORT_RUNS, ours, theirs, trusted=without_zero_rows(SHORT_RUNS) & ~badly_scaled(SHORT_RUNS))


row("excess_mtl", "TorchJD", "ExcessMTL.step1", 1e-5, _EXCESS + _EXCESS_FIRST + _EXCESS_EPS)(excess_torchjd, 1.0)
row("excess_mtl", "TorchJD", "ExcessMTL.step0.01", 1e-5, _EXCESS + _EXCESS_FIRST + _EXCESS_EPS)(excess_torchjd, 0.01)
row("excess_mtl", "TorchJD", "ExcessMTL.warm2", 1e-5, _EXCESS + _EXCESS_EPS)(excess_torchjd, 0.1, 2)


@row("excess_mtl", "LibMTL", "ExcessMTL", 1e-5, _EXCESS_EPS)
def _(field):
    ours = excess(0.01) * SHORT_RUNS.present.sum(-1)[:, None, None]
    trusted = without_zero_rows(SHORT_RUNS) & ~badly_scaled(SHORT_RUNS)
    return Answers(SHORT_RUNS, ours, SHORT_RUNS(field), trusted=trusted)
