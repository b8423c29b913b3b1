"""Files == exports == rows of `cases.CASES` == rows of the README's table; and who may import whom."""

import ast
import inspect
import pathlib
import re

import pytest

import cases
import optax_mtl as mtl

ROOT = pathlib.Path(mtl.__file__).parent
README = ROOT.parent / "README.md"
FILES = sorted((ROOT / "methods").glob("_[a-z]*.py"))
METHODS = {path.stem.removeprefix("_") for path in FILES}

# A row's transformation and a learning rate: no row of their own.
ALIASES = {"adatask", "mao", "mtadam"}

# What a module of the package may import from it. One line a rule.
MAY_IMPORT = {
    "_base": set(),
    "_solvers": set(),
    "_xla": set(),
    "_deferred": {"_base"},
    "_shards": {"_base", "_deferred"},
    "_gramian": {"_base", "_deferred", "_shards"},
    "_split": {"_base"},
    "_oracles": {"_base", "_split", "_xla"},
    "_pullbacks": {"_base", "_deferred", "_gramian", "_oracles", "_split"},
    "_taps": {"_blocks", "_gramian"},
    "_kept": {"_base", "_blocks", "_gramian", "_oracles", "_pullbacks", "_shards", "_taps"},
    "_light": {"_base", "_kept", "_pullbacks", "_taps", "_xla"},
    "_features": {"_base", "_gramian", "_pullbacks", "_shards", "_split"},
    "_sketch": {"_base", "_gramian", "_pullbacks"},
    "_change_tasks": set(),
    "_checked": {"_base"},
    "_bundle": {"_base"},
    "_multi_steps": {"_base", "_combinators", "_deferred", "_gramian"},
    "_weighting": {"_base", "_deferred", "_gramian"},
    "_task_state": {"_base"},
    "_blocks": {"_base", "_deferred", "_gramian"},
    "_blockwise": {"_base", "_blocks", "_gramian", "_weighting"},
    "_geometry": {"_base", "_combinators", "_gramian", "_shards"},
    "_monitor": {"_base", "_blocks", "_gramian", "_shards", "_solvers"},
    "_combinators": {"_base", "_blocks", "_gramian", "_weighting"},
    "_mixing": {"_base", "_gramian", "_combinators", "_shards"},
    "_tracking": {"_base", "_gramian"},
    "_diagnostics": {"_base", "_gramian", "_solvers"},
    "methods": {
        "_base",
        "_gramian",
        "_shards",
        "_solvers",
        "_blockwise",
        "_combinators",
        "_weighting",
        "_mixing",
        "_task_state",
        "_tracking",
        "_oracles",
    },
}


def imported_modules(path):
    """Names of the modules of optax_mtl that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "optax_mtl":
            inner = node.module.split(".")[1:]
            yield from [".".join(inner)] if inner else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "optax_mtl")


@pytest.mark.parametrize("path", sorted(ROOT.glob("_[a-z]*.py")) + FILES, ids=lambda path: path.stem)
def test_imports_go_one_way(path):
    rule = "methods" if path.parent.name == "methods" else path.stem
    assert set(imported_modules(path)) <= MAY_IMPORT[rule]


def test_only_the_package_and_the_experiments_import_methods():
    for path in ROOT.rglob("*.py"):
        if "experiments" not in path.parts and path != ROOT / "__init__.py":
            assert not [name for name in imported_modules(path) if name.startswith("methods")], path
        if "experiments" not in path.parts:
            assert not [name for name in imported_modules(path) if name.startswith("experiments")], path


def test_every_file_has_its_factory_exported_and_a_row():
    rows = {case.method for case in cases.CASES}
    for method in METHODS:
        factory = method if hasattr(mtl, method) else f"scale_by_{method}"
        assert factory in mtl.__all__, f"methods/_{method}.py: export {factory} in optax_mtl/__init__.py"
        assert hasattr(mtl, factory)
        assert {method, f"scale_by_{method}"} & rows, f"{method}: add a row to tests/cases.py"


def test_every_factory_of_a_balancing_method_has_a_row():
    rows = {case.method for case in cases.CASES} | ALIASES
    for name in mtl.__all__:
        public = getattr(mtl, name)
        is_method = inspect.isfunction(public) and public.__module__.startswith("optax_mtl.methods")
        if is_method and "num_tasks" in inspect.signature(public).parameters:
            assert name in rows, f"{name}: add a row to tests/cases.py"


def test_the_readme_has_a_row_for_every_method():
    in_table = set(re.findall(r"^\| `(\w+)`", README.read_text(), flags=re.MULTILINE))
    factories = {case.method for case in cases.CASES} | ALIASES
    assert in_table == factories


def test_all_is_sorted_complete_and_documented():
    assert mtl.__all__ == sorted(mtl.__all__)
    for name in mtl.__all__:
        doc = inspect.getdoc(getattr(mtl, name))
        assert doc, name
    defined = {name for name in vars(mtl) if not name.startswith("_") and not inspect.ismodule(getattr(mtl, name))}
    assert defined == set(mtl.__all__)


@pytest.mark.parametrize("method", sorted({case.method for case in cases.CASES} | ALIASES))
def test_docstrings_have_every_section(method):
    doc = inspect.getdoc(getattr(mtl, method))
    sections = ["Args:", "Returns:", "Example:"]
    if method not in ("sum_tasks", "mean_tasks"):
        sections.append("References:")
    for section in sections:
        assert section in doc, section
    for parameter in inspect.signature(getattr(mtl, method)).parameters:
        assert re.search(rf"^  {parameter}: ", doc, flags=re.MULTILINE), parameter
