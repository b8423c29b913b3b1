"""The rows of the table: method by method, what we answer to what the peers were asked.

What is compared is the update, or the weights where nothing else is recorded: weights are not unique where gradients
are dependent. Where the peer's convention is another one, the conversion is made here, on its answer or on our input.
"""

import jax
import numpy as np
import optax

import optax_mtl as mtl
from parity.comparisons import (
    Answers,
    apply,
    first_step,
    LONG_RUNS,
    MATRICES,
    MOST,
    relative,
    row,
    ROWS as ROWS,
    run,
    RUNS,
    SHORT_RUNS,
    STEPS,
)
from parity.records import gramian, inner, mix, norm

LIBMTL_LOSSES = RUNS("losses").reshape(-1, MOST)  # of STEPS


def mean_norm(cases):
    """The norm of the mean gradient of the tasks that are there."""
    tasks = cases.present.sum(-1).reshape(-1, *[1] * (cases.grads.ndim - 3))
    return norm(cases.grads.sum(-2)) / tasks


def largest(cases):
    return norm(cases.grads).max(-1)


def errors(exact, *answers, scale):
    """How far each answer is from the exact one, relative to `scale`."""
    return tuple(relative(norm(answer - exact), scale) for answer in answers)


# -- Linear scalarization, RLW ---------------------------------------------------------------------------------------


def the_sum():
    return mtl.linear_scalarization(MOST)


@row("linear_scalarization", "TorchJD", "Sum", 1e-13)
def _():
    ours, _ = first_step(the_sum, MATRICES)
    return Answers(MATRICES, ours, MATRICES("torchjd.Sum"), largest(MATRICES))


@row("linear_scalarization", "TorchJD", "Mean", 1e-13, '`reduction="mean"`')
def _():
    ours, _ = first_step(lambda: mtl.linear_scalarization(MOST, reduction="mean"), MATRICES)
    return Answers(MATRICES, ours, MATRICES("torchjd.Mean"), largest(MATRICES))


@row("linear_scalarization", "TorchJD", "Constant.pref", 1e-13)
def _():
    pref = MATRICES("torchjd.pref")
    ours, _ = first_step(lambda weights: mtl.linear_scalarization(MOST, weights=weights), MATRICES, pref)
    return Answers(MATRICES, ours, MATRICES("torchjd.Constant.pref"), largest(MATRICES))


@row("linear_scalarization", "LibMTL", "EW", 1e-13, "LibMTL sums, whatever its documentation says")
def _():
    ours, _ = first_step(the_sum, STEPS)
    return Answers(STEPS, ours, STEPS("libmtl.EW"), largest(STEPS))


def rlw_weights(draws, present):
    return mtl.rlw_weights(draws, present=present)


@row("rlw", "TorchJD", "Random", 1e-14, "given its draws")
def _():
    ours = apply(rlw_weights, MATRICES("torchjd.z"), MATRICES.present)
    return Answers(MATRICES, ours, MATRICES("torchjd.Random"))


@row("rlw", "LibMTL", "RLW", 1e-14, "given its draws")
def _():
    draws, present = SHORT_RUNS("z"), np.repeat(SHORT_RUNS.present[:, None], 5, axis=1)
    ours = apply(jax.vmap(rlw_weights), draws, present)
    return Answers(SHORT_RUNS, ours, SHORT_RUNS("libmtl.RLW"))


# -- MGDA ------------------------------------------------------------------------------------------------------------


def mgda():
    return mtl.mgda(MOST)


def mgda_torchjd(config):
    ours, _ = first_step(mgda, MATRICES)
    theirs, exact = mix(MATRICES(f"torchjd.{config}"), MATRICES.grads), MATRICES("exact.minnorm")
    scale = mean_norm(MATRICES)
    return Answers(MATRICES, ours, theirs, scale, errors=errors(exact, ours, theirs, scale=scale))


@row("mgda", "TorchJD", "MGDA.default", 0.3, "stops at 1e-3 or after 100 steps of Frank-Wolfe", exact=1e-13)
def _():
    return mgda_torchjd("MGDA.default")


@row("mgda", "TorchJD", "MGDA.tight", 0.1, "stops at 1e-7 or after 1000 steps", exact=1e-13)
def _():
    return mgda_torchjd("MGDA.tight")


@row("mgda", "LibMTL", "MGDA.none", 0.5, "weights of its line search end at 0.001 and 0.999; error: duality gap")
def _():
    ours, weights = first_step(mgda, STEPS)
    theirs = STEPS("libmtl.MGDA.none")
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


def mgda_normalized(normalization):
    updates, weights = first_step(lambda: mtl.mgda(MOST, normalization=normalization), STEPS, losses=LIBMTL_LOSSES)
    norms, losses = norm(STEPS.grads), LIBMTL_LOSSES
    lengths = {"l2": norms, "loss": losses, "loss+": losses * norms}[normalization]
    normalized = STEPS.grads / np.where(lengths > 0, lengths, 1)[..., None]
    theirs = STEPS(f"libmtl.MGDA.{normalization}")
    gap = duality_gaps(normalized, STEPS.present, weights, theirs)
    return Answers(STEPS, mix(weights, normalized), mix(theirs, normalized), norm(normalized).max(-1), errors=gap)


_NORMALIZED = "as above; of the normalized gradients, to which LibMTL applies the weights; NaN at a zero row"


@row("mgda", "LibMTL", "MGDA.l2", 0.5, _NORMALIZED)
def _():
    return mgda_normalized("l2")


@row("mgda", "LibMTL", "MGDA.loss", 0.5, _NORMALIZED)
def _():
    return mgda_normalized("loss")


@row("mgda", "LibMTL", "MGDA.loss+", 0.5, _NORMALIZED)
def _():
    return mgda_normalized("loss+")


# -- CAGrad ----------------------------------------------------------------------------------------------------------


def mean_and_step(c):
    return mtl.cagrad(MOST, c=c, rescale=0)


def cagrad(cases, c):
    return first_step(mean_and_step, cases, np.full(len(cases), c))[0]


def cagrad_torchjd(config, c):
    weights = MATRICES(f"torchjd.{config}")
    ours, theirs = cagrad(MATRICES, c), mix(weights, MATRICES.grads)
    return Answers(MATRICES, ours, theirs, mean_norm(MATRICES), trusted=weights.any(-1))


_TORCHJD_CAGRAD = "`rescale=0`; its solver stops at 1e-8 of the objective; left out: where it returns zero"


@row("cagrad", "TorchJD", "CAGrad.c0.5", 5e-4, _TORCHJD_CAGRAD)
def _():
    return cagrad_torchjd("CAGrad.c0.5", 0.5)


@row("cagrad", "TorchJD", "CAGrad.c0.9", 5e-4, _TORCHJD_CAGRAD)
def _():
    return cagrad_torchjd("CAGrad.c0.9", 0.9)


def cagrad_libmtl(rescale):
    # For LibMTL a zero gradient is a task, which holds the worst case at zero.
    trusted = ~np.isin(STEPS.kind, ["zero_row", "badly_scaled"])
    ours = cagrad(STEPS, 0.5) / {0: 1, 1: 1 + 0.5**2, 2: 1 + 0.5}[rescale]
    return Answers(STEPS, ours, STEPS(f"libmtl.CAGrad.r{rescale}"), mean_norm(STEPS), trusted)


_LIBMTL_CAGRAD = "SciPy stops at 1e-6 of the objective; left out: zero rows, which it takes for tasks, and bad scaling"


@row("cagrad", "LibMTL", "CAGrad.r0", 5e-3, _LIBMTL_CAGRAD)
def _():
    return cagrad_libmtl(0)


@row("cagrad", "LibMTL", "CAGrad.r1", 5e-3, _LIBMTL_CAGRAD)
def _():
    return cagrad_libmtl(1)


@row("cagrad", "LibMTL", "CAGrad.r2", 5e-3, _LIBMTL_CAGRAD)
def _():
    return cagrad_libmtl(2)


# -- PCGrad ----------------------------------------------------------------------------------------------------------


@row("pcgrad", "TorchJD", "PCGrad", 1e-12, "given its orders")
def _():
    orders = MATRICES.orders("torchjd.orders")
    ours = apply(jax.vmap(mtl.pcgrad_weights, (None, 0)), gramian(MATRICES.grads), orders)
    return Answers(MATRICES, np.where(MATRICES.present[:, None], ours, 0), MATRICES("torchjd.PCGrad"))


@row("pcgrad", "conflictfree", "PCGradOperator", 1e-12, '`order="fixed"`')
def _():
    ours, _ = first_step(lambda: mtl.pcgrad(MOST, order="fixed"), MATRICES)
    return Answers(MATRICES, ours, MATRICES("conflictfree.PCGradOperator"), largest(MATRICES))


@row(
    "pcgrad",
    "LibMTL",
    "PCGrad",
    1e-12,
    "given its orders; each task has a copy to project it against, as LibMTL may "
    "project a task against itself, and 1e-8 is added to the copies' squared norms",
)
def _():
    orders = STEPS.orders("libmtl.orders")
    tasks = np.arange(2 * MOST)
    doubled = np.tile(gramian(STEPS.grads), (1, 2, 2))
    doubled[:, tasks[MOST:], tasks[MOST:]] += 1e-8 * STEPS.present
    own = np.broadcast_to(tasks[:, None], (len(orders), 2 * MOST, MOST))
    visits = np.concatenate([np.concatenate([orders + MOST, own[:, MOST:]], axis=1), own], axis=2)
    weights = np.asarray(apply(mtl.pcgrad_weights, doubled, visits))
    ours = weights[:, :MOST] + weights[:, MOST:] - 1
    return Answers(STEPS, np.where(STEPS.present, ours, 0), STEPS("libmtl.PCGrad"))


# -- DWA, uncertainty, GradNorm --------------------------------------------------------------------------------------


def learn(method):
    return run(method, SHORT_RUNS.grads, SHORT_RUNS.present, losses=SHORT_RUNS("losses"))[1]


@row("dwa", "LibMTL", "DWA", 1e-14, "`steps_per_epoch=1`; TorchJD's weights are the same bit for bit")
def _():
    ours = learn(lambda: mtl.dwa(MOST, steps_per_epoch=1, temperature=2.0)).task_weights
    return Answers(SHORT_RUNS, ours, SHORT_RUNS("libmtl.DWA"))


def uncertainty(init):
    return learn(lambda: mtl.uncertainty(MOST, optimizer=optax.sgd(0.1), init=init))


@row("uncertainty", "TorchJD", "UW", 1e-12, "SGD(0.1), as it was given")
def _():
    state = uncertainty(0.0)
    return Answers(SHORT_RUNS, state.task_weights, SHORT_RUNS("torchjd.UW"))


@row("uncertainty", "LibMTL", "UW", 1e-12, "SGD(0.1), as it was given; `init=-0.5`")
def _():
    return Answers(SHORT_RUNS, uncertainty(-0.5).task_weights, SHORT_RUNS("libmtl.UW"))


@row(
    "gradnorm",
    "LibMTL",
    "GradNorm",
    1e-12,
    "the gradient of the weights; LibMTL learns `p` and weighs by "
    "`T softmax(p)`, so ours goes through the Jacobian of that; left out: its first epoch, in which it does not learn",
)
def _():
    losses, weights = SHORT_RUNS("losses"), SHORT_RUNS("libmtl.GradNorm")
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
    "the central direction; exact for two tasks, for three their "
    "Frank-Wolfe is up to 7e-5 off; error: duality gap of the unit gradients",
)
def _():
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
    "every step from the eleventh on, when the window is full; their "
    "central direction is up to 7e-5 off for three tasks (2e-11 for two)",
)
def _():
    updates, _ = run(
        lambda alpha: mtl.cdtt(MOST, alpha=alpha, window=10),
        LONG_RUNS.grads,
        LONG_RUNS.present,
        [LONG_RUNS("alpha", ())],
        losses=LONG_RUNS("losses"),
    )
    return Answers(LONG_RUNS, np.asarray(updates)[:, 10:], LONG_RUNS("direction", (20,)))
