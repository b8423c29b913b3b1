"""A fault of one XLA release, in what the batched ways of pulling tasks back are made of."""

import os
import warnings

import jax
import jaxlib.version

_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"


def set_flag() -> None:
    """Has the release that is wrong do right; for programs of our own, before their first computation."""
    flags = os.environ.get("XLA_FLAGS", "")
    if jaxlib.version.__version__ == "0.10.2" and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()


def batching_is_wrong() -> bool:
    """Whether a batch of pullbacks may come out wrong here.

    On CPUs, jaxlib 0.10.2 computes wrong numbers, without a word, for `jax.vmap` over the cotangents of a layer
    normalisation, `x * lax.rsqrt(mean(x**2))`, from some thousand rows on: all but the first of the batch. 0.10.1 does
    not, nor does it with the flag.
    """
    return (
        jaxlib.version.__version__ == "0.10.2"
        and jax.default_backend() == "cpu"
        and _FLAG.split("=")[0] not in os.environ.get("XLA_FLAGS", "")
    )


def warn_if_batching_is_wrong(name: str) -> None:
    """Warns that `name`, which pulls tasks back in a batch, may give wrong numbers, and says what to do."""
    if batching_is_wrong():
        warnings.warn(
            f"{name} pulls the tasks back in a batch, and jaxlib 0.10.2 gets batches of normalisation layers wrong on "
            f"CPUs. Set XLA_FLAGS={_FLAG} before Python starts, or install another release of jax.",
            UserWarning,
            stacklevel=4,
        )
