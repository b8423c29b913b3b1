"""Writes `docs/parity.md`: how far our answers are from those of other libraries.

Usage, in the folder of the tests: python -m parity.report [--write]
"""

import argparse
import pathlib
import sys

import numpy as np

import problems

PEERS = {
    "TorchJD": "[TorchJD](https://github.com/SimplexLab/TorchJD) 0.18.0",
    "LibMTL": "[LibMTL](https://github.com/median-research-group/LibMTL) at git `4336804`",
    "conflictfree": "[conflictfree](https://github.com/tum-pbs/ConFIG) 0.1.8, by the authors of ConFIG",
}
PATH = pathlib.Path(__file__).parents[2] / "docs" / "parity.md"
ROUNDING = 1e-12

HEAD = """\
# Agreement with other libraries

Written by `make parity ARGS=--write`; do not edit. `make test` holds every row to a tolerance.

The inputs and the answers of the peers are recorded, in float64: {peers}, and the authors' code of
[CDTT](https://github.com/tiemink/MTL_TaskTensioner). `tests/parity/golden/README.md` describes them: gradient matrices
of 1 to 10 tasks, in general position, conflicting, badly scaled (norms 1e-4 to 1e4), with duplicate, zero and nearly
parallel rows, of low rank, and Pareto-stationary; and runs of a few steps for methods that remember something.

- *compared*: answers that are compared, of those that are recorded. The last column says what is left out: most often
  what the peer did not solve, or where an epsilon that it adds counts.
- *largest difference*: relative, and the kind of case it occurs in. Up to {rounding:.0e} it is rounding.
- *from the optimum*: largest relative distance from the exact solution over all that is recorded, ours and the peer's,
  where the problem has one; or what the last column says.

| method | peer | recorded as | compared | largest difference | from the optimum: ours | theirs | how it is compared |
|---|---|---|---|---|---|---|---|
"""


def number(value):
    return f"< {ROUNDING:.0e}" if value <= ROUNDING else f"{value:.0e}"


def table(measured=True):
    """The lines of the table; without what is to be computed if not `measured`."""
    from parity import rows

    lines = []
    for row in sorted(rows.ROWS, key=lambda row: (row.method, list(PEERS).index(row.peer) if row.peer in PEERS else 9)):
        cells = [f"| `{row.method}`", row.peer, f"`{row.config}`"]
        if measured:
            answers = row.answers()
            difference = answers.difference
            cells += [f"{answers.compared.sum()} of {answers.recorded.sum()}"]
            worst = np.nanargmax(difference)
            kind = np.broadcast_to(answers.kind, difference.shape).flat[worst].replace("_", " ")
            largest = difference.flat[worst]
            cells += [number(largest) + (f" ({kind})" if largest > ROUNDING and kind != "run" else "")]
            cells += [number(np.nanmax(each)) for each in answers.errors] if answers.errors else ["", ""]
        lines.append(" | ".join([*cells, f"{row.note} |"]))
    return lines


def main():
    parser = argparse.ArgumentParser(prog="parity.report", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {PATH.name} too")
    arguments = parser.parse_args()
    with problems.enable_x64():
        text = HEAD.format(peers=", ".join(PEERS.values()), rounding=ROUNDING) + "\n".join(table()) + "\n"
    sys.stdout.write(text)
    if arguments.write:
        PATH.parent.mkdir(exist_ok=True)
        PATH.write_text(text)


if __name__ == "__main__":
    main()
