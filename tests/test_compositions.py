"""The table of docs/compositions.md: each of its lines runs, or is refused with the words that the table quotes."""

import pathlib
import re

import chex
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

DOC = pathlib.Path(mtl.__file__).parent.parent / "docs" / "compositions.md"
# What the table must not leave out.
NAMES = {
    "MultiSteps",
    "mtl.multi_steps",
    "apply_if_finite",
    "skip_not_finite",
    "lookahead",
    "schedule_free",
    "inject_hyperparams",
    "masked",
    "partition",
    "freeze",
    "clip_by_global_norm",
    "clip",
    "adaptive_grad_clip",
}
T = 3
PARAMS = {"w": jnp.linspace(-1, 1, 8).reshape(4, 2), "b": jnp.ones(2)}
RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.standard_normal((T, 5, 4)), jnp.float32)
TARGETS = jnp.asarray(RNG.standard_normal((T, 5, 2)), jnp.float32)
NAMESPACE = {
    "mtl": mtl,
    "optax": optax,
    "T": T,
    "method": mtl.uw_so(T),
    "optimiser": optax.sgd(0.05, momentum=0.5),
    "frozen": {"w": False, "b": True},
    "labels": {"w": "trunk", "b": "head"},
}


def rows():
    """The table: what it is, where it stands, the line, and what becomes of the two kinds of gradients."""
    name = ""
    for line in DOC.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 5 and cells[2].startswith("`"):
            name = cells[0] or name
            expression = cells[2].strip("`")
            yield pytest.param(name, expression, *cells[3:], id=f"{name.split('`')[1]}-{cells[1]}".replace(" ", "_"))


def loss_fn(params):
    outputs = jnp.einsum("tni,io->tno", INPUTS, params["w"]) + params["b"][None, None]
    return jnp.mean((outputs - TARGETS) ** 2, axis=(1, 2))


def trainer(line):
    """The line's optimiser, the first parameters and state, and a step that returns losses, parameters and state."""
    tx = eval(line, NAMESPACE)
    is_lookahead = ".lookahead" in line
    params = optax.LookaheadParams.init_synced(PARAMS) if is_lookahead else PARAMS

    def step(oracle, params, state):
        losses, task_grads = oracle(loss_fn)(params.fast if is_lookahead else params)
        if is_lookahead:
            updates, state = tx.update(mtl.bundle(task_grads, losses=losses), state, params)
        else:
            updates, state = tx.update(task_grads, state, params, losses=losses)
        return losses, optax.apply_updates(params, updates), state

    return tx, params, step


ORACLES = {"gradients": mtl.value_and_task_grads, "deferred": mtl.value_and_light_grads}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Explicitly requested dtype"),
    pytest.mark.skipif(not hasattr(optax, "freeze"), reason="from optax 0.2.6 on"),
]


@pytest.mark.parametrize(("name", "line", "gradients", "deferred"), list(rows()))
def test_the_table(name, line, gradients, deferred):
    with problems.relaxed_promotion():
        reached = {}
        for kind, verdict in {"gradients": gradients, "deferred": deferred}.items():
            if verdict.startswith("works"):
                reached[kind] = trains(line, ORACLES[kind])
            else:
                assert verdict.startswith("refused"), verdict
                is_refused(line, ORACLES[kind], verdict)
        if len(reached) == 2:
            chex.assert_trees_all_close(reached["gradients"], reached["deferred"], rtol=1e-5, atol=1e-5)


def trains(line, oracle):
    tx, params, step = trainer(line)
    if not isinstance(params, optax.LookaheadParams):
        mtl.checked(tx, T).init(params)  # nor does it refuse what works
    state = tx.init(params)
    jitted = jax.jit(lambda params, state: step(oracle, params, state))
    first, start = None, params
    for _ in range(8):
        losses, params, state = jitted(params, state)
        first = losses if first is None else first
    assert jitted._cache_size() == 1
    chex.assert_trees_all_equal_shapes_and_dtypes(params, start)
    assert jnp.sum(losses) < jnp.sum(first)
    return params


def is_refused(line, oracle, verdict):
    def attempt():
        if "by `checked`" in verdict:
            mtl.checked(eval(line, NAMESPACE), T).init(PARAMS)
        else:
            tx, params, step = trainer(line)
            jax.eval_shape(lambda params, state: step(oracle, params, state), params, tx.init(params))

    words = verdict.split("`")[-2]
    with pytest.raises((ValueError, TypeError, AttributeError), match=re.escape(words)):
        attempt()


def test_the_table_has_all_that_it_should():
    named = {parameters.values[0].split("`")[1] for parameters in rows()}
    assert named >= NAMES


def test_what_the_page_says_of_clipping_and_freezing_is_so():
    big, small = jnp.array([30.0, 40.0]), jnp.array([0.3, 0.4])
    stacked = jnp.stack([big, small])
    total = mtl.sum_tasks(2)

    def updated(*parts):
        tx = optax.chain(*parts)
        return jax.jit(lambda: tx.update(stacked, tx.init(jnp.zeros(2)), jnp.zeros(2))[0])()

    common = jnp.linalg.norm(stacked)
    np.testing.assert_allclose(updated(optax.clip_by_global_norm(1.0), total), (big + small) / common, rtol=1e-5)
    between = updated(mtl.per_task(optax.clip_by_global_norm(1.0), 2), total)
    np.testing.assert_allclose(between, big / 50 + small, rtol=1e-5)
    np.testing.assert_allclose(updated(total, optax.clip_by_global_norm(1.0)), big / 50, rtol=1e-5)

    def freezing():
        _, task_grads = mtl.value_and_task_grads(loss_fn)(PARAMS)
        frozen = optax.chain(optax.freeze({"w": False, "b": True}), mtl.edm(T))
        frozen_step = frozen.update(task_grads, frozen.init(PARAMS), PARAMS)
        return *frozen_step, *mtl.edm(T).update(task_grads["w"], mtl.edm(T).init(PARAMS["w"]))

    updates, state, alone, expected = jax.jit(freezing)()
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), expected.task_weights, rtol=1e-5)
    np.testing.assert_allclose(updates["w"], alone, rtol=1e-5)
    np.testing.assert_array_equal(updates["b"], 0)


# -- multi_steps and bundle ------------------------------------------------------------------------------------------


def test_multi_steps_is_the_step_of_all_batches_whoever_was_in_which():
    """Means over the batches that each task was in, finite; a task that was asked for and never finite is counted."""
    every = 3
    grads = np.stack([problems.gradients(seed=k) for k in range(2 * every)]).astype(np.float32)
    losses = np.stack([problems.losses(seed=k) for k in range(2 * every)]).astype(np.float32)
    masks = np.ones((2 * every, T), bool)
    masks[1, 0] = False  # task 0 has no labels in a batch,
    grads[2, 1, 5] = np.nan  # task 1 is broken in one,
    losses[3:, 2] = np.inf  # and task 2 in all of the second step
    taken = masks & np.isfinite(grads).all(-1) & np.isfinite(losses)

    chain = optax.chain(mtl.uw_so(T), optax.sgd(0.1, momentum=0.9))
    tx = mtl.multi_steps(chain, T, every)
    params = problems.params(jnp.bfloat16)
    state, expected_state = tx.init(params), chain.init(params)
    step = jax.jit(lambda g, state, losses, mask: tx.update(g, state, params, losses=losses, task_mask=mask))
    for k in range(2 * every):
        matrix = problems.tree_of(grads[k], jnp.bfloat16)
        updates, state = step(matrix, state, jnp.asarray(losses[k]), jnp.asarray(masks[k]))
        if k % every < every - 1:
            np.testing.assert_array_equal(problems.vector_of(updates), 0)
            assert int(state.mini_step) == k % every + 1
            continue
        batches = slice(k - every + 1, k + 1)
        rounded = np.asarray(jnp.asarray(grads[batches], jnp.bfloat16), np.float64)
        where = taken[batches]
        shares = where / np.maximum(where.sum(0), 1)
        means = (
            np.einsum("kt,ktd->td", shares, np.nan_to_num(rounded)),
            np.einsum("kt,kt->t", shares, np.nan_to_num(losses[batches], posinf=0)),
        )
        expected, expected_state = jax.jit(chain.update)(
            problems.tree_of(means[0], jnp.bfloat16),
            expected_state,
            params,
            losses=jnp.asarray(means[1], jnp.float32),
            task_mask=jnp.asarray(where.any(0)),
        )
        np.testing.assert_allclose(problems.vector_of(updates), problems.vector_of(expected), rtol=2e-2, atol=1e-3)
        assert int(state.mini_step) == 0
        chex.assert_trees_all_equal(state.task_grads, jax.tree.map(jnp.zeros_like, state.task_grads))
    assert jax.tree.leaves(state.task_grads)[0].dtype == jnp.float32
    assert step._cache_size() == 1
    assert int(state.step) == 2
    np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), [0, 0, 1])
    np.testing.assert_array_equal(state.nonfinite_mini_steps, [0, 1, 3])


def test_multi_steps_takes_a_schedule():
    tx = mtl.multi_steps(optax.chain(mtl.sum_tasks(2), optax.sgd(1.0)), 2, lambda step: step + 1)
    state, made = tx.init(jnp.zeros(1)), []
    step = jax.jit(lambda state: tx.update(jnp.ones((2, 1)), state))
    for _ in range(6):
        updates, state = step(state)
        made.append(float(updates[0]))
    assert made == [-2, 0, -2, 0, 0, -2]
    with pytest.raises(ValueError, match="every must be at least 1"):
        mtl.multi_steps(optax.sgd(1.0), 2, 0)
    with pytest.raises(ValueError, match="heads with a task axis of 1"):
        tx.update(jnp.ones((1, 1)), state, jnp.zeros(1))


def test_a_bundle_needs_its_counterpart():
    tx = optax.chain(mtl.uw_so(T), optax.sgd(0.1))
    grads, losses = problems.tree_of(problems.gradients()), jnp.asarray(problems.losses(), jnp.float32)
    params = problems.params()
    bundled = mtl.bundle(grads, losses=losses)
    with pytest.raises(ValueError, match=r"tx = optax_mtl.unbundle\(tx\)"):
        tx.update(bundled, tx.init(params), params)
    outer = mtl.unbundle(mtl.checked(tx, T))
    for updates, _ in (
        outer.update(bundled, outer.init(params), params),
        outer.update(grads, outer.init(params), params, losses=losses),
    ):
        chex.assert_trees_all_equal(updates, tx.update(grads, tx.init(params), params, losses=losses)[0])


def test_the_blocks_of_the_page_run():
    namespace = {}
    with problems.relaxed_promotion():
        for block in re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL):
            exec(compile(block, str(DOC), "exec"), namespace)
    assert int(optax.tree.get(namespace["opt_state"], "step")) == 1
    norms = jax.vmap(jax.vmap(optax.tree.norm))(namespace["grads"])  # (examples, T)
    expected = jnp.einsum("nt,nt...->t...", jnp.minimum(1, 1 / norms), namespace["grads"]["w"])
    np.testing.assert_allclose(namespace["task_grads"]["w"], expected, rtol=1e-5)
    assert norms.max() > 1
