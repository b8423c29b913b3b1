"""The methods on show, and how each is put together for an experiment.

One convention for all: what a paper writes as weights on the *losses* weights trunk and heads alike; what a paper does
to the *gradients of the shared parameters* is done to the trunk, and each head gets its own task's gradient.

`CATALOGUE` has the library's methods, `VARIANTS` some of them at another grain or in Adam's geometry, `METHODS` both,
and `GROUPS` what the command line offers under one name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax

import optax_mtl as mtl


@dataclass(frozen=True)
class Setting:
    """What an experiment gives to every method alike.

    Attributes:
      num_tasks: number of tasks `T`.
      learning_rate: of the optimiser, of MAO and of HydaLearn's trial steps.
      optimizer: what turns the balanced gradient into a step.
      key: a random key, another for each seed.
      steps_per_epoch: optimiser steps in an epoch.
      form: `"classification"` or `"regression"`, what the losses are, all of them or each.
      primary: the task that the methods with a main task serve.
    """

    num_tasks: int
    learning_rate: float
    optimizer: optax.GradientTransformation
    key: jax.Array
    steps_per_epoch: int
    form: str | Sequence[str]
    primary: int = 0


@dataclass(frozen=True)
class Method:
    """A method on show.

    Attributes:
      build: makes the whole optimiser.
      summary: one line for `--list`.
      serves_primary: whether it serves one main task rather than all.
      weights_losses: whether it weights trunk and heads, as weights on the losses do.
    """

    build: Callable[[Setting], optax.GradientTransformation]
    summary: str
    serves_primary: bool = False
    weights_losses: bool = False


def is_shared(path: str) -> bool:
    """Whether the parameter at `path` belongs to the trunk."""
    return path.startswith("trunk")


_Make = Callable[[Setting], optax.GradientTransformation]
_Method = Callable[[int], optax.GradientTransformationExtraArgs]  # from the number of tasks


def _weighted(make: _Make, summary: str, serves_primary: bool = False) -> Method:
    """Weights the losses: trunk and heads."""
    return Method(lambda s: optax.chain(make(s), s.optimizer), summary, serves_primary, weights_losses=True)


def _balanced(make: _Make, summary: str, serves_primary: bool = False) -> Method:
    """Balances the trunk's gradients; the heads' are their own."""
    return Method(
        lambda s: optax.chain(mtl.shared_and_heads(make(s), shared=is_shared), s.optimizer), summary, serves_primary
    )


CATALOGUE = {
    "linear_scalarization": _weighted(
        lambda s: mtl.linear_scalarization(s.num_tasks),
        "equal weighting: the sum of the losses",
    ),
    "rlw": _weighted(
        lambda s: mtl.rlw(s.num_tasks, s.key),
        "random weights, new ones at every step",
    ),
    "uncertainty": _weighted(
        lambda s: mtl.uncertainty(s.num_tasks, form=s.form),
        "weights learned as the noise level of each task",
    ),
    "dwa": _weighted(
        lambda s: mtl.dwa(s.num_tasks, steps_per_epoch=s.steps_per_epoch),
        "more weight where the loss falls more slowly",
    ),
    "adaptive_weight_assignment": _weighted(
        lambda s: mtl.adaptive_weight_assignment(s.num_tasks),
        "weights proportional to the losses",
    ),
    "gls": _weighted(
        lambda s: mtl.gls(s.num_tasks),
        "the geometric mean of the losses",
    ),
    "scale_invariant": _weighted(
        lambda s: mtl.scale_invariant(s.num_tasks),
        "the sum of the losses' logarithms",
    ),
    "uw_o": _weighted(
        lambda s: mtl.uw_o(s.num_tasks),
        "weights inverse to the losses",
    ),
    "uw_so": _weighted(
        lambda s: mtl.uw_so(s.num_tasks),
        "the softmax of the inverse losses",
    ),
    "imtl_l": _weighted(
        lambda s: mtl.imtl_l(s.num_tasks),
        "scales learned so that all losses are alike",
    ),
    "cov_weighting": _weighted(
        lambda s: mtl.cov_weighting(s.num_tasks),
        "more weight where the loss still varies",
    ),
    "slaw": _weighted(
        lambda s: mtl.slaw(s.num_tasks),
        "weights inverse to the losses' standard deviations",
    ),
    "igb": _weighted(
        lambda s: mtl.igb(s.num_tasks, steps_per_epoch=s.steps_per_epoch),
        "log losses, more weight where the gap is still large",
    ),
    "famo": _weighted(
        lambda s: mtl.famo(s.num_tasks),
        "weights learned so that all losses fall at one relative rate",
    ),
    "go4align": _weighted(
        lambda s: mtl.go4align(s.num_tasks),
        "tasks in two groups, each with one weight",
    ),
    "stch": _weighted(
        lambda s: mtl.stch(s.num_tasks, form="log", steps_per_epoch=s.steps_per_epoch, warmup_epochs=1),
        "a soft maximum of the losses, relative to those after a warm-up",
    ),
    "group_dro": _weighted(
        lambda s: mtl.group_dro(s.num_tasks),
        "weights grow exponentially with the losses",
    ),
    "cosmos": _weighted(
        lambda s: mtl.cosmos(s.num_tasks),
        "the mean loss, held near equal losses",
    ),
    "pbi": _weighted(
        lambda s: mtl.pbi(s.num_tasks),
        "equal losses first, then small ones",
    ),
    "ldc_mtl": _weighted(
        lambda s: mtl.ldc_mtl(s.num_tasks),
        "a learned router, and a penalty on gaps between the weighted losses",
    ),
    "gradnorm": _balanced(
        lambda s: mtl.gradnorm(s.num_tasks),
        "weights learned so that gradient norms follow training rates",
    ),
    "mgda": _balanced(
        lambda s: mtl.mgda(s.num_tasks),
        "the shortest convex combination of the gradients",
    ),
    "pcgrad": _balanced(
        lambda s: mtl.pcgrad(s.num_tasks, s.key),
        "projects conflicting gradients off each other",
    ),
    "cagrad": _balanced(
        lambda s: mtl.cagrad(s.num_tasks),
        "helps the worst task, near the mean gradient",
    ),
    "edm": _balanced(
        lambda s: mtl.edm(s.num_tasks),
        "the central direction: equal angles to all gradients",
    ),
    "cdtt": _balanced(
        lambda s: mtl.cdtt(s.num_tasks),
        "the central direction, pulled towards tasks that lag",
    ),
    "upgrad": _balanced(
        lambda s: mtl.upgrad(s.num_tasks),
        "every gradient projected so that none conflicts, then averaged",
    ),
    "dual_proj": _balanced(
        lambda s: mtl.dual_proj(s.num_tasks),
        "the mean gradient, projected so that none conflicts",
    ),
    "nash_mtl": _balanced(
        lambda s: mtl.nash_mtl(s.num_tasks),
        "the tasks' bargain, blind to their scales",
    ),
    "fairgrad": _balanced(
        lambda s: mtl.fairgrad(s.num_tasks),
        "gains shared out fairly",
    ),
    "gradvac": _balanced(
        lambda s: mtl.gradvac(s.num_tasks, s.key),
        "pulls gradients to the cosines they used to have",
    ),
    "imtl_g": _balanced(
        lambda s: mtl.imtl_g(s.num_tasks),
        "equal projections on all tasks",
    ),
    "imtl": _balanced(
        lambda s: mtl.imtl(s.num_tasks),
        "learned loss scales, then equal projections",
    ),
    "aligned_mtl": _balanced(
        lambda s: mtl.aligned_mtl(s.num_tasks),
        "gradients made orthogonal and equally long",
    ),
    "con_fig": _balanced(
        lambda s: mtl.con_fig(s.num_tasks),
        "equal angles with all tasks",
    ),
    "sdmgrad": _balanced(
        lambda s: mtl.sdmgrad(s.num_tasks),
        "the min-norm point, held near the mean, in a few warm steps",
    ),
    "modo": _balanced(
        lambda s: mtl.modo(s.num_tasks),
        "the min-norm point, one step of it at every step",
    ),
    "moco": _balanced(
        lambda s: mtl.moco(s.num_tasks),
        "the min-norm point of the gradients' running means",
    ),
    "db_mtl": _balanced(
        lambda s: mtl.db_mtl(s.num_tasks),
        "running means of the log losses' gradients, all of one norm",
    ),
    "excess_mtl": _balanced(
        lambda s: mtl.excess_mtl(s.num_tasks),
        "more weight where the excess risk is estimated higher",
    ),
    "graddrop": _balanced(
        lambda s: mtl.graddrop(s.num_tasks, s.key),
        "keeps one sign at every parameter, drawn by its share",
    ),
    "mao": Method(
        lambda s: mtl.mao(s.learning_rate, s.num_tasks),
        "one Adam a task, their steps summed",
    ),
    "mtadam": Method(
        lambda s: mtl.mtadam(s.learning_rate, s.num_tasks),
        "one Adam a task on gradients of one norm a leaf, one denominator for all",
    ),
    "madam": _balanced(
        lambda s: mtl.madam(s.num_tasks, mtl.mgda(s.num_tasks)),
        "mgda, preconditioned for the weights of each step",
    ),
    "apt": Method(
        lambda s: optax.chain(
            mtl.apt(s.num_tasks, mtl.shared_and_heads(mtl.mgda(s.num_tasks), shared=is_shared)),
            optax.scale_by_learning_rate(s.learning_rate),
        ),
        "mgda, then Adam with a momentum that gives way to conflicts with the past",
    ),
    "ial": Method(
        lambda s: optax.chain(mtl.ial(s.num_tasks, primary=s.primary, shared=is_shared), s.optimizer),
        "auxiliary gradients rescaled to the primary task's",
        serves_primary=True,
    ),
    "grad_cosine": _balanced(
        lambda s: mtl.grad_cosine(s.num_tasks, primary=s.primary),
        "auxiliary gradients while they agree with the primary task's",
        serves_primary=True,
    ),
    "ol_aux": _weighted(
        lambda s: mtl.ol_aux(s.num_tasks, primary=s.primary),
        "weights learned by how much each helper helped the primary task",
        serves_primary=True,
    ),
    "bloop": _balanced(
        lambda s: mtl.bloop(s.num_tasks, primary=s.primary),
        "auxiliary gradients across the primary task's running mean",
        serves_primary=True,
    ),
    "auto_lambda": _weighted(
        lambda s: mtl.auto_lambda(s.num_tasks, learning_rate=s.learning_rate, primary=s.primary),
        "weights that descend on the primary task's loss one step ahead",
        serves_primary=True,
    ),
    "auxi_nash": _balanced(
        lambda s: mtl.auxi_nash(s.num_tasks, primary=s.primary),
        "a bargain whose powers are learned for the primary task",
        serves_primary=True,
    ),
    "pcd": _balanced(
        lambda s: mtl.pcd(s.num_tasks, primary=s.primary),
        "the primary task's gradient, with a share for every other",
        serves_primary=True,
    ),
    "hydalearn": _weighted(
        lambda s: mtl.hydalearn(s.num_tasks, learning_rate=s.learning_rate, primary=s.primary),
        "weights by what a trial step on each task gains the primary one",
        serves_primary=True,
    ),
}


def _layer(path: str) -> str:
    return path.rpartition("/")[0]


def _by(method: _Method, blocks: Any) -> _Make:
    return lambda s: mtl.blockwise(method(s.num_tasks), blocks)


def _preconditioned(method: _Method) -> _Make:
    """One Adam a task, and the balance of what they make; heads and all, in place of the optimiser."""
    return lambda s: optax.chain(
        mtl.precondition_then_balance(mtl.shared_and_heads(method(s.num_tasks), shared=is_shared), s.num_tasks),
        optax.scale_by_learning_rate(s.learning_rate),
    )


def _in_metric(method: _Method) -> _Make:
    """The balance in the metric of the Adam that follows."""
    return lambda s: mtl.balance_in_metric(
        mtl.shared_and_heads(method(s.num_tasks), shared=is_shared), optax.adam(s.learning_rate)
    )


AT_GRAINS: dict[str, _Method] = {
    "mgda": mtl.mgda,
    "upgrad": mtl.upgrad,
    "nash_mtl": mtl.nash_mtl,
    "cagrad": mtl.cagrad,
}
IN_GEOMETRY = ("mgda", "upgrad")  # nash_mtl's update has one length for all gradients, and needs an optimiser behind it
VARIANTS = {
    **{
        f"{name}_by_layer": _balanced(_by(m, _layer), f"{name}, by layer of the trunk") for name, m in AT_GRAINS.items()
    },
    **{f"{name}_by_leaf": _balanced(_by(m, "leaf"), f"{name}, by leaf of the trunk") for name, m in AT_GRAINS.items()},
    **{f"{m}_preconditioned": Method(_preconditioned(AT_GRAINS[m]), f"one Adam a task, then {m}") for m in IN_GEOMETRY},
    **{f"{m}_in_metric": Method(_in_metric(AT_GRAINS[m]), f"{m} in the metric of Adam") for m in IN_GEOMETRY},
    "mean_preconditioned": Method(
        _preconditioned(mtl.mean_tasks), "one Adam a task, their steps averaged on the trunk"
    ),
}
METHODS = CATALOGUE | VARIANTS
BASELINE = "linear_scalarization"
GROUPS = {
    "all": tuple(CATALOGUE),
    "grain": (BASELINE, "mao", "madam", "apt", *AT_GRAINS, *VARIANTS),
}
