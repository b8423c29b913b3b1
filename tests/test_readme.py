"""Every Python block of the README and of the site's pages runs, in order, a page in one namespace."""

import pathlib
import re

from jax import numpy as jnp
import optax
import pytest

import optax_mtl as mtl
import problems

README = pathlib.Path(mtl.__file__).parent.parent / "README.md"
RELIABILITY = README.parent / "docs" / "reliability.md"
SPEED = README.parent / "docs" / "speed_and_memory.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_every_block_runs():
    namespace = {}
    with problems.relaxed_promotion():
        for block in BLOCKS:
            exec(compile(block, str(README), "exec"), namespace)
    assert namespace["losses"].shape == (2,)
    assert len(BLOCKS) >= 3


def test_the_blocks_about_microbatches_run():
    if not hasattr(optax, "microbatching"):
        pytest.skip("from optax 0.2.6 on")
    namespace = {}
    with problems.relaxed_promotion():
        for block in re.findall(r"```python\n(.*?)```", SPEED.read_text(), flags=re.DOTALL):
            exec(compile(block, str(SPEED), "exec"), namespace)
    assert namespace["task_grads"]["in"].shape == (2, 5, 7)


def test_the_blocks_about_reliability_run():
    namespace = {}
    with problems.relaxed_promotion():
        for block in re.findall(r"```python\n(.*?)```", RELIABILITY.read_text(), flags=re.DOTALL):
            exec(compile(block, str(RELIABILITY), "exec"), namespace)
    assert optax.tree.get(namespace["opt_state"], "task_weights").shape == (3,)


@pytest.mark.parametrize("page", ["index", "concepts", "getting_started", "migrating", "recipes"])
def test_the_blocks_of_a_page_run(page):
    path = SPEED.with_name(f"{page}.md")
    text = path.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    namespace = {}
    with problems.relaxed_promotion():
        for block in blocks:
            exec(compile(block, str(path), "exec"), namespace)
    if "losses" in namespace:
        assert jnp.all(jnp.isfinite(namespace["losses"]))


@pytest.mark.peers
def test_the_block_of_torchjd_runs():
    pytest.importorskip("torchjd", reason="pip install '.[peers]'")
    theirs, _ = re.findall(r"```py\n(.*?)```", SPEED.with_name("migrating.md").read_text(), flags=re.DOTALL)
    exec(compile(theirs, "migrating.md", "exec"), {})


def test_make_has_the_commands_it_names():
    makefile = (README.parent / "Makefile").read_text()
    named = set(re.findall(r"^make (\w+)", README.read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:notebooks|tests|optax_mtl)/[\w./]+)`", README.read_text())))
)
def test_the_files_it_names_exist(path):
    if path != "optax_mtl/methods/_mine.py":
        assert (README.parent / path).exists()
