import pkgutil

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
from optax_mtl import methods
from optax_mtl.experiments import _registry
from optax_mtl.experiments.evidence import toy

pytestmark = pytest.mark.usefixtures("promotion")


def published(x, y, scale=1.0):
    """The objectives in float64, as the papers' programs have them, each in one line."""
    left = np.log(max(abs(0.5 * (-x - 7) - np.tanh(-y)), 5e-6)) + 6
    right = np.log(max(abs(0.5 * (-x + 3) + np.tanh(-y) + 2), 5e-6)) + 6
    above, below = max(np.tanh(0.5 * y), 0), max(np.tanh(-0.5 * y), 0)
    left_bowl = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    right_bowl = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    return np.array([left * above + left_bowl * below, right * above + right_bowl * below])


@pytest.mark.parametrize("point", [*toy.STARTS, (-5.1, 2.0), (5.2, 3.0), (1.0, -8.0)])
def test_the_objectives_are_the_published_ones_but_for_twenty(point):
    np.testing.assert_allclose(toy.objectives(jnp.float32(point)), published(*point) + 20, rtol=2e-5, atol=2e-5)


def test_the_start_on_the_axis_has_the_slopes_of_both_sides():
    slopes = jax.jacobian(toy.objectives)(jnp.zeros(2))
    valleys, bowls = np.log(3.5) + 6, (49 + 0.1 * 64) / 10 - 20  # the same for both losses
    np.testing.assert_allclose(slopes, [[0, 0.5 * (valleys - bowls)]] * 2, rtol=1e-5)


def test_nowhere_in_the_plane_are_both_losses_lower_than_on_the_front():
    front = jax.vmap(toy.objectives)(jnp.float32(toy.front(141)))
    axis = np.linspace(-11, 11, 221, dtype=np.float32)
    plane = jax.vmap(toy.objectives)(jnp.asarray(np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)))
    assert not (np.asarray(plane)[:, None] < np.asarray(front) - 1e-4).all(axis=2).any()
    assert np.min(plane) > 0  # as methods that take logarithms need
    gradients = jax.vmap(jax.jacobian(toy.objectives))(jnp.float32(toy.front(15)[1:-1]))
    shortest = jax.vmap(lambda g: mtl.mgda_weights(g @ g.T) @ g)(gradients)
    assert np.linalg.norm(shortest, axis=1).max() < 1e-4


def test_the_distance_to_the_front():
    front = toy.front(3)
    assert front[1] == pytest.approx([0, -8.3552], abs=1e-3)  # the authors draw it as a straight line at this height
    points = front[None] + np.array([0, 0.5])
    np.testing.assert_allclose(toy.distance_to_front(points), [[0.5, 0.5, 0.5]], atol=0.01)
    assert toy.distance_to_front(np.array([np.nan, 0.0])) == np.inf


def test_every_method_of_the_library_is_here_or_said_why_not():
    modules = {name.removeprefix("_") for _, name, _ in pkgutil.iter_modules(methods.__path__)}
    assert set(toy.Config().methods) == set(_registry.CATALOGUE)
    assert not set(toy.LEFT_OUT) & set(_registry.CATALOGUE)
    assert modules == set(_registry.CATALOGUE) | set(toy.LEFT_OUT)


def test_methods_with_a_random_key():
    assert [m for m in _registry.CATALOGUE if toy.is_random(m)] == ["rlw", "pcgrad", "gradvac", "graddrop"]


def path_to(*sides):
    """A method's path that ends at those places of the front, for each scale at one for all starts; None: elsewhere."""
    front = toy.front(201)
    ends = [np.zeros(2) if side is None else front[round(100 + 100 * side)] for side in sides]
    return toy.Ends(np.broadcast_to(np.stack(ends)[:, None, None, None], (2, 1, 5, 201, 2)))


def test_what_is_said_of_the_ends():
    ends = {"nash_mtl": path_to(0, 0.05), "mgda": path_to(-0.5, 0.5), "cagrad": path_to(0.6, 0.6)}
    ends["linear_scalarization"] = path_to(0, None)
    said = "\n".join(toy.findings(ends))
    assert "3 of 4 methods arrive at the front from all five starts, with either scale: nash_mtl, mgda, cagrad." in said
    assert "with the factor 1: nash_mtl, linear_scalarization; with the factor 0.1: nash_mtl." in said
    assert "2 end in the same places whatever the first loss is multiplied by (within 0.1): nash_mtl, cagrad." in said
    assert "Every method arrives in some run." in said
    assert (
        "linear_scalarization arrives from 5 of 5 (at +0.00) with the factor 1 and 0 of 5 with the factor 0.1." in said
    )
    assert toy.verdict(ends).startswith("3 of 4 methods arrive")
    assert ends["mgda"].cells(1) == ["5", "5", "+0.50", "0.50"]
    assert "After 35 % of the steps 35 of 40 runs are at the front, at the end 35. Of the others, 0 have moved" in said


def test_the_sum_slides_to_its_own_minimum_from_below_the_valleys_only():
    config = toy.Config(steps=2_500, learning_rate=1e-2, methods=("linear_scalarization",))
    (cell,) = toy.cells(config)
    found = toy.Ends(cell.run(lambda ticks: None)["path"])
    np.testing.assert_array_equal(found.path[0, 0, :, 0], np.float32(toy.STARTS))
    assert found.points[0, 0, 3:, 1].max() < -6  # those two begin in the bowls
    assert np.abs(found.side[0, 0, 3:]).max() < 0.02
    assert found.side[1, 0, 3] == pytest.approx(-9 / 11, abs=0.02)  # where a tenth of the first slope meets the second
    assert not found.arrived[0, 0, [0, 2]].any()  # in the valleys
