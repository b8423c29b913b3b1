"""From losses to task gradients."""

import chex
import jax
from jax import lax, numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
from optax_mtl import _oracles

STRATEGIES = ("unroll", "loop", "vmap")


def two_headed(params, x, scale=1.0):
    hidden = jnp.tanh(x @ params["trunk"])
    left = jnp.mean(jnp.square(hidden @ params["left"]))
    right = jnp.mean(jnp.abs(hidden @ params["right"])) * scale
    return {"left": left, "right": right}


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "trunk": jax.random.normal(keys[0], (4, 3)),
        "left": jax.random.normal(keys[1], (3, 2)),
        "right": jax.random.normal(keys[2], (3, 2)),
    }


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (8, 4))


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
def test_equals_one_grad_a_task(params, x, strategy):
    losses, task_grads = jax.jit(mtl.value_and_task_grads(two_headed, strategy=strategy))(params, x, scale=3.0)
    chex.assert_shape(losses, (2,))
    for i, name in enumerate(("left", "right")):
        loss, grads = jax.value_and_grad(lambda p, name=name: two_headed(p, x, 3.0)[name])(params)
        np.testing.assert_allclose(losses[i], loss, rtol=1e-6)
        chex.assert_trees_all_close(jax.tree.map(lambda g, i=i: g[i], task_grads), grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_may_be_an_array_and_come_with_aux(params, x, strategy):
    def loss_fn(params, x):
        losses = two_headed(params, x)
        return jnp.stack([losses["right"], losses["left"]]), {"hidden": x @ params["trunk"]}

    (losses, aux), task_grads = mtl.value_and_task_grads(loss_fn, has_aux=True, strategy=strategy)(params, x)
    chex.assert_shape(aux["hidden"], (8, 3))
    reference, reference_grads = mtl.value_and_task_grads(two_headed)(params, x)
    np.testing.assert_allclose(losses, reference[::-1], rtol=1e-6)
    chex.assert_trees_all_close(task_grads, jax.tree.map(lambda g: g[::-1], reference_grads), rtol=1e-5)


def test_argnums(params, x):
    oracle = mtl.value_and_task_grads(two_headed, argnums=(1, 0))
    _, (x_grads, param_grads) = oracle(params, x)
    chex.assert_shape(x_grads, (2, 8, 4))
    chex.assert_trees_all_close(param_grads, mtl.value_and_task_grads(two_headed)(params, x)[1], rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_forward_pass_runs_once(params, x, strategy):
    """Counted: the loss is traced once, and the tanh of the trunk is computed once in the program."""
    chex.clear_trace_counter()
    loss_fn = chex.assert_max_traces(n=1)(two_headed)
    lowered = jax.jit(mtl.value_and_task_grads(loss_fn, strategy=strategy)).lower(params, x)
    assert lowered.as_text().count("stablehlo.tanh") == 1


def test_unrolled_pullbacks_leave_other_tasks_heads_out(params, x):
    """Two tasks cost no more than twice one: no zeros are pulled back through the other's head."""
    flops = {}
    for name in ("left", "both"):
        loss_fn = two_headed if name == "both" else lambda p, x: {"left": two_headed(p, x)["left"]}
        compiled = jax.jit(mtl.value_and_task_grads(loss_fn, strategy="unroll")).lower(params, x).compile()
        flops[name] = compiled.cost_analysis()["flops"]
    assert flops["both"] <= 2.1 * flops["left"]


def test_arguments_to_differentiate_are_positional(params, x):
    with pytest.raises(ValueError, match="argnums=0 asks for argument 0, but 0 positional arguments were given"):
        mtl.value_and_task_grads(two_headed)(params=params, x=x)


def test_integer_parameters_are_refused():
    with pytest.raises(ValueError, match=r"argument \[0\]\['step'\] has dtype int32"):
        mtl.value_and_task_grads(lambda p: (jnp.sum(p["w"]),))({"w": jnp.ones(2), "step": jnp.array(1)})


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (lambda w: {"a": w, "b": jnp.sum(w)}, r"losses\['a'\] has shape \(2,\), wanted a scalar"),
        (lambda w: w[:, None], r"has shape \(2, 1\), wanted a scalar"),
        (lambda w: {}, "returned no losses"),
    ],
)
def test_losses_that_are_not_scalars_are_refused(losses, words):
    with pytest.raises(ValueError, match=words):
        mtl.value_and_task_grads(losses)(jnp.ones(2))


def test_a_bad_strategy_is_refused():
    with pytest.raises(ValueError, match="strategy must be one of 'auto', 'unroll', 'loop', 'vmap', found 'fast'"):
        mtl.value_and_task_grads(two_headed, strategy="fast")


def test_losses_of_different_dtypes_meet_in_the_wider(params):
    def loss_fn(w):
        return jnp.sum(w), jnp.sum(w.astype(jnp.bfloat16))

    losses, task_grads = mtl.value_and_task_grads(loss_fn)(jnp.ones(3))
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(task_grads, 1)


def test_task_names(params, x):
    assert mtl.task_names(two_headed)(params, x, scale=2.0) == ("left", "right")
    assert mtl.task_names(lambda w: (w, 0), has_aux=True)(jnp.ones(3)) == ("0", "1", "2")
    assert mtl.task_names(jnp.sum)(jnp.ones(3)) == ("0",)


def test_stack_task_grads(params, x):
    each = [jax.grad(lambda p, n=n: two_headed(p, x)[n])(params) for n in ("left", "right")]
    chex.assert_trees_all_close(
        mtl.stack_task_grads(each), mtl.value_and_task_grads(two_headed)(params, x)[1], rtol=1e-5
    )
    with pytest.raises(ValueError, match="gradients of task 1 have the structure"):
        mtl.stack_task_grads([{"w": jnp.ones(2)}, {"v": jnp.ones(2)}])
    with pytest.raises(ValueError, match="at least one task"):
        mtl.stack_task_grads([])


@pytest.mark.parametrize(
    ("function", "loops"),
    [
        (lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3)[0], True),
        (lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3, unroll=2)[0], True),
        (lambda x: lax.scan(lambda c, _: (jnp.sin(c), None), x, length=3, unroll=True)[0], False),
        (
            lambda x: lax.scan(lambda c, _: (lax.fori_loop(0, 3, lambda _, y: y + 1, c), None), x, length=3, unroll=3),
            True,
        ),
        (jax.jit(lambda x: lax.map(jnp.sin, jnp.stack([x, x]))), True),
        (jax.jit(jnp.sin), False),
    ],
)
def test_auto_knows_what_stays_a_loop(function, loops):
    """On CPUs loops are batched and all else is unrolled, scans that are written out among it."""
    assert _oracles._has_loop(jax.make_jaxpr(function)(1.0).jaxpr) == loops
