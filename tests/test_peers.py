"""Against other libraries as they are installed (`pip install '.[peers]'`), on inputs that are new in every run.

`tests/parity` has their recorded answers to difficult inputs; these are easy ones, that everyone solves. LibMTL is not
here: its release does not run on torch 2.
"""

from collections.abc import Callable
import dataclasses
import secrets

import jax
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

pytestmark = pytest.mark.peers

STEPS = 4
SIZE = 30


@dataclasses.dataclass(frozen=True)
class Peer:
    """One method of ours and one of theirs.

    Attributes:
      method: our name.
      theirs: from torch and the number of tasks to a function of the inputs and a step, which returns the update.
      options: our hyper-parameters; or a function of the number of tasks that returns them.
      tolerance: relative to the norm of the mean gradient.
      worth: for peers that may stop early without a word, what the method maximises, from gradients and direction; then
        ours is to be worth as much at least, and need not be close.
      tasks: numbers of tasks to compare for.
      given: further arguments of our update, from the inputs and the number of the step.
    """

    method: str
    theirs: Callable
    options: dict | Callable = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-10
    worth: Callable | None = None
    tasks: tuple[int, ...] = (2, 4)
    given: Callable = lambda inputs, k: {}

    def __str__(self):
        return self.method

    def ours(self, num_tasks):
        options = self.options(num_tasks) if callable(self.options) else self.options
        return getattr(mtl, self.method)(num_tasks, **options)


@dataclasses.dataclass(frozen=True)
class Inputs:
    grads: np.ndarray
    others: np.ndarray  # two more samples
    losses: np.ndarray
    losses_after: np.ndarray


def draw(num_tasks, seed):
    """Gradients in general position, some of which conflict, of norms within a factor of three; positive losses."""
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((STEPS, num_tasks, SIZE)) - 0.3 * rng.standard_normal((STEPS, 1, SIZE))
    grads *= rng.uniform(0.5, 1.5, (STEPS, num_tasks, 1))
    others = grads + 0.2 * rng.standard_normal((2, *grads.shape))
    losses = rng.uniform(0.1, 3, (2, STEPS, num_tasks))
    return Inputs(grads, others, *losses)


def aggregator(make):
    """An aggregator of TorchJD, made of its module `aggregation` and the number of tasks."""

    def theirs(torch, num_tasks):
        aggregation = pytest.importorskip("torchjd.aggregation", reason="pip install '.[peers]'")
        aggregate = make(aggregation, num_tasks)
        return lambda inputs, k: aggregate(torch.tensor(inputs.grads[k])).numpy()

    return theirs


def cross_weighting(make):
    """A weighting of TorchJD of the matrix of inner products between two samples of the gradients."""

    def theirs(torch, num_tasks):
        aggregation = pytest.importorskip("torchjd.aggregation", reason="pip install '.[peers]'")
        weigh = make(aggregation, num_tasks)

        def update(inputs, k):
            first, second = inputs.others[:, k]
            return weigh(torch.tensor(first @ second.T)).numpy() @ inputs.grads[k]

        return update

    return theirs


def scalarizer(make, learn=lambda torch, scalarizer: lambda inputs, k: None):
    """A scalarizer of TorchJD; its weights are the derivatives of the scalarized loss. `learn` makes its own step."""

    def theirs(torch, num_tasks):
        scalarization = pytest.importorskip("torchjd.scalarization", reason="pip install '.[peers]'")
        scalarize = make(scalarization, num_tasks)
        after_step = learn(torch, scalarize)

        def update(inputs, k):
            losses = torch.tensor(inputs.losses[k], requires_grad=True)
            scalarize(losses).backward()
            after_step(inputs, k)
            return losses.grad.numpy() @ inputs.grads[k]

        return update

    return theirs


# What is done after each step of a scalarizer.


def descend(torch, scalarizer):
    """TorchJD's learned scalarizers leave the step to the network's optimiser."""
    optimizer = torch.optim.SGD(scalarizer.parameters(), lr=0.1)

    def step(inputs, k):
        optimizer.step()
        optimizer.zero_grad()

    return step


def end_epoch(torch, scalarizer):
    return lambda inputs, k: scalarizer.step()


def look(torch, scalarizer):
    return lambda inputs, k: scalarizer.update(torch.tensor(inputs.losses_after[k]))


SGD = {"optimizer": optax.sgd(0.1)}


def operator(make):
    """An operator of conflictfree."""

    def theirs(torch, num_tasks):
        operators = pytest.importorskip("conflictfree.grad_operator", reason="pip install '.[peers]'")
        calculate = make(operators).calculate_gradient
        return lambda inputs, k: calculate(torch.tensor(inputs.grads[k])).numpy()

    return theirs


def with_losses(inputs, k):
    return {"losses": inputs.losses[k]}


def with_losses_after(inputs, k):
    return {"losses": inputs.losses[k], "losses_after": inputs.losses_after[max(k - 1, 0)]}


def with_samples(inputs, k):
    return {"independent_grads": tuple(inputs.others[:, k])}


def bargain(grads, direction):
    """The logarithm of the product of the gains along a direction."""
    gains = grads @ (direction / np.linalg.norm(direction))
    return np.log(np.maximum(gains, 1e-300)).sum()


def hardly_regularised():
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)


def equal(num_tasks):
    import torch

    return torch.full((num_tasks,), 1 / num_tasks)


PEERS = [
    Peer("linear_scalarization", aggregator(lambda td, n: td.Mean()), {"reduction": "mean"}),
    Peer("linear_scalarization", aggregator(lambda td, n: td.Sum())),
    # Its Frank-Wolfe is exact for two; those that draw orders have none to draw for two.
    Peer("mgda", aggregator(lambda td, n: td.MGDA(1e-12)), tasks=(2,)),
    Peer("pcgrad", aggregator(lambda td, n: td.PCGrad()), tasks=(2,)),
    # It adds 1e-8 to products of norms.
    Peer("gradvac", aggregator(lambda td, n: td.GradVac()), {"beta": 0.5}, tolerance=1e-6, tasks=(2,)),
    # Its solver stops at 1e-8 of the objective.
    Peer("cagrad", aggregator(lambda td, n: td.CAGrad(c=0.4)), {"c": 0.4, "rescale": 0}, tolerance=1e-3),
    Peer("imtl_g", aggregator(lambda td, n: td.IMTLG()), tolerance=1e-8),
    Peer("nash_mtl", aggregator(lambda td, n: td.NashMTL(n)), worth=bargain),
    Peer("fairgrad", aggregator(lambda td, n: td.FairGrad(alpha=2.0)), {"alpha": 2.0}, tolerance=1e-5),
    *(
        Peer(
            "aligned_mtl",
            aggregator(lambda td, n, mode=mode: td.AlignedMTL(scale_mode=mode)),
            lambda n, mode=mode: {"scale_mode": mode, "preference": np.full(n, 1 / n)},
            tolerance=1e-8,
        )
        for mode in ("min", "median", "rmse")
    ),
    Peer("con_fig", aggregator(lambda td, n: td.ConFIG()), tolerance=1e-8),
    Peer("upgrad", aggregator(lambda td, n: td.UPGrad(projector=hardly_regularised())), tolerance=1e-6),
    Peer("dual_proj", aggregator(lambda td, n: td.DualProj(projector=hardly_regularised())), tolerance=1e-6),
    Peer("pcd", aggregator(lambda td, n: td.PCD()), tolerance=1e-7),
    Peer("trimmed_mean", aggregator(lambda td, n: td.TrimmedMean(1)), {"k": 1}, tasks=(4, 5)),
    Peer("modo", cross_weighting(lambda td, n: td.MoDoWeighting()), given=with_samples),
    # At its own rate of 10 rounding grows; it adds 1e-8 to the squared scale of the gradients.
    Peer(
        "sdmgrad",
        cross_weighting(lambda td, n: td.SDMGradWeighting(lr=0.5)),
        {"inner_learning_rate": 0.5},
        tolerance=1e-6,
        given=with_samples,
    ),
    Peer("gls", scalarizer(lambda td, n: td.GeometricMean()), given=with_losses),
    Peer("stch", scalarizer(lambda td, n: td.STCH(0.3)), {"mu": 0.3}, given=with_losses),
    Peer("cosmos", scalarizer(lambda td, n: td.COSMOS(1.0, equal(n))), given=with_losses),
    Peer("pbi", scalarizer(lambda td, n: td.PBI(5.0, equal(n))), tolerance=1e-8, given=with_losses),
    Peer("dwa", scalarizer(lambda td, n: td.DWA(), end_epoch), {"steps_per_epoch": 1}, given=with_losses),
    Peer("uncertainty", scalarizer(lambda td, n: td.UW(n), descend), SGD, given=with_losses),
    Peer("imtl_l", scalarizer(lambda td, n: td.IMTLL(n), descend), SGD, given=with_losses),
    # It adds 1e-8 to losses.
    Peer("famo", scalarizer(lambda td, n: td.FAMO(n), look), tolerance=1e-5, given=with_losses_after),
    Peer("con_fig", operator(lambda cf: cf.ConFIGOperator()), tolerance=1e-8),
    Peer("pcgrad", operator(lambda cf: cf.PCGradOperator()), tasks=(2,)),
    Peer("imtl_g", operator(lambda cf: cf.IMTLGOperator()), tolerance=1e-8),
]


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="pip install '.[peers]'")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # what peers make themselves is to be of the gradients' dtype
    yield torch
    torch.set_default_dtype(default)


@pytest.mark.filterwarnings("ignore:You are solving:UserWarning")  # cvxpy, of NashMTL's program
@pytest.mark.parametrize(("peer", "num_tasks"), [(peer, n) for peer in PEERS for n in peer.tasks], ids=str)
def test_peer(torch, peer, num_tasks):
    seed = secrets.randbits(32)
    inputs = draw(num_tasks, seed)
    theirs = peer.theirs(torch, num_tasks)
    with problems.enable_x64(), problems.relaxed_promotion():
        tx = peer.ours(num_tasks)
        state = tx.init(np.zeros(SIZE))
        update = jax.jit(tx.update)
        for k in range(STEPS):
            grads, expected = inputs.grads[k], theirs(inputs, k)
            ours, state = update(grads, state, **peer.given(inputs, k))
            where = f"seed {seed}, step {k}"
            if peer.worth is None:
                distance = np.linalg.norm(np.asarray(ours) - expected)
                assert distance <= peer.tolerance * np.linalg.norm(grads.mean(0)), where
            else:
                assert peer.worth(grads, np.asarray(ours)) >= peer.worth(grads, expected) - peer.tolerance, where
