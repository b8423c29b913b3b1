"""Small exact solvers on `(T, T)` arrays: jit-, vmap- and scan-safe, on the device, finite.

Each returns a solution and its residual, `()`: by how much it fails its optimality conditions, relative to the lengths
of the (scaled) gradients that make up the direction; a few times the precision of the dtype if all is well. Every
Gramian is first brought to unit diagonal, so nothing depends on the gradients' scale, common or each task's own.

Most problems here come down to a quadratic over the non-negative orthant whose support must be found. A monotone
active set (Lawson and Hanson, "Solving Least Squares Problems", 1974, ch. 23) finds it, with one `T x T` solve a round.
Rounds measured over the gradients of `tests/test_solvers.py`, of every kind: one or two for two tasks, at most 3 for
three, a median of 1 to 8 for 16 (nearly parallel gradients leave the support one by one: 16). What was tried instead:
Frank-Wolfe needs hundreds of steps for a few digits and is still 1e-2 away after a thousand on badly scaled gradients;
block principal pivoting is as fast, but cycles on rank-deficient Gramians (2 % of cases at `T = 16`, rank 8).

The equation `M w = p w^-e` has a smooth convex objective: Newton's method, with a step that is known to descend, and no
line search. It ends after one solve for two tasks, 3 to 7 in general position and up to 14 for norms over eight orders
of magnitude; the authors of Nash-MTL solve up to twenty convex programs for it.
"""

from collections.abc import Callable
import functools
from typing import Any, cast, NamedTuple, TypeVar

import jax
from jax import lax, numpy as jnp

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Takes matrix products with all digits of the dtype, on devices too that keep a few unless asked (TPU, TF32)."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return cast(Function, run)


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


def ratio(x: jax.Array, size: jax.Array) -> jax.Array:
    """`x / size`, and zero where both are zero, for a `size` that is not negative."""
    return x / jnp.maximum(size, jnp.finfo(size.dtype).tiny)


@full_precision
def norm_of(coefficients: jax.Array, unit: jax.Array) -> jax.Array:
    """The norm `()` of a combination of unit gradients with Gramian `unit`; zero where all cancels but for rounding."""
    square = coefficients @ unit @ coefficients
    rounding = 4 * len(unit) * jnp.finfo(unit.dtype).eps * jnp.sum(jnp.abs(coefficients)) ** 2
    return jnp.sqrt(jnp.where(square > rounding, square, 0))


@full_precision
def shortened(weights: jax.Array, gramian: jax.Array, max_norm: jax.typing.ArrayLike) -> jax.Array:
    """The weights, scaled down if the combination that they make is longer than `max_norm`."""
    unit, norms = cosines(gramian)
    length = jnp.sqrt(jnp.maximum((weights * norms) @ unit @ (weights * norms), 0))
    limit = jnp.asarray(max_norm, length.dtype)
    return weights * jnp.where(length > limit, limit / jnp.where(length > 0, length, 1), 1)


def _relative_inverse(norms: jax.Array, allowed: jax.Array) -> jax.Array:
    """The least positive norm over each norm: `1 / n`, but in (0, 1]; zero for tasks that are not allowed or zero."""
    allowed = allowed & (norms > 0)
    least = jnp.min(norms, where=allowed, initial=jnp.finfo(norms.dtype).max)
    return jnp.where(allowed, least * reciprocal(norms), 0)


Solution = tuple[jax.Array, jax.Array]  # and its residual


class Solved(NamedTuple):
    """State of a method that solves a small problem at every step, and remembers nothing else.

    Attributes:
      residual: () by how much the last solution fails its optimality conditions, relative; see `_solvers`.
    """

    residual: jax.Array

    @classmethod
    def init(cls, dtype: jnp.dtype, params: Any = None) -> "Solved":
        """Before the first step."""
        return cls(jnp.zeros((), dtype))


@full_precision
def min_norm_point(gramian: jax.Array, allowed: jax.Array) -> Solution:
    """Convex weights of the point of least norm in the convex hull of the gradients.

    Solves `min_a a^T M a` over the simplex. A zero gradient is that point itself.

    Args:
      gramian: `(T, T)`, `M`.
      allowed: `(T,)` of bool; the others get weight zero.

    Returns:
      `(T,)`, non-negative, summing to one, all zero if no task is allowed; and the residual.
    """
    unit, norms = cosines(gramian)
    zero = allowed & (norms == 0)
    # With r = 1 / n: a = r * u / sum(r * u) for the u >= 0 that minimises u^T (C + r r^T) u / 2 - r^T u.
    r = _relative_inverse(norms, allowed)
    start = _Iterate.start(r > 0, r.dtype)
    u = _active_set(unit + jnp.outer(r, r), r, r > 0, start).x
    # With sum(r * u) = 1, u^T C u is the least square, and no (C u)_i / r_i may be smaller.
    u = u * reciprocal(r @ u)
    products = unit @ u
    residual = jnp.where(jnp.any(zero), 0, _violation(products - r * (u @ products), u, r > 0))
    convex = jnp.where(jnp.any(zero), zero.astype(r.dtype), r * u)
    return convex * reciprocal(jnp.sum(convex)), residual * reciprocal(jnp.sum(u))


def central_weights(gramian: jax.Array, allowed: jax.Array) -> Solution:
    """Convex weights, on the raw gradients, of the min-norm direction of the *unit* gradients.

    Args:
      gramian: `(T, T)`.
      allowed: `(T,)` of bool; the others, and zero gradients, get weight zero.

    Returns:
      `(T,)`, non-negative, summing to one, all zero if no gradient is left; and the residual.
    """
    unit, norms = cosines(gramian)
    r = _relative_inverse(norms, allowed)
    weights, residual = min_norm_point(unit, r > 0)
    return weights * r * reciprocal(weights @ r), residual


@full_precision
def project_on_dual_cone(gramian: jax.Array, point: jax.Array, allowed: jax.Array) -> Solution:
    """Coefficients of the vector nearest to `G^T point` that conflicts with no gradient.

    Solves `min_v v^T M v` subject to `v >= point`: at the optimum `M v >= 0`, with equality where `v > point`.

    Args:
      gramian: `(T, T)`, `M`.
      point: `(T,)`, zero for tasks that are not allowed.
      allowed: `(T,)` of bool; the others, and zero gradients, put no constraint.

    Returns:
      `(T,)`, `v`; and the residual.
    """
    unit, norms = cosines(gramian)
    allowed = allowed & (norms > 0)
    lengths = jnp.where(allowed, norms, 0)
    largest = jnp.max(lengths * jnp.abs(point))
    at = lengths * point * reciprocal(largest)  # in terms of unit gradients, with a largest coefficient of one
    products = unit @ at
    start = _Iterate.start(allowed & (products < 0), unit.dtype)
    moved = _active_set(unit, -products, allowed, start._replace(x=jnp.zeros_like(at))).x
    residual = _violation(products + unit @ moved, moved, allowed) * reciprocal(jnp.sum(jnp.abs(at)) + jnp.sum(moved))
    return point + largest * moved * reciprocal(lengths), residual


@full_precision
def nonnegative_quadratic(matrix: jax.Array, linear: jax.Array, allowed: jax.Array) -> Solution:
    """The `x >= 0` that minimises `x^T A x / 2 - linear^T x`.

    Args:
      matrix: `(T, T)`, `A`, positive semi-definite.
      linear: `(T,)`.
      allowed: `(T,)` of bool, False for variables fixed at zero, as are those with a zero row.

    Returns:
      `(T,)`, `x`; and the residual, here relative to the linear term: it is not small if there is no minimum.
    """
    unit, norms = cosines(matrix)
    allowed = allowed & (norms > 0)
    wanted = jnp.where(allowed, linear * reciprocal(norms), 0)
    largest = jnp.max(jnp.abs(wanted))
    wanted = wanted * reciprocal(largest)
    start = _Iterate.start(allowed & (wanted > 0), unit.dtype)
    x = _active_set(unit, wanted, allowed, start._replace(x=jnp.zeros_like(wanted))).x
    return largest * x * reciprocal(norms), _violation(unit @ x - wanted, x, allowed)


@full_precision
def log_barrier_point(gramian: jax.Array, preference: jax.Array, exponent: jax.Array, allowed: jax.Array) -> Solution:
    """The positive weights with `M w = preference * w ** -exponent`: of Nash, and of all that is fair in some way.

    They minimise `w^T M w / 2 - sum_i p_i phi(w_i)`, where `phi` is the logarithm for `exponent = 1`, and is concave
    for all positive ones. Newton's steps are cut to a length at which the convexity of the barrier, which grows at most
    by a factor of `(1 - rho)^-(1 + exponent)` where the weights shrink by `rho`, still lets the objective fall.

    At a Pareto-stationary point there is no solution: the weights would grow for ever, their direction `G^T w`
    vanishing beside them. A ridge at the level of rounding ends that. The answer is defined as zero where `G^T w` is
    shorter than that level tells from zero: where a convex combination of the unit gradients is shorter than 1e-3, in
    float32.

    Args:
      gramian: `(T, T)`, `M`.
      preference: `(T,)`, positive for tasks that are allowed.
      exponent: scalar, positive.
      allowed: `(T,)` of bool; the others, and zero gradients, get weight zero.

    Returns:
      `(T,)`, positive, or all zero; and the residual.
    """
    unit, norms = cosines(gramian)
    r = _relative_inverse(norms, allowed & (preference > 0))
    allowed = r > 0
    dtype, precision = unit.dtype, jnp.finfo(unit.dtype).eps
    exponent = jnp.asarray(exponent, dtype)

    # The weights of the unit gradients, x = n w, meet C x = q x^-e with q = p n^(e - 1). Orthogonal gradients have
    # x = q^(1 / (1 + e)) = g, in terms of which it is C x = g (g / x)^e; here with a largest g of one. For a task that
    # is not allowed, the equation is x = 1 / x^e.
    log_q = jnp.log(jnp.where(allowed, preference, 1)) + (1 - exponent) * jnp.log(jnp.where(allowed, r, 1))
    log_g = jnp.where(allowed, log_q, -jnp.inf) / (1 + exponent)
    log_unit = jnp.where(jnp.any(allowed), jnp.max(log_g), 0)
    g = jnp.where(allowed, jnp.exp(log_g - log_unit), 1)
    pairs = jnp.where(jnp.outer(allowed, allowed), unit, 0)
    ridge = (4 + len(g) ** 0.5) * precision
    matrix = pairs + jnp.diag(jnp.where(allowed, ridge, 1))
    # Where others help a task enough, its own weight may be smaller than numbers are.
    floor = jnp.maximum(g * jnp.exp(-jnp.minimum(69 / exponent, 69)), jnp.finfo(dtype).tiny ** 0.75)

    def barrier(x: jax.Array) -> jax.Array:
        return g * (g / x) ** exponent

    def newton(at: _Newton) -> _Newton:
        x = at.x
        gradient = matrix @ x - barrier(x)
        factors = jax.scipy.linalg.cho_factor(matrix + jnp.diag(exponent * barrier(x) / x))
        free = (x > floor) | (gradient < 0)
        step = jnp.where(free, -jax.scipy.linalg.cho_solve(factors, gradient), 0)
        shrinks = jnp.max(jnp.maximum(-step / x, 0))
        # t = (1 - (1 + e rho)^(-1/e)) / rho, and its limit for a small rho
        kept = (1 + exponent * shrinks) ** (-1 / exponent)
        t = jnp.where(shrinks > 1e-3, (1 - kept) / jnp.where(shrinks > 0, shrinks, 1), 1 - (1 + exponent) / 2 * shrinks)
        settled = jnp.max(jnp.abs(step / x)) < 0.3 * precision**0.5
        solved = jnp.max(jnp.abs(jnp.where(free, gradient, 0))) < precision * jnp.sum(x)
        moved = jnp.maximum(jnp.maximum(x + t * step, kept * x), floor)
        return _Newton(moved, settled | solved, at.rounds + 1)

    # Exact for orthogonal gradients, then the best along that ray.
    along = g @ pairs @ g
    ray = jnp.sum(g**2, where=allowed) / jnp.where(along > 0, along, 1)
    first = jnp.where(allowed, g * jnp.where(along > 0, ray, 1) ** (1 / (1 + exponent)), 1)
    start = _Newton(jnp.maximum(first, floor), ~jnp.any(allowed), jnp.array(0))
    x = lax.while_loop(lambda at: ~at.done & (at.rounds < 100), newton, start).x

    gradient = pairs @ x - barrier(x)
    violation = jnp.where(allowed, jnp.where(x > floor, jnp.abs(gradient), jnp.maximum(-gradient, 0)), 0)
    total = jnp.sum(x, where=allowed)
    # What is not finite is no solution either, but says so in its residual.
    stationary = jnp.where(allowed, x, 0) @ pairs @ x <= 2 * ridge * total**2
    residual = jnp.where(stationary | ~jnp.any(allowed), 0, jnp.max(violation) / jnp.where(total > 0, total, 1))
    least = jnp.min(norms, where=allowed, initial=jnp.finfo(dtype).max)
    unscaled = jnp.exp(log_unit - 2 * jnp.log(least) / (1 + exponent))
    weights = jnp.where(allowed & ~stationary & (x > floor), x * r * unscaled, 0)
    return jnp.where(jnp.isfinite(residual), weights, 0), jnp.where(jnp.isfinite(residual), residual, jnp.inf)


@full_precision
def worst_case_in_ball(gramian: jax.Array, centre: jax.Array, radius: jax.Array, allowed: jax.Array) -> Solution:
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
      `(T,)`, non-negative; and the residual.
    """
    unit, norms = cosines(gramian)
    r = _relative_inverse(norms, allowed)
    allowed = r > 0
    size = jnp.sqrt(jnp.maximum(centre @ gramian @ centre, 0))
    v = jnp.where(allowed, gramian @ centre * reciprocal(norms) * reciprocal(size), 0)  # cosines with d0

    # The least convex combination bounds the level from above (duality). Where it is zero but for rounding, the tasks
    # are at a Pareto-stationary point: no step helps them all, and the best level is zero.
    convex, _ = min_norm_point(gramian, allowed)
    least = jnp.where(allowed, convex * reciprocal(r), 0)
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
        return _Search(at, level, low, high, search.rounds + 1)

    def unsolved(search: _Search) -> jax.Array:
        tolerance = 64 * jnp.finfo(unit.dtype).eps
        off = jnp.abs(length(search.at.x) - radius) > tolerance * radius
        apart = search.high - search.low > tolerance * jnp.maximum(jnp.abs(search.high), radius)
        return off & apart & (search.rounds < 60)

    at = solve(bound, _Iterate.start(allowed, r.dtype))
    lowest = jnp.min(v * reciprocal(r), where=allowed, initial=jnp.finfo(r.dtype).max)  # here the step has length zero
    fits = length(at.x) <= radius
    search = _Search(at, bound, jnp.where(fits, bound, jnp.minimum(lowest, bound)), bound, jnp.array(0))
    search = lax.while_loop(unsolved, newton, search)
    u, level = search.at.x, search.level
    # The step may be too long by what the search tolerates; too short it may be only where no level is higher.
    short = jnp.where(level < bound, radius - length(u), 0)
    violation = jnp.maximum(_violation(unit @ u + v - level * r, u, allowed), jnp.abs(short))
    u = u * jnp.minimum(1, radius * reciprocal(length(u)))
    residual = violation * reciprocal(jnp.maximum(jnp.sum(u), radius))
    return size * u * reciprocal(norms), jnp.where(jnp.any(allowed), residual, 0)


@full_precision
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


@full_precision
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


class _Newton(NamedTuple):
    """Where Newton's method stands."""

    x: jax.Array
    done: jax.Array
    rounds: jax.Array


class _Search(NamedTuple):
    """Where the search for a level stands: the solution at the last level, and a bracket."""

    at: _Iterate
    level: jax.Array
    low: jax.Array
    high: jax.Array
    rounds: jax.Array


def _active_set(matrix: jax.Array, linear: jax.Array, allowed: jax.Array, start: _Iterate) -> _Iterate:
    """Minimises `x^T A x / 2 - linear^T x` over `x >= 0`.

    Each round solves on the support. If the solution leaves the orthant, goes as far as the first bound it meets and
    takes what meets it out of the support; else lets in all variables that gain, or ends. Of those let in, some that
    are in the others' way go out again at once, and at least one stays, so that the objective falls: no support comes
    twice. Should rounding tell otherwise, none is let in again before the point has moved.

    Args:
      matrix: `(T, T)`, `A`, positive semi-definite with unit diagonal, or more.
      linear: `(T,)`.
      allowed: `(T,)` of bool, False for variables fixed at zero.
      start: a feasible point.

    Returns:
      The last iterate; its rounds are bounded, should rounding keep it from ending.
    """
    num_tasks = len(linear)

    precision = jnp.finfo(linear.dtype).eps

    def advance(carry: tuple[_Iterate, jax.Array]) -> tuple[_Iterate, jax.Array]:
        at, refused = carry
        (target,) = _solve_on(at.support, matrix, linear)
        blocked = at.support & (target <= 0)
        leaves = jnp.any(blocked)
        reach = jnp.where(blocked, at.x / jnp.where(blocked & (at.x > target), at.x - target, 1), jnp.inf)
        step = jnp.minimum(jnp.min(reach), 1)
        support = at.support & ~(blocked & (reach <= step))
        x = jnp.where(support, jnp.maximum(at.x + step * (target - at.x), 0), 0)
        moved = jnp.max(jnp.abs(x - at.x)) > 4 * precision * jnp.max(x)
        refused = ~moved & (refused | (at.support & ~support))

        slack = 16 * precision * jnp.maximum(1, jnp.max(x))
        enters = ~leaves & allowed & ~support & ~refused & (matrix @ x - linear < -slack)
        done = ~leaves & ~jnp.any(enters)
        return _Iterate(x, support | enters, done, at.rounds + 1), refused

    def unsolved(carry: tuple[_Iterate, jax.Array]) -> jax.Array:
        at, _ = carry
        return ~at.done & (at.rounds < 20 + 10 * num_tasks)

    last, _ = lax.while_loop(unsolved, advance, (start, jnp.zeros_like(allowed)))
    return last


def _violation(gradient: jax.Array, x: jax.Array, allowed: jax.Array) -> jax.Array:
    """The largest entry of the gradient of a minimum over `x >= 0` that ought to be zero, or not to be negative."""
    return jnp.max(jnp.where(allowed, jnp.where(x > 0, jnp.abs(gradient), jnp.maximum(-gradient, 0)), 0))


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


def min_norm_step(
    gramian: jax.Array,
    weights: jax.Array,
    allowed: jax.Array,
    *,
    gamma: jax.typing.ArrayLike,
    rho: jax.typing.ArrayLike,
) -> jax.Array:
    """One gradient step on `w^T (M + rho I) w / 2`, from the weights projected onto the simplex of the tasks allowed.

    Args:
      gramian: `(T, T)`, `M`; or a cross-Gramian, of which it need not be the mean.
      weights: `(T,)`, `w`.
      allowed: `(T,)` of bool.
      gamma: length of the step.
      rho: pull towards equal weights.

    Returns:
      `(T,)`, which need not be on the simplex.
    """
    weights = project_onto_simplex(weights, allowed)
    slope = gramian @ weights + jnp.asarray(rho, weights.dtype) * weights
    return weights - jnp.asarray(gamma, weights.dtype) * slope


def project_onto_simplex(point: jax.Array, allowed: jax.Array) -> jax.Array:
    """The nearest point of the simplex.

    Args:
      point: `(T,)`; infinite entries, from an overflow, are taken for very large ones.
      allowed: `(T,)` of bool; the others get weight zero.

    Returns:
      `(T,)`, non-negative, summing to one; all zero if no entry is allowed.
    """
    largest = jnp.finfo(point.dtype).max / 2
    point = jnp.clip(point, -largest, largest)
    # The threshold lies less than one below the largest entry. What is lower, and what is not allowed, ends at zero.
    point = point - jnp.max(point, where=allowed, initial=-largest)
    point = jnp.where(allowed, jnp.maximum(point, -1), -1)
    descending = jnp.sort(point)[::-1]
    ranks = jnp.arange(1, len(point) + 1).astype(point.dtype)
    threshold = jnp.max((jnp.cumsum(descending) - 1) / ranks)
    return jnp.where(allowed, jnp.maximum(point - threshold, 0), 0)
