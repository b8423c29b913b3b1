"""TPUs to compile for, on a machine that has none."""

import importlib.metadata
import importlib.util
import os
from typing import Any

# v5e, by the number of chips, as libtpu names them. One chip is one of four.
TOPOLOGIES = {
    1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip

# On a machine without TPUs, libtpu would look for what these tell it.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # only who runs programs needs the chips for itself
}


def version() -> str:
    """That of libtpu."""
    return importlib.metadata.version("libtpu")


class MissingError(ImportError):
    """There is no compiler for TPUs."""


def devices(chips: int) -> list[Any]:
    """So many v5e chips that programs can be compiled for, and not run on.

    Args:
      chips: how many, one of `TOPOLOGIES`.

    Returns:
      The devices, for shardings of `jax.ShapeDtypeStruct`s that `jax.jit(...).lower` is given.

    Raises:
      MissingError: if libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise MissingError('libtpu, the compiler for TPUs, is not installed. Write: pip install "optax-mtl[tpu-aot]"')
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)

    from jax.experimental import topologies  # would ask for TPUs if imported before

    return list(topologies.get_topology_desc(f"v5e:{TOPOLOGIES[chips]}", platform="tpu").devices)[:chips]
