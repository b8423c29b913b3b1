"""Small exact solvers on `(T, T)` arrays: jit-, vmap- and scan-safe, on the device, finite.

All the problems here come down to a quadratic over the non-negative orthant whose support must be found. Block
principal pivoting (Kim & Park, "Fast nonnegative matrix factorization", SIAM J. Sci. Comput. 33, 2011) finds it in
a handful of `T x T` solves whatever `T` is, where Frank-Wolfe needs hundreds of steps for a few digits and is still
1e-2 away after a thousand on badly scaled gradients. Every Gramian is first brought to unit diagonal, so nothing
depends on the gradients' scale, common or each task's own.
"""

from collections.abc import Callable

import jax
from jax import lax, numpy as jnp

# Given the support (T,) bool: the point x that is stationary on it, and the gradient there; both (T,).
SolveOnSupport = Callable[[jax.Array], tuple[jax.Array, jax.Array]]

# support, violators, fewest violators so far, patience, least wrong x so far, its wrongness, rounds
Carry = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def cosines(gramian: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit-diagonal Gramian (cosine similarities) and norms; rows of zero gradients are zero.

    Args:
      gramian: `(T, T)`.

    Returns:
      `(C, n)`, `(T, T)` in [-1, 1] and `(T,)`.
    """
    norms = jnp.sqrt(jnp.diagonal(gramian))
    inverse = reciprocal(norms)
    unit = jnp.clip(scaled(gramian, inverse), -1, 1)
    return jnp.fill_diagonal(unit, (norms > 0).astype(unit.dtype), inplace=False), norms


def scaled(gramian: jax.Array, factors: jax.Array) -> jax.Array:
    """The Gramian of the gradients times `factors` `(T,)`."""
    return factors[:, None] * gramian * factors[None, :]


def reciprocal(x: jax.Array) -> jax.Array:
    """`1 / x`, and zero where `x` is zero."""
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def min_norm_point(gramian: jax.Array, allowed: jax.Array) -> jax.Array:
    """Convex weights of the point of least norm in the convex hull of the gradients.

    Solves `min_a a^T M a` over the simplex. A zero gradient is that point itself.

    Args:
      gramian: `(T, T)`, `M`.
      allowed: `(T,)` of bool; the others get weight zero.

    Returns:
      `(T,)`, non-negative, summing to one; all zero if no task is allowed.
    """
    unit, norms = cosines(gramian)
    zero = allowed & (norms == 0)
    # With r = 1 / n: a = r * u / sum(r * u) for the u >= 0 that minimises u^T (C + r r^T) u / 2 - r^T u.
    smallest = jnp.min(jnp.where(allowed & ~zero, norms, jnp.inf))
    r = jnp.where(allowed & ~zero, smallest * reciprocal(norms), 0)
    matrix = unit + jnp.outer(r, r)

    def solve(support: jax.Array) -> tuple[jax.Array, jax.Array]:
        (u,) = _solve_on(support, matrix, r)
        return u, matrix @ u - r

    allowed = allowed & ~zero
    u = _block_pivoting(solve, allowed, allowed)
    convex = jnp.where(jnp.any(zero), zero.astype(r.dtype), r * u)
    return convex * reciprocal(jnp.sum(convex))


def central_weights(gramian: jax.Array, allowed: jax.Array) -> jax.Array:
    """Convex weights, on the raw gradients, of the min-norm direction of the *unit* gradients.

    Args:
      gramian: `(T, T)`.
      allowed: `(T,)` of bool; the others, and zero gradients, get weight zero.

    Returns:
      `(T,)`, non-negative, summing to one; all zero if no gradient is left.
    """
    unit, norms = cosines(gramian)
    allowed = allowed & (norms > 0)
    smallest = jnp.min(jnp.where(allowed, norms, jnp.inf))
    weights = min_norm_point(unit, allowed) * jnp.where(allowed, smallest * reciprocal(norms), 0)
    return weights * reciprocal(jnp.sum(weights))


def worst_case_in_ball(gramian: jax.Array, centre: jax.Array, radius: jax.Array, allowed: jax.Array) -> jax.Array:
    """Coefficients `y` of the step `G^T y` from `d0 = G^T centre` that helps the worst task most.

    Solves `max_y min_i (M (centre + y))_i` subject to `y^T M y <= (radius |d0|)^2`, whose optimality conditions are
    `y >= 0`, `M (centre + y) >= level`, with equality where `y > 0`. On a known support the level is the root of a
    quadratic.

    Args:
      gramian: `(T, T)`, `M`.
      centre: `(T,)`.
      radius: scalar, relative to `|d0|`.
      allowed: `(T,)` of bool; the others, and zero gradients, neither count as a task nor get a coefficient.

    Returns:
      `(T,)`, non-negative.
    """
    unit, norms = cosines(gramian)
    allowed = allowed & (norms > 0)
    size = jnp.sqrt(jnp.maximum(centre @ gramian @ centre, 0))
    r = jnp.where(allowed, jnp.min(jnp.where(allowed, norms, jnp.inf)) * reciprocal(norms), 0)
    v = jnp.where(allowed, gramian @ centre * reciprocal(norms) * reciprocal(size), 0)  # cosines with d0
    # Where the least convex combination is zero but for rounding, no step helps all tasks: the best level is zero.
    least = jnp.where(r > 0, min_norm_point(gramian, allowed) * reciprocal(r), 0)
    stationary = least @ unit @ least < 2 * _ridge(unit)

    def solve(support: jax.Array) -> tuple[jax.Array, jax.Array]:
        worst = jnp.argmin(jnp.where(allowed, v * reciprocal(r), jnp.inf))
        support = jnp.where(jnp.any(support), support, jnp.arange(len(r)) == worst)
        p, q = _solve_on(support, unit, r, v)
        a, b, c = r @ p, r @ q, v @ q - radius**2
        level = (b + jnp.sqrt(jnp.maximum(b**2 - a * c, 0))) * reciprocal(a)
        level = jnp.where(stationary, jnp.minimum(level, 0), level)
        u = level * p - q
        return u, unit @ u + v - level * r

    u = _block_pivoting(solve, allowed, allowed)
    length = jnp.sqrt(jnp.maximum(u @ unit @ u, 0))
    u = u * jnp.minimum(1, radius * reciprocal(length))
    return size * u * reciprocal(norms)


def _solve_on(support: jax.Array, matrix: jax.Array, *vectors: jax.Array) -> list[jax.Array]:
    """Solves `matrix[S, S] x[S] = vector[S]` for each vector, zero outside the support `S`.

    A ridge at the level of rounding keeps dependent gradients from dividing by zero; one step of refinement takes its
    effect back wherever the matrix is regular.
    """
    kept = jnp.where(jnp.outer(support, support), matrix, 0)
    factors = jax.scipy.linalg.lu_factor(kept + jnp.diag(jnp.where(support, _ridge(matrix), 1)))
    right = jnp.where(support[:, None], jnp.stack(vectors, axis=1), 0)
    x = jax.scipy.linalg.lu_solve(factors, right)
    x = x + jax.scipy.linalg.lu_solve(factors, right - kept @ x)
    return list(jnp.where(support[:, None], x, 0).T)


def _ridge(matrix: jax.Array) -> float:
    return 2 * len(matrix) * float(jnp.finfo(matrix.dtype).eps)


def _block_pivoting(solve: SolveOnSupport, start: jax.Array, allowed: jax.Array) -> jax.Array:
    """Solution of the complementarity problem `x >= 0, gradient(x) >= 0, x * gradient(x) = 0`.

    Exchanges all violators at once while their number falls; when it has not for three rounds, exchanges only the
    last one, which is finite (Murty's rule). Should rounding make it cycle, the least wrong point seen is returned.

    Args:
      solve: the point and the gradient, given a support; see `SolveOnSupport`.
      start: `(T,)` of bool, the first support to try.
      allowed: `(T,)` of bool, False for variables fixed at zero.

    Returns:
      `x`, `(T,)`, non-negative.
    """
    num_tasks = start.shape[0]

    def try_support(support: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, gradient = solve(support)
        violation = jnp.where(allowed, jnp.maximum(-jnp.where(support, x, gradient), 0), 0)
        scale = jnp.maximum(1, jnp.max(jnp.abs(x)))
        return x, violation > 16 * jnp.finfo(x.dtype).eps * scale, jnp.max(violation) / scale

    def exchange(carry: Carry) -> Carry:
        support, bad, fewest, patience, best, least, rounds = carry
        count = jnp.sum(bad)
        patience = jnp.where(count < fewest, 3, patience - 1)
        last = jnp.arange(num_tasks) == num_tasks - 1 - jnp.argmax(bad[::-1])
        support = jnp.where(patience >= 0, support ^ bad, support ^ last)
        x, bad, wrongness = try_support(support)
        better = ~(wrongness >= least)
        best, least = jnp.where(better, x, best), jnp.where(better, wrongness, least)
        return support, bad, jnp.minimum(count, fewest), patience, best, least, rounds + 1

    def unsolved(carry: Carry) -> jax.Array:
        return jnp.any(carry[1]) & (carry[6] < 20 + 5 * num_tasks)

    x, bad, wrongness = try_support(start)
    carry = (start, bad, jnp.array(num_tasks + 1), jnp.array(3), x, wrongness, jnp.array(0))
    return jnp.maximum(lax.while_loop(unsolved, exchange, carry)[4], 0)
