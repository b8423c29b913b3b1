"""The border between trees and matrices."""

import os
import subprocess
import sys
import textwrap

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
from optax_mtl import _gramian
import problems


@pytest.mark.parametrize("size", [1, 4096, 4097, 20_000])
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_gramian_is_that_of_the_flattened_gradients(num_tasks, size):
    """Also for leaves that are contracted in chunks, with a remainder."""
    matrix = np.random.default_rng(0).standard_normal((num_tasks, size))
    task_grads = {"w": jnp.asarray(matrix, jnp.float32), "b": jnp.ones((num_tasks, 2, 2), jnp.float32), "none": None}
    gramian = jax.jit(mtl.task_gramian)(task_grads)
    chex.assert_shape(gramian, (num_tasks, num_tasks))
    np.testing.assert_allclose(gramian, matrix @ matrix.T + 4, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(gramian, gramian.T)
    np.testing.assert_allclose(_gramian.task_squared_norms(task_grads), np.diag(gramian), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4097, 20_000])
def test_cross_gramian_is_that_of_the_flattened_gradients(size):
    first, second = np.random.default_rng(0).standard_normal((2, 3, size))
    trees = [{"w": jnp.asarray(m, jnp.float32), "b": jnp.ones((3, 2, 2)), "none": None} for m in (first, second)]
    cross = jax.jit(mtl.task_cross_gramian)(*trees)
    np.testing.assert_allclose(cross, first @ second.T + 4, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("oracle", ["gradients", "deferred"])
def test_what_overflows_stays_within_range(oracle):
    """An update that would be too long keeps its direction, and a length that the optimiser behind can square."""
    tx = mtl.scale_invariant(2)  # weights 1 / L
    rows = jnp.array([[3.0, 4.0], [0.3, 0.4]])

    @jax.jit
    def step(w, offsets):
        loss_fn = lambda w: 1e10 * rows @ w + offsets
        compute = mtl.value_and_task_grads if oracle == "gradients" else mtl.value_and_light_grads
        losses, grads = compute(loss_fn)(w)
        return tx.update(grads, tx.init(w), w, losses=losses)

    update, state = step(jnp.zeros(2), jnp.array([1e-30, 1.0]))
    assert np.isfinite(np.square(update)).all()
    np.testing.assert_allclose(update / jnp.linalg.norm(update), [0.6, 0.8], rtol=1e-5)
    np.testing.assert_allclose(state.task_weights @ (1e10 * rows), update, rtol=1e-5)

    half = jnp.array([[60_000.0, 1.0], [60_000.0, 1.0]], jnp.float16)
    update, _ = mtl.sum_tasks(2).update(half, mtl.sum_tasks(2).init(jnp.zeros(2, jnp.float16)))
    assert update.dtype == jnp.float16
    assert update.tolist() == [65504.0, 2.0]
    # And yet what is not finite is no large number.
    update, state = mtl.sum_tasks(2).update(half.at[0, 0].set(jnp.inf), mtl.sum_tasks(2).init(update))
    assert update.tolist() == half[1].tolist()
    assert state.nonfinite_count.tolist() == [1, 0]


def test_half_precision_is_accumulated_in_float32():
    """Ten thousand ones: bfloat16 would stop counting at 256."""
    task_grads = jnp.ones((2, 10_000), jnp.bfloat16)
    gramian = mtl.task_gramian(task_grads)
    assert gramian.dtype == jnp.float32
    np.testing.assert_array_equal(gramian, 10_000)
    many = mtl.combine(jnp.full(300, 1.0), jnp.ones((300, 4), jnp.bfloat16))
    assert many.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(many, np.float32), 300)


@pytest.mark.parametrize("num_tasks", [1, 3, 40])
def test_combine(num_tasks):
    matrix = np.random.default_rng(1).standard_normal((num_tasks, problems.SIZE))
    weights = np.random.default_rng(2).standard_normal(num_tasks)
    combined = mtl.combine(jnp.asarray(weights, jnp.float32), problems.tree_of(matrix))
    np.testing.assert_allclose(problems.vector_of(combined), weights @ matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tasks", [2, 40])
def test_combine_passes_over_rows_of_weight_zero(num_tasks):
    matrix = np.ones((num_tasks, problems.SIZE))
    matrix[1] = np.nan
    weights = jnp.ones(num_tasks).at[1].set(0)
    combined = mtl.combine(weights, problems.tree_of(matrix))
    np.testing.assert_allclose(problems.vector_of(combined), num_tasks - 1)


def test_gramian_is_a_pytree():
    gramian = mtl.Gramian(jnp.eye(2))
    doubled = jax.jit(lambda g: jax.tree.map(lambda x: 2 * x, g))(gramian)
    assert isinstance(doubled, mtl.Gramian)
    np.testing.assert_array_equal(mtl.task_gramian(doubled), 2 * np.eye(2))
    np.testing.assert_array_equal(mtl.combine(jnp.ones(2), gramian), 1)
    assert repr(gramian).startswith("Gramian(")


def temporary_bytes(function, *given):
    return jax.jit(function).lower(*given).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_tasks", [2, 8, 16, 40])
def test_one_pass_needs_no_memory_of_the_gradients_size(num_tasks, dtype):
    """Counted in the compiled program: no copy, transposed, widened or cleaned, of the task gradients."""
    params = jax.ShapeDtypeStruct((700, 999), dtype)
    grads = jax.ShapeDtypeStruct((num_tasks, 700, 999), dtype)
    least = 700 * 999 * 4  # one task's gradient, accumulated
    assert temporary_bytes(lambda g: mtl.task_gramian(g), grads) < least / 2
    assert temporary_bytes(mtl.task_gramian, grads, params) < least / 2
    assert temporary_bytes(mtl.task_cross_gramian, grads, grads) < least / 2
    assert temporary_bytes(mtl.combine, jax.ShapeDtypeStruct((num_tasks,), jnp.float32), grads) < 1.1 * least
    tx = mtl.mgda(num_tasks)
    assert temporary_bytes(tx.update, grads, tx.init(jnp.zeros(params.shape, dtype))) < 1.5 * least


def test_what_is_done_entry_by_entry_needs_none_either():
    tx = mtl.excess_mtl(8)
    grads = jnp.zeros((8, 700, 999))
    update = jax.jit(tx.update, donate_argnums=1)
    memory = update.lower(grads, tx.init(grads[0])).compile().memory_analysis()
    assert memory.temp_size_in_bytes < grads[0].nbytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("num_tasks", [3, 8])
def test_what_is_done_by_columns_is_what_is_done_at_once(num_tasks, dtype):
    """On leaves that are no multiple of anything; against the same on leaves too small to be cut."""
    rng = np.random.default_rng(0)
    whole = jnp.asarray(rng.standard_normal((num_tasks, 101, 299)), dtype)
    parts = [whole[:, i : i + 10] for i in range(0, 101, 10)]
    tx = mtl.excess_mtl(num_tasks)
    update, state = tx.update(whole, tx.init(whole[0]))
    update_of_parts, state_of_parts = tx.update(parts, tx.init([part[0] for part in parts]))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 2e-2, "atol": 2e-2}
    expected = np.concatenate([np.asarray(part, np.float32) for part in update_of_parts])
    np.testing.assert_allclose(np.asarray(update, np.float32), expected, **close)
    np.testing.assert_allclose(state.task_weights, state_of_parts.task_weights, rtol=1e-3)


@pytest.mark.parametrize("along", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_task_products_are_inner_products_with_one_direction(dtype, along):
    rng = np.random.default_rng(0)
    shapes = {"matrix": (3, 5), "scalar": (), "vector": (4,)}
    task_grads = {name: jnp.asarray(rng.standard_normal((2, *shape)), dtype) for name, shape in shapes.items()}
    direction = {name: jnp.asarray(rng.standard_normal(shape), along) for name, shape in shapes.items()}
    expected = sum(
        np.asarray(task_grads[name], np.float64).reshape(2, -1) @ np.asarray(direction[name], np.float64).ravel()
        for name in shapes
    )
    products = _gramian.task_products(task_grads, direction)
    assert products.dtype == jnp.float32
    np.testing.assert_allclose(products, expected, rtol=1e-5)


def test_sharded_leaves_stay_where_they_are():
    """On 8 devices: all-reduces of (T, T), and nothing gathered. (A process of its own: devices are fixed at start.)"""
    program = """
        import re
        import jax
        from jax import numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        import numpy as np
        import optax_mtl as mtl

        assert jax.device_count() == 8
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
        method = mtl.mgda(num_tasks=3)
        params = {"w": jnp.zeros((64, 128)), "b": jnp.zeros(64), "layers": jnp.zeros((5, 16, 8))}
        task_grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), (3, *p.shape)), params)
        specs = {"w": P("data", "model"), "b": P("model"), "layers": P(None, "data", "model")}
        place = lambda tree, lead: jax.tree.map(
            lambda x, s: jax.device_put(x, NamedSharding(mesh, P(*lead, *s))), tree, specs
        )
        sharded, placed = place(task_grads, (None,)), place(params, ())
        by_layer = mtl.blockwise(method, stacked=lambda path: path == "layers")
        for tx in (method, by_layer):
            expected, _ = jax.jit(tx.update)(task_grads, tx.init(params), params)
            step = jax.jit(tx.update)
            updates, _ = step(sharded, tx.init(placed), placed)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), updates, expected)
            jax.tree.map(lambda u, p: (u.sharding.is_equivalent_to(p.sharding, u.ndim)) or 1 / 0, updates, placed)
            text = step.lower(sharded, tx.init(placed), placed).compile().as_text()
            found = re.findall(r"= (.+?) (all-gather|all-to-all|collective-permute|all-reduce)\\(", text)
            assert {kind for _, kind in found} == {"all-reduce"}, found
            shapes = {shape for shaped, _ in found for shape in re.findall(r"f32\\[([\\d,]*)\\]", shaped)}
            assert shapes <= {"", "3,3", "3,1,3,1", "5,3,3", "5,3,1,3,1", "3,5,3"}, shapes

        # Layers that live on devices of their own: what they exchange is small too.
        layers = jax.device_put(jnp.ones((3, 8, 16, 8)), NamedSharding(mesh, P(None, "data", None, "model")))
        tx = mtl.blockwise(method, stacked=True)
        text = jax.jit(tx.update).lower(layers, tx.init(layers[0])).compile().as_text()
        exchanged = re.findall(r"= (.+?) (?:all-gather|all-to-all|collective-permute|all-reduce)\\(", text)
        shapes = [shape for shaped in exchanged for shape in re.findall(r"\\w+\\[([\\d,]*)\\]", shaped)]
        assert shapes and max(np.prod([int(n) for n in s.split(",") if n]) for s in shapes) <= 8 * 3 * 3, shapes
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_is_compiled_is_for_where_it_will_run():
    """Chunks in a loop are for CPUs alone, also where a program for another device is only compiled on one."""
    task_grads = jnp.ones((3, 200, 300))
    lowered = lambda platform: jax.jit(mtl.task_gramian).trace(task_grads).lower(lowering_platforms=(platform,))
    for platform in ("tpu", "cuda"):
        text = lowered(platform).as_text()
        assert "stablehlo.while" not in text
        assert text.count("stablehlo.dot_general") == 1
    many = jnp.ones((9, 200, 300))  # too many for sums side by side
    assert "stablehlo.while" in jax.jit(mtl.task_gramian).lower(many).as_text()
