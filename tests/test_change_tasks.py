"""A run to which a task is added, inside everything that a balancing method may stand in; and what is refused."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems


def params_of(*heads):
    return {"trunk": jnp.ones((2, 2)), "heads": {head: jnp.ones(2) for head in heads}}


def grads_like(params, num_tasks, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(num_tasks, *p.shape)), jnp.float32), params)


def step(tx, state, params, num_tasks, seed=0):
    update = jax.jit(tx.update)
    losses = jnp.arange(1.0, num_tasks + 1)
    updates, state = update(grads_like(params, num_tasks, seed), state, params, losses=losses)
    return optax.apply_updates(params, updates), state


def trunk(path):
    return path == "trunk"


# Of a number of tasks. In all of them but the first, a new head is a new parameter, too.
NESTED = {
    "blocks": lambda n: optax.chain(mtl.blockwise(mtl.gradvac(n, key=0)), optax.sgd(0.1)),
    "behind per_task": lambda n: optax.chain(mtl.per_task(optax.scale_by_adam(), n), mtl.famo(n)),
    "per_task with keys": lambda n: optax.chain(mtl.per_task(optax.add_noise(0.1, 0.5, 0), n), mtl.rlw(n, key=0)),
    "shared": lambda n: optax.chain(mtl.shared_and_heads(mtl.blockwise(mtl.dwa(n, steps_per_epoch=1)), trunk)),
    "injected": lambda n: optax.inject_hyperparams(mtl.cagrad, static_args="num_tasks")(
        n, c=optax.constant_schedule(1)
    ),
    "partition": lambda n: optax.partition(
        {"trunk": mtl.madam(n, mtl.mgda(n)), "heads": mtl.sum_tasks(n)}, {"trunk": "trunk", "heads": "heads"}
    ),
    "watched": lambda n: mtl.monitor(
        optax.chain(mtl.upgrad(n), optax.adam(0.1)), n, capacity=4, blocks=lambda path: path.split("/")[0]
    ),
    "in its metric": lambda n: mtl.balance_in_metric(mtl.slaw(n), optax.adam(0.1)),
}


@pytest.mark.parametrize("name", NESTED)
def test_it_is_found_wherever_it_stands(name):
    """What was there before is found again when the tasks that are new are taken away: nothing was lost or moved."""
    old, new = (("b", "c"), ("a", "b", "c")) if name != "blocks" else (("b", "c"),) * 2
    with problems.relaxed_promotion():
        tx, grown_tx = NESTED[name](2), NESTED[name](3)
        params, state = step(tx, tx.init(params_of(*old)), params_of(*old), 2)
        grown_params = params_of(*new)
        grown = mtl.change_tasks(state, grown_tx, grown_params, tasks=(None, 0, 1))
        assert jax.tree.structure(grown) == jax.tree.structure(grown_tx.init(grown_params))
        back = mtl.change_tasks(grown, tx, params, tasks=(1, 2))
        paths_and_leaves = jax.tree_util.tree_leaves_with_path(numbers_of(back)), jax.tree.leaves(numbers_of(state))
        for (path, leaf), was in zip(*paths_and_leaves, strict=True):
            np.testing.assert_array_equal(leaf, was, err_msg=jax.tree_util.keystr(path))
        _, after = step(grown_tx, grown, grown_params, 3)
    weights = optax.tree.get_all_with_path(after, "task_weights")
    assert weights
    for _, of_tasks in weights:
        assert of_tasks.shape == (3,)
        assert np.isfinite(of_tasks).all()


def test_in_jit_and_over_seeds():
    """Each of several runs, whose states are stacked, is as by itself; and so is one inside `jax.jit`."""
    tx, grown_tx = mtl.gradvac(2, key=0), mtl.gradvac(3, key=0)
    params = params_of("a")
    states = [step(tx, tx.init(params), params, 2, seed)[1] for seed in range(2)]
    apart = [mtl.change_tasks(state, grown_tx, params) for state in states]
    change = lambda state: mtl.change_tasks(state, grown_tx, params)
    together = jax.vmap(change)(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    for k, state in enumerate(map(numbers_of, apart)):
        jax.tree.map(lambda one, all_, k=k: np.testing.assert_array_equal(one, all_[k]), state, numbers_of(together))
    jax.tree.map(np.testing.assert_array_equal, numbers_of(jax.jit(change)(states[0])), numbers_of(apart[0]))


def numbers_of(state):
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), state)


def test_what_is_kept_of_pairs_of_tasks():
    """`madam` keeps a mean for each pair of tasks, in one axis."""
    tx, grown_tx = (mtl.madam(num_tasks, mtl.mgda(num_tasks)) for num_tasks in (2, 3))
    params = {"w": jnp.ones(2)}
    _, state = step(tx, tx.init(params), params, 2)
    products = mtl.change_tasks(state, grown_tx, params, tasks=(1, None, 0)).method.products["w"]
    of_pairs = dict(zip([(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)], products, strict=True))
    was = dict(zip([(0, 0), (0, 1), (1, 1)], state.method.products["w"], strict=True))
    np.testing.assert_array_equal(of_pairs[0, 0], was[1, 1])
    np.testing.assert_array_equal(of_pairs[0, 2], was[0, 1])
    np.testing.assert_array_equal(of_pairs[2, 2], was[0, 0])
    for new in ((0, 1), (1, 1), (1, 2)):
        np.testing.assert_array_equal(of_pairs[new], 0)


@pytest.mark.parametrize(
    ("old", "new", "tasks", "words"),
    [
        (mtl.mgda(2), mtl.mgda(2), None, "as many tasks"),
        (optax.adam(1.0), optax.adam(1.0), None, "as many tasks"),
        (mtl.mgda(2), mtl.mgda(3), (0, 1), "one entry for each of the 3 tasks"),
        (mtl.mgda(2), mtl.mgda(3), (0, 0, 1), "each at most once"),
        (mtl.mgda(2), mtl.mgda(3), (0, 1, 2), "among the 2 so far"),
        (mtl.mgda(2), mtl.slaw(3), None, "was not there|no longer there"),
        (mtl.cdtt(2, window=2), mtl.cdtt(3, window=5), None, r"another change than one of the number of tasks"),
    ],
)
def test_what_cannot_be_told_is_refused(old, new, tasks, words):
    with pytest.raises(ValueError, match=words):
        mtl.change_tasks(old.init(jnp.ones(3)), new, jnp.ones(3), tasks)


def test_heads_in_a_list_and_heads_that_are_blocks_are_refused():
    make = lambda num_tasks: optax.chain(mtl.sum_tasks(num_tasks), optax.trace(0.9))
    two, three = ({"heads": [jnp.ones(2)] * n} for n in (2, 3))
    mtl.change_tasks(make(2).init(two), make(3), three)
    with pytest.raises(ValueError, match="heads in a dict by name"):
        mtl.change_tasks(make(2).init(two), make(3), three, tasks=(None, 0, 1))
    with pytest.raises(ValueError, match="new ones would be new blocks"):
        mtl.change_tasks(mtl.blockwise(mtl.mgda(2)).init(two), mtl.blockwise(mtl.mgda(3)), three)
