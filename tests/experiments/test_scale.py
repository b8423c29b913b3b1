"""What can be tested of the scale command without a compiler for TPUs; `test_tpu.py` has the rest."""

import importlib.util

import pytest

from optax_mtl.experiments import __main__ as command_line, _collectives, _scale, _tpu

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%gathers (p: f32[4,2]) -> f32[4,8] {
  ROOT %ag.1 = f32[4,8]{1,0:T(8,128)} all-gather(%p), channel_id=1, dimensions={1}
}

%window_condition (p.1: (bf16[8,2], bf16[8,2], u32[])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
  %p.1 = (bf16[8,2], bf16[8,2], u32[]) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%p.1), index=2
  ROOT %less = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%window_body (p.2: (bf16[8,2], bf16[8,2], u32[])) -> (bf16[8,2], bf16[8,2], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=2
  %start = (bf16[8,2]{1,0}, bf16[8,2]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=2
  %next = u32[]{:T(128)} add(%counter.2, %two)
  ROOT %result = (bf16[8,2], bf16[8,2], u32[]) tuple(%a, %done, %next)
}

%layer_condition (p.3: (s32[], f32[4,2])) -> pred[] {
  %layers = s32[]{:T(128)} constant(20)
  %i = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %less.1 = pred[]{:T(512)} compare(%i, %layers), direction=LT
}

%layer_body (p.4: (s32[], f32[4,2])) -> (s32[], f32[4,2]) {
  %one = s32[]{:T(128)} constant(1)
  %w = (bf16[8,2], bf16[8,2], u32[]) while(%init), condition=%window_condition, body=%window_body
  %f = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%gathers
  %i.1 = s32[]{:T(128)} add(%i.0, %one)
  ROOT %t = (s32[], f32[4,2]) tuple(%i.1, %x)
}

%unknown_condition (p.5: (s32[], f32[3])) -> pred[] {
  ROOT %found = pred[] get-tuple-element(%p.5), index=0
}

%unknown_body (p.6: (s32[], f32[3])) -> (s32[], f32[3]) {
  %many = (f32[3]{0}, f32[]) all-reduce(%u, %v), channel_id=3, to_apply=%add
}

ENTRY %main (a: f32[4,2]) -> f32[4,2] {
  %loop = (s32[], f32[4,2]) while(%start.1), condition=%layer_condition, body=%layer_body
  %search = (s32[], f32[3]) while(%start.2), condition=%unknown_condition, body=%unknown_body
  %again = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%gathers
}
"""


def test_collectives_count_as_often_as_their_loops_run():
    assert _collectives.by_kind(_collectives.collectives(PROGRAM)) == {
        "all-gather": {"count": 21, "bytes": 21 * 4 * 8 * 4},
        "all-reduce": {"count": 1, "bytes": 16},
        "collective-permute": {"count": 20 * 4, "bytes": 20 * 4 * 8 * 2 * 2},
    }


def test_without_libtpu_the_extra_is_named(capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name))
    with pytest.raises(SystemExit) as stop:
        command_line.main(["scale"])
    assert stop.value.code == 2
    assert 'pip install "optax-mtl[tpu-aot]"' in capsys.readouterr().err


def test_a_number_of_chips_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["scale", "--chips", "3"])
    assert "wanted one of 1, 4, 8, 16" in capsys.readouterr().err


def test_the_command_line_and_the_module_know_the_same_ways():
    assert command_line.SCALE_WAYS == _scale.WAYS
    assert set(_tpu.TOPOLOGIES) >= {1, 16, 256}


def test_tables_of_what_fits_and_what_does_not():
    kinds = {"all-gather": {"count": 1234, "bytes": 5 * 10**9}}
    parts = {"argument_bytes": 10**9, "output_bytes": 0, "temporary_bytes": 2 * 10**9, "total_bytes": 3 * 10**9}
    fits = {"way": "light", "chips": 16, **parts, "fits": True, "collectives": kinds, "compile_seconds": 41.6}
    nothing = dict.fromkeys(parts) | {"total_bytes": 50 * 10**9}
    not_ = {"way": "exact", "chips": 1, **nothing, "fits": False, "collectives": None, "compile_seconds": 3.0}
    memory, sent = (table.markdown() for table in _scale.tables([fits, not_]))
    assert "| 16 chips, light | 1.00 | 0.00 | 2.00 | 3.00 | yes | 42 |" in memory
    assert "| 1 chip, exact | – | – | – | 50.00 | no | 3 |" in memory
    assert "| 16 chips, light | 1,234, 5.00 | 0 | 0 | 0 | 0 | 5.00 |" in sent
    assert "1 chip," not in sent
