"""THE table of methods: one row for each method and each of its forms that behaves differently.

A new method is a row here: `test_laws.py` does the rest, and `test_catalogue.py` says if the row is missing.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from jax import numpy as jnp
import numpy as np
import optax

import optax_mtl as mtl


@dataclasses.dataclass(frozen=True, eq=False)  # a row is itself: programs are cached by it
class Case:
    """A row.

    Attributes:
      factory: `factory(num_tasks, **kwargs)` is the transformation. It is public, and names the method.
      kwargs: hyper-parameters; a callable value is called with `num_tasks`.
      label: distinguishes the forms of one method.
      static: hyper-parameters that `optax.inject_hyperparams` must leave alone.
      needs: what `update` must be given: "losses", "positive losses", "params", "value_fn", or a name in
        `problems.extra_args`.
      alone: `alone(g, loss)` is the update for one task with gradient `g`, in the first step.
      scale: power of a common factor of the gradients in the update; None if there is no such law.
      keeps: opt-in laws: "permutation", "non-conflicting", "task-scale", "linear", "simplex", "sum" (weights
        sum to the number of tasks present), "stationary".
      lacks: laws that cannot hold, with the reason.
      optax_inside: whether Optax's own code, not written for strict promotion, runs in it.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""
    static: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    alone: Callable[[np.ndarray, float], np.ndarray] = lambda g, loss: g
    scale: float | None = 1
    keeps: frozenset[str] = frozenset()
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)
    optax_inside: bool = False

    @property
    def method(self) -> str:
        return self.factory.__name__

    def __str__(self) -> str:
        return f"{self.method}-{self.label}" if self.label else self.method

    def hyperparams(self, num_tasks: int) -> dict[str, Any]:
        return {
            name: value(num_tasks) if callable(value) and name not in self.static else value
            for name, value in self.kwargs.items()
        }

    def make(self, num_tasks: int) -> optax.GradientTransformationExtraArgs:
        return self.factory(num_tasks, **self.hyperparams(num_tasks))


def row(factory, label="", needs=(), keeps=(), lacks=None, **fields):
    return Case(factory, label=label, needs=frozenset(needs), keeps=frozenset(keeps), lacks=lacks or {}, **fields)


def adam_step(g, loss):
    return g / (np.abs(g) + 1e-8)


def leaf_rms_step(g, loss):
    leaves = np.split(g, [4])  # problems.SHAPES
    return np.concatenate([leaf / np.sqrt(np.mean(leaf**2)) for leaf in leaves])


def unit_step(g, loss):
    return g / np.linalg.norm(g)


RANDOM = {"absent": "other draws for another number of tasks", "precision": "other draws in another dtype"}
TRACKED = {"weights": "weights the tracked gradients", "gramian": "needs the gradients"}
PRECONDITIONED = {"weights": "preconditions what it has mixed", "gramian": "needs the gradients"}
MIXER = {"weights": "mixes elementwise: there is no weight vector", "gramian": "needs the gradients"}

CASES = (
    # -- Static, random and loss weightings --------------------------------------------------------------------------
    row(mtl.sum_tasks, keeps=("permutation", "linear")),
    row(mtl.mean_tasks, keeps=("permutation", "linear", "simplex")),
    row(mtl.linear_scalarization, keeps=("permutation", "linear")),
    row(
        mtl.linear_scalarization,
        "weighted mean",
        kwargs={"weights": lambda num_tasks: 2.0 * jnp.ones(num_tasks), "reduction": "mean"},
        alone=lambda g, loss: 2 * g,
        keeps=("permutation", "linear"),
    ),
    row(mtl.rlw, kwargs={"key": 0}, keeps=("simplex",), lacks=RANDOM),
    row(
        mtl.rlw,
        "dirichlet",
        kwargs={"key": 1, "distribution": "dirichlet", "total": 2.0},
        alone=lambda g, loss: 2 * g,
        lacks=RANDOM,
    ),
    row(mtl.uncertainty, needs=("losses",), alone=lambda g, loss: g / 2, keeps=("permutation",), optax_inside=True),
    row(
        mtl.uncertainty,
        "classification",
        kwargs={"form": "classification", "optimizer": optax.sgd(0.1), "init": 0.5},
        needs=("losses",),
        alone=lambda g, loss: np.exp(-0.5) * g,
        keeps=("permutation",),
    ),
    row(
        mtl.uncertainty,
        "reu",
        kwargs={"variant": "reu", "optimizer": optax.sgd(0.1)},
        needs=("losses",),
        alone=lambda g, loss: g / 2,
        keeps=("permutation", "linear"),
    ),
    row(mtl.gls, needs=("positive losses",), keeps=("permutation", "linear")),
    row(
        mtl.scale_invariant,
        needs=("positive losses",),
        alone=lambda g, loss: g / loss,
        keeps=("permutation", "linear"),
    ),
    row(
        mtl.scale_invariant,
        "log1p",
        kwargs={"mode": "log1p", "preference": lambda num_tasks: 2.0 * jnp.ones(num_tasks)},
        needs=("positive losses",),
        alone=lambda g, loss: 2 * g / (1 + loss),
        keeps=("permutation", "linear"),
    ),
    row(mtl.uw_o, needs=("positive losses",), keeps=("permutation", "linear", "simplex")),
    row(mtl.uw_so, needs=("positive losses",), keeps=("permutation", "linear", "simplex")),
    row(
        mtl.dwa,
        kwargs={"steps_per_epoch": 1},
        static=("steps_per_epoch",),
        needs=("losses",),
        keeps=("permutation", "sum"),
    ),
    row(
        mtl.dwa,
        "epochs of 2",
        kwargs={"steps_per_epoch": 2, "temperature": 0.5},
        static=("steps_per_epoch",),
        needs=("losses",),
        keeps=("sum",),
    ),
    row(mtl.adaptive_weight_assignment, needs=("losses",), keeps=("permutation", "simplex")),
    row(
        mtl.adaptive_weight_assignment,
        "softmax",
        kwargs={"mode": "softmax", "total": 3.0},
        needs=("losses",),
        alone=lambda g, loss: 3 * g,
        keeps=("permutation",),
    ),
    row(
        mtl.adaptive_weight_assignment,
        "epochs of 2",
        kwargs={"steps_per_epoch": 2},
        needs=("losses",),
        keeps=("permutation", "simplex"),
        static=("steps_per_epoch",),
    ),
    # -- Loss weightings that learn or remember ----------------------------------------------------------------------
    row(mtl.gradnorm, needs=("losses",), keeps=("permutation", "sum"), optax_inside=True),
    row(
        mtl.imtl_l,
        kwargs={"optimizer": optax.sgd(0.1)},
        needs=("losses",),
        keeps=("permutation", "linear"),
    ),
    row(
        mtl.dtp,
        needs=("kpis",),
        alone=lambda g, loss: (1 - np.exp(-loss)) * loss * g,
        keeps=("permutation", "linear"),
    ),
    row(mtl.cov_weighting, needs=("positive losses",), keeps=("permutation", "linear", "simplex")),
    row(mtl.slaw, needs=("losses",), keeps=("permutation", "linear", "sum")),
    row(
        mtl.igb,
        kwargs={"steps_per_epoch": 1},
        static=("steps_per_epoch",),
        needs=("positive losses",),
        alone=lambda g, loss: g / loss,
        keeps=("permutation", "linear"),
    ),
    row(mtl.famo, needs=("positive losses",), keeps=("permutation", "simplex"), optax_inside=True),
    row(
        mtl.go4align,
        static=("num_groups",),
        needs=("positive losses",),
        keeps=("permutation",),
    ),
    row(mtl.stch, kwargs={"mu": 0.5}, needs=("losses",), keeps=("permutation",)),
    row(
        mtl.stch,
        "log",
        kwargs={"mu": 0.5, "form": "log", "steps_per_epoch": 1, "warmup_epochs": 1},
        static=("steps_per_epoch", "warmup_epochs"),
        needs=("positive losses",),
        alone=lambda g, loss: g / loss,
        keeps=("permutation",),
    ),
    row(mtl.group_dro, kwargs={"step_size": 0.5}, needs=("losses",), keeps=("permutation", "simplex")),
    row(mtl.cosmos, needs=("losses",), keeps=("permutation",)),
    row(mtl.pbi, needs=("losses",), keeps=("permutation",)),
    row(mtl.ldc_mtl, needs=("positive losses",), optax_inside=True),
    # -- Weightings from the Gramian ---------------------------------------------------------------------------------
    row(mtl.mgda, keeps=("permutation", "non-conflicting", "simplex", "stationary")),
    row(mtl.mgda, "l2", kwargs={"normalization": "l2"}, keeps=("permutation", "simplex")),
    row(
        mtl.mgda,
        "loss+",
        kwargs={"normalization": "loss+"},
        needs=("positive losses",),
        keeps=("permutation", "simplex"),
    ),
    row(mtl.pcgrad, kwargs={"key": 0}, keeps=("linear",)),
    row(mtl.pcgrad, "shared mean", kwargs={"key": 0, "order": "shared", "reduction": "mean"}),
    row(mtl.pcgrad, "fixed", kwargs={"order": "fixed"}, keeps=("linear",)),
    row(mtl.cagrad, kwargs={"c": 0.4}, alone=lambda g, loss: 1.4 / 1.16 * g, keeps=("permutation",)),
    row(
        mtl.cagrad,
        "c=1",
        kwargs={"c": 1.0, "rescale": 0},
        alone=lambda g, loss: 2 * g,
        keeps=("permutation", "non-conflicting", "stationary"),
    ),
    row(mtl.edm, keeps=("permutation", "non-conflicting", "task-scale", "simplex", "stationary")),
    row(mtl.dual_proj, keeps=("permutation", "non-conflicting", "stationary")),
    row(mtl.upgrad, keeps=("permutation", "non-conflicting", "linear", "stationary")),
    row(
        mtl.nash_mtl,
        alone=unit_step,
        scale=0,
        keeps=("permutation", "non-conflicting", "task-scale"),
    ),
    row(
        mtl.nash_mtl,
        "preference",
        kwargs={"preference": lambda num_tasks: 2.0 * jnp.ones(num_tasks), "max_norm": None},
        alone=lambda g, loss: np.sqrt(2) * unit_step(g, loss),
        scale=0,
        keeps=("permutation",),
    ),
    row(
        mtl.fairgrad,
        alone=lambda g, loss: np.linalg.norm(g) ** (-4 / 3) * g,
        scale=-1 / 3,
        keeps=("permutation", "non-conflicting"),
    ),
    row(
        mtl.db_mtl,
        kwargs={"beta_sigma": 0.5},
        needs=("positive losses",),
        alone=lambda g, loss: 0.1 * g / loss,
        keeps=("permutation", "task-scale"),
        lacks=TRACKED,
    ),
    row(
        mtl.db_mtl,
        "beta=0",
        kwargs={"beta": 0.0},
        needs=("positive losses",),
        alone=lambda g, loss: g / loss,
        keeps=("permutation", "task-scale"),
    ),
    row(
        mtl.excess_mtl,
        kwargs={"warmup_steps": 2},
        keeps=("permutation", "linear", "sum"),
        lacks={"gramian": "needs the gradients"},
    ),
    row(
        mtl.pike,
        kwargs={"zeta1": 0.1, "zeta2": 0.1},
        needs=("gradient_variance",),
        scale=None,  # its factors are absolute
        keeps=("permutation", "simplex"),
    ),
    row(
        mtl.pike,
        "balanced",
        kwargs={"zeta1": 0.01, "zeta2": 0.1, "every": 2, "tau": 1.5},
        needs=("gradient_variance", "losses"),
        alone=lambda g, loss: 1.5 * g,
        scale=None,
        keeps=("permutation",),
    ),
    row(
        mtl.cdtt,
        kwargs={"window": 2},
        static=("window",),
        needs=("positive losses",),
        scale=None,  # pulls have a length of their own
    ),
    row(
        mtl.cdtt,
        "relative",
        kwargs={"window": 1, "tension": "relative", "passes": 2},
        static=("window",),
        needs=("positive losses",),
    ),
    row(mtl.gradvac, kwargs={"key": 0, "beta": 0.3}, keeps=("linear",)),
    row(
        mtl.gradvac,
        "leaf",
        kwargs={"key": 0, "granularity": "leaf", "order": "shared"},
        keeps=("linear",),
        lacks={
            "weights": "every leaf has its own",
            "leaves": "weights differ from leaf to leaf",
            "gramian": "needs one for every leaf",
        },
    ),
    row(mtl.imtl_g, keeps=("permutation", "task-scale")),  # with a negative weight, rescaling may turn it round
    row(mtl.imtl, needs=("losses",), keeps=("permutation", "task-scale"), optax_inside=True),
    row(mtl.aligned_mtl, keeps=("permutation",)),
    row(mtl.con_fig, keeps=("permutation", "task-scale", "linear")),
    row(
        mtl.con_fig_momentum,
        alone=adam_step,
        scale=None,  # Adam's epsilon is absolute
        keeps=("permutation", "task-scale"),
        lacks=PRECONDITIONED,
    ),
    row(
        mtl.krum,
        kwargs={"n_selected": lambda num_tasks: min(2, num_tasks)},
        keeps=("permutation", "simplex"),
    ),
    # -- Stochastic multi-objective methods --------------------------------------------------------------------------
    # At the default rate of 10 rounding may decide where the weights end, from one program or machine to another.
    row(mtl.sdmgrad, kwargs={"inner_learning_rate": 0.5}, keeps=("permutation", "simplex")),
    row(mtl.modo, keeps=("permutation", "simplex"), scale=None),  # the weights' step is absolute
    row(
        mtl.moco,
        alone=lambda g, loss: g / 2,
        scale=None,  # the weights' step is absolute
        keeps=("permutation", "simplex"),
        lacks=TRACKED,
    ),
    row(
        mtl.moco,
        "softmax",
        kwargs={"mapping": "softmax", "prenorm": True},
        static=("mapping", "prenorm"),
        needs=("positive losses",),
        alone=lambda g, loss: 0.5 * loss * g / np.linalg.norm(g),
        scale=0,
        keeps=("permutation", "simplex"),
        lacks=TRACKED,
    ),
    # -- Auxiliary learning ------------------------------------------------------------------------------------------
    row(mtl.grad_cosine, keeps=("linear",)),
    row(mtl.grad_cosine, "weighted", kwargs={"mode": "weighted", "primary": -1}, keeps=("linear",)),
    row(mtl.grad_cosine, "project", kwargs={"mode": "project", "primary": lambda num_tasks: (0, num_tasks - 1)}),
    row(
        mtl.ol_aux,
        kwargs={"every": 2, "optimizer": optax.sgd(0.1)},
        scale=None,  # the weights change by the gradients' products
        keeps=("linear",),  # in the first step
    ),
    row(
        mtl.bloop,
        keeps=("linear",),
        lacks={
            "weights": "takes a multiple of the primary's running mean out of the weighted sum",
            "gramian": "keeps a running mean of gradients",
        },
    ),
    row(mtl.pcd, kwargs={"tau": 0.1}, keeps=("task-scale", "linear")),
    row(
        mtl.auto_lambda,
        kwargs={"learning_rate": 1e-2, "primary": lambda num_tasks: tuple(range(num_tasks))},
        needs=("params", "value_fn"),
        alone=lambda g, loss: 0.0999 * g,  # Adam's first step is 1e-4; this gradient raises the other loss
        scale=None,  # the weights change by products of gradients
        keeps=("permutation",),
        lacks={"gramian": "multiplies the gradients with one of validation data"},
        optax_inside=True,
    ),
    row(
        mtl.auxi_nash,
        kwargs={"every": 2},
        needs=("params", "value_fn"),
        alone=unit_step,
        scale=0,
        keeps=("non-conflicting", "task-scale"),
        lacks={"gramian": "multiplies the gradients with one of validation data"},
    ),
    row(
        mtl.hydalearn,
        kwargs={"learning_rate": 1e-2},
        needs=("params", "value_fn"),
        keeps=("simplex",),
        scale=None,  # a longer trial step gains something else
        lacks={"gramian": "takes trial steps along the gradients", "precision": "a difference of two losses"},
    ),
    row(
        mtl.hydalearn,
        "first order",
        kwargs={"learning_rate": 1e-2, "lookahead": "first_order"},
        keeps=("simplex",),
    ),
    row(mtl.ial, needs=("losses",), optax_inside=True),
    row(
        mtl.ial,
        "ratio",
        kwargs={"uncertainty_fn": "ratio", "optimizer": optax.sgd(0.1)},
        needs=("losses",),
    ),
    # -- Mixers and wrappers -----------------------------------------------------------------------------------------
    row(mtl.cr_mogm, kwargs={"inner": mtl.mgda}, keeps=("permutation",)),
    row(mtl.update_every, kwargs={"inner": mtl.mgda, "every": 2}, keeps=("permutation", "simplex")),
    # Behind a weighting, with its simplex; Adam's epsilon, in both, is absolute.
    row(
        mtl.madam,
        kwargs={"inner": mtl.mgda},
        alone=adam_step,
        scale=None,
        keeps=("permutation", "simplex"),
        lacks=PRECONDITIONED,
    ),
    row(
        mtl.madam,
        "own squares only",
        kwargs={"inner": mtl.upgrad, "cross": False, "ramp_steps": 2},
        alone=lambda g, loss: (g + adam_step(g, loss)) / 2,
        scale=None,
        keeps=("permutation",),
        lacks=PRECONDITIONED,
    ),
    row(
        mtl.apt,
        kwargs={"inner": mtl.upgrad},
        alone=adam_step,
        scale=None,
        keeps=("permutation",),
        lacks=PRECONDITIONED,
    ),
    row(
        mtl.graddrop,
        kwargs={"key": 0, "leak": 0.25},
        keeps=("permutation",),
        lacks=MIXER | {"leaves": "draws leaf by leaf"},
    ),
    row(
        mtl.trimmed_mean,
        kwargs={"k": lambda num_tasks: (num_tasks - 1) // 2},
        keeps=("permutation",),
        lacks=MIXER,
    ),
    row(
        mtl.scale_by_mao,
        alone=adam_step,
        scale=None,  # Adam's epsilon is absolute
        keeps=("permutation",),
        lacks=MIXER,
    ),
    row(
        mtl.scale_by_mao,
        "amsgrad mean",
        kwargs={
            "base": "amsgrad",
            "reduction": "mean",
            "preference": lambda num_tasks: 2.0 * jnp.ones(num_tasks),
            "mu_dtype": jnp.bfloat16,
        },
        static=("base", "reduction", "mu_dtype"),
        alone=adam_step,
        scale=None,
        keeps=("permutation",),
        lacks=MIXER,
    ),
    row(
        mtl.scale_by_mao,
        "optax",
        kwargs={"base": optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False)},
        static=("base",),
        alone=lambda g, loss: g / (np.sqrt(1e-3) * np.abs(g) + 1e-8),
        scale=None,
        keeps=("permutation",),
        lacks=MIXER,
        optax_inside=True,
    ),
    row(
        mtl.scale_by_mao,
        "leaf",
        kwargs={"grain": "leaf"},
        alone=leaf_rms_step,
        scale=None,
        keeps=("permutation",),
        lacks=MIXER | {"leaves": "mixes leaf by leaf"},
    ),
    row(
        mtl.scale_by_mtadam,
        alone=adam_step,
        scale=None,
        lacks=MIXER | {"leaves": "rescales leaf by leaf"},
    ),
)

FIRST_ROWS = {case.method: case for case in reversed(CASES)}  # of each method
