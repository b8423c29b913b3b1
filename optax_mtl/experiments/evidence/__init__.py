"""Experiments that test the claims of the papers, one file each; `optax-mtl experiment NAME` runs one.

Each module has a `Config`, `protocol(config)`, `cells(config)` (what is trained) and `report(config, results)` (what it
shows). `_runner.py` runs the cells, keeps what they found, and writes the report.
"""

import importlib
from types import ModuleType

EXPERIMENTS = {  # name: the claim on trial
    "adaptive-weights": "weights in proportion to the losses serve hard tasks (Huq and Pervin), on images and on text",
    "ial": "impartial auxiliary learning keeps the primary task safe from wrong auxiliary labels (Li et al.)",
    "mao": "one adaptive step a task balances tasks in every layer, whatever their losses' scales (Hervella et al.)",
    "hydalearn": "weights chosen anew for every batch follow auxiliary tasks whose use drifts (Verboven et al.)",
    "cdtt": "tensioners on the central direction help where tasks conflict (Nakamura et al.)",
    "toy": "where every method ends in the plane of CAGrad's and Nash-MTL's two objectives",
    "dense": "segmentation, depth and surface normals from one small encoder-decoder",
}


def module(name: str) -> ModuleType:
    """The module of an experiment; imported late, as it needs the extra `experiments`."""
    return importlib.import_module(f"optax_mtl.experiments.evidence.{name.replace('-', '_')}")
