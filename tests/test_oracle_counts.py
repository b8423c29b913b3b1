"""What the oracles cost, counted in the compiled programs: memory, work, traces."""

import functools

import chex
import jax
from jax import lax, numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl

LIGHT = mtl.value_and_light_grads
KEPT = functools.partial(mtl.value_and_light_grads, recompute=False)
WIDTH = 128


def scanned(num_tasks, depth=12):
    """A deep network of stacked layers, each rematerialised: ordinary steps hold the activations of one, nearly."""

    def trunk(params, batch):
        def layer(z, p):
            return jnp.tanh(z @ p["w"] + p["b"][None]), None

        return lax.scan(jax.checkpoint(layer), batch, params)[0]

    params = {
        "trunk": {"w": jnp.ones((depth, WIDTH, WIDTH)) / WIDTH, "b": jnp.zeros((depth, WIDTH))},
        "heads": [jnp.ones(WIDTH)] * num_tasks,
    }
    heads = [lambda p, z, batch, i=i: jnp.mean((z @ p - i) ** 2) for i in range(num_tasks)]
    return mtl.split(trunk, heads), params, jnp.ones((4, WIDTH))


def wide(num_tasks, batch=16):
    """Few wide layers, one after another, and a small batch."""

    def trunk(params, batch):
        for p in params:
            batch = jnp.tanh(batch @ p)
        return batch

    params = {"trunk": [jnp.ones((WIDTH, WIDTH)) / WIDTH] * 3, "heads": [jnp.ones(WIDTH)] * num_tasks}
    heads = [lambda p, z, batch, i=i: jnp.mean((z @ p - i) ** 2) for i in range(num_tasks)]
    return mtl.split(trunk, heads), params, jnp.ones((batch, WIDTH))


def compiled(oracle, problem, wrap=lambda tx: tx):
    loss_fn, params, batch = problem
    tx = mtl.shared_and_heads(wrap(mtl.mgda(loss_fn.num_tasks)), loss_fn.shared)

    def step(params, state, batch):
        losses, grads = oracle(loss_fn)(params, batch)
        return tx.update(grads, state, params, losses=losses)

    return jax.jit(step).lower(params, tx.init(params), batch).compile()


def ordinary(problem):
    loss_fn, params, batch = problem
    return jax.jit(jax.grad(lambda params, batch: jnp.sum(loss_fn(params, batch)))).lower(params, batch).compile()


def temporary(program):
    return program.memory_analysis().temp_size_in_bytes


def flops(program):
    return program.cost_analysis()["flops"]


@pytest.mark.parametrize("wrap", [lambda tx: tx, mtl.blockwise], ids=["whole", "leaves"])
def test_light_memory_does_not_grow_with_tasks_times_parameters(wrap):
    parameters = 12 * WIDTH * WIDTH * 4
    few, many = (temporary(compiled(LIGHT, scanned(n), wrap)) for n in (2, 16))
    assert few < parameters / 2
    assert many < parameters  # 14 tasks more, and not as much as one of them
    assert temporary(compiled(mtl.value_and_task_grads, scanned(16))) > 14 * parameters
    assert many - temporary(ordinary(scanned(16))) < parameters


def test_sketched_memory_does_not_grow_with_tasks_times_parameters():
    parameters = 12 * WIDTH * WIDTH * 4
    sketched = functools.partial(mtl.value_and_sketched_grads, size=1023)
    few, many = (temporary(compiled(sketched, scanned(n))) for n in (2, 16))
    assert many - few < parameters
    assert many < 4 * parameters


def test_light_costs_at_most_a_backward_pass_more():
    """In multiply-adds of a network outside of loops, which XLA counts right: forward one, backward two."""
    num_tasks = 8
    problem = wide(num_tasks, batch=512)  # more rows than columns: gradients are computed
    forward = 2 * 512 * WIDTH * WIDTH * 3
    exact, light, kept = (flops(compiled(oracle, problem)) for oracle in (mtl.value_and_task_grads, LIGHT, KEPT))
    assert exact > 14 * forward
    assert light < exact + 2.2 * forward
    assert kept < 1.02 * exact


def test_of_wide_layers_no_gradients_are_computed():
    """Fewer multiply-adds than the tasks' gradients alone; for one more product of activations than a backward pass."""
    num_tasks = 8
    problem = wide(num_tasks)
    loss_fn, params, batch = problem
    floor = jax.jit(lambda params, batch: mtl.value_and_task_grads(loss_fn)(params, batch)).lower(params, batch)
    floor_flops = flops(floor.compile())
    assert flops(compiled(KEPT, problem)) < 0.75 * floor_flops
    assert flops(compiled(LIGHT, problem)) < 0.9 * floor_flops
    assert temporary(compiled(KEPT, problem)) < num_tasks * WIDTH * WIDTH * 4


def test_feature_level_is_an_ordinary_step():
    problem = wide(8, batch=64)
    feature = compiled(mtl.value_and_feature_grads, problem)
    assert flops(feature) < 1.1 * flops(ordinary(problem))
    assert temporary(feature) < temporary(ordinary(problem)) + 3 * 8 * 64 * WIDTH * 4  # the features' gradients


def test_each_head_is_pulled_back_once():
    """Heads that are heavier than the trunk: exact gradients cost the heads one step, and the trunk T."""
    num_tasks, heavy = 4, 512

    def head(p, z, batch):
        return jnp.mean((jnp.tanh(z @ p["in"]) @ p["out"]) ** 2)

    loss_fn, params, batch = wide(num_tasks, batch=64)
    params["heads"] = [{"in": jnp.ones((WIDTH, heavy)), "out": jnp.ones((heavy, heavy))}] * num_tasks
    problem = (mtl.split(loss_fn.trunk, [head] * num_tasks), params, batch)
    of_heads = 3 * num_tasks * 2 * 64 * heavy * (WIDTH + heavy)
    of_trunk = 3 * 2 * num_tasks * 2 * 64 * WIDTH * WIDTH
    for oracle in (mtl.value_and_task_grads, LIGHT, KEPT):
        assert flops(compiled(oracle, problem)) < 1.2 * (of_heads + of_trunk)
    whole = functools.partial(lambda loss_fn, *args: loss_fn(*args), problem[0])
    tx = mtl.shared_and_heads(mtl.mgda(num_tasks), problem[0].shared)

    def unsplit(params, state, batch):
        return tx.update(mtl.value_and_task_grads(whole, strategy="vmap")(params, batch)[1], state, params)

    assert flops(jax.jit(unsplit).lower(params, tx.init(params), batch).compile()) > 1.5 * (of_heads + of_trunk)


@pytest.mark.parametrize("oracle", [mtl.value_and_task_grads, LIGHT, KEPT, mtl.value_and_feature_grads])
def test_a_step_is_traced_once(oracle):
    loss_fn, params, batch = wide(3)
    tx = optax.chain(mtl.shared_and_heads(mtl.upgrad(3), loss_fn.shared), optax.scale(-0.1))

    @jax.jit
    def step(params, opt_state, batch):
        losses, grads = oracle(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for k in range(3):
        params, opt_state = step(params, opt_state, batch * (1 + k))
    assert step._cache_size() == 1
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


def regression(params, batch):
    """Two tasks' mean squared errors."""
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2, axis=0)


def regression_problem():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {"in": normal(5, 7), "out": normal(7, 2)}, (normal(12, 5), normal(12, 2))


def test_microbatches_by_optax():
    """`optax.microbatch` around the oracle: means over microbatches of one size are the mean over the batch."""
    microbatching = pytest.importorskip("optax.microbatching")  # from optax 0.2.6
    params, batch = regression_problem()
    oracle = mtl.value_and_task_grads(regression)
    in_parts = microbatching.microbatch(
        oracle, argnums=1, microbatch_size=4, accumulator=microbatching.AccumulationType.MEAN
    )
    chex.assert_trees_all_close(jax.jit(in_parts)(params, batch), jax.jit(oracle)(params, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("oracle", [mtl.value_and_task_grads, LIGHT, KEPT, mtl.value_and_sketched_grads])
def test_microbatches_in_the_loss(oracle):
    """A loss that scans its batch, rematerialised: one program, exact, for deferred gradients too."""
    params, batch = regression_problem()

    def in_parts(params, batch):
        parts = jax.tree.map(lambda leaf: leaf.reshape(3, 4, *leaf.shape[1:]), batch)
        add = jax.checkpoint(lambda total, part: (total + regression(params, part) / 3, None))
        return lax.scan(add, jnp.zeros(2), parts)[0]

    tx = mtl.upgrad(2)
    step = lambda loss_fn, way: jax.jit(
        lambda params: tx.update(way(loss_fn)(params, batch)[1], tx.init(params), params)
    )(params)
    actual, expected = step(in_parts, oracle), step(regression, mtl.value_and_task_grads)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
