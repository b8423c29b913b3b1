import functools
import json
import pathlib
import sys

import jax
from jax import numpy as jnp
import numpy as np
import pytest

import optax_mtl as mtl
from optax_mtl.experiments import __main__ as command_line, _speed, _speed_peers, _timing, _workloads

SIZES = {
    "mlp": {"inputs": 5, "widths": (6, 4), "batch": 3},
    "conv": {"side": 5, "widths": (3, 4), "batch": 2},
    "transformer": {"layers": 2, "width": 8, "length": 3, "batch": 2},
}
# A worker that knows no network, and is quick; of `krum` it knows nothing either.
FAKE = """
import json, sys
import numpy as np
print(json.dumps({"torch": "fake", "torchjd": "fake", "threads": int(sys.argv[1])}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    if command["do"] == "save":
        np.savez(command["arrays"], losses=[0.0])
    answer = {"seconds": 0.25} if command["do"] == "step" else {}
    print(json.dumps({"error": "never heard of it"} if command.get("method") == "krum" else answer), flush=True)
"""


@pytest.fixture(autouse=True)
def standard_ranks():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def small(monkeypatch):
    """Small networks, and few rounds."""
    workloads = {name: functools.partial(_workloads.WORKLOADS[name], **sizes) for name, sizes in SIZES.items()}
    monkeypatch.setattr(_workloads, "WORKLOADS", workloads)
    monkeypatch.setattr(_speed, "_QUICK_SECONDS", 0)
    monkeypatch.setattr(_speed, "_FEWEST_ROUNDS", 2)


@pytest.fixture
def fake_peers(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(FAKE, encoding="utf-8")
    monkeypatch.setattr(_speed_peers, "__file__", str(script))
    monkeypatch.setattr(_speed, "_difference", lambda *_: None)


def plan_of(monkeypatch, *cases):
    monkeypatch.setattr(_speed, "plan", lambda full, **choice: [_speed.Case(*case) for case in cases])


@pytest.mark.usefixtures("small", "fake_peers")
def test_speed_leaves_tables_and_numbers(capsys, monkeypatch, tmp_path):
    plan_of(
        monkeypatch,
        ("mlp", "light", 2, ["mean_tasks", "krum"]),
        ("mlp", "light", 4, ["mean_tasks", "krum"]),
        ("conv", "heavy", 2, ["graddrop"]),
    )
    command_line.main(["speed", "--out", str(tmp_path / "new")])
    said = capsys.readouterr().out
    written = (tmp_path / "new" / "speed.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "new" / "speed.json").read_text(encoding="utf-8"))

    for text in (said, written):
        assert "torchjd fake" in " ".join(text.split())  # lines are broken anywhere
        assert "krum, TorchJD: autogram" not in text
        assert "never heard of it" in text
        assert "TorchJD / ours: " in text
    assert "| T = 2 | T = 4 |" in written
    assert f"| {_speed_peers.PLAIN} | 250.0 | 250.0 |" in written
    assert "| mean_tasks, exact |" in written
    assert "| krum, exact |" not in written.partition("Ratios")[0]  # it needs four tasks
    assert "| mlp, light heads, T = 4: krum |" in written
    assert f"speed --out {tmp_path / 'new'}" in written
    assert "Measured on cpu " in said

    rows = {(row["workload"], row["tasks"], row["way"], row["method"]): row for row in results["steps"]}
    assert ("conv", 2, _speed.LIGHT, "graddrop") not in rows  # it is no weighting
    assert rows["conv", 2, _speed_peers.MTL_BACKWARD, "graddrop"]["milliseconds"] == 250
    assert ("conv", 2, _speed_peers.AUTOGRAM, "graddrop") not in rows  # it makes no weights
    assert {row["traces"] for row in rows.values() if "traces" in row} == {1}


@pytest.mark.usefixtures("small", "fake_peers")
def test_a_run_that_was_stopped_goes_on(capsys, monkeypatch, tmp_path):
    first, second = ("mlp", "light", 2, ["mean_tasks"]), ("mlp", "heavy", 2, ["mean_tasks"])
    plan_of(monkeypatch, first, ("no such network", "light", 2, ["mean_tasks"]))
    command = ["speed", "--out", str(tmp_path), "--resume"]
    with pytest.raises(KeyError, match="no such network"):
        command_line.main(command)
    before = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["steps"]
    assert {row["heads"] for row in before} == {"light"}

    plan_of(monkeypatch, first, second)
    command_line.main(command)
    after = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert after["steps"][: len(before)] == before  # the very times
    assert {row["heads"] for row in after["steps"]} == {"light", "heavy"}
    assert capsys.readouterr().out.count("mlp, light heads") >= 2  # in the tables, too

    after["machine"]["jax"] = "0.0.0"
    (tmp_path / "speed.json").write_text(json.dumps(after), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"measured with jax 0\.0\.0"):
        command_line.main(command)
    with pytest.raises(SystemExit):
        command_line.main(["speed", "--resume"])
    assert "--out DIR" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_speed_goes_without_peers_that_are_not_installed(capsys, monkeypatch, tmp_path):
    plan_of(monkeypatch, ("conv", "light", 2, ["mgda"]))
    script = tmp_path / "worker.py"
    script.write_text("""print('{"error": "No module named torchjd"}')""", encoding="utf-8")
    monkeypatch.setattr(_speed_peers, "__file__", str(script))
    command_line.main(["speed"])
    said = capsys.readouterr().out
    assert "No module named torchjd" in said
    assert "pip install 'optax-mtl[peers]'" in said
    assert "TorchJD / ours" not in said


def test_sections_by_themselves_are_tables_too(capsys, monkeypatch, tmp_path):
    measured = [
        ("measure_balancing", {"tasks": 2, "over_floor": 1.25, "read_milliseconds": 1.0, "multiply_milliseconds": 2.0}),
        ("measure_aggregation", {"torchjd_milliseconds": None, "times_faster": None}),
        ("measure_solvers", {"kind": "random", "tasks": 16, "microseconds": 3.0}),
        ("measure_tasks", {"tasks": 128, "microseconds": 5.0}),
        ("measure_compilation", {"tasks": 8, "seconds": 0.5, "blockwise_seconds": None}),
    ]
    for name, row in measured:
        row = {"method": "mgda", "milliseconds": 4.0, "state_over_gradients": 0.0, **row}
        monkeypatch.setattr(_speed._speed_alone, name, lambda full, progress, row=row, **_: [row])
    sections = ",".join(_speed.SECTIONS)
    command_line.main(["speed", "--sections", sections, "--out", str(tmp_path)])
    assert "The T x T part alone" in capsys.readouterr().out
    written = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert "| mgda | 2 | 4.00 | 1.00 | 2.00 | 1.25 | 0.00 |" in written
    assert "| mgda | 4.00 | – | – |" in written
    assert "| mgda | 8 | 0.50 | – |" in written
    assert json.loads((tmp_path / "speed.json").read_text(encoding="utf-8")).keys() >= set(_speed.SECTIONS)


def test_a_worker_that_dies_says_why(monkeypatch, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("raise SystemExit('out of memory')", encoding="utf-8")
    monkeypatch.setattr(_speed_peers, "__file__", str(script))
    with pytest.raises(_speed_peers.PeersError, match="exit status 1: out of memory"):
        _speed.Peers(sys.executable)


@pytest.mark.usefixtures("small")
def test_ways_that_do_something_else_are_left_out(monkeypatch):
    right = _speed.mtl.value_and_light_grads

    def wrong(loss_fn, **options):
        twice = lambda params, batch: jax.tree.map(lambda x: 2 * x, loss_fn(params, batch))
        return right(loss_fn if options else twice, recompute=False)

    monkeypatch.setattr(_speed.mtl, "value_and_light_grads", wrong)
    notes = []
    rows = _speed.measure(_speed.Case("conv", "light", 2, ["upgrad"]), None, 0, notes)
    ways = {row["way"] for row in rows}
    assert _speed.KEPT in ways
    assert _speed.LIGHT not in ways
    assert notes == [notes[0]]
    assert "light, upgrad: left out, as its losses differ by 1 from ours" in notes[0]


def test_difference_is_relative():
    wanted = {"losses": np.array([1.0, 2.0]), "trunk/w": np.array([300.0, 400.0])}
    assert _speed._difference(wanted, wanted) is None
    assert _speed._difference({**wanted, "trunk/w": np.array([301.0, 400.0])}, wanted) is None
    assert "gradients differ by 0.1" in _speed._difference({**wanted, "trunk/w": np.array([350.0, 400.0])}, wanted)
    assert "losses differ by nan" in _speed._difference({**wanted, "losses": np.array([np.nan, 2.0])}, wanted)


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--peers-python", "no/python"], "'no/python'"),
        (["--methods", "pcgard"], "'pcgrad'"),
        (["--workloads", "cnov"], "'conv'"),
        (["--tasks", "64"], "from 1 to 32"),
        (["--sections", "solver"], "'solvers'"),
    ],
)
def test_bad_arguments_get_a_hint(capsys, argv, hint):
    with pytest.raises(SystemExit):
        command_line.main(["speed", *argv])
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("name", SIZES)
def test_all_our_ways_make_the_same_gradients(name):
    workload = _workloads.WORKLOADS[name](3, heavy=name != "conv", **SIZES[name])
    found = {
        way: jax.jit(step)(workload.params, state, workload.batch)
        for (way, _), (step, state) in _speed.steps(workload, ["sum_tasks"]).items()
    }
    losses, grads, _ = found[_speed.PLAIN]
    for way in _speed.FLOORS:
        each_losses, each, _ = found[way]
        trunk = each["trunk"] if way == _speed.FLOORS[1] else mtl.stack_task_grads(each["trunk"])
        summed = jax.tree.map(lambda leaf: leaf.sum(0), trunk)
        found[way] = each_losses, {"trunk": summed, "heads": list(each["heads"])}, ()
    assert found.keys() >= {*_speed.EXACT_WAYS, _speed.UNSPLIT, _speed.FEATURES}
    for way, (way_losses, way_grads, _) in found.items():
        np.testing.assert_allclose(jnp.stack(way_losses), losses, rtol=1e-5, err_msg=way)
        assert jax.tree.structure(way_grads) == jax.tree.structure(grads)
        for ours, ordinary in zip(jax.tree.leaves(way_grads), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(ours, ordinary, atol=1e-4 * np.abs(ordinary).max(), err_msg=way)


@pytest.mark.parametrize("name", SIZES)
def test_tasks_conflict(name):
    workload = _workloads.WORKLOADS[name](2)
    floor, _ = _speed.steps(workload, [])[_speed.FLOORS[1], None]
    _, each, _ = jax.jit(floor)(workload.params, (), workload.batch)
    assert mtl.task_cosines(each["trunk"])[0, 1] < 0


def test_plan_is_what_was_asked_for():
    assert tuple(_workloads.WORKLOADS) == command_line.WORKLOADS
    full, quick = _speed.plan(True), _speed.plan(False)
    assert {case.num_tasks for case in full} == {2, 4, 8, 16, 32}
    assert [case for case in quick if case.workload != "mlp" and case not in full] == []
    assert any(set(case.methods) == set(_speed.METHODS) for case in full)
    chosen = _speed.plan(False, ["conv"], [3, 5], ["krum"])
    assert chosen == [_speed.Case("conv", "light", n, ["krum"]) for n in (3, 5)]


def test_every_method_of_the_plan_is_a_method_here_and_there():
    assert list(_speed.METHODS) == list(_speed_peers.PEERS)
    for case in (*_speed.plan(False), *_speed.plan(True)):
        assert case.workload in _workloads.WORKLOADS
        assert set(case.methods) <= set(_speed.METHODS)
    for name, options in _speed.METHODS.items():
        getattr(mtl, name)(4, **options)


def test_worker_does_not_import_jax():
    source = pathlib.Path(_speed_peers.__file__).read_text(encoding="utf-8")
    assert "optax_mtl" not in source
    assert "jax" not in source.lower().replace("nothing of jax", "")


def test_interleaved_takes_turns_and_counts_the_second_run():
    turns = []
    ways = {
        "array": lambda: turns.append("array"),
        "elsewhere": lambda: (turns.append("elsewhere"), _timing.Seconds(len(turns)))[1],
    }
    taken = _timing.interleaved(ways, 2)
    rounds = 2 + _timing.WARM_UP
    assert turns == ["array", "array", "elsewhere", "elsewhere"] * rounds
    assert taken["elsewhere"] == [4 * rounds - 4, 4 * rounds]
    assert len(taken["array"]) == 2


def test_a_program_says_what_it_costs():
    program = _timing.Program(lambda x: x @ x, jnp.ones((8, 8)))
    assert program(jnp.ones((8, 8))).shape == (8, 8)
    assert program.traces == 1
    program(jnp.ones((4, 4)))
    assert program.traces == 2
    assert program.costs()["flops"] == pytest.approx(2 * 8**3, rel=0.1)


@pytest.mark.peers
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", SIZES)
def test_peers_make_the_same_gradients(name):
    pytest.importorskip("torchjd", reason="pip install '.[peers]'")
    peers = _speed.Peers(sys.executable)
    notes = []
    try:
        rows = _speed.measure(_speed.Case(name, "heavy", 3, ["upgrad"]), peers, 0, notes)
    finally:
        peers.close()
    assert not notes
    assert {row["way"] for row in rows} >= {*_speed_peers.WAYS, _speed_peers.PLAIN}
