"""Every row of the table in `rows.py`: our answers and those of the peers."""

import pathlib

from jax import numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl as mtl
from parity import comparisons, report, rows
from parity.records import at_most, close, mix, norm

ROOT = pathlib.Path(__file__).parents[2]
# What the peers were given, and further fields of an answer.
INPUTS = {"torchjd.pref", "torchjd.z", "torchjd.orders", "libmtl.orders", "libmtl.losses"}
DETAILS = (".grad",)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row), marks=pytest.mark.xdist_group(row.method)) for row in rows.ROWS]
)
def test_row(row):
    answers = row.answers()
    assert answers.compared.any()
    wrong = answers.compared & ~(answers.difference <= row.tolerance)
    assert not wrong.any(), f"{answers.name(wrong)}: {answers.difference[wrong]}"

    if answers.errors is not None:
        ours, theirs = answers.errors
        wrong = np.isfinite(theirs) & ~(ours <= row.exact)
        assert not wrong.any(), f"{answers.name(wrong)}: {ours[wrong]}, theirs {theirs[wrong]}"
        assert np.nanmax(ours) <= np.nanmax(theirs)


@pytest.mark.xdist_group("cagrad")
@pytest.mark.parametrize("c", [0.5, 0.9])
def test_cagrad_stays_in_the_ball(c):
    for cases in (comparisons.MATRICES, comparisons.STEPS):
        updates, _ = rows.cagrad(cases, c)
        centre = mix(rows.equal_weights(cases), cases.grads)
        at_most(norm(updates - centre), c * norm(centre) * (1 + 1e-10))


@pytest.mark.xdist_group("cagrad")
@pytest.mark.parametrize("c", [0.5, 0.9])
def test_why_torchjd_cagrad_returns_zero(c):
    """Its thresholds of 1e-4 fire: a combination of gradients is that small beside them, or they all are, squared."""
    cases = comparisons.MATRICES
    zero = ~cases(f"torchjd.CAGrad.c{c}").any(-1)
    assert set(cases.kind[zero]) == {"zero_row", "badly_scaled"}
    updates, shares = rows.cagrad(cases, c)
    trace = (cases.grads**2).sum((1, 2))
    small = (norm(mix(shares, cases.grads)) < 1e-4 * np.sqrt(trace)) | (trace < 1e-4)
    assert np.all(small | (cases.kind == "zero_row") | ~zero)
    assert np.all((rows.worst_case(cases, updates) > 0) | (cases.kind != "zero_row") | (trace == 0) | ~zero)


def test_gradnorm_steps_in_the_direction_of_libmtl():
    # From equal weights, the Jacobian only takes the mean off, as our renormalisation does: a step, after one at rest
    # like LibMTL's first, goes in the direction of LibMTL's.
    cases = comparisons.SHORT_RUNS
    optimizer = optax.sgd(lambda count: jnp.where(count == 1, 0.01, 0.0))
    weights = np.asarray(rows.learn(lambda: mtl.gradnorm(comparisons.MOST, optimizer=optimizer))[1].task_weights)
    np.testing.assert_allclose(weights[:, :2], np.repeat(cases.present[:, None], 2, axis=1), rtol=1e-14)
    step, gradient = weights[:, 2] - cases.present, cases("libmtl.GradNorm.grad")[:, 1]
    unit_step, unit_gradient = (each / np.maximum(norm(each), 1e-300)[:, None] for each in (step, gradient))
    close(unit_step, -unit_gradient, 1, 1e-10)


def test_everything_that_is_recorded_has_a_row():
    recorded = set().union(*(cases.fields for cases in comparisons.ALL))
    answers = {field for field in recorded if field.startswith(("torchjd.", "libmtl.", "conflictfree."))} - INPUTS
    answers = {field for field in answers if not field.endswith(DETAILS)}
    assert answers == {f"{row.peer.lower()}.{row.config}" for row in rows.ROWS if row.peer in report.PEERS}


def test_the_report_is_up_to_date():
    report_file = ROOT / "docs" / "parity.md"
    written = [line.split(" | ")[:3] for line in report_file.read_text().splitlines() if line.startswith("| `")]
    assert written == [line.split(" | ")[:3] for line in report.table(measured=False)], "run `make parity ARGS=--write`"
