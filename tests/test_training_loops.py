"""The loops of docs/training_loops.md: each trains, to where the plain one leads from the same parameters."""

import pathlib
import pickle
import re

import chex
import flax.serialization
import jax
from jax import numpy as jnp
import numpy as np
import optax
from orbax import checkpoint
import pytest

import optax_mtl as mtl
import problems

DOC = pathlib.Path(mtl.__file__).parent.parent / "docs" / "training_loops.md"
SETUP, *SECTIONS = re.split(r"^## ", DOC.read_text(), flags=re.MULTILINE)
SECTIONS = dict(section.split("\n", 1) for section in SECTIONS)
PLAIN = "Plain pytrees, and Haiku"


def run(text, namespace):
    exec(compile(text, str(DOC), "exec"), namespace)


def block(text):
    (only,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return only


@pytest.fixture(scope="module")
def plain():
    """What the first blocks define."""
    namespace = {}
    with problems.relaxed_promotion():
        run(block(SETUP), namespace)
        run(block(SECTIONS[PLAIN]), namespace)
    return namespace


def haiku_like(hidden, out):
    """The plain loop's tree, from each layer's weights and bias."""
    return {"net/~/hidden": dict(zip("wb", hidden, strict=True)), "net/~/out": dict(zip("wb", out, strict=True))}


def nnx_params(namespace):
    model = namespace["model"]
    return haiku_like(*((layer.kernel[...], layer.bias[...]) for layer in (model.hidden, model.out)))


def linen_params(namespace):
    params = namespace["state"].params
    return haiku_like(*((params[name]["kernel"], params[name]["bias"]) for name in ("hidden", "out")))


def equinox_params(namespace):
    return haiku_like(*((layer.weight.T, layer.bias) for layer in namespace["model"].layers))


@pytest.mark.parametrize(
    ("section", "params_in"),
    [
        (PLAIN, lambda namespace: namespace["params"]),
        ("Flax NNX", nnx_params),
        ("Flax Linen", linen_params),
        ("Equinox", equinox_params),
    ],
)
def test_a_loop_trains_as_the_plain_one_does(section, params_in, plain):
    namespace = dict(plain)
    before, loop = block(SECTIONS[section]).split("\n\n\nfor ")
    with problems.relaxed_promotion():
        run(before, namespace)
        params = start = jax.tree.map(jnp.copy, params_in(namespace))
        first = plain["loss_fn"](start, plain["batch"])
        run("for " + loop, namespace)
        opt_state = plain["tx"].init(params)
        for _ in range(20):
            params, opt_state, losses = plain["step"](params, opt_state, plain["batch"])
    chex.assert_trees_all_close(params_in(namespace), params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(namespace["losses"], losses, rtol=1e-5)
    assert (losses < 0.9 * first).all()


def test_an_nnx_model_may_change_in_a_step(plain):
    """As the page's does not: by batch statistics and random streams."""
    layer = "self.hidden = nnx.Linear(3, 8, rngs=rngs)"
    call = "jnp.tanh(self.hidden(x))"
    text = block(SECTIONS["Flax NNX"])
    assert layer in text
    assert call in text
    more = "self.norm = nnx.BatchNorm(8, rngs=rngs); self.drop = nnx.Dropout(0.1, rngs=rngs)"
    text = text.replace(layer, f"{layer}; {more}")
    namespace = dict(plain)
    with problems.relaxed_promotion():
        run(text.replace(call, "self.drop(jnp.tanh(self.norm(self.hidden(x))))"), namespace)
    model = namespace["model"]
    assert (np.asarray(model.norm.mean[...]) != 0).all()
    assert int(model.drop.rngs.count[...]) == 20


def test_tuples_train_as_dicts_do(plain):
    def loss_fn(params, batch):
        return plain["loss_fn"](haiku_like(*params), batch)

    @jax.jit
    def step(params, opt_state, batch):
        losses, task_grads = mtl.value_and_task_grads(loss_fn)(params, batch)
        updates, opt_state = plain["tx"].update(task_grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), opt_state, losses

    with problems.relaxed_promotion():
        params = tuple((layer["w"], layer["b"]) for layer in plain["params"].values())
        opt_state = plain["tx"].init(params)
        expected, expected_state = plain["params"], plain["tx"].init(plain["params"])
        for _ in range(3):
            params, opt_state, _ = step(params, opt_state, plain["batch"])
            expected, expected_state, _ = plain["step"](expected, expected_state, plain["batch"])
    assert isinstance(params, tuple)
    chex.assert_trees_all_close(haiku_like(*params), expected, rtol=1e-5, atol=1e-6)


def test_the_checkpoints_of_the_page(plain):
    namespace = dict(plain)
    text = SECTIONS["Checkpoints"]
    first, second = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    run(first, namespace)
    assert_same_bits(namespace["restored"]["opt_state"], namespace["opt_state"])
    run(second.replace("key_impl(key)),\n)", "key_impl(key)),\n    override=True,\n)"), namespace)
    assert_same_bits(namespace["restored"], namespace["opt_state"])
    assert "key=jax.random.PRNGKey(0)" in text
    raw = mtl.pcgrad(3, key=jax.random.PRNGKey(0))
    task_grads, params = problems.tree_of(problems.gradients("conflicting")), problems.params()
    updates, state = jax.jit(raw.update)(task_grads, raw.init(params), params)
    typed = mtl.pcgrad(3, key=jax.random.key(0))
    chex.assert_trees_all_equal(updates, jax.jit(typed.update)(task_grads, typed.init(params), params)[0])
    restored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    np.testing.assert_array_equal(restored["method"]["key"], state.method.key)


def test_the_wrappers_states_go_on_too(plain, tmp_path):
    """All that goes around methods, in one optimiser, saved in the middle of an accumulation."""
    balanced = mtl.balance_in_metric(mtl.blockwise(mtl.pcgrad(2, key=0)), optax.adam(1e-2))
    parts = (
        mtl.per_task(optax.add_noise(0.1, 0.5, key=1), 2),
        mtl.shared_and_heads(balanced, shared=lambda path: "hidden" in path),
    )
    tx = mtl.multi_steps(mtl.monitor(optax.chain(*parts), 2, capacity=3), 2, every=2)

    traces = []

    @jax.jit
    def step(params, opt_state):
        traces.append(1)
        losses, task_grads = mtl.value_and_task_grads(plain["loss_fn"])(params, plain["batch"])
        updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), opt_state

    def train(kept, steps):
        for _ in range(steps):
            kept = step(*kept)
        return kept

    with problems.relaxed_promotion():
        half = train((plain["params"], tx.init(plain["params"])), 3)
        expected = train(half, 3)
        with checkpoint.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "kept", half)
            checkpointer.wait_until_finished()
            like = jax.eval_shape(lambda params: (params, tx.init(params)), plain["params"])
            restored = checkpointer.restore(tmp_path / "kept", like)
        for kept in (restored, pickle.loads(pickle.dumps(half))):
            assert_same_bits(train(kept, 3), expected)
    assert len(traces) == 1


def assert_same_bits(one, other):
    def plain_numbers(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    chex.assert_trees_all_equal(jax.tree.map(plain_numbers, one), jax.tree.map(plain_numbers, other))
