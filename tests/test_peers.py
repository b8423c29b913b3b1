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
      ours: from the number of tasks to a transformation.
      theirs: from the library and the number of tasks to a function of a step's inputs, which returns the update.
      tolerance: relative to the norm of the mean gradient.
      tasks: numbers of tasks to compare for.
      given: further arguments of our update, from the inputs and the number of the step.
    """

    name: str
    ours: Callable
    theirs: Callable
    tolerance: float = 1e-10
    tasks: tuple[int, ...] = (2, 4)
    given: Callable = lambda inputs, k: {}

    def __str__(self):
        return self.name


@dataclasses.dataclass(frozen=True)
class Inputs:
    grads: np.ndarray
    losses: np.ndarray
    losses_after: np.ndarray


def draw(num_tasks, seed):
    """Gradients in general position, some of which conflict, of norms within a factor of three; positive losses."""
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((STEPS, num_tasks, SIZE)) - 0.3 * rng.standard_normal((STEPS, 1, SIZE))
    lengths = rng.uniform(0.5, 1.5, (STEPS, num_tasks, 1))
    losses = rng.uniform(0.1, 3, (2, STEPS, num_tasks))
    return Inputs(grads * lengths, *losses)


def aggregator(make):
    """An aggregator of TorchJD, made of its module `aggregation` and the number of tasks."""

    def theirs(torch, num_tasks):
        aggregation = pytest.importorskip("torchjd.aggregation", reason="pip install 'torchjd[full]'")
        aggregate = make(aggregation, num_tasks)
        return lambda inputs, k: aggregate(torch.tensor(inputs.grads[k])).numpy()

    return theirs


def scalarizer(make, learn=lambda torch, scalarizer: lambda inputs, k: None):
    """A scalarizer of TorchJD; its weights are the derivatives of the scalarized loss. `learn` makes its own step."""

    def theirs(torch, num_tasks):
        scalarization = pytest.importorskip("torchjd.scalarization", reason="pip install torchjd")
        scalarize = make(scalarization, num_tasks)
        after_step = learn(torch, scalarize)

        def update(inputs, k):
            losses = torch.tensor(inputs.losses[k], requires_grad=True)
            scalarize(losses).backward()
            after_step(inputs, k)
            return losses.grad.numpy() @ inputs.grads[k]

        return update

    return theirs


def sgd(torch, scalarizer):
    """TorchJD's learned scalarizers leave the step to the network's optimiser."""
    optimizer = torch.optim.SGD(scalarizer.parameters(), lr=0.1)

    def step(inputs, k):
        optimizer.step()
        optimizer.zero_grad()

    return step


def operator(make):
    """An operator of conflictfree."""

    def theirs(torch, num_tasks):
        operators = pytest.importorskip("conflictfree.grad_operator", reason="pip install conflictfree")
        calculate = make(operators).calculate_gradient
        return lambda inputs, k: calculate(torch.tensor(inputs.grads[k])).numpy()

    return theirs


def with_losses(inputs, k):
    return {"losses": inputs.losses[k]}


def with_losses_after(inputs, k):
    return {"losses": inputs.losses[k], "losses_after": inputs.losses_after[max(k - 1, 0)]}


def hardly_regularised():
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=1e-12, reg_eps=1e-10)


PEERS = [
    Peer(
        "mean",
        lambda n: mtl.linear_scalarization(n, reduction="mean"),
        aggregator(lambda aggregation, n: aggregation.Mean()),
    ),
    Peer("sum", mtl.linear_scalarization, aggregator(lambda aggregation, n: aggregation.Sum())),
    # Its Frank-Wolfe is exact for two.
    Peer("mgda", mtl.mgda, aggregator(lambda aggregation, n: aggregation.MGDA(1e-12)), tasks=(2,)),
    Peer(
        "cagrad",
        lambda n: mtl.cagrad(n, c=0.4, rescale=0),
        aggregator(lambda aggregation, n: aggregation.CAGrad(c=0.4)),
        tolerance=1e-3,  # its solver stops at 1e-8 of the objective
    ),
    # Without a random order.
    Peer("pcgrad", mtl.pcgrad, aggregator(lambda aggregation, n: aggregation.PCGrad()), tasks=(2,)),
    Peer(
        "gradvac",
        lambda n: mtl.gradvac(n, beta=0.5),
        aggregator(lambda aggregation, n: aggregation.GradVac(beta=0.5)),
        tolerance=1e-6,  # it adds 1e-8 to products of norms
        tasks=(2,),
    ),
    Peer("imtl_g", mtl.imtl_g, aggregator(lambda aggregation, n: aggregation.IMTLG()), tolerance=1e-8),
    Peer(
        "nash_mtl",
        lambda n: mtl.nash_mtl(n, max_norm=0.0),
        aggregator(lambda aggregation, n: aggregation.NashMTL(n, max_norm=0.0, optim_niter=100)),
        tolerance=1e-3,  # its solver stops there
    ),
    Peer(
        "fairgrad",
        lambda n: mtl.fairgrad(n, alpha=2.0),
        aggregator(lambda aggregation, n: aggregation.FairGrad(alpha=2.0)),
        tolerance=1e-5,
    ),
    *(
        Peer(
            f"aligned_mtl-{mode}",
            lambda n, mode=mode: mtl.aligned_mtl(n, scale_mode=mode, preference=np.full(n, 1 / n)),
            aggregator(lambda aggregation, n, mode=mode: aggregation.AlignedMTL(scale_mode=mode)),
            tolerance=1e-8,
        )
        for mode in ("min", "median", "rmse")
    ),
    Peer("con_fig", mtl.con_fig, aggregator(lambda aggregation, n: aggregation.ConFIG()), tolerance=1e-8),
    Peer(
        "upgrad",
        mtl.upgrad,
        aggregator(lambda aggregation, n: aggregation.UPGrad(projector=hardly_regularised())),
        tolerance=1e-6,
    ),
    Peer(
        "dual_proj",
        mtl.dual_proj,
        aggregator(lambda aggregation, n: aggregation.DualProj(projector=hardly_regularised())),
        tolerance=1e-6,
    ),
    Peer(
        "excess_mtl",
        lambda n: mtl.excess_mtl(n),
        aggregator(lambda aggregation, n: aggregation.ExcessMTL()),
    ),
    Peer("pcd", mtl.pcd, aggregator(lambda aggregation, n: aggregation.PCD()), tolerance=1e-7),
    Peer(
        "trimmed_mean",
        lambda n: mtl.trimmed_mean(n, k=1),
        aggregator(lambda aggregation, n: aggregation.TrimmedMean(1)),
        tasks=(4, 5),
    ),
    Peer("gls", mtl.gls, scalarizer(lambda scalarization, n: scalarization.GeometricMean()), given=with_losses),
    Peer(
        "stch",
        lambda n: mtl.stch(n, mu=0.3),
        scalarizer(lambda scalarization, n: scalarization.STCH(0.3)),
        given=with_losses,
    ),
    Peer(
        "dwa",
        lambda n: mtl.dwa(n, steps_per_epoch=1),
        scalarizer(
            lambda scalarization, n: scalarization.DWA(),
            lambda torch, scalarizer: lambda inputs, k: scalarizer.step(),
        ),
        given=with_losses,
    ),
    Peer(
        "uncertainty",
        lambda n: mtl.uncertainty(n, optimizer=optax.sgd(0.1)),
        scalarizer(lambda scalarization, n: scalarization.UW(n).double(), sgd),
        given=with_losses,
    ),
    Peer(
        "imtl_l",
        lambda n: mtl.imtl_l(n, optimizer=optax.sgd(0.1)),
        scalarizer(lambda scalarization, n: scalarization.IMTLL(n).double(), sgd),
        given=with_losses,
    ),
    Peer(
        "famo",
        mtl.famo,
        scalarizer(
            lambda scalarization, n: scalarization.FAMO(n).double(),
            lambda torch, scalarizer: lambda inputs, k: scalarizer.update(torch.tensor(inputs.losses_after[k])),
        ),
        tolerance=1e-5,  # it adds 1e-8 to losses
        given=with_losses_after,
    ),
    Peer("con_fig-authors", mtl.con_fig, operator(lambda operators: operators.ConFIGOperator()), tolerance=1e-8),
    Peer("pcgrad-conflictfree", mtl.pcgrad, operator(lambda operators: operators.PCGradOperator()), tasks=(2,)),
    Peer("imtl_g-conflictfree", mtl.imtl_g, operator(lambda operators: operators.IMTLGOperator()), tolerance=1e-8),
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="pip install torch")


@pytest.mark.parametrize(("peer", "num_tasks"), [(peer, n) for peer in PEERS for n in peer.tasks], ids=str)
def test_peer(torch, peer, num_tasks):
    seed = secrets.randbits(32)
    inputs = draw(num_tasks, seed)
    theirs = peer.theirs(torch, num_tasks)
    with problems.enable_x64():
        tx = peer.ours(num_tasks)
        state = tx.init(np.zeros(SIZE))
        update = jax.jit(tx.update)
        for k in range(STEPS):
            ours, state = update(inputs.grads[k], state, **peer.given(inputs, k))
            distance = np.linalg.norm(np.asarray(ours) - theirs(inputs, k))
            scale = np.linalg.norm(inputs.grads[k].mean(0))
            assert distance <= peer.tolerance * scale, f"seed {seed}, step {k}"
