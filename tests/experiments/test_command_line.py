import importlib.util
import json

import jax
from jax import numpy as jnp
import pytest

from optax_mtl.experiments import __main__ as command_line, _compare, _leaves, _logic_gates, _multidigits, _registry

METHODS = ("linear_scalarization", "hydalearn", "mao")


def fail(capsys, *argv):
    """What the command says when it refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        command_line.main(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["compare", "--methods", "cdtt,pcgard"], "'pcgrad'"),
        (["compare", "--methods", "GradNorm"], "'gradnorm'"),
        (["compare", "--methods", "zzz"], "choose from linear_scalarization, "),
        (["compare", "--benchmark", "logicgates"], "'logic-gates'"),
        (["compare", "--benchmark", "multi_digits"], "'multidigits'"),
        (["compare", "--gates", "xro"], "'xor'"),
        (["compare", "--sedes", "3"], "--seeds"),
        (["compare", "--seeds", "0"], "a whole number from 1"),
        (["compare", "--learning-rate", "-1"], "a number above 0"),
        (["compare", "--methods", "grian"], "'grain'"),
        (["leaves", "--leaves", "1,none"], "a whole number from 1"),
        (["leafs"], "leaves"),
        (["data", "cifar10", "."], "'cifar100'"),
        (["data", "nyuv2", "/nowhere"], "nothing is downloaded"),
        (["compere"], "compare"),
        (["--metods", "mgda"], "--methods"),
    ],
)
def test_bad_names_get_the_nearest_right_one(capsys, argv, hint):
    assert hint in fail(capsys, *argv)


def test_list_names_every_method_and_benchmark(capsys):
    command_line.main(["compare", "--list"])
    said = capsys.readouterr().out
    command_line.main(["--list"])  # the one command need not be named
    assert capsys.readouterr().out == said
    assert [
        name for name in (*_registry.METHODS, *_registry.GROUPS, *command_line.BENCHMARKS) if f"  {name} " not in said
    ] == []


def test_help_states_the_true_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(["compare", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    digits, gates = _multidigits.Config(), _logic_gates.Config()
    assert f"multidigits {digits.seeds}, logic-gates {gates.seeds}" in said
    assert f"training steps (default: {digits.steps}); logic-gates: epochs at most (default: {gates.steps})" in said
    assert f"multidigits {digits.learning_rate:g} (Adam), logic-gates {gates.learning_rate:g} (SGD)" in said
    assert f"multidigits only (default: {digits.batch_size})" in said
    assert f"units in a hidden layer (default: {digits.width})" in said
    assert f"logic-gates only (default: {','.join(gates.gates)})" in said


def test_command_line_and_comparison_know_the_same_benchmarks():
    assert list(command_line.BENCHMARKS) == list(_compare._BENCHMARKS)


def test_missing_packages_are_named_with_the_extra_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flax" else object())
    assert 'flax not installed. Write: pip install "optax-mtl[experiments]"' in fail(capsys, "compare")


@pytest.mark.usefixtures("promotion")
def test_compare_leaves_a_whole_report(capsys, tmp_path):
    sizes = ["--seeds", "2", "--steps", "4", "--batch-size", "64", "--width", "8"]
    command_line.main(["compare", "--out", str(tmp_path), "--methods", ",".join(METHODS), *sizes])
    said = capsys.readouterr().out
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))

    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "logic-gates.png",
        *(
            f"multidigits-{kind}.png"
            for kind in ("gains", "accuracy", "weights", "cosines", "shares", "steps", "canvases")
        ),
    }
    assert [name for name in pictures if f"({name})" not in report] == []
    for text in (said, report):
        for method in (*METHODS, "single-task networks"):
            assert method in text
    assert f"compare --out {tmp_path}" in report
    assert "### Protocol" in report
    assert "on the whole" in report
    assert "explained, %" in report
    assert "optax-mtl" in results["versions"]
    assert len(results["MultiDigits"]["methods"]["hydalearn"]["delta_m"]) == 2
    assert results["Logic gates"]["epochs_to_learn"]["hydalearn"] == [None, None]


def test_a_group_stands_for_its_methods(monkeypatch, tmp_path):
    chosen = []
    monkeypatch.setattr(_compare, "compare", lambda benchmarks, *, methods, **_: chosen.extend(methods))
    command_line.main(["compare", "--methods", "rlw,grain,mao", "--out", str(tmp_path)])
    assert chosen == ["rlw", *_registry.GROUPS["grain"]]


def test_leaves_prints_costs_by_number_of_leaves(capsys, monkeypatch):
    def programs(num_leaves, size, num_tasks):
        leaves = [jnp.ones((num_tasks, size))] * num_leaves
        names = [_leaves.FLOOR, "another"][: 1 + (num_leaves < 3)]
        return {name: (jax.tree_util.Partial(jax.tree.map, jnp.negative), (leaves,)) for name in names}

    monkeypatch.setattr(_leaves, "programs", programs)
    command_line.main(["leaves", "--leaves", "1,3", "--size", "4", "--tasks", "2"])
    said = capsys.readouterr().out
    assert said.count(" | 1 | 3 |\n") == 4
    assert said.count(f"| {_leaves.FLOOR} | ") == 4
    assert said.count("| another | ") == said.count(" | – |") == 4


def test_leaves_stops_the_unrolled_way_in_time():
    numbers = (1, _leaves.UNROLLED_UNTIL + 1)
    assert [len(_leaves.programs(n, size=2, num_tasks=2)) for n in numbers] == [8, 7]
