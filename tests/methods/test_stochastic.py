"""SDMGrad, MoDo and MoCo: their recursions, written out, and gradients from independent batches."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
import problems

T = 3
STEPS = 4
BATCHES = [
    np.stack([problems.gradients(seed=k) + 0.5 * problems.gradients(seed=10 * b + k) for k in range(STEPS)])
    for b in (1, 2, 3)
]
METHODS = {
    "sdmgrad": lambda: mtl.sdmgrad(T, inner_learning_rate=0.5, preference=jnp.array([1.0, 2.0, 3.0])),
    "modo": lambda: mtl.modo(T, gamma=0.02),
}
both = pytest.mark.parametrize("method", METHODS)


def project(point):
    """Onto the simplex, by bisection of the threshold."""
    low, high = point.min() - 1, point.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(point - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(point - low, 0)


def run(tx, independent=None, masks=None):
    """Over the steps; `independent(k)` is the extra argument of step k."""
    params = problems.params()
    step = jax.jit(tx.update)
    state, updates = tx.init(params), []
    for k in range(STEPS):
        extra_args = {} if independent is None else {"independent_grads": independent(k)}
        if masks is not None:
            extra_args["task_mask"] = jnp.asarray(masks[k])
        update, state = step(problems.tree_of(BATCHES[0][k]), state, params, **extra_args)
        updates.append(problems.vector_of(update))
    return np.stack(updates), state


def pair(k):
    return problems.tree_of(BATCHES[1][k]), problems.tree_of(BATCHES[2][k])


def sdmgrad_step(solution, cross, size):
    """Returns the new solution and the weights; `size` is what the products are divided by."""
    target, lam, velocity = np.array([1.0, 2.0, 3.0]) / 6, 0.3, np.zeros(T)
    for _ in range(20):
        velocity = 0.5 * velocity + cross / size @ (solution + lam * target)
        solution = project(solution - 0.5 * velocity)
    return solution, (solution + lam * target) / (1 + lam)


def test_sdmgrad_follows_its_formula():
    updates, _ = run(METHODS["sdmgrad"](), pair)
    solution = np.full(T, 1 / T)
    for k in range(STEPS):
        cross = BATCHES[1][k] @ BATCHES[2][k].T
        size = np.mean(np.sqrt(np.maximum(np.diag(cross), 0))) ** 2
        solution, weights = sdmgrad_step(solution, cross, size)
        np.testing.assert_allclose(updates[k], weights @ BATCHES[0][k], rtol=1e-3, atol=1e-4)


def test_modo_follows_its_formula():
    updates, _ = run(METHODS["modo"](), pair)
    weights = np.full(T, 1 / T)
    for k in range(STEPS):
        slope = BATCHES[1][k] @ (BATCHES[2][k].T @ weights) + 0.1 * weights
        weights = project(weights - 0.02 * slope)
        np.testing.assert_allclose(updates[k], weights @ BATCHES[0][k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mapping", ["project", "softmax"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_moco_follows_its_formula(mapping, prenorm):
    tx = mtl.moco(T, beta_sigma=0.3, gamma_sigma=0.7, rho=0.2, mapping=mapping, prenorm=prenorm)
    params = problems.params()
    state, tracked, weights = tx.init(params), np.zeros((T, problems.SIZE)), np.full(T, 1 / T)
    for k in range(STEPS):
        matrix, losses = BATCHES[0][k], problems.losses(T, k)
        update, state = tx.update(problems.tree_of(matrix), state, params, losses=jnp.asarray(losses, jnp.float32))
        if prenorm:
            matrix = matrix / np.linalg.norm(matrix, axis=1)[:, None] * losses[:, None]
        tracked = tracked - 0.5 / (k + 1) ** 0.3 * (tracked - matrix)
        slope = (tracked @ tracked.T + 0.2 * np.eye(T)) @ weights
        point = weights - 0.1 / (k + 1) ** 0.7 * slope
        weights = project(point) if mapping == "project" else np.exp(point) / np.exp(point).sum()
        np.testing.assert_allclose(problems.vector_of(update), weights @ tracked, rtol=1e-4, atol=1e-5)


def test_moco_sees_through_the_noise_of_batches():
    """The first task's gradients are small but noisy: the last batch's norm hides that, the tracked one tells."""
    rng = np.random.default_rng(0)
    mean = np.array([[0.5, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    tx = mtl.moco(2)
    state, step, params = tx.init(jnp.zeros(4)), jax.jit(tx.update), jnp.zeros(4)
    for _ in range(600):
        noise = np.stack([rng.standard_normal(4), np.zeros(4)])
        _, state = step(jnp.asarray(mean + noise, jnp.float32), state, params)
    exact = mtl.mgda_weights(jnp.asarray(mean @ mean.T, jnp.float32))  # (0.8, 0.2); with the noise (0.19, 0.81)
    np.testing.assert_allclose(optax.tree.get(state, "task_weights"), exact, atol=0.1)


@both
def test_on_one_and_the_same_batch_it_is_the_deterministic_form(method):
    alone, _ = run(METHODS[method]())
    same, _ = run(METHODS[method](), lambda k: (problems.tree_of(BATCHES[0][k]),) * 2)
    np.testing.assert_allclose(same, alone, rtol=1e-4, atol=1e-5)


@both
def test_a_cross_gramian_does_for_the_pair(method):
    updates, state = run(METHODS[method](), pair)
    by_matrix, _ = run(METHODS[method](), lambda k: mtl.Gramian(mtl.task_cross_gramian(*pair(k))))
    np.testing.assert_allclose(by_matrix, updates, rtol=1e-5, atol=1e-6)

    tx = METHODS[method]()
    light = tx.init(problems.params())
    for k in range(STEPS):
        gramian, cross = mtl.Gramian(jnp.eye(T)), mtl.Gramian(mtl.task_cross_gramian(*pair(k)))
        weights, light = tx.update(gramian, light, independent_grads=cross)
    np.testing.assert_allclose(weights, optax.tree.get(state, "task_weights"), rtol=1e-4)


@both
@pytest.mark.parametrize("which", [0, 1])
def test_an_independent_gradient_that_is_not_finite_sets_its_task_aside(method, which):
    def broken(k):
        grads = list(pair(k))
        if k == 1:
            grads[which] = {**grads[which], "a": grads[which]["a"].at[2, 3].set(jnp.nan)}
        return tuple(grads)

    masks = np.ones((STEPS, T), bool)
    masks[1, 2] = False
    updates, state = run(METHODS[method](), broken)
    expected, expected_state = run(METHODS[method](), pair, masks)
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.task_weights, expected_state.task_weights, rtol=1e-5)
    assert state.nonfinite_count.tolist() == [0, 0, 1]


@both
def test_products_that_overflow_set_a_task_aside_too(method):
    """Each task's own product is finite; the first's gradient on one batch times the second's on the other is not."""
    huge = mtl.Gramian(jnp.array([[1.0, jnp.inf, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    tx = METHODS[method]()
    weights, state = tx.update(mtl.Gramian(jnp.eye(T)), tx.init(problems.params()), independent_grads=huge)
    assert np.isfinite(weights).all()
    assert state.task_present.tolist() == [False, True, True]


@both
def test_whole_trees_will_do_where_it_balances_the_trunk_alone(method):
    grads = [problems.tree_of(batch[0]) for batch in BATCHES]
    params = problems.params()
    trunk = {"a": params["a"]}
    tx = METHODS[method]()
    expected, _ = tx.update(
        {"a": grads[0]["a"]}, tx.init(trunk), trunk, independent_grads=({"a": grads[1]["a"]}, {"a": grads[2]["a"]})
    )
    wrapped = mtl.shared_and_heads(METHODS[method](), shared=lambda path: path == "a")
    updates, _ = wrapped.update(grads[0], wrapped.init(params), params, independent_grads=(grads[1], grads[2]))
    np.testing.assert_allclose(updates["a"], expected["a"], rtol=1e-6)


@both
def test_what_independent_gradients_must_look_like(method):
    tx = METHODS[method]()
    params = problems.params()
    state, grads = tx.init(params), problems.tree_of(BATCHES[0][0])
    with pytest.raises(
        ValueError, match=r"write\n +updates, opt_state = tx.update\(task_grads, opt_state, params, ind"
    ):
        tx.update(grads, state, params, independent_grads=grads)
    ordinary = jax.tree.map(lambda g: g[0], grads)
    with pytest.raises(ValueError, match=r"independent_grads\[1\]\['a'\] has shape \(4,\), wanted \(3, 4\)"):
        tx.update(grads, state, params, independent_grads=(grads, ordinary))
    with pytest.raises(ValueError, match=r"Gramian has shape \(2, 2\), wanted \(3, 3\)"):
        tx.update(grads, state, params, independent_grads=mtl.Gramian(jnp.eye(2)))


@both
def test_independent_gradients_are_compared_with_the_others_without_params(method):
    tx = METHODS[method]()
    grads = problems.tree_of(BATCHES[0][0])
    state = tx.init(problems.params())
    other = {"a": jnp.ones((3, 2)), "b": grads["b"]}
    for given, like in ((grads, "task_grads"), (mtl.Gramian(jnp.eye(T)), r"independent_grads\[0\]")):
        with pytest.raises(ValueError, match=r"independent_grads\[1\]\['a'\] has shape \(3, 2\), wanted \(3, 4\)"):
            tx.update(given, state, independent_grads=(grads, other))
        with pytest.raises(ValueError, match=rf"like {like}, but {like}\['b'\]\[0\] is not in independent_grads\[1\]"):
            tx.update(given, state, independent_grads=(grads, {"a": grads["a"]}))
        with pytest.raises(ValueError, match=rf"but independent_grads\[1\]\['c'\] is not in {like}"):
            tx.update(given, state, independent_grads=(grads, {**grads, "c": grads["a"]}))


def test_both_end_at_mgda_if_nothing_else_pulls():
    """With the gradients held fixed: many steps, many iterations."""
    for seed in range(3):
        matrix = problems.gradients(seed=seed)
        gramian = jnp.asarray(matrix @ matrix.T, jnp.float32)
        exact = mtl.mgda_weights(gramian)
        start = jnp.full(T, 1 / T)
        solution = mtl.sdmgrad_solution(gramian, start, start, lam=0.0, inner_learning_rate=0.2, iterations=300)
        np.testing.assert_allclose(solution, exact, atol=1e-4)
        weights, step = start, jax.jit(mtl.modo_weights)
        for _ in range(300):
            weights = step(gramian, weights, gamma=0.05, rho=0.0)
        np.testing.assert_allclose(weights, exact, atol=1e-4)


def test_a_strong_pull_gives_the_preferred_direction():
    tx = mtl.sdmgrad(T, lam=1e4, preference=jnp.array([1.0, 2.0, 1.0]))
    _, state = tx.update(problems.tree_of(BATCHES[0][0]), tx.init(problems.params()))
    np.testing.assert_allclose(state.task_weights, [0.25, 0.5, 0.25], atol=1e-3)


def test_batches_that_disagree_entirely_follow_the_formulas_too():
    """No task's gradients agree across the batches: nothing on the diagonal to take a scale from."""
    for seed in range(3):
        grads = problems.gradients(seed=seed)
        cross, equal = -grads @ grads.T, np.full(T, 1 / T)
        size = np.finfo(np.float32).eps * np.abs(cross).max()
        expected = {
            "sdmgrad": sdmgrad_step(equal, cross, size)[1],
            "modo": project(equal - 0.02 * (cross @ equal + 0.1 * equal)),
        }
        given = mtl.Gramian(jnp.asarray(cross, jnp.float32))
        for method, make in METHODS.items():
            tx = make()
            weights, _ = tx.update(mtl.Gramian(jnp.eye(T)), tx.init(problems.params()), independent_grads=given)
            np.testing.assert_allclose(weights, expected[method], rtol=1e-5, atol=1e-6)
