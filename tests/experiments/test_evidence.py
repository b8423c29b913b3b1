import csv
import dataclasses
import pathlib
import re
import types

import jax
from matplotlib import figure
import numpy as np
import pytest

from optax_mtl.experiments import __main__ as command_line, _report, evidence
from optax_mtl.experiments.evidence import _runner, _study

SHOWN = pathlib.Path(__file__).parent.parent.parent / "docs" / "evidence"


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3


@pytest.fixture
def study(monkeypatch):
    """An experiment of two cells; `ran` has the names of those that were run, `broken` of those that fail."""
    made_up = types.ModuleType("made_up")
    ran, broken = [], set()

    def cell(config, name, value):
        def run(advance):
            if name in broken:
                raise KeyboardInterrupt
            ran.append(name)
            advance(1)
            return {"score": np.full(config.seeds, value)}

        return _study.Cell(name, run)

    def report(config, results):
        rows = [
            {"method": name, "seed": seed, "score": float(score)}
            for name, found in results.items()
            for seed, score in enumerate(found["score"])
        ]
        section = _report.Section(
            title="A claim",
            introduction="Somebody says so.",
            protocol=["Do nothing."],
            table=_report.Table(["method"], [["a"]]),
            legend="Nothing.",
            findings=["It is so."],
            pictures=[_report.Picture("dense.png", figure.Figure(figsize=(1, 1)), "Nothing to see.")],
            data={},
        )
        return _study.Report(section, rows, "It is so.")

    made_up.Config, made_up.QUICK, made_up.report = Config, Config(seeds=1), report
    made_up.protocol = lambda config: [f"{config.seeds} seeds."]
    made_up.cells = lambda config: [cell(config, "a: one", 1.0), cell(config, "a, two", 1 / 3)]
    monkeypatch.setattr(_runner, "module", lambda name: made_up)
    made_up.ran, made_up.broken = ran, broken
    return made_up


def run(out, **options):
    _runner.run(["dense"], out=out, command="optax-mtl experiment dense", **options)


def test_page_csv_and_picture_are_written(study, tmp_path, capsys):
    run(tmp_path)
    page = (tmp_path / "dense.md").read_text()
    assert page.startswith("# A claim\n\nSomebody says so.\n\n## What was found\n\n- It is so.")
    assert "optax-mtl experiment dense" in page
    assert f"jax {jax.__version__}" in page
    assert (tmp_path / "dense.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "dense.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[:1] + rows[-1:] == [
        {"method": "a: one", "seed": "0", "score": "1"},
        {"method": "a, two", "seed": "2", "score": "0.33333"},
    ]
    assert "It is so." in capsys.readouterr().out


def test_an_interrupted_run_goes_on_where_it_was(study, tmp_path):
    study.broken.add("a, two")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    study.broken.clear()
    run(tmp_path)
    assert study.ran == ["a: one", "a, two"]
    run(tmp_path)
    assert study.ran == ["a: one", "a, two"]
    run(tmp_path, fresh=True)
    assert study.ran == ["a: one", "a, two"] * 2


def test_runs_of_other_settings_are_not_mixed(study, tmp_path):
    run(tmp_path)
    with pytest.raises(_runner.OtherRunsError, match=r"'seeds': 3.*not.*'seeds': 4.*--fresh"):
        run(tmp_path, seeds=4)
    run(tmp_path, seeds=4, fresh=True)
    assert len((tmp_path / "dense.csv").read_text().splitlines()) == 1 + 2 * 4


def test_the_table_of_verdicts_keeps_what_was_found_before(study, tmp_path):
    _runner.run(["toy"], out=tmp_path, command="")
    _runner.run(["ial"], out=tmp_path, command="")
    table = (tmp_path / "verdicts.md").read_text().splitlines()
    assert [line.split("]")[0] for line in table[2:]] == ["| [ial", "| [toy"]
    assert all(line.endswith("| It is so. |") for line in table[2:])


def test_the_command_line_says_what_is_kept(study, tmp_path, capsys):
    command_line.main(["experiment", "dense", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        command_line.main(["experiment", "dense", "--seeds", "4", "--out", str(tmp_path)])
    assert "--fresh" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main(["experiment", "hydra"])
    assert "did you mean 'hydalearn'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", evidence.EXPERIMENTS)
def test_every_experiment_runs(name, tmp_path, promotion):
    module = evidence.module(name)
    cells = module.cells(module.Config())
    files = {_runner.file_name(cell) for cell in cells}
    assert len(files) == len(cells), "two cells would be kept in one file"
    _runner.run([name], out=tmp_path, command="", quick=True)
    page = (tmp_path / f"{name}.md").read_text()
    assert all(picture.exists() for picture in tmp_path.glob(f"{name}*.png"))
    assert list(tmp_path.glob(f"{name}*.png"))
    assert "## What was found\n\n- " in page
    assert "nan" not in page.lower().split()
    assert (tmp_path / "verdicts.md").read_text().count("\n") == 3


@pytest.mark.parametrize("name", evidence.EXPERIMENTS)
def test_what_every_experiment_has_found_is_in_the_repository(name):
    page = (SHOWN / f"{name}.md").read_text()
    assert "experiment all --out docs/evidence" in page
    for picture in re.findall(r"\]\(([\w-]+\.png)\)", page):
        assert (SHOWN / picture).stat().st_size < 400_000
    with (SHOWN / f"{name}.csv").open(newline="") as file:
        assert file.seek(0, 2) < 300_000, "a small CSV, please"
        file.seek(0)
        rows = list(csv.DictReader(file))
    if "seed" in rows[0]:
        assert len({row["seed"] for row in rows}) >= 10
    assert f"[{name}](./{name}.md)" in (SHOWN / "verdicts.md").read_text()
