"""Every method of `cases.CASES` on sharded gradients, all in one program: compiled for one device, and for the mesh."""

import contextlib
import functools

import jax
from jax import lax, numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

import cases
from mesh import common
from mesh.common import T
import optax_mtl as mtl
import problems


def make_transforms():
    """What is tried, by name, and whether Optax's own code runs in it."""
    mgda, upgrad = mtl.mgda(T), mtl.upgrad(T)
    others = {
        "blockwise": mtl.blockwise(mgda),
        "blockwise-stacked": mtl.blockwise(upgrad, stacked=lambda path: path == "layers"),
        "in-metric": mtl.balance_in_metric(upgrad, optax.rmsprop(1.0)),
        "preconditioned": mtl.precondition_then_balance(upgrad, T),
        "shared": mtl.shared_and_heads(upgrad, lambda path: path != "b"),
        "monitor": mtl.monitor(upgrad, T, returns="gradient"),
    }
    rows = {str(case): (case.make(T), case.optax_inside) for case in cases.FIRST_ROWS.values()}
    return rows | {name: (tx, True) for name, tx in others.items()}


def init(transforms, params):
    states = {}
    for name, (tx, relaxed) in transforms.items():
        with problems.relaxed_promotion() if relaxed else contextlib.nullcontext():
            states[name] = tx.init(params)
    return states


def value_fn(reduce, params):
    """Losses elsewhere; `reduce(name, x)` sums what there is of a leaf over its shards."""
    sums, squares = (sum(reduce(name, jnp.sum(leaf**k)) for name, leaf in params.items()) for k in (1, 2))
    return (squares + jnp.arange(1.0, T + 1) * sums) / 1000


def update(transforms, reduce, task_grads, states, params, losses):
    updates, after = {}, {}
    given = {"losses": losses, "value_fn": lambda params: value_fn(reduce, params), **problems.extra_args(losses)}
    for name, (tx, relaxed) in transforms.items():
        with problems.relaxed_promotion() if relaxed else contextlib.nullcontext(), jax.named_scope(f"[{name}]"):
            updates[name], after[name] = tx.update(task_grads, states[name], params, **given)
    return updates, after


def steps(program, grads, states, params, losses):
    """The updates of two steps of one compiled program: the states must stay where they are."""
    first, states = program(grads[0], states, params, losses)
    second, states = program(grads[1], states, params, losses)
    return [first, second], states


def whole(name, value):
    return value


def of_shards(name, value):
    axes = tuple(axis for axis in common.SPECS[name] if axis is not None)
    return lax.psum(value, axes) if axes else value


def main():
    transforms = make_transforms()
    params, losses = common.random_tree(0), jnp.asarray(problems.losses(T), jnp.float32)
    grads = [common.random_tree(seed, (T,)) for seed in (1, 2)]
    grads[1]["w"] = grads[1]["w"].at[1, 0, 0].set(jnp.nan)  # on one device: the task must be absent on all
    step = functools.partial(update, transforms, whole)
    states = init(transforms, params)
    expected = steps(jax.jit(step).lower(grads[0], states, params, losses).compile(), grads, states, params, losses)

    mesh = common.mesh()
    placed = common.place(mesh, params, common.SPECS)
    sharded = [common.place(mesh, task_grads, common.SPECS, (None,)) for task_grads in grads]
    states = init(transforms, placed)
    program = jax.jit(step).lower(sharded[0], states, placed, losses).compile()
    actual = steps(program, sharded, states, placed, losses)
    common.assert_close(actual, expected)
    for updates in actual[0][0].values():
        common.assert_sharded_like(updates, placed)
    common.assert_small_sums(program, 4 * T * T)

    # By hand, in shard_map. The draws of `graddrop` are each shard's own.
    by_hand = {name: (mtl.over_axes(tx, ("data", "model")), relaxed) for name, (tx, relaxed) in transforms.items()}
    specs = jax.tree.map(lambda leaf: getattr(leaf.sharding, "spec", P()), states)
    grad_specs = {name: P(None, *spec) for name, spec in common.SPECS.items()}
    in_shards = jax.shard_map(
        functools.partial(update, by_hand, of_shards),
        mesh=mesh,
        in_specs=(grad_specs, specs, common.SPECS, P()),
        out_specs=(dict.fromkeys(transforms, common.SPECS), specs),
    )
    program = jax.jit(in_shards).lower(sharded[0], states, placed, losses).compile()
    actual = steps(program, sharded, states, placed, losses)
    for tree in (*actual[0], *expected[0], actual[1], expected[1]):
        del tree["graddrop"]
    common.assert_close(actual, expected)
    common.assert_small_sums(program, 4 * T * T)


if __name__ == "__main__":
    with common.strict():
        main()
