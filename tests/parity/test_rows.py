"""Every row of the table of `rows.py`."""

import pathlib

import numpy as np
import pytest

from parity import comparisons, report, rows

ROOT = pathlib.Path(__file__).parents[2]
# What the peers were given, and further fields of an answer.
INPUTS = {"torchjd.pref", "torchjd.z", "torchjd.orders", "libmtl.orders", "libmtl.losses"}
DETAILS = (".grad",)


@pytest.mark.parametrize("row", rows.ROWS, ids=str)
def test_row(row):
    answers = row.answers()
    assert answers.compared.any()
    wrong = answers.compared & ~(answers.difference <= row.tolerance)
    assert not wrong.any(), f"{answers.name(wrong)}: {answers.difference[wrong]}"

    if answers.errors is not None:
        ours, theirs = answers.errors
        wrong = np.isfinite(theirs) & ~(ours <= np.minimum(np.maximum(theirs, row.exact / 100), row.exact))
        assert not wrong.any(), f"{answers.name(wrong)}: {ours[wrong]}, theirs {theirs[wrong]}"


def test_everything_that_is_recorded_has_a_row():
    recorded = set().union(*(cases.fields for cases in comparisons.ALL))
    answers = {field for field in recorded if field.startswith(("torchjd.", "libmtl.", "conflictfree."))} - INPUTS
    answers = {field for field in answers if not field.endswith(DETAILS)}
    assert answers == {f"{row.peer.lower()}.{row.config}" for row in rows.ROWS if row.peer in report.PEERS}


def test_the_report_is_up_to_date():
    path = ROOT / "docs" / "parity.md"
    if not path.exists():
        pytest.skip("docs/ is not part of the sdist")
    written = [line.split(" | ")[:3] for line in path.read_text().splitlines() if line.startswith("| `")]
    assert written == [line.split(" | ")[:3] for line in report.table(measured=False)], "run `make parity ARGS=--write`"
