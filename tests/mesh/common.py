"""What the programs of this folder share. Each is a process of its own, as devices are fixed when JAX starts."""

import contextlib
import re

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np

T = 3
SHAPES = {"w": (16, 24), "b": (128,), "layers": (2, 8, 16), "scale": (40,)}
# Over both axes, over one, layers over the other, and on every device: FSDP, tensor parallel, and neither.
SPECS = {"w": P("data", "model"), "b": P("model"), "layers": P(None, "data", None), "scale": P()}


def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def place(mesh, tree, specs, lead=()):
    """`tree` on the mesh, its leaves by `specs`, behind the axes of `lead`."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, P(*lead, *spec))), tree, specs)


def random_tree(seed, lead=()):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal((*lead, *shape)), jnp.float32) for name, shape in SHAPES.items()}


@contextlib.contextmanager
def strict():
    """As `conftest.py` has it; and XLA need not optimise what is compiled once and run twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def assert_close(actual, expected, rtol=1e-3):
    """Leaf by leaf, in norm: what rounds differently may be small where terms cancel."""

    def compare(path, a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        where = jax.tree_util.keystr(path)
        assert a.shape == b.shape, where
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b) + 1e-6, (where, a, b)

    jax.tree_util.tree_map_with_path(compare, actual, expected)


def assert_sharded_like(tree, params):
    for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), (leaf.sharding, param.sharding)


_KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (?P<result>.+?) (?P<kind>{_KINDS})(-start)?\(")


def collectives(compiled):
    """What crosses devices in a compiled program: for each tensor, the kind, its shape, and where it comes from."""
    found = []
    for line in compiled.as_text().splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            origin = re.search(r'op_name="([^"]*)"', line)
            for shape in re.findall(r"\w+\[([\d,]*)\]", match["result"]):
                sizes = tuple(int(n) for n in shape.split(",") if n)
                found.append((match["kind"], sizes, origin.group(1) if origin else "?"))
    return found


def size(shape):
    return int(np.prod(shape, dtype=int))


def assert_small_sums(compiled, largest):
    """Nothing crosses devices but sums of so many numbers at most."""
    found = collectives(compiled)
    assert found
    wrong = [one for one in found if one[0] != "all-reduce" or size(one[1]) > largest]
    assert not wrong, wrong
