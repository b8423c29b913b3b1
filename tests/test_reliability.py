"""The same numbers in every process, no randomness but by a key, and nothing foreign is run."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest

import cases
import optax_mtl as mtl
import problems

PACKAGE = pathlib.Path(mtl.__file__).parent
TESTS = pathlib.Path(__file__).parent

RANDOM = [case for case in cases.CASES if "key" in case.kwargs]

# Every method that draws, some steps, and the sketches: a digest of all bits.
RUN = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import jax
jax.config.update("jax_disable_most_optimizations", True)
from jax import numpy as jnp
import numpy as np
import cases, optax_mtl as mtl, problems
digest = hashlib.sha256()
params = problems.params()
loss_fn = lambda params: problems.value_fn(3)(params)
oracle = jax.jit(lambda params, tx=mtl.upgrad(3): tx.update(
    mtl.value_and_sketched_grads(loss_fn, size=5)(params)[1], tx.init(params), params))
digest.update(problems.vector_of(oracle(params)[0]).tobytes())
for case in cases.CASES:
    if "key" in case.kwargs:
        tx = case.make(3)
        state, update = tx.init(params), jax.jit(tx.update)
        for k in range(3):
            updates, state = update(problems.tree_of(problems.gradients("conflicting", seed=k)), state, params)
            digest.update(problems.vector_of(updates).tobytes())
print(digest.hexdigest())
"""


def test_two_processes_draw_the_same():
    """Whatever the seed of Python's hashes: no order of a set decides which leaf or task gets which number."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RUN.format(tests=str(TESTS))],
            env=os.environ | {"PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    digests = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert len(digests[0].strip()) == 64
    assert digests[0] == digests[1]


def test_who_draws_has_a_key_and_no_method_has_one_of_its_own():
    """A random key enters by an argument, or is drawn from one that did: no seed is made up, and no clock is asked."""
    allowed = {
        ("_base.py", "key"),  # as_key: a key from the user's seed
        ("_sketch.py", "key"),  # the documented default of `value_and_sketched_grads`
    }
    for path, call in calls(path for path in sources() if "experiments" not in path.parts):
        name = ast.unparse(call.func)
        if name in ("jax.random.key", "jax.random.PRNGKey"):
            assert (path.name, name.rpartition(".")[2]) in allowed, f"{path}:{call.lineno}"
        assert not name.startswith(("np.random.", "numpy.random.", "random.", "time.", "os.urandom", "hash(")), path
    drawing = {path for path, call in calls(sources()) if ast.unparse(call.func).startswith("jax.random.")}
    methods = {path.stem.removeprefix("_") for path in drawing if path.parent.name == "methods"}
    assert methods == {case.method for case in RANDOM if "gradvac" not in case.method and "pcgrad" not in case.method}
    for case in RANDOM:
        assert "key" in inspect.signature(case.factory).parameters
        with pytest.raises((TypeError, ValueError), match="key"):
            case.factory(3, **{name: value for name, value in case.hyperparams(3).items() if name != "key"})


def test_a_seed_is_the_key_that_is_made_of_it():
    for case in RANDOM:
        first, same, other = (
            jax.random.key_data(optax.tree.get(make_with(case, key).init(problems.params()), "key"))
            for key in (7, jax.random.key(7), 8)
        )
        np.testing.assert_array_equal(first, same)
        assert not np.array_equal(first, other), str(case)


def make_with(case, key):
    return case.factory(3, **case.hyperparams(3) | {"key": key})


FORBIDDEN = {"eval", "exec", "compile", "__import__", "pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
DOWNLOADING = {"urllib", "requests", "http", "ftplib", "socket", "aiohttp", "httpx", "huggingface_hub"}


def test_nothing_foreign_is_run_or_fetched():
    """No pickle, eval or shell; a file is read as numbers only; and nothing in the package opens a connection."""
    for path in sources():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert name.split(".")[0] not in FORBIDDEN | DOWNLOADING | {"yaml"}, f"{path}:{node.lineno} {name}"
    for path, call in calls(sources()):
        name, where = ast.unparse(call.func), f"{path}:{call.lineno}"
        assert name not in FORBIDDEN, where
        assert name not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), where
        assert not name.startswith(("fetch_", "sklearn.datasets.fetch_")), where
        for keyword in call.keywords:
            value = ast.unparse(keyword.value)
            assert keyword.arg != "shell" or value == "False", where
            assert keyword.arg != "allow_pickle" or value == "False", where
            assert keyword.arg != "download" or value == "False", where


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def calls(paths):
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, node
