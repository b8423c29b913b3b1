"""Checks that each run-time dependency is installed at exactly its declared lower bound.

The bound of another package can lift one of ours unnoticed; the declared one is then never tried.
"""

from importlib import metadata
import sys

from packaging.requirements import Requirement

wrong = []
for requirement in map(Requirement, metadata.requires("optax-mtl") or ()):
    if requirement.marker is None:  # those of an extra have one
        declared, found = str(requirement.specifier), metadata.version(requirement.name)
        print(f"  {requirement.name} {found}")
        if declared != f">={found}":
            wrong.append(f"{requirement.name}{declared} is declared, but {found} is installed")
sys.exit("\n".join(wrong) or None)
