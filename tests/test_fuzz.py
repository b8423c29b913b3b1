"""The whole catalogue on whatever training comes with: trees, dtypes, numbers of tasks, conditioning, masks, faults.

A few cases run with the other tests. `make fuzz` runs some for every row of `cases.CASES` and every entry of `POOL`,
says how many there were and, for one that fails, how to run it again.
"""

import contextlib
import dataclasses
import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import cases
import problems

# Shapes and dtypes, of problems.SIZE parameters each: the numbers are drawn, but not what shapes a program, or each
# would be compiled anew.
TREES = {
    "one": {"w": ((8,), jnp.float32)},
    "nested": {"a": ((3,), jnp.float32), "b": [((2, 2), jnp.float32), None], "c": ((), jnp.float32), "d": ((0,), "f4")},
    "half": (((4,), jnp.bfloat16), ((2, 2), jnp.bfloat16)),
    "mixed": {"w": ((2, 2), jnp.float32), "b": ((2,), jnp.bfloat16), "c": ((2,), jnp.float16)},
}
POOL = [
    (1, "nested"),
    (2, "mixed"),
    (3, "one"),
    (4, "half"),
    (5, "nested"),
    (6, "one"),
    (7, "half"),
    (8, "mixed"),
]

GRADIENT_FAULTS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "too large to square": 1e30}
LOSS_FAULTS = [np.nan, np.inf, -np.inf, 1e30, -1e30, 1e15, 0.0, -1.0, 1e-30]

# What a method's documentation says, and is not put right here.
OWN_WAYS = {
    "edm": "gradients that are zero have no direction: without any other, weights are zero",
    "con_fig_momentum": "an absent task takes part with the moment it has",
    "hydalearn": "weights are zero if the main task is absent",
    "update_every": "where tasks come and go, weights need not sum to what they did",
}
MULTIPLIED_WITH_LOSSES = ("db_mtl", "moco")  # gradients: a task is absent, too, if that overflows

tried = 0  # cases so far


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a case: `faults` has, for each task, None, "masked", a name of GRADIENT_FAULTS or a loss."""

    kind: str
    seed: int
    power: int
    faults: tuple


def steps_of(num_tasks):
    fault = st.none() | st.none() | st.none() | st.sampled_from(["masked", *GRADIENT_FAULTS, *LOSS_FAULTS])
    step = st.builds(
        Step,
        kind=st.sampled_from(problems.KINDS),
        seed=st.integers(0, 10**6),
        power=st.sampled_from([0, 0, 0, -10, -3, 2, 6, 12]),
        faults=st.tuples(*[fault] * num_tasks),
    )
    return st.lists(step, min_size=1, max_size=6)


def is_spec(node):
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], tuple) and not isinstance(node[1], tuple)


def tree_of(vectors, name):
    """Cuts the last axis of an array into the leaves of a tree."""
    start = 0

    def cut(spec):
        nonlocal start
        shape, dtype = spec
        size = int(np.prod(shape))
        part = vectors[..., start : start + size].reshape((*vectors.shape[:-1], *shape))
        start += size
        with np.errstate(over="ignore"):
            return jnp.asarray(np.asarray(part, jnp.dtype(dtype)))

    return jax.tree.map(cut, TREES[name], is_leaf=is_spec)


def vector_of(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def rows_of(tree, num_tasks):
    """The gradients as the method is given them, `(T, SIZE)`."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(num_tasks, -1) for leaf in jax.tree.leaves(tree)], 1)


def losses_elsewhere(tree, factors):
    flat = jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(tree)])
    return jnp.sum((flat[None] - factors[:, None]) ** 2, axis=1) * factors


@functools.lru_cache(maxsize=32)
def program(case, num_tasks, name):
    tx = case.make(num_tasks)

    @jax.jit
    def step(task_grads, state, params, losses, mask, factors):
        updates, state = tx.update(
            task_grads,
            state,
            params,
            losses=losses,
            task_mask=mask,
            value_fn=lambda tree: losses_elsewhere(tree, factors),
            **problems.extra_args(losses),
        )
        floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return updates, state, jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in floats]))

    return tx, step


@dataclasses.dataclass
class Inputs:
    """What the method is given at each step: gradients `(T, SIZE)`, losses `(T,)`, mask `(T,)`."""

    gradients: list
    losses: list
    masks: list


def inputs_of(steps, num_tasks):
    inputs = Inputs([], [], [])
    for step in steps:
        matrix = problems.gradients(step.kind, num_tasks, step.seed) * 10.0**step.power
        losses, mask = problems.losses(num_tasks, step.seed), np.ones(num_tasks, bool)
        for i, fault in enumerate(step.faults):
            if fault == "masked":
                mask[i] = False
            elif isinstance(fault, str):
                matrix[i, (step.seed + i) % problems.SIZE] = GRADIENT_FAULTS[fault]
            elif fault is not None:
                losses[i] = fault
        inputs.gradients.append(matrix)
        inputs.losses.append(losses)
        inputs.masks.append(mask)
    return inputs


def run(case, num_tasks, name, inputs, factors=None):
    """Updates `(steps, SIZE)`, weights and who was present `(steps, T)`; checks what always holds."""
    tx, step = program(case, num_tasks, name)
    factors = jnp.asarray(np.arange(1, num_tasks + 1) if factors is None else factors, jnp.float32)
    updates, weights, presents = [], [], []
    with problems.relaxed_promotion() if case.optax_inside else contextlib.nullcontext():
        params = tree_of(np.linspace(-1, 1, problems.SIZE), name)
        state = tx.init(params)
        like = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (params, state))
        for matrix, losses, mask in zip(inputs.gradients, inputs.losses, inputs.masks, strict=True):
            losses = jnp.asarray(losses, jnp.float32)
            task_grads = tree_of(matrix, name)
            update, state, finite = step(task_grads, state, params, losses, jnp.asarray(mask), factors)
            assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (update, state)) == like
            updates.append(vector_of(update))
            weights.append(np.asarray(optax.tree.get(state, "task_weights"), np.float64))
            presents.append(np.asarray(optax.tree.get(state, "task_present")))
            with np.errstate(over="ignore", invalid="ignore"):
                squares = np.sum(np.square(rows_of(task_grads, num_tasks).astype(np.float32)), axis=1)
                squares += np.square(np.asarray(losses))
            assert np.isfinite(updates[-1]).all(), updates
            assert finite, state
            assert np.isfinite(weights[-1]).all()
            expected = mask & np.isfinite(squares)
            if case.method in MULTIPLIED_WITH_LOSSES:
                assert np.all(presents[-1] <= expected)
                expected = presents[-1]
            np.testing.assert_array_equal(presents[-1], expected)
            assert case.method == "con_fig_momentum" or np.all(weights[-1][~expected] == 0)
            if not expected.any():
                assert np.all(updates[-1] == 0)
            elif case.method in OWN_WAYS or ("positive losses" in case.needs and np.any(losses[expected] <= 0)):
                continue
            elif "simplex" in case.keeps:
                assert np.all(weights[-1] >= 0)
                np.testing.assert_allclose(weights[-1].sum(), 1, rtol=1e-4)
            elif "sum" in case.keeps:
                np.testing.assert_allclose(weights[-1].sum(), expected.sum(), rtol=1e-4)
            residual = optax.tree.get(state, "residual")
            assert residual is None or case.method == "pcd" or residual <= 1e-3, residual
    return np.array(updates), np.array(weights), np.array(presents)


def check(case, num_tasks, name, steps):
    if (str(case), name) == ("scale_by_mao-optax", "mixed"):
        return  # Optax's own transformation: it keeps squares of float16 gradients in float16, where they overflow
    global tried
    tried += 1
    inputs = inputs_of(steps, num_tasks)
    updates, weights, presents = run(case, num_tasks, name, inputs)
    size = np.abs(updates).max()

    # A task that is not finite is as one that is masked, bit for bit.
    healthy = [problems.gradients(num_tasks=num_tasks, seed=k) for k in range(len(steps))]
    masked = Inputs(
        [np.where(present[:, None], g, h) for g, h, present in zip(inputs.gradients, healthy, presents, strict=True)],
        [np.where(present, losses, 1) for losses, present in zip(inputs.losses, presents, strict=True)],
        list(presents),
    )
    again, weights_again, _ = run(case, num_tasks, name, masked)
    np.testing.assert_array_equal(again, updates)
    np.testing.assert_array_equal(weights_again, weights)

    tame = all(step.kind in ("gaussian", "conflicting") and step.power == 0 for step in steps)
    tame &= not np.any(np.abs(inputs.losses) > 1e3) and not np.any(np.asarray(inputs.losses) < 1e-3)
    if name not in ("one", "nested"):
        return
    if "non-conflicting" in case.keeps:
        for step, matrix, update, present in zip(steps, inputs.gradients, updates, presents, strict=True):
            rows = matrix[present]
            norms = np.linalg.norm(rows, axis=1)
            if present.any() and step.kind != "extremely_scaled":
                slack = 1e-3 * norms * max(np.linalg.norm(update), 1e-3 * norms.max())
                assert np.all(rows @ update >= -slack)
    if not tame:
        return
    if case.scale is not None:
        scaled = Inputs([matrix * 2.0**12 for matrix in inputs.gradients], inputs.losses, inputs.masks)
        rescaled = run(case, num_tasks, name, scaled)[0] / 2.0 ** (12 * case.scale)
        np.testing.assert_allclose(rescaled, updates, rtol=1e-3, atol=1e-3 * size)
    if "permutation" in case.keeps:
        order = np.random.default_rng(steps[0].seed).permutation(num_tasks)
        permuted = Inputs(*[[each[order] for each in field] for field in vars(inputs).values()])
        of_permuted, permuted_weights, _ = run(case, num_tasks, name, permuted, order + 1)
        np.testing.assert_allclose(of_permuted, updates, rtol=1e-2, atol=1e-2 * size)
        np.testing.assert_allclose(permuted_weights, weights[:, order], rtol=1e-2, atol=1e-2 * np.abs(weights).max())
    if "absent" not in case.lacks and (num_tasks, name) == (3, "one"):
        alone = [[np.delete(each, 1, axis=0) for each in field] for field in vars(inputs).values()]
        without = Inputs(*alone)
        masks = [mask & (np.arange(num_tasks) != 1) for mask in inputs.masks]
        away = run(case, num_tasks, name, Inputs(inputs.gradients, inputs.losses, masks))[0]
        never = run(case, num_tasks - 1, name, without, [1, 3])[0]
        np.testing.assert_allclose(away, never, rtol=1e-2, atol=1e-2 * np.abs(never).max())


@pytest.fixture(scope="module", autouse=True)
def say_how_many(request):
    yield
    terminal = request.config.pluginmanager.getplugin("terminalreporter")  # none in a worker of xdist
    if terminal is not None:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            terminal.write_line(f"\nfuzzing: {tried} cases")


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=12)
def test_a_few_cases_of_the_whole_catalogue(data):
    case = data.draw(st.sampled_from(cases.CASES))
    num_tasks, name = data.draw(st.sampled_from(POOL))
    check(case, num_tasks, name, data.draw(steps_of(num_tasks)))


@pytest.mark.fuzz
@pytest.mark.parametrize("entry", POOL, ids=lambda entry: f"{entry[0]}-{entry[1]}")
@pytest.mark.parametrize("case", cases.CASES, ids=str)
@hypothesis.given(data=st.data())
def test_fuzz(case, entry, data):
    check(case, *entry, data.draw(steps_of(entry[0])))
