"""The notebooks run from the first cell to the last, and are stored with the outputs of a full run."""

import pathlib
import re
import sys

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 600_000
assert NOTEBOOKS, "no notebook found"

pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisInterpreter(AsyncKernelManager):
    """Whatever kernel the notebook asks for, it gets the interpreter that runs the tests."""

    kernel_spec = KernelSpec(**get_kernel_dict())


def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("OPTAX_MTL_FAST", "1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling is most of the time
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        timeout=300,
        # Python looks in the kernel's directory first: the package under test is this one, installed or not.
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    stderr = [out.text for cell in notebook.cells for out in cell.get("outputs", []) if out.get("name") == "stderr"]
    assert not stderr, f"{path.name} prints warnings: {stderr}"


def test_a_notebook_is_stored_tidily(path):
    text = path.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < MAX_BYTES, "fewer or smaller pictures, please: a diff of this file must stay bearable"
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not [cell.id for cell in notebook.cells if cell.metadata], "cells carry metadata (timings, editor state)"
    for folder in (str(ROOT), str(pathlib.Path.home()), sys.prefix, "/tmp/"):
        assert folder not in text, f"a path of somebody's machine: {folder}"


def test_a_notebook_is_stored_with_the_outputs_of_a_full_run(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run all cells, once, in order"
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures, "no picture is stored"
    # Every notebook prints its settings, so that it can be seen here that they were not those of a fast run.
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    seeds = re.search(r"(\d+) seeds of \d+ steps", printed)
    assert seeds, "the notebook does not print its settings: '... 10 seeds of 1000 steps'"
    assert int(seeds[1]) >= 5, f"stored after a fast run: {seeds[0]}"
