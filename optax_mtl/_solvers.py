"""Small exact solvers on `(T, T)` arrays: jit-, vmap- and scan-safe, on the device, finite.

All the problems here come down to a quadratic over the non-negative orthant whose support must be found. A monotone
active set (Lawson and Hanson, "Solving Least Squares Problems", 1974, ch. 23) finds it in one or two `T x T` solves
for gradients in general position and a few more for dependent ones. What was tried instead: Frank-Wolfe needs hundreds
of steps for a few digits and is still 1e-2 away after a thousand on badly scaled gradients; block principal pivoting is
as fast, but cycles on rank-deficient Gramians (2 % of cases at `T = 16`, rank 8). Every Gramian is first brought to
unit diagonal, so nothing depends on the gradients' scale, common or each task's own.
"""

from typing import NamedTuple

import jax
from jax import lax, numpy as jnp


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


def _relative_inverse(norms: jax.Array, allowed: jax.Array) -> jax.Array:
    """The least positive norm over each norm: `1 / n`, but in (0, 1]; zero for tasks that are not allowed or zero."""
    allowed = allowed & (norms > 0)
    least = jnp.min(norms, where=allowed, initial=jnp.finfo(norms.dtype).max)
    return jnp.where(allowed, least * reciprocal(norms), 0)


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
    r = _relative_inverse(norms, allowed)
    start = _Iterate.start(r > 0, r.dtype)
    u = _active_set(unit + jnp.outer(r, r), r, r > 0, start).x
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
    r = _relative_inverse(norms, allowed)
    weights = min_norm_point(unit, r > 0) * r
    return weights * reciprocal(jnp.sum(weights))


def spectrum(matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors of a Gramian, and its rank.

    Args:
      matrix: `(T, T)`, positive semi-definite.

    Returns:
      `(values, basis, kept)`: `(T,)`, ascending; `(T, T)`, in columns; and `(T,)` of bool, which eigenvalues are not
      zero but for rounding: those above the largest times the number of non-zero rows times the dtype's epsilon.
    """
    values, basis = jnp.linalg.eigh(matrix)
    rows = jnp.sum(jnp.diagonal(matrix) > 0).astype(values.dtype)
    return values, basis, values > rows * jnp.finfo(values.dtype).eps * values[-1]


def pseudo_solve(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """The least-squares solution of least norm, `A^+ b`, for a positive semi-definite `A`.

    Args:
      matrix: `(T, T)`, `A`; eigenvalues that are zero but for rounding (see `spectrum`) count as zero.
      vector: `(T,)`, `b`; so do its parts along an eigenvector.

    Returns:
      `(T,)`.
    """
    values, basis, kept = spectrum(matrix)
    parts = vector @ basis
    kept &= jnp.abs(parts) > len(vector) * jnp.finfo(parts.dtype).eps * jnp.max(jnp.abs(vector))
    return basis @ jnp.where(kept, parts / jnp.where(kept, values, 1), 0)


def impartial_weights(gramian: jax.Array, factors: jax.Array) -> jax.Array:
    """Weights of the combination of the gradients that has equal inner products with all of them at unit length.

    The weights `w` of `G^T w` solve `C (n w) = 1`, in the least-squares sense, up to a factor.

    Args:
      gramian: `(T, T)`; tasks with zero rows get weight zero.
      factors: `(T,)`, positive.

    Returns:
      `(T,)`, such that `sum(w / factors)` is one; all zero if that sum is zero but for rounding.
    """
    unit, norms = cosines(gramian)
    weights = pseudo_solve(unit, jnp.ones_like(norms)) * _relative_inverse(norms, norms > 0)
    terms = weights / factors
    total, size = jnp.sum(terms), jnp.sum(jnp.abs(terms))
    regular = jnp.abs(total) > 64 * len(norms) * jnp.finfo(norms.dtype).eps * size
    return jnp.where(regular, weights / jnp.where(regular, total, 1), 0)


def worst_case_in_ball(gramian: jax.Array, centre: jax.Array, radius: jax.Array, allowed: jax.Array) -> jax.Array:
    """Coefficients `y` of the step `G^T y` from `d0 = G^T centre` that helps the worst task most.

    Solves `max_y min_i (M (centre + y))_i` subject to `y^T M y <= (radius |d0|)^2`. At the optimum `y >= 0` and
    `M (centre + y) >= level`, with equality where `y > 0`: for a given level, a quadratic over the orthant; and the
    length of the step grows with the level. On a known support the level for a given length is the root of a quadratic
    equation: Newton steps, kept in a bracket, which end at the optimum as soon as they meet its support.

    Args:
      gramian: `(T, T)`, `M`.
      centre: `(T,)`.
      radius: scalar, relative to `|d0|`.
      allowed: `(T,)` of bool; the others, and zero gradients, neither count as a task nor get a coefficient.

    Returns:
      `(T,)`, non-negative.
    """
    unit, norms = cosines(gramian)
    r = _relative_inverse(norms, allowed)
    allowed = r > 0
    size = jnp.sqrt(jnp.maximum(centre @ gramian @ centre, 0))
    v = jnp.where(allowed, gramian @ centre * reciprocal(norms) * reciprocal(size), 0)  # cosines with d0

    # The least convex combination bounds the level from above (duality). Where it is zero but for rounding, the tasks
    # are at a Pareto-stationary point: no step helps them all, and the best level is zero.
    least = jnp.where(allowed, min_norm_point(gramian, allowed) * reciprocal(r), 0)
    square = least @ unit @ least
    bound = least @ v + radius * jnp.sqrt(jnp.maximum(square, 0))
    bound = jnp.where(square < 2 * _ridge(unit), jnp.minimum(bound, 0), bound)

    def solve(level: jax.Array, start: _Iterate) -> _Iterate:
        return _active_set(unit, level * r - v, allowed, start)

    def length(u: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum(u @ unit @ u, 0))

    def newton(search: _Search) -> _Search:
        p, q = _solve_on(search.at.support, unit, r, v)
        a, b, c = r @ p, r @ q, v @ q - radius**2
        root = (b + jnp.sqrt(jnp.maximum(b**2 - a * c, 0))) * reciprocal(a)
        level = jnp.where((root > search.low) & (root < search.high), root, (search.low + search.high) / 2)
        at = solve(level, search.at._replace(done=jnp.array(False), rounds=jnp.array(0)))
        long = length(at.x) > radius
        low, high = jnp.where(long, search.low, level), jnp.where(long, level, search.high)
        return _Search(at, low, high, search.rounds + 1)

    def unsolved(search: _Search) -> jax.Array:
        tolerance = 64 * jnp.finfo(unit.dtype).eps
        off = jnp.abs(length(search.at.x) - radius) > tolerance * radius
        apart = search.high - search.low > tolerance * jnp.maximum(jnp.abs(search.high), radius)
        return off & apart & (search.rounds < 60)

    at = solve(bound, _Iterate.start(allowed, r.dtype))
    lowest = jnp.min(v * reciprocal(r), where=allowed, initial=jnp.finfo(r.dtype).max)  # here the step has length zero
    fits = length(at.x) <= radius
    search = _Search(at, jnp.where(fits, bound, jnp.minimum(lowest, bound)), bound, jnp.array(0))
    u = lax.while_loop(unsolved, newton, search).at.x
    return size * u * jnp.minimum(1, radius * reciprocal(length(u))) * reciprocal(norms)


class _Iterate(NamedTuple):
    """Where an active set stands: a point `x >= 0`, zero outside its support."""

    x: jax.Array
    support: jax.Array
    done: jax.Array
    rounds: jax.Array

    @classmethod
    def start(cls, allowed: jax.Array, dtype: jnp.dtype) -> "_Iterate":
        """All that is allowed, evenly: in general position most of it stays."""
        return cls(allowed.astype(dtype) / len(allowed), allowed, jnp.array(False), jnp.array(0))


class _Search(NamedTuple):
    """Where the search for a level stands: the solution at the last level, and a bracket."""

    at: _Iterate
    low: jax.Array
    high: jax.Array
    rounds: jax.Array


def _active_set(matrix: jax.Array, linear: jax.Array, allowed: jax.Array, start: _Iterate) -> _Iterate:
    """Minimises `x^T A x / 2 - linear^T x` over `x >= 0`.

    Each round solves on the support. If the solution leaves the orthant, goes as far as the first bound it meets and
    takes what meets it out of the support; else lets in the variable that gains most, or ends. The objective falls in
    every round, so no support comes twice.

    Args:
      matrix: `(T, T)`, `A`, positive semi-definite with unit diagonal, or more.
      linear: `(T,)`.
      allowed: `(T,)` of bool, False for variables fixed at zero.
      start: a feasible point.

    Returns:
      The last iterate; its rounds are bounded, should rounding keep it from ending.
    """
    num_tasks = len(linear)

    def advance(at: _Iterate) -> _Iterate:
        (target,) = _solve_on(at.support, matrix, linear)
        blocked = at.support & (target <= 0)
        leaves = jnp.any(blocked)
        reach = jnp.where(blocked, at.x / jnp.where(blocked & (at.x > target), at.x - target, 1), jnp.inf)
        step = jnp.minimum(jnp.min(reach), 1)
        support = at.support & ~(blocked & (reach <= step))
        x = jnp.where(support, jnp.maximum(at.x + step * (target - at.x), 0), 0)

        gradient = jnp.where(allowed & ~support, matrix @ x - linear, jnp.inf)
        slack = 16 * jnp.finfo(x.dtype).eps * jnp.maximum(1, jnp.max(x))
        enters = ~leaves & (jnp.min(gradient) < -slack)
        support = support | (enters & (jnp.arange(num_tasks) == jnp.argmin(gradient)))
        return _Iterate(x, support, ~leaves & ~enters, at.rounds + 1)

    return lax.while_loop(lambda at: ~at.done & (at.rounds < 20 + 10 * num_tasks), advance, start)


def _ridge(matrix: jax.Array) -> float:
    return 2 * len(matrix) * float(jnp.finfo(matrix.dtype).eps)


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
