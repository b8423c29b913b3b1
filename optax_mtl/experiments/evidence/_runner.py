"""Runs experiments cell by cell, keeps what each found, goes on where it was interrupted, and writes the report."""

from collections.abc import Sequence
import csv
import dataclasses
import json
import pathlib
import re
import time
from typing import Any

import numpy as np
import tqdm

from optax_mtl.experiments import _report
from optax_mtl.experiments.evidence import _study, EXPERIMENTS, module

_SECONDS = "seconds of the run"  # beside a cell's own arrays
_BAR = "{desc:44}|{bar}| {percentage:3.0f} % {elapsed}<{remaining}"


class OtherRunsError(Exception):
    """The folder holds runs of other settings or versions."""


def run(
    names: Sequence[str], *, out: pathlib.Path, command: str, fresh: bool = False, quick: bool = False, **options: Any
) -> None:
    """Runs experiments and writes, for each, a page, its pictures and a CSV file into `out`, and one table of all.

    What a cell has found is kept in `out/runs`; a cell that is there is not run again.

    Args:
      names: of the experiments.
      out: the folder.
      command: what was typed, for the pages.
      fresh: whether to forget what is kept.
      quick: whether to run with the module's `QUICK` settings, which show that all works and nothing else.
      **options: fields of the experiments' `Config`; those that are None or that one does not have are left out.

    Raises:
      OtherRunsError: if what is kept is of other settings or versions.
    """
    for name in names:
        study = module(name)
        fields = {field.name for field in dataclasses.fields(study.Config)}
        if unused := [f"--{key}" for key, value in options.items() if value is not None and key not in fields]:
            print(f"\n{name} has no {' and no '.join(unused)}.")
        config = study.QUICK if quick else study.Config()
        config = dataclasses.replace(config, **{k: v for k, v in options.items() if k in fields and v is not None})
        print(f"\n{name}: {EXPERIMENTS[name]}\n{_report.bullets(study.protocol(config), 100)}\n")
        results, seconds = _results(study.cells(config), out / "runs" / name, _stamp(config), fresh)
        report = study.report(config, results)
        print(report.section.text())
        _write(name, report, out, command, seconds)
        _write_verdict(name, report.verdict, out)
    print(f"\nPages, pictures and CSV files: {out}")


def file_name(cell: _study.Cell) -> str:
    """Where the runner keeps what a cell has found."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", cell.name).strip("-") + ".npz"


def _stamp(config: Any) -> dict[str, Any]:
    """What runs have to agree in to stand in one table."""
    return {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str)), "versions": _report.versions()}


def _results(
    cells: Sequence[_study.Cell], store: pathlib.Path, stamp: dict[str, Any], fresh: bool
) -> tuple[dict[str, dict[str, np.ndarray]], float]:
    """What every cell has found, now or before, and the seconds that took."""
    stamped = store / "stamp.json"
    if fresh:
        stamped.unlink(missing_ok=True)
    store.mkdir(parents=True, exist_ok=True)
    if stamped.exists() and (there := json.loads(stamped.read_text(encoding="utf-8"))) != stamp:
        differing = [f"{k}: {there[k]}, not {stamp[k]}" for k in stamp if there.get(k) != stamp[k]]
        raise OtherRunsError(
            f"{store} keeps runs of other settings or versions ({'; '.join(differing)}). Write --fresh to forget them, "
            "or name another folder with --out"
        )
    if not stamped.exists():
        for old in store.glob("*.npz"):  # to be forgotten, or of nobody knows what
            old.unlink()
        partial = stamped.with_suffix(".partial")
        partial.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
        partial.replace(stamped)
    results, seconds = {}, 0.0
    with tqdm.tqdm(total=sum(c.ticks for c in cells), bar_format=_BAR, disable=None, leave=False) as bar:
        for cell in cells:
            bar.set_description_str(cell.name[:44])
            path = store / file_name(cell)
            if path.exists():
                bar.update(cell.ticks)
            else:
                start = time.perf_counter()
                found: dict[str, Any] = dict(cell.run(lambda ticks: bar.update(ticks)))
                found[_SECONDS] = np.float64(time.perf_counter() - start)
                partial = path.with_suffix(".partial")  # so that a file that is there is whole
                with partial.open("wb") as file:
                    np.savez_compressed(file, **found)
                partial.replace(path)
            with np.load(path, allow_pickle=False) as kept:
                results[cell.name] = {key: kept[key] for key in kept.files if key != _SECONDS}
                seconds += float(kept[_SECONDS])
    return results, seconds


def _write(name: str, report: _study.Report, out: pathlib.Path, command: str, seconds: float) -> None:
    for picture in report.section.pictures:
        picture.figure.savefig(out / picture.name, dpi=picture.dots_per_inch)
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(report.rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in report.rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    used = ", ".join(f"{k} {v}" for k, v in _report.versions().items())
    made = f"Made by `{command}` in {seconds:.0f} seconds with {used}. "
    made += f"All numbers, seed by seed: [{name}.csv]({name}.csv)."
    page = f"{report.section.markdown(level=1)}\n\n{made}\n"
    (out / f"{name}.md").write_text(page, encoding="utf-8")


def _write_verdict(name: str, verdict: str, out: pathlib.Path) -> None:
    """Puts it into the table of all experiments of this folder, in their order; the others' rows stay."""
    table = out / "verdicts.md"
    lines = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    rows = {line.split("]")[0].removeprefix("| ["): line for line in lines if line.startswith("| [")}
    rows[name] = f"| [{name}](./{name}.md) | {EXPERIMENTS[name]} | {verdict} |"
    head = ["| experiment | on trial | found |", "| :-- | :-- | :-- |"]
    table.write_text("\n".join([*head, *(rows[n] for n in EXPERIMENTS if n in rows)]) + "\n", encoding="utf-8")
