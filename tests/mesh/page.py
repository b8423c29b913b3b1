"""Runs the examples of the section "On a mesh" of docs/scale.md, one after another."""

import pathlib
import re

import numpy as np

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "scale.md"
section = re.search(r"^## On a mesh$(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
namespace = {}
for block in re.findall(r"```python\n(.*?)```", section[1], flags=re.DOTALL):
    exec(compile(block, str(PAGE), "exec"), namespace)
assert np.all(np.isfinite(namespace["losses"]))
assert namespace["params"]["in"].sharding.is_equivalent_to(namespace["sharded"], 2)
