"""Every row of `cases.CASES` x every law it claims."""

import contextlib
import functools
import pickle

import chex
import flax.serialization
import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
import jax
from jax import numpy as jnp
import numpy as np
import optax
from orbax import checkpoint
import pytest

import cases
import optax_mtl as mtl
import problems

T = 3
EVERYONE = np.ones(T, bool)


def every_case(*, keeps=None, unless_lacks=None, needs=None, once=False):
    """Parametrises a law over the rows that claim it; a row's tests run in one worker and share its programs.

    With `once`, over the first row of each method: for what is the wrappers' doing, whatever the method's arguments.
    """
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=str(case), marks=pytest.mark.xdist_group(str(case)))
            for case in cases.CASES
            if (not once or case is cases.FIRST_ROWS[case.method])
            and (keeps is None or keeps in case.keeps)
            and (unless_lacks is None or unless_lacks not in case.lacks)
            and (needs is None or needs in case.needs)
        ],
    )


def context(case):
    return problems.relaxed_promotion() if case.optax_inside else contextlib.nullcontext()


def program(case, num_tasks=T, dtype="float32"):
    """The transformation and its jitted step for one dtype; every law that can shares them."""
    return _program(case, num_tasks, dtype)


@functools.cache
def _program(case, num_tasks, dtype):
    tx = case.make(num_tasks)
    value_fn = problems.value_fn(num_tasks)

    @jax.jit
    def step(task_grads, state, params, losses, task_mask):
        return tx.update(
            task_grads,
            state,
            params,
            losses=losses,
            task_mask=task_mask,
            value_fn=value_fn,
            **problems.extra_args(losses),
            nobody_knows_this=1,
        )

    return tx, step


def run(case, matrices, losses=None, masks=None, dtype=jnp.float32, state=None):
    """Runs the method over a sequence of gradient matrices; returns the updates `(steps, SIZE)` and the last state."""
    matrices = np.asarray(matrices)
    num_tasks = matrices.shape[1]
    tx, step = program(case, num_tasks, jnp.dtype(dtype).name)
    params = problems.params(dtype)
    updates = []
    with context(case):
        state = tx.init(params) if state is None else state
        for k, matrix in enumerate(matrices):
            loss = problems.losses(num_tasks, k) if losses is None else losses[k]
            mask = np.ones(num_tasks, bool) if masks is None else masks[k]
            wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
            update, state = step(
                problems.tree_of(matrix, dtype), state, params, jnp.asarray(loss, wide), jnp.asarray(mask)
            )
            updates.append(problems.vector_of(update))
    return np.stack(updates), state


def weights_of(state):
    return np.asarray(optax.tree.get(state, "task_weights"), np.float64)


# -- Form ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@every_case()
def test_update_is_shaped_and_typed_like_the_parameters(case, dtype):
    x64 = problems.enable_x64() if dtype == "float64" else contextlib.nullcontext()
    with x64, context(case):
        tx, step = program(case, T, dtype)
        params = problems.params(dtype)
        state = tx.init(params)
        task_grads = problems.tree_of(problems.gradients(), dtype)
        losses = jnp.asarray(problems.losses(), jnp.float64 if dtype == "float64" else jnp.float32)
        updates, new_state = step(task_grads, state, params, losses, jnp.asarray(EVERYONE))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        chex.assert_tree_all_finite(updates)
        assert weights_of(new_state).dtype == np.float64
        assert optax.tree.get(new_state, "task_weights").dtype == (jnp.float64 if dtype == "float64" else jnp.float32)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-4), ("bfloat16", 2e-2)])
@every_case(unless_lacks="precision", once=True)
def test_the_same_in_every_dtype(case, dtype, rtol):
    exact_in_both = jnp.float32 if dtype == "float64" else jnp.bfloat16
    matrices = np.stack([problems.gradients(seed=k) for k in range(2)]).astype(exact_in_both).astype(np.float64)
    reference, _ = run(case, matrices)
    with problems.enable_x64() if dtype == "float64" else contextlib.nullcontext():
        updates, _ = run(case, matrices, dtype=jnp.dtype(dtype))
    np.testing.assert_allclose(updates, reference, rtol=rtol, atol=rtol * np.abs(reference).max())


@every_case()
def test_the_state_can_be_donated(case):
    """No two of its arrays are one, and none is the factory's own: a second state is there after the first is gone."""
    tx = case.make(T)
    with context(case):
        for state in (tx.init(problems.params()), tx.init(problems.params())):
            leaves = jax.tree.leaves(state)
            assert len({id(leaf) for leaf in leaves}) == len(leaves)
            for leaf in leaves:
                assert not leaf.is_deleted()
                leaf.delete()


@every_case()
def test_one_trace_and_the_same_in_scan(case):
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    stepped, state = run(case, matrices)
    tx, step = program(case)
    assert step._cache_size() == 1  # however many steps there were, of this law and others
    params, mask = problems.params(), jnp.asarray(EVERYONE)

    def scanned_step(state, inputs):
        task_grads, losses = inputs
        updates, state = step(task_grads, state, params, losses, mask)
        return state, updates

    with context(case):
        first = tx.init(params)
        losses = jnp.stack([jnp.asarray(problems.losses(T, k), jnp.float32) for k in range(4)])
        scanned_state, scanned = jax.lax.scan(scanned_step, first, (problems.tree_of(matrices), losses))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, state, scanned_state)
    np.testing.assert_allclose(stepped, problems.vector_of(scanned), rtol=1e-5, atol=1e-6)


@every_case()
def test_products_are_taken_in_full_precision(case):
    """A TPU multiplies float32 matrices with eight bits unless it is asked for all: so it is, in every product."""
    tx = case.make(T)
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    losses = jnp.asarray(problems.losses(), jnp.float32)

    def step(task_grads, state):
        extra_args = problems.extra_args(losses) | {"value_fn": problems.value_fn(T)}
        return tx.update(task_grads, state, params, losses=losses, **extra_args)

    with context(case):
        jaxpr = jax.make_jaxpr(step)(task_grads, tx.init(params)).jaxpr
    for product in equations(jaxpr, "dot_general"):
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, product


def equations(jaxpr, primitive):
    """All equations of a primitive, in the sub-programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner, primitive)


def _register_keys():
    """`flax.serialization` knows nothing of typed random keys until it is told: see docs/training_loops.md."""
    flax.serialization.register_serialization_state(
        type(jax.random.key(0)),
        jax.random.key_data,
        lambda key, data: jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)),
        override=True,
    )


@every_case()
def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(case, tmp_path):
    tx, step = program(case)
    params = problems.params()

    def train(state, steps):
        updates = []
        for k in steps:
            matrix = problems.tree_of(problems.gradients(seed=k))
            loss = jnp.asarray(problems.losses(T, k), jnp.float32)
            update, state = step(matrix, state, params, loss, jnp.asarray(EVERYONE))
            updates.append(update)
        return updates, state

    def bits(tree):
        is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)

    _register_keys()
    with context(case):
        _, half = train(tx.init(params), range(3))
        expected = train(half, range(3, 5))
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", half)
            checkpointer.wait_until_finished()
            restored = {"orbax": checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))}
        fresh = tx.init(params)
        restored["bytes"] = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(half))
        restored["dict"] = flax.serialization.from_state_dict(fresh, flax.serialization.to_state_dict(half))
        restored["pickle"] = pickle.loads(pickle.dumps(half))
        for way, state in restored.items():
            chex.assert_trees_all_equal_shapes_and_dtypes(bits(state), bits(half))
            chex.assert_trees_all_equal(bits(train(state, range(3, 5))), bits(expected), custom_message=way)


@every_case(once=True)
def test_vmap_over_seeds(case):
    tx, step = program(case)
    matrices = np.stack([problems.gradients(seed=k) for k in range(2)])
    losses = jnp.stack([jnp.asarray(problems.losses(T, k), jnp.float32) for k in range(2)])
    with context(case):
        params = problems.params()
        stacked = jax.tree.map(lambda p: jnp.stack([p, p]), params)
        states = jax.vmap(tx.init)(stacked)
        batched = problems.tree_of(matrices)
        mask = jnp.asarray(EVERYONE)
        updates, states = jax.vmap(step, in_axes=(0, 0, 0, 0, None))(batched, states, stacked, losses, mask)
        for k in range(2):
            task_grads = problems.tree_of(matrices[k])
            alone, state = step(task_grads, tx.init(params), params, losses[k], mask)
            np.testing.assert_allclose(problems.vector_of(updates)[k], problems.vector_of(alone), rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(
                np.asarray(optax.tree.get(states, "task_weights"))[k], weights_of(state), rtol=1e-4, atol=1e-6
            )


@every_case(unless_lacks="leaves")
def test_splitting_leaves_changes_nothing(case):
    matrix = problems.gradients()
    split, _ = run(case, [matrix])
    tx = case.make(T)

    def merge(tree):
        return jnp.concatenate([tree["a"], tree["b"][0].reshape(*tree["a"].shape[:-1], 4)], -1)

    def value_fn(flat):
        return problems.value_fn(T)({"a": flat[:4], "b": [flat[4:].reshape(2, 2), None]})

    with context(case):
        params = merge(problems.params())
        losses = jnp.asarray(problems.losses(), jnp.float32)
        task_grads = merge(problems.tree_of(matrix))
        update = jax.jit(functools.partial(tx.update, value_fn=value_fn))
        updates, _ = update(task_grads, tx.init(params), params, losses=losses, **problems.extra_args(losses))
    np.testing.assert_allclose(np.asarray(updates), split[0], rtol=1e-4, atol=1e-6)


@every_case()
def test_masked_nodes_are_passed_over(case):
    """A masked leaf leaves no trace: the program is that of a tree without it."""
    tx = case.make(T)
    losses = jnp.asarray(problems.losses(), jnp.float32)

    def update(params, task_grads):
        extra_args = problems.extra_args(losses) | {"value_fn": problems.value_fn(T)}
        return tx.update(task_grads, tx.init(params), params, losses=losses, **extra_args)[0]

    params, task_grads = problems.params()["a"], problems.tree_of(problems.gradients())["a"]
    masked = [{"a": leaf, "b": optax.MaskedNode()} for leaf in (params, task_grads)]
    with context(case):
        programs = [jax.make_jaxpr(update)(*trees) for trees in (masked, ({"a": params}, {"a": task_grads}))]
        assert str(programs[0]) == str(programs[1])
        assert isinstance(jax.eval_shape(update, *masked)["b"], optax.MaskedNode)


# -- The contract ----------------------------------------------------------------------------------------------------


@every_case(once=True)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda g: jax.tree.map(lambda x: x[0], g), "ordinary gradient"),
        (lambda g: jax.tree.map(lambda x: x[:2], g), "has length 2"),
        (lambda g: {**g, "b": [jnp.zeros((T, 2)), None]}, r"\['b'\]\[0\] has shape \(3, 2\), wanted \(3, 2, 2\)"),
    ],
    ids=["no task axis", "wrong number of tasks", "wrong leaf"],
)
def test_leaves_without_a_proper_task_axis_are_refused(case, spoil, words):
    tx = case.make(T)
    params = problems.params()
    with context(case), pytest.raises(ValueError, match=words) as error:
        tx.update(spoil(problems.tree_of(problems.gradients())), tx.init(params), params, losses=jnp.ones(T))
    assert "value_and_task_grads" in str(error.value)


@every_case(once=True)
def test_a_missing_task_axis_is_refused_without_params_too(case):
    tx = case.make(T)
    params = {"w": jnp.zeros((5, 2))}
    with context(case), pytest.raises(ValueError, match=r"\['w'\] has shape \(5, 2\), wanted \(3, \*param.shape\)"):
        tx.update(params, tx.init(params), losses=jnp.ones(T))


@every_case(once=True)
def test_a_task_mask_or_losses_of_the_wrong_shape_are_refused(case):
    tx = case.make(T)
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    with context(case):
        state = tx.init(params)
        for bad in ({"task_mask": jnp.ones(2, bool)}, {"losses": jnp.ones((T, 1))}, {"losses": {"a": 1.0}}):
            arguments = {"losses": jnp.ones(T), "value_fn": problems.value_fn(T)} | bad
            (name,) = bad
            with pytest.raises(ValueError, match=rf"{name} must"):
                tx.update(task_grads, state, params, **arguments)


@every_case(once=True)
def test_num_tasks_is_checked(case):
    for bad in (0, -1, 2.0, True, jnp.array(2)):
        with pytest.raises(ValueError, match="num_tasks must be"):
            case.factory(bad, **case.hyperparams(2))


@pytest.mark.parametrize(
    "needed", ["losses", "positive losses", "value_fn", "params", *problems.extra_args(jnp.ones(T))]
)
def test_what_is_needed_is_asked_for(needed):
    rows = [case for case in cases.CASES if needed in case.needs]
    assert rows
    for case in rows:
        tx = case.make(T)
        params, task_grads = problems.params(), problems.tree_of(problems.gradients())
        given = {"losses": jnp.ones(T), "value_fn": problems.value_fn(T), "params": params}
        given |= problems.extra_args(jnp.ones(T))
        del given[needed.removeprefix("positive ")]
        state = tx.init(params)
        with pytest.raises(ValueError, match="write") as error:
            tx.update(task_grads, state, **given)
        assert "tx.update(task_grads, opt_state, params" in str(error.value)


@every_case(needs="positive losses")
def test_a_negative_loss_is_refused_where_known_and_harmless_inside_jit(case):
    tx, _ = program(case)
    params, task_grads = problems.params(), problems.tree_of(problems.gradients())
    with context(case):
        with pytest.raises(ValueError, match=r"not negative, but losses\[1\] = -0.5"):
            tx.update(task_grads, tx.init(params), params, losses=jnp.array([1.0, -0.5, 2.0]))
        for harmless in ([1.0, -jnp.inf, 2.0], [1.0, jnp.nan, 2.0]):
            tx.update(task_grads, tx.init(params), params, losses=jnp.array(harmless))
        masked = {"losses": jnp.array([1.0, -0.5, 2.0]), "task_mask": jnp.array([True, False, True])}
        tx.update(task_grads, tx.init(params), params, **masked)
        known_in_jit = jax.jit(lambda g: tx.update(g, tx.init(params), params, losses=jnp.ones(T))[0])
        chex.assert_tree_all_finite(known_in_jit(task_grads))
    losses = [[1.0, -0.5, 0.0]] * 4 + [[-1.0, -0.5, 0.0]]
    updates, _ = run(case, [problems.gradients(seed=k) for k in range(5)], losses=losses)
    assert np.isfinite(updates).all()


@every_case(unless_lacks="gramian")
def test_a_gramian_is_a_valid_update(case):
    matrices = np.stack([problems.gradients(seed=k) for k in range(3)])
    _, expected = run(case, matrices)
    tx, _ = program(case)
    with context(case):
        params = problems.params()
        state = tx.init(params)
        update = jax.jit(tx.update)
        for k in range(3):
            gramian = mtl.Gramian(mtl.task_gramian(problems.tree_of(matrices[k])))
            losses = jnp.asarray(problems.losses(T, k), jnp.float32)
            weights, state = update(gramian, state, params, losses=losses, **problems.extra_args(losses))
        np.testing.assert_array_equal(np.asarray(weights, np.float64), weights_of(state))
        with pytest.raises(ValueError, match="Gramian has shape"):
            tx.update(mtl.Gramian(jnp.eye(T + 1)), state, params, losses=losses)
    np.testing.assert_allclose(weights_of(state), weights_of(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in cases.CASES if "gramian" in case.lacks], ids=str)
def test_a_method_that_needs_gradients_refuses_a_gramian(case):
    tx = case.make(T)
    params = problems.params()
    with context(case), pytest.raises(ValueError, match="was given a Gramian"):
        tx.update(mtl.Gramian(jnp.eye(T)), tx.init(params), params, value_fn=problems.value_fn(T))


# -- Values ----------------------------------------------------------------------------------------------------------


@every_case(unless_lacks="weights")
def test_the_update_is_the_weighted_sum_that_the_state_tells(case):
    for kind in problems.KINDS:
        matrix = problems.gradients(kind)
        updates, state = run(case, [matrix])
        weights = weights_of(state)
        scale = np.abs(weights) @ np.abs(matrix).max(1)  # of the terms of the sum, which may cancel
        np.testing.assert_allclose(updates[0], weights @ matrix, rtol=1e-4, atol=1e-5 * scale, err_msg=kind)


@every_case()
def test_one_task_alone(case):
    matrix = problems.gradients(num_tasks=1)
    (update,), state = run(case, [matrix], losses=[[0.7]])
    np.testing.assert_allclose(update, case.alone(matrix[0], 0.7), rtol=1e-4)
    assert weights_of(state) > 0


@every_case()
def test_zero_gradients_give_zero(case):
    updates, state = run(case, np.zeros((3, T, problems.SIZE)))
    np.testing.assert_array_equal(updates, 0)
    assert np.isfinite(weights_of(state)).all()


@pytest.mark.parametrize("kind", problems.KINDS)
@every_case()
def test_degenerate_gradients_give_finite_weights(case, kind):
    updates, state = run(case, np.stack([problems.gradients(kind, seed=k) for k in range(4)]))
    assert np.isfinite(updates).all()
    chex.assert_tree_all_finite(jax.tree.map(jnp.asarray, [x for x in jax.tree.leaves(state) if _is_float(x)]))


def _is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


@pytest.mark.parametrize("power", [-15, -8, 8, 15])
@every_case()
def test_scale(case, power):
    matrices = np.stack([problems.gradients(seed=k) for k in range(3)])
    updates, state = run(case, 10.0**power * matrices)
    assert np.isfinite(updates).all()
    assert np.isfinite(weights_of(state)).all()
    if case.scale is not None:
        reference, _ = run(case, matrices)
        rescaled = updates / 10.0 ** (power * case.scale)
        np.testing.assert_allclose(rescaled, reference, rtol=1e-3, atol=1e-4 * np.abs(reference).max())


adversarial = hnp.arrays(
    np.float32,
    (T, problems.SIZE),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -1.0, 1e-6, -1e-6]),
)


@every_case()
@hypothesis.given(matrix=adversarial)
@hypothesis.settings(max_examples=25)
def test_whatever_the_gradients_the_update_is_finite(case, matrix):
    updates, state = run(case, [matrix, matrix[::-1]])
    assert np.isfinite(updates).all()
    assert np.isfinite(weights_of(state)).all()


# -- Absent and broken tasks -----------------------------------------------------------------------------------------


@every_case(unless_lacks="absent")
def test_a_masked_task_equals_the_method_run_without_it(case):
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    losses = np.stack([problems.losses(T, k) for k in range(4)])
    kept = [0, 2]
    mask = np.isin(np.arange(T), kept)
    masked, state = run(case, matrices, losses, [mask] * 4)
    without, _ = _run_without(case, matrices[:, kept], losses[:, kept])
    np.testing.assert_allclose(masked, without, rtol=1e-3, atol=1e-4 * np.abs(without).max())
    assert weights_of(state)[1] == 0
    assert not np.any(optax.tree.get(state, "nonfinite_count"))


@functools.cache
def _program_without(case):
    """The transformation for all tasks but the one in the middle, and its jitted step, with the `value_fn` of these."""
    tx = case.make(T - 1)
    return tx, jax.jit(functools.partial(tx.update, value_fn=lambda tree: problems.value_fn(T)(tree)[::2]))


def _run_without(case, matrices, losses, state=None):
    """As `run`, without the task in the middle."""
    tx, step = _program_without(case)
    with context(case):
        params = problems.params()
        state, updates = tx.init(params) if state is None else state, []
        for matrix, loss in zip(matrices, losses, strict=True):
            loss = jnp.asarray(loss, jnp.float32)
            update, state = step(problems.tree_of(matrix), state, params, losses=loss, **problems.extra_args(loss))
            updates.append(problems.vector_of(update))
    return np.stack(updates), state


@every_case()
def test_a_masked_task_keeps_its_state(case):
    """Whatever the state holds for each task, counters too, stays as it is, even if the gradient is garbage.

    Two steps before and two steps masked: whole epochs, for the methods that have any.
    """
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    _, before = run(case, matrices[:2])
    garbage = matrices.copy()
    garbage[2:, 1] = np.nan
    losses = [problems.losses(T, 0), problems.losses(T, 1), [1.0, np.nan, 1.0], [1.0, -1.0, 2.0]]
    mask = np.array([True, False, True])
    updates, after = run(case, garbage, losses, [EVERYONE, EVERYONE, mask, mask])
    assert np.isfinite(updates).all()
    assert not np.any(optax.tree.get(after, "nonfinite_count"))
    of_the_step = (".task_weights", ".task_present", ".nonfinite_count", ".head_weights")
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(after)
    for (path, new), old in zip(paths_and_leaves, jax.tree.leaves(before), strict=True):
        name = jax.tree_util.keystr(path)
        if new.ndim and new.shape[0] == T and not name.endswith(of_the_step):
            np.testing.assert_array_equal(np.asarray(new)[1], np.asarray(old)[1], err_msg=name)


@every_case()
def test_a_task_that_was_away_goes_on_where_it_was(case):
    """Masked for two steps in between: what it knows of the task is what it knew, and all of it is finite."""
    steps = 6
    matrices = np.stack([problems.gradients(seed=k) for k in range(steps)])
    masks = np.ones((steps, T), bool)
    masks[2:4, 1] = False
    updates, state = run(case, matrices, masks=masks)
    assert np.isfinite(updates).all()
    weights = weights_of(state)
    assert np.isfinite(weights).all()
    assert optax.tree.get(state, "task_present").all()
    if "sum" in case.keeps:
        np.testing.assert_allclose(weights.sum(), T, rtol=1e-5)
    if "simplex" in case.keeps:
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@every_case()
def test_a_task_that_is_not_finite_counts_as_absent(case, bad):
    matrices = np.stack([problems.gradients(seed=k) for k in range(3)])
    broken = matrices.copy()
    broken[1, 1, 4] = bad
    mask = np.array([True, False, True])
    updates, state = run(case, broken)
    expected, expected_state = run(case, matrices, masks=[EVERYONE, mask, EVERYONE])
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights_of(state), weights_of(expected_state), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), [0, 1, 0])


@every_case()
def test_a_loss_that_is_not_finite_sets_its_task_aside(case):
    matrix = problems.gradients()
    updates, state = run(case, [matrix], losses=[[1.0, 2.0, np.nan]])
    expected, _ = run(case, [matrix], losses=[[1.0, 2.0, 3.0]], masks=[[True, True, False]])
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), [0, 0, 1])


@every_case()
def test_without_any_task_the_update_is_zero_and_the_state_recovers(case):
    matrices = np.stack([problems.gradients(seed=k) for k in range(3)])
    broken = matrices.copy()
    broken[1] = np.nan
    updates, state = run(case, broken)
    np.testing.assert_array_equal(updates[1], 0)
    assert np.isfinite(updates).all()
    assert np.any(updates[2] != 0)
    np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), 1)
    masked, _ = run(case, matrices, masks=[EVERYONE, ~EVERYONE, EVERYONE])
    np.testing.assert_array_equal(masked[1], 0)


# A gradient or a loss of which the square overflows counts as not finite.
GRADIENT_FAULTS = (np.nan, np.inf, -np.inf, 1e30)
LOSS_FAULTS = (np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, -1.0, 1e-30, 1e15)


def schedule_of_faults(steps, seed):
    """Gradients, losses and masks of which any may fail at any step, for one to five; all do in the middle."""
    rng = np.random.default_rng(seed)
    matrices = np.stack([problems.gradients(seed=k) for k in range(steps)])
    losses = np.stack([problems.losses(T, k) for k in range(steps)])
    masks = np.ones((steps, T), bool)
    for k in range(steps):
        for i in np.flatnonzero(rng.random(T) < 0.15) if k != steps // 2 else range(T):
            until = k + rng.integers(1, 6)
            match rng.integers(3):
                case 0:
                    matrices[k:until, i, rng.integers(problems.SIZE)] = rng.choice(GRADIENT_FAULTS)
                case 1:
                    losses[k:until, i] = rng.choice(LOSS_FAULTS[: 5 if k == steps // 2 else None])
                case 2:
                    masks[k:until, i] = False
    return matrices, losses, masks


@every_case()
def test_whatever_fails_whenever_for_however_long(case):
    """What is not finite leaves no trace that a masked task would not, bit for bit; all else is survived."""
    steps, healthy = 24, 4
    matrices, losses, masks = schedule_of_faults(steps, seed=0)
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.square(np.float32(matrices))).all(2) & np.isfinite(np.square(np.float32(losses)))
    present = masks & finite
    assert not present.any(1).all()
    assert present.any()
    updates, state = run(case, matrices, losses, masks)
    assert np.isfinite(updates).all()
    np.testing.assert_array_equal(updates[~present.any(1)], 0)
    np.testing.assert_array_equal(optax.tree.get(state, "nonfinite_count"), (masks & ~finite).sum(0))

    tame = np.where(present[..., None], matrices, 1)
    expected, masked_state = run(case, tame, np.where(present, losses, 1), present)
    np.testing.assert_array_equal(updates, expected)
    states = (jax.tree_util.tree_leaves_with_path(numbers_of(each)) for each in (state, masked_state))
    for (path, leaf), (_, other) in zip(*states, strict=True):
        if not jax.tree_util.keystr(path).endswith(".nonfinite_count"):
            np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))

    after = np.stack([problems.gradients(seed=50 + k) for k in range(healthy)])
    updates, state = run(case, after, state=state)
    assert np.isfinite(updates).all()
    assert np.any(updates != 0, axis=1).all()
    assert optax.tree.get(state, "task_present").all()
    chex.assert_tree_all_finite([leaf for leaf in jax.tree.leaves(state) if _is_float(leaf)])
    if {"simplex", "sum"} & case.keeps:
        np.testing.assert_allclose(weights_of(state).sum(), T if "sum" in case.keeps else 1, rtol=1e-5)


@every_case()
def test_a_task_that_is_added_changes_nothing_for_the_others(case):
    """It comes between the two there are. While it is masked, they go on as without it; then all go on together."""
    steps = 7
    matrices = np.stack([problems.gradients(seed=k) for k in range(steps)])
    losses = np.stack([problems.losses(T, k) for k in range(steps)])
    params, (tx, _), (tx_without, _) = problems.params(), program(case), _program_without(case)
    _, before = _run_without(case, matrices[:3, ::2], losses[:3, ::2])
    with context(case):
        grown = mtl.change_tasks(before, tx, params, tasks=(0, None, 1))
        chex.assert_trees_all_equal_shapes_and_dtypes(grown, tx.init(params))
        back = mtl.change_tasks(grown, tx_without, params, tasks=(0, 2))
    jax.tree.map(np.testing.assert_array_equal, *[numbers_of(state) for state in (back, before)])
    if "absent" not in case.lacks:
        masked, _ = run(case, matrices[3:5], losses[3:5], [np.array([True, False, True])] * 2, state=grown)
        expected, _ = _run_without(case, matrices[3:5, ::2], losses[3:5, ::2], before)
        np.testing.assert_allclose(masked, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    updates, state = run(case, matrices[3:], losses[3:], state=grown)
    assert np.isfinite(updates).all()
    weights = weights_of(state)
    assert optax.tree.get(state, "task_present").all()
    if {"simplex", "sum"} & case.keeps:
        np.testing.assert_allclose(weights.sum(), T if "sum" in case.keeps else 1, rtol=1e-5)
    with context(case):
        shrunk = mtl.change_tasks(state, tx_without, params, tasks=(0, 2))
    updates, _ = _run_without(case, matrices[:2, ::2], losses[:2, ::2], shrunk)
    assert np.isfinite(updates).all()


def numbers_of(state):
    is_key = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), state)


# -- With Optax ------------------------------------------------------------------------------------------------------


@every_case(once=True)
def test_chained_with_adam_it_descends(case):
    """A sum of quadratics, from zero: each task pulls to its own minimum along the same axis."""
    value_fn = problems.value_fn(T)
    tx = optax.chain(case.make(T), optax.adam(0.05))

    @jax.jit
    def step(params, state):
        losses, task_grads = mtl.value_and_task_grads(value_fn)(params)
        extra_args = problems.extra_args(losses) | {"value_fn": value_fn}
        updates, state = tx.update(task_grads, state, params, losses=losses, **extra_args)
        return optax.apply_updates(params, updates), state, losses

    with problems.relaxed_promotion():
        params = problems.params()
        state = tx.init(params)
        first = value_fn(params)
        for _ in range(40):
            params, state, losses = step(params, state)
    assert np.all(np.asarray(losses) < np.asarray(first))


@every_case()
def test_inject_hyperparams(case):
    matrix = problems.gradients()
    with problems.relaxed_promotion():
        (expected,), _ = run(case, [matrix])
        tx = optax.inject_hyperparams(case.factory, static_args=("num_tasks", *case.static))(T, **case.hyperparams(T))
        params = problems.params()
        state = tx.init(params)

        @jax.jit
        def step(task_grads, state, losses):
            extra_args = problems.extra_args(losses) | {"value_fn": problems.value_fn(T)}
            return tx.update(task_grads, state, params, losses=losses, **extra_args)

        updates, state = step(problems.tree_of(matrix), state, jnp.asarray(problems.losses(), jnp.float32))
    np.testing.assert_allclose(problems.vector_of(updates), expected, rtol=1e-4, atol=1e-5)
    assert optax.tree.get(state, "task_weights").shape == (T,)


@every_case(once=True)
def test_partition_and_what_others_own(case):
    """Under `optax.partition` a method balances its own leaves and sees no others."""
    labels = {"a": "mine", "b": "other"}
    with problems.relaxed_promotion():
        tx = optax.partition({"mine": case.make(T), "other": mtl.sum_tasks(T)}, labels)
        params, task_grads = problems.params(), problems.tree_of(problems.gradients())
        losses = jnp.asarray(problems.losses(), jnp.float32)

        def update(task_grads):
            extra_args = problems.extra_args(losses) | {"value_fn": lambda tree: jnp.sum(tree["a"]) * jnp.arange(3.0)}
            return tx.update(task_grads, tx.init(params), params, losses=losses, **extra_args)

        updates, state = jax.eval_shape(update, task_grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert len(optax.tree.get_all_with_path(state, "task_weights")) == 2


@every_case()
def test_tree_map_params(case):
    tx = case.make(T)
    params = problems.params()
    names = {"a": "a", "b": ["b", None]}
    shapes = {"a": params["a"].shape, "b": params["b"][0].shape}
    with context(case):
        state = tx.init(params)
        marked = optax.tree.map_params(tx, lambda _, name: name, state, names, transform_non_params=lambda _: "other")
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    for name, leaf in zip(jax.tree.leaves(marked), jax.tree.leaves(state), strict=True):
        if name != "other":
            # What is taken for a parameter's is shaped like it, but for one axis in front (of tasks, or of pairs of
            # tasks): a sharding fits.
            assert shapes[name] in (leaf.shape, leaf.shape[1:])
    assert optax.tree.get(marked, "task_weights") == "other"


@pytest.mark.parametrize("case", [case for case in cases.CASES if "key" in case.kwargs], ids=str)
def test_the_same_key_gives_the_same_numbers(case):
    matrices = np.stack([problems.gradients("conflicting", seed=k) for k in range(3)])
    first, _ = run(case, matrices)
    again, _ = run(case, matrices)
    np.testing.assert_array_equal(first, again)


# -- Laws that a row claims ------------------------------------------------------------------------------------------


@every_case(keeps="permutation")
def test_permuting_the_tasks_permutes_the_weights(case):
    order = np.array([2, 0, 1])
    matrices = np.stack([problems.gradients(seed=k) for k in range(4)])
    losses = np.stack([problems.losses(T, k) for k in range(4)])
    updates, state = run(case, matrices, losses)
    permuted, permuted_state = run(case, matrices[:, order], losses[:, order])
    np.testing.assert_allclose(permuted, updates, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(weights_of(permuted_state), weights_of(state)[order], rtol=1e-3, atol=1e-5)


@every_case(keeps="non-conflicting")
@hypothesis.given(seed=st.integers(0, 10**6), kind=st.sampled_from(problems.KINDS))
def test_no_task_is_worse_off(case, seed, kind):
    matrix = problems.gradients(kind, seed=seed)
    (update,), _ = run(case, [matrix])
    norms = np.linalg.norm(matrix, axis=1)
    slack = 1e-3 * norms * max(np.linalg.norm(update), 1e-3 * norms.max())
    assert np.all(matrix @ update >= -slack)


@every_case(keeps="task-scale")
@hypothesis.given(powers=hnp.arrays(np.float64, T, elements=st.floats(-4, 4)))
def test_rescaling_a_task_does_not_turn_the_update(case, powers):
    matrix = problems.gradients()
    (update,), _ = run(case, [matrix])
    (rescaled,), _ = run(case, [10.0 ** powers[:, None] * matrix])
    np.testing.assert_allclose(
        rescaled / np.linalg.norm(rescaled), update / np.linalg.norm(update), rtol=1e-3, atol=1e-4
    )


@every_case(keeps="linear")
@hypothesis.given(scales=hnp.arrays(np.float64, (2, T), elements=st.floats(0.125, 8)))
def test_linear_under_scaling(case, scales):
    matrix = problems.gradients()
    one, other = (run(case, [c[:, None] * matrix])[0][0] for c in scales)
    both = run(case, [scales.sum(0)[:, None] * matrix])[0][0]
    np.testing.assert_allclose(both, one + other, rtol=1e-4, atol=1e-4)


@every_case(keeps="simplex")
@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=20)
def test_weights_are_on_the_simplex(case, seed):
    matrices = [problems.gradients(seed=seed + k) for k in range(2)]
    _, state = run(case, matrices)
    weights = weights_of(state)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)


@every_case(keeps="sum")
def test_weights_sum_to_the_number_of_tasks_present(case):
    mask = np.array([True, False, True])
    for last, number in ((EVERYONE, T), (mask, 2)):
        matrices = np.stack([problems.gradients(seed=k) for k in range(5)])
        _, state = run(case, matrices, masks=[EVERYONE] * 4 + [last])
        np.testing.assert_allclose(weights_of(state).sum(), number, rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in cases.CASES if "key" in case.kwargs], ids=str)
def test_random_methods_draw_anew_at_every_step(case):
    """Of three tasks in conflict, PCGrad has few orders: over a dozen steps, more than one turns up."""
    matrix = problems.gradients("conflicting", seed=3)
    updates, _ = run(case, [matrix] * 12)
    assert len(np.unique(updates.round(4), axis=0)) > 1


@every_case(keeps="stationary")
@hypothesis.given(seed=st.integers(0, 10**6))
@hypothesis.settings(max_examples=20)
def test_pareto_stationary_points_are_fixed_points(case, seed):
    matrix = problems.gradients("stationary", seed=seed)
    (update,), _ = run(case, [matrix])
    np.testing.assert_allclose(update, 0, atol=1e-3 * np.abs(matrix).max())
