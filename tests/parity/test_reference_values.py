"""Weights on two small matrices, worked out independently (in part by TorchJD), to the digits that are given."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl

# Two tasks, padded to the shape of the other so that each method is compiled once.
J2 = np.array([[-4.0, 1.0, 1.0, 0.0], [6.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
J3 = np.array([[1.0, 2.0, 0.0, -1.0], [-2.0, 1.0, 1.0, 0.5], [0.5, -1.0, 2.0, 1.0]])


def mgda(gramian, present):
    return mtl.mgda_weights(gramian, present=present)


def edm(gramian, present):
    return mtl.edm_weights(gramian, present=present)


def cagrad(gramian, present, c):
    return jnp.where(present, mtl.cagrad_weights(gramian, c=c, rescale=0, present=present), 0)


def pcgrad(gramian, present):
    return jnp.where(present, mtl.pcgrad_weights(gramian, jnp.tile(jnp.arange(3), (3, 1))), 0)


def dual_proj(gramian, present):
    return mtl.dual_proj_weights(gramian, present=present)


def upgrad(gramian, present):
    return mtl.upgrad_weights(gramian, present=present)


def nash_mtl(gramian, present):
    return mtl.nash_mtl_weights(gramian, present=present)


def fairgrad(gramian, present, alpha):
    return mtl.fairgrad_weights(gramian, alpha=alpha, present=present)


def cdtt(gramian, present, tension):
    return mtl.cdtt_weights(gramian, mtl.edm_weights(gramian, present=present), tension)


compiled = functools.cache(jax.jit)


@pytest.mark.parametrize(
    ("method", "arguments", "grads", "weights"),
    [
        (mgda, (), J2, (0.6, 0.4, 0)),
        (mgda, (), J3, (0.40533, 0.22684, 0.36783)),
        (edm, (), J2, (0.59233, 0.40767, 0)),
        (edm, (), J3, (0.40296, 0.22844, 0.36860)),
        (cagrad, (0.4,), J2, (0.66330, 0.5, 0)),
        (cagrad, (0.5,), J2, (0.70412, 0.5, 0)),
        (cagrad, (0.4,), J3, (0.53820, 0.33333, 0.48473)),
        (pcgrad, (), J2, (2.22222, 1.57895, 0)),
        (pcgrad, (), J3, (1.50000, 1.08000, 1.39360)),
        (dual_proj, (), J2, (0.61111, 0.5, 0)),
        (dual_proj, (), J3, (1 / 3, 1 / 3, 1 / 3)),
        (upgrad, (), J2, (1.11111, 0.78947, 0)),
        (upgrad, (), J3, (0.50000, 0.34944, 0.46538)),
        (nash_mtl, (), J2, (0.59146, 0.40707, 0)),
        (nash_mtl, (), J3, (0.54783, 0.40175, 0.50428)),
        (fairgrad, (2.0,), J2, (0.47136, 0.31945, 0)),
        (fairgrad, (2.0,), J3, (0.44373, 0.29679, 0.40513)),
        (fairgrad, (0.5,), J2, (0.74283, 0.52539, 0)),
        (fairgrad, (0.5,), J3, (0.67429, 0.54408, 0.62970)),
        (cdtt, (np.array([0.9, 1.3, 0.0]),), J2, (0.55233, 0.44767, 0)),
        (cdtt, (np.array([0.9, 1.1, 1.3]),), J3, (0.21241, 0.38405, 0.40355)),
        (cdtt, (np.array([4.5, 5.5, 6.5]),), J3, (0.16680, 0.54110, 0.29210)),
    ],
)
def test_weights(method, arguments, grads, weights):
    got = compiled(method)(grads @ grads.T, grads.any(axis=1), *arguments)
    np.testing.assert_allclose(got, weights, rtol=0, atol=5.01e-6)
